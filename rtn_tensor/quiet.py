"""Imports torchao without its start-up messages. `rtn_tensor` imports this first: later imports of torchao find it there.

On a CPU build of torch, torchao 0.18 logs each CUDA library it cannot load, and torch 2.13 a deprecation for each enum torchao registers;
neither concerns anyone who uses this library.
"""

import logging
from importlib.util import find_spec

_LOGGERS = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


for _logger in _LOGGERS:
    _logger.addFilter(_drop)
try:
    import torchao.quantization

    if find_spec("numpy") is not None:  # torch works without it; torchao's safetensors do not
        import torchao.prototype.safetensors.safetensors_support  # noqa: F401
finally:
    for _logger in _LOGGERS:
        _logger.removeFilter(_drop)
