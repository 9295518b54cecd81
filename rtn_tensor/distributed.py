"""Quantized tensors among ranks: the collectives that DTensor, FSDP2 and checkpoints send them through, plane by plane; and the part of a
weight that a rank holds."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor import _torch
from rtn_tensor.tensor.quantized import RTNQuantizedTensor, rebuilt

aten = torch.ops.aten
_op = RTNQuantizedTensor.implements


def _by_plane(func, args: tuple, kwargs: dict) -> list[Any]:
    """What `func` gives for each plane of the quantized tensors among its arguments."""
    return [
        func(*_torch.tree_map_only(RTNQuantizedTensor, lambda w, plane=plane: getattr(w, plane), args), **kwargs)
        for plane in RTNQuantizedTensor.tensor_data_names
    ]


if torch.distributed.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    _torch.hash_local_parts(RTNQuantizedTensor)

    c10d, functional = torch.ops.c10d, torch.ops._c10d_functional

    @_op([c10d.scatter_.default, c10d.broadcast_.default])
    def _(func, types, args, kwargs):
        """In place: the outputs' planes are what is filled. The caller waits for the last; so the others are waited for here."""
        if func is c10d.broadcast_.default and _sends_a_state_dict():
            raise NotImplementedError(
                f"broadcast_from_rank0 cannot send a {RTNQuantizedTensor.__name__}: torch makes float tensors for it on the other ranks; "
                "use rtn_tensor.load_from_rank0(model, state_dict)"
            )
        *others, (_, work) = _by_plane(func, args, kwargs)
        for _, other in others:
            other.wait()
        return args[0], work

    @_op([functional.all_gather_into_tensor.default, functional.broadcast.default])
    def _(func, types, args, kwargs):
        """Each plane is waited for before the next is sent: gloo corrupts the heap where two are gathered at once (torch 2.11 to 2.13)."""
        w = args[0]
        w = rebuilt(w, w.qdata.contiguous(), w.scale.contiguous())  # some columns of a weight, say, which torch 2.11 does not gather
        return rebuilt(w, *_by_plane(lambda *a, **k: functional.wait_tensor(func(*a, **k)), (w, *args[1:]), kwargs))

    @_op([functional.wait_tensor.default, functional._wrap_tensor_autograd.default])
    def _(func, types, args, kwargs):
        """What was gathered is there already; the second op would make planes that wait when they are first used, so perhaps never."""
        return args[0]


class _Bucket(Tensor):
    """Flat tensors end to end, quantized ones among them, as DistributedDataParallel joins what it broadcasts; each is sent by itself.

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
        raise NotImplementedError(f"parameters that were joined, some of them quantized, can be broadcast only, not go through {func}")


_cat = RTNQuantizedTensor._ATEN_OP_TABLE[RTNQuantizedTensor][aten.cat.default]


@_op(aten.cat.default)
def _(func, types, args, kwargs):
    flat = any(isinstance(t, RTNQuantizedTensor) and t._is_flat for t in args[0])
    return _Bucket(args[0]) if flat else _cat(func, types, args, kwargs)


@_op(aten.constant_pad_nd.default)
def _(func, types, args, kwargs):
    """Rows of zeros after the last, as DTensor pads the shards of ranks that have fewer."""
    w, pad, value = [*args, 0][:3]
    if w.transposed or any(pad[:2]) or value:
        raise NotImplementedError(f"{type(w).__name__} pads its rows with zeros only, not {list(pad)} with {value}")
    qdata, scale = _by_plane(func, args, kwargs)
    return rebuilt(w, qdata, scale)


def _sends_a_state_dict() -> bool:
    """Whether `set_model_state_dict(broadcast_from_rank0=True)` sends. Nothing but the stack tells, and its other ranks would abort."""
    frame = sys._getframe()
    while frame and frame.f_code.co_name != "_broadcast_state_dict":
        frame = frame.f_back
    return frame is not None


# ------------------------------------------------------------------------------------------- a rank's part


def held(w: Any) -> Any:
    """What of `w` this rank holds: a DTensor's local tensor; a plain tensor itself."""
    return w.to_local() if torch.distributed.is_available() and isinstance(w, DTensor) else w


def as_part(part: Tensor, w: Any) -> Tensor:
    """`part`, which stands for what this rank holds of `w`: a DTensor where `w` is one."""
    if held(w) is w:
        return part
    return DTensor.from_local(part, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride())


def place(w: Any) -> tuple[slice, ...]:
    """Where in `w` the part that this rank holds lies.

    Raises:
        NotImplementedError: it is several parts, as where tensor parallelism cuts each of two fused layers.
    """
    if held(w) is w:
        return tuple(slice(0, size) for size in w.shape)
    sizes = w.device_mesh.shape
    for axis, placement in enumerate(w.placements):
        # FSDP2 over tensor parallelism of the same dim, whose parts lie in one piece, is told by such a placement, too.
        inner = math.prod(sizes[i] for i in range(axis + 1, len(sizes)) if w.placements[i] == Shard(getattr(placement, "dim", None)))
        if not placement.is_replicate() and type(placement) is not Shard and getattr(placement, "split_factor", None) != inner:
            raise NotImplementedError(f"a weight that is placed as {placement} lies in several pieces; use the whole state dict")
    shape, offset = _torch.compute_local_shape_and_global_offset(w.shape, w.device_mesh, w.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def columns_a_rank(w: Any, dim: int) -> int:
    """The columns (along `dim`) that the first rank holds of `w`: what every cut is a multiple of."""
    size = w.shape[dim]
    if held(w) is not w:
        for axis, placement in enumerate(w.placements):
            if isinstance(placement, Shard) and placement.dim in (dim, dim % w.dim()):
                size = -(-size // w.device_mesh.size(axis))
    return size


def ranks_of(w: Any) -> Any:
    """The mesh of the ranks that hold a part of `w`, None of a plain tensor."""
    return None if held(w) is w else w.device_mesh


def all_ranks(model: nn.Module) -> Any:
    """The mesh of all ranks, on the kind of device that `model`'s parameters are shared over."""
    meshes = (ranks_of(w) for w in model.parameters())
    kinds = [mesh.device_type for mesh in meshes if mesh is not None] or [w.device.type for w in model.parameters() if not w.is_meta]
    return init_device_mesh(kinds[0] if kinds else "cpu", (torch.distributed.get_world_size(),))


def everywhere(ok: bool, ranks: Any) -> bool:
    """Whether `ok` is true on every rank of the mesh `ranks`, so that all of them raise, or none; None stands for this one alone."""
    if ranks is None:
        return ok
    flag = torch.tensor(float(ok), device=ranks.device_type)
    for group in ranks.get_all_groups():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
    return bool(flag)


@contextmanager
def together(ranks: Any, otherwise: str = "nothing was changed") -> Iterator[None]:
    """What raises here on one rank of the mesh `ranks` raises on all of them: none is left waiting for another."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not everywhere(failure is None, ranks):
        raise failure or RuntimeError(f"another rank failed here, and says why; {otherwise}")


def fully_sharded(model: Any) -> dict[str, bool]:
    """The modules of `model` that `fully_shard` made, by name, and whether each has begun to run."""
    if not torch.distributed.is_available():
        return {}
    found = {name or "the model": module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    return {name: _torch.fsdp_runs(module) for name, module in found.items()}


def check_idle(model: nn.Module) -> None:
    """Raises ValueError where `fully_shard` has begun to run `model`: it keeps the parameters, and would ignore new ones."""
    if name := next((name for name, runs in fully_sharded(model).items() if runs), None):
        raise ValueError(
            f"{name} has run under fully_shard, which keeps its parameters; do this before the first forward pass, or copy_ fresh weights "
            "into the local tensors"
        )
