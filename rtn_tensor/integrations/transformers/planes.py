"""Weights as torchao's reader of safetensors makes them, by which transformers reads a quantized folder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import _torchao
from rtn_tensor.checkpoint.sources import check_attributes
from rtn_tensor.formats import FORMATS, check_format
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.tensor.callers import callers


def _from_planes(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None = None, **attributes: Any
) -> RTNQuantizedTensor:
    """A weight of a file, whose attributes nobody has looked at yet; `zero_point` is what its plane `zero` is
    called there.

    Raises:
        TypeError, ValueError: the planes are not those of a weight with such attributes, nor a rank's part of
            them; or those of a weight of another shape than the model's.
    """
    check_attributes(attributes)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        attributes["in_features"] = _columns_here(qdata, scale, attributes)
        return RTNQuantizedTensor(qdata, scale, zero=zero_point, **attributes)
    w = RTNQuantizedTensor(qdata, scale, zero=zero_point, **attributes)
    if (place := _place()) is not None and w.shape != (shape := place[1]):
        raise ValueError(
            f"{place[0]} has shape {tuple(w.shape)} in the file, and {tuple(shape)} in the model; give the "
            "config.json that belongs to these weights"
        )
    return w


def _place() -> tuple[str, torch.Size] | None:
    """The name and the shape of the model's weight that transformers reads one for, which it tells nobody and
    does not compare; None where torchao's reader is called by another."""
    for frame in callers():
        of_transformers = frame.f_globals.get("__name__") == "transformers.integrations.torchao"
        if of_transformers and frame.f_code.co_name == "convert":
            model, fqn = frame.f_locals["model"], frame.f_locals["full_layer_name"]
            return fqn, model.get_parameter(fqn).shape
    return None


def _columns_here(qdata: Tensor, scale: Tensor, attributes: Mapping[str, Any]) -> Any:
    """The columns of a rank's planes. transformers' tensor parallelism cuts each plane into as many parts,
    and gives the attributes of the whole.

    Raises:
        ValueError: a part of the one plane is not of the same columns as that of the other.
    """
    k, bits, group_size = (attributes[name] for name in ("in_features", "bits", "group_size"))
    check_format(bits, group_size, attributes["scale_method"])
    if type(k) is not int or not qdata.dim() or qdata.shape[-1] in (0, FORMATS[bits].row_bytes(k)):
        return k  # which the tensor checks
    columns = qdata.shape[-1] * 8 // bits
    fits = (
        FORMATS[bits].row_bytes(k) * 8 == k * bits
        and k % columns == 0
        and group_size != -1
        and columns % group_size == 0
    )
    if not fits or scale.shape[-1:] != (columns // group_size,):
        raise ValueError(
            f"a quantized weight of {k} columns cannot be cut into {columns} a rank, inside a group of "
            f"{group_size}; quantize with a "
            "group_size that divides the columns of a rank, or load on another number of ranks"
        )
    return columns


_torchao.read_from_safetensors(RTNQuantizedTensor, _from_planes)
