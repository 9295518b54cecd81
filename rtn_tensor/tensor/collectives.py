"""Collectives that DTensor, FSDP2, DistributedDataParallel and checkpoints send quantized tensors through,
plane by plane."""

from typing import Any

import torch
from torch import Tensor

from rtn_tensor import _torch
from rtn_tensor.tensor.callers import callers
from rtn_tensor.tensor.quantized import RTNQuantizedTensor, aten, by_plane, on_op, rebuilt
from rtn_tensor.tensor.views import join_op


def _by_plane(func, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What `func` gives for each plane of the quantized tensors among its arguments, which have the same."""
    w = next(t for t in _torch.tree_leaves(args) if isinstance(t, RTNQuantizedTensor))
    return {
        name: func(
            *_torch.tree_map_only(RTNQuantizedTensor, lambda w, name=name: w.planes[name], args), **kwargs
        )
        for name in w.planes
    }


if torch.distributed.is_available():
    _torch.hash_local_parts(RTNQuantizedTensor)

    c10d, functional = torch.ops.c10d, torch.ops._c10d_functional

    @on_op([c10d.scatter_.default, c10d.broadcast_.default])
    def scatter_or_broadcast_in_place(func, types, args, kwargs):
        """In place: the outputs' planes are what is filled. The caller waits for the last; so the others are
        waited for here."""
        if func is c10d.broadcast_.default and _sends_a_state_dict():
            raise NotImplementedError(
                f"broadcast_from_rank0 cannot send an {RTNQuantizedTensor.__name__}: torch makes float "
                "tensors for it on the other ranks; "
                "use rtn_tensor.load_from_rank0(model, state_dict)"
            )
        *others, (_, work) = _by_plane(func, args, kwargs).values()
        for _, other in others:
            other.wait()
        return args[0], work

    @on_op([functional.all_gather_into_tensor.default, functional.broadcast.default])
    def gather_or_broadcast(func, types, args, kwargs):
        """Each plane is waited for before the next is sent: gloo corrupts the heap where two are gathered at
        once (torch 2.11 to 2.13)."""
        # Some columns of a weight, say, which torch 2.11 does not gather.
        w = by_plane(args[0], Tensor.contiguous)
        return rebuilt(
            w, _by_plane(lambda *a, **k: functional.wait_tensor(func(*a, **k)), (w, *args[1:]), kwargs)
        )

    @on_op([functional.wait_tensor.default, functional._wrap_tensor_autograd.default])
    def already_there(func, types, args, kwargs):
        """What was gathered is there already; the second op would make planes that wait when they are first
        used, so perhaps never."""
        return args[0]


class _Bucket(Tensor):
    """Flat tensors end to end, quantized ones among them, as DistributedDataParallel joins what it
    broadcasts; each is sent by itself.

    Joined as floats they would be quantized anew where they arrive, to other numbers.
    """

    parts: list[Tensor]

    @staticmethod
    def __new__(cls, parts: list[Tensor]):
        size = sum(part.numel() for part in parts)
        new = _torch.wrapper(cls, (size,), dtype=parts[0].dtype, device=parts[0].device)
        new.parts = [part.contiguous() for part in parts]
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func is aten.slice.Tensor:
            bucket, _, start, end = args
            for part in bucket.parts:
                if start == 0 and end == part.numel():
                    return part.view(part.shape)
                start, end = start - part.numel(), end - part.numel()
        elif func is torch.ops.c10d.broadcast_.default:
            ([bucket], *rest), kwargs = args, kwargs or {}
            *others, last = bucket.parts
            for part in others:
                func([part], *rest, **kwargs)[1].wait()
            return args[0], func([last], *rest, **kwargs)[1]
        raise NotImplementedError(
            "parameters that were joined, some of them quantized, can be broadcast "
            f"only, not go through {func}"
        )


@on_op(aten.cat.default)
def cat_or_bucket(func, types, args, kwargs):
    flat = any(isinstance(t, RTNQuantizedTensor) and t._is_flat for t in args[0])
    return _Bucket(args[0]) if flat else join_op(func, types, args, kwargs)


@on_op(aten.constant_pad_nd.default)
def pad_rows(func, types, args, kwargs):
    """Rows of zeros after the last, as DTensor pads the shards of ranks that have fewer."""
    w, pad, value = [*args, 0][:3]
    if w.transposed or any(pad[:2]) or value:
        raise NotImplementedError(
            f"{type(w).__name__} pads its rows with zeros only, not {list(pad)} with {value}"
        )
    return rebuilt(w, _by_plane(func, args, kwargs))


def _sends_a_state_dict() -> bool:
    """Whether `set_model_state_dict(broadcast_from_rank0=True)` sends. Its other ranks would abort."""
    return any(frame.f_code.co_name == "_broadcast_state_dict" for frame in callers())
