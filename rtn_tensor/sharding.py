"""Quantized tensors among ranks: the collectives that DTensor, FSDP2 and checkpoints send them through, plane by plane."""

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from rtn_tensor.tensor import RTNQuantizedTensor, rebuilt

aten = torch.ops.aten
_op = RTNQuantizedTensor.implements


def _by_plane(func, args: tuple, kwargs: dict) -> list[Any]:
    """What `func` gives for each plane of the quantized tensors among its arguments."""
    return [
        func(*tree_map_only(RTNQuantizedTensor, lambda w, plane=plane: getattr(w, plane), args), **kwargs)
        for plane in RTNQuantizedTensor.tensor_data_names
    ]


if torch.distributed.is_available():
    c10d, functional = torch.ops.c10d, torch.ops._c10d_functional

    @_op([c10d.scatter_.default, c10d.broadcast_.default])
    def _(func, types, args, kwargs):
        """In place: the outputs' planes are what is filled. The caller waits for the last; so the others are waited for here."""
        *others, (_, work) = _by_plane(func, args, kwargs)
        for _, other in others:
            other.wait()
        return args[0], work

    _names = ("all_gather_into_tensor", "broadcast", "wait_tensor", "_wrap_tensor_autograd")

    @_op([getattr(functional, name).default for name in _names if hasattr(functional, name)])  # the last from torch 2.12 on
    def _(func, types, args, kwargs):
        w = args[0]
        w = rebuilt(w, w.qdata.contiguous(), w.scale.contiguous())  # some columns of a weight, say, which torch 2.11 does not gather
        return rebuilt(w, *_by_plane(func, (w, *args[1:]), kwargs))


@_op(aten.constant_pad_nd.default)
def _(func, types, args, kwargs):
    """Rows of zeros after the last, as DTensor pads the shards of ranks that have fewer."""
    w, pad, value = [*args, 0][:3]
    if w.transposed or any(pad[:2]) or value:
        raise NotImplementedError(f"{type(w).__name__} pads its rows with zeros only, not {list(pad)} with {value}")
    qdata, scale = _by_plane(func, args, kwargs)
    return rebuilt(w, qdata, scale)
