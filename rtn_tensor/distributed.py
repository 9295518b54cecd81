"""The part of a weight that a rank holds, and what all ranks agree on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor import _torch

if torch.distributed.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard


def held(w: Any) -> Any:
    """What of `w` this rank holds: a DTensor's local tensor; a plain tensor itself."""
    return w.to_local() if torch.distributed.is_available() and isinstance(w, DTensor) else w


def as_part(part: Tensor, w: Any) -> Tensor:
    """`part`, which stands for what this rank holds of `w`: a DTensor where `w` is one."""
    if held(w) is w:
        return part
    return DTensor.from_local(
        part, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
    )


def place(w: Any) -> tuple[slice, ...]:
    """Where in `w` the part that this rank holds lies.

    Raises:
        NotImplementedError: it is several parts, as where tensor parallelism cuts each of two fused layers.
    """
    if held(w) is w:
        return tuple(slice(0, size) for size in w.shape)
    sizes = w.device_mesh.shape
    for axis, placement in enumerate(w.placements):
        # FSDP2 over tensor parallelism of the same dim, whose parts lie in one piece, is told by such a
        # placement, too.
        inner = math.prod(
            sizes[i]
            for i in range(axis + 1, len(sizes))
            if w.placements[i] == Shard(getattr(placement, "dim", None))
        )
        if (
            not placement.is_replicate()
            and type(placement) is not Shard
            and getattr(placement, "split_factor", None) != inner
        ):
            raise NotImplementedError(
                f"a weight that is placed as {placement} lies in several pieces; use the whole state dict"
            )
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
    kinds = [mesh.device_type for mesh in meshes if mesh is not None] or [
        w.device.type for w in model.parameters() if not w.is_meta
    ]
    return init_device_mesh(kinds[0] if kinds else "cpu", (torch.distributed.get_world_size(),))


def everywhere(ok: bool, ranks: Any) -> bool:
    """Whether `ok` is true on every rank of the mesh `ranks`, so that all of them raise, or none; None stands
    for this one alone."""
    if ranks is None:
        return ok
    flag = torch.tensor(float(ok), device=ranks.device_type)
    for group in ranks.get_all_groups():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
    return bool(flag)


@contextmanager
def together(ranks: Any, otherwise: str = "nothing was changed") -> Iterator[None]:
    """What raises here on one rank of the mesh `ranks` raises on all of them: none is left waiting for
    another."""
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
    found = {
        name or "the model": module
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule)
    }
    return {name: _torch.fsdp_runs(module) for name, module in found.items()}


def check_idle(model: nn.Module) -> None:
    """Raises ValueError where `fully_shard` has begun to run `model`: it keeps the parameters, and would
    ignore new ones."""
    if name := next((name for name, runs in fully_sharded(model).items() if runs), None):
        raise ValueError(
            f"{name} has run under fully_shard, which keeps its parameters; do this before the first forward "
            "pass, or copy_ fresh weights "
            "into the local tensors"
        )
