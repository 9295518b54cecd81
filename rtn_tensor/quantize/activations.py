"""`set_activations_`, by which a quantized model rounds its activations, or leaves them as they are."""

from torch import nn

from rtn_tensor._torch import local_part
from rtn_tensor.distributed import check_idle
from rtn_tensor.formats import check_activations, version_of
from rtn_tensor.integrations import on_quantized
from rtn_tensor.quantize.report import Report, report
from rtn_tensor.quantize.selection import check_module, tensors_of
from rtn_tensor.tensor import RTNQuantizedTensor


def set_activations_(model: nn.Module, activations: str | None) -> Report:
    """Has every quantized weight of `model` take its activations so, as `RTNConfig.activations` says; the
    planes stay as they are, and `save` writes it with them.

    Args:
        activations: "int8" or None.

    Returns:
        `report(model)`.

    Raises:
        TypeError: `model` is no module.
        ValueError: other activations, or no weight of the model is quantized.
    """
    check_module(model)
    check_activations(activations)
    check_idle(model)
    parts = [local_part(t) for _, _, _, t in tensors_of(model)]
    quantized = [part for part in parts if isinstance(part, RTNQuantizedTensor)]
    if not quantized:
        raise ValueError(
            f"no weight of the {type(model).__name__} is quantized, and activations={activations!r} is of "
            "products with quantized ones; quantize it first, as quantize_(model, "
            "rtn_int4(activations='int8')) does"
        )
    for w in quantized:
        w.activations = activations
        w.version = version_of(w.zero, w.float_dtype, activations)
    on_quantized(model)
    return report(model)
