"""What quantizing will make of a model, by its shapes alone."""

from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import format_of
from rtn_tensor.quantize.api import Exchange
from rtn_tensor.quantize.report import Report, report
from rtn_tensor.quantize.selection import FilterFn, Rules
from rtn_tensor.quantize.targets import targets_of
from rtn_tensor.tensor import RTNQuantizedTensor


def estimate(model: nn.Module, config: AOBaseConfig | Rules, filter_fn: FilterFn) -> Report:
    """The report that `quantize_` will give of a model like `model`, whose parameters are on the meta device;
    it is `model` that is changed.

    Raises:
        ValueError: as `quantize_`, but for what the values would show.
    """
    targets = targets_of(model, config, filter_fn)
    exchange = Exchange(model, targets)
    for target in targets:
        exchange.put(target, _of_shape)
    return report(model)


def _of_shape(w: Tensor, config: RTNConfig) -> RTNQuantizedTensor:
    return RTNQuantizedTensor.empty(*w.shape, **format_of(config), dtype=w.dtype, device="meta")
