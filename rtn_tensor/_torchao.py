"""All that this library does to torchao. `rtn_tensor` imports this first: torchao is imported here without
its start-up messages, and later imports of it find it there.

On a CPU build of torch, torchao 0.18 logs each CUDA library it cannot load, and torch 2.13 a deprecation for
each enum torchao registers; neither concerns anyone who uses this library.
"""

import functools
import logging
from collections.abc import Callable
from importlib.util import find_spec

from rtn_tensor import _torch

_LOGGERS = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


for _logger in _LOGGERS:
    _logger.addFilter(_drop)
# torch works without it; safetensors, and so what torchao has for them, do not.
HAS_NUMPY = find_spec("numpy") is not None
try:
    import torchao.quantization
    from torchao.core.config import ALLOWED_AO_MODULES
    from torchao.utils import TorchAOBaseTensor

    if HAS_NUMPY:
        import torchao.prototype.safetensors.safetensors_support
finally:
    for _logger in _LOGGERS:
        _logger.removeFilter(_drop)


# Of a frame that it gave up (a graph break in a loop, say) Dynamo compiles each function that it calls. On
# the one that finds our handlers Dynamo of torch 2.11 ends in an error of its own.
_torch.never_compile_alone(TorchAOBaseTensor.__torch_function__.__code__)

# torchao keeps its lists of classes to itself: none of them has a function to add one.


def allow_configs_of(module: str) -> None:
    """Has `config_from_dict` find the config classes of `module`."""
    ALLOWED_AO_MODULES.add(module)


def read_from_safetensors(kind: type, make: Callable) -> None:
    """Has torchao's reader and writer of safetensors take tensors of the class `kind`, which `make` makes of
    planes and attributes."""
    if HAS_NUMPY:
        from torchao.prototype.safetensors import safetensors_utils

        safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(kind.__name__)
        safetensors_utils.ALLOWED_CLASSES[kind.__name__] = make


def handle_fqn_configs(handler: Callable) -> None:
    """Has torchao's `quantize_` give each module, its name and an `FqnToConfig` to `handler`, with torchao's
    own function as `others=`."""
    quant_api = torchao.quantization.quant_api
    quant_api._fqn_to_config_handler = functools.partial(handler, others=quant_api._fqn_to_config_handler)
