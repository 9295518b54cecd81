"""`load_from_rank0` sends a whole state dict that only rank 0 has to the ranks that a model is sharded
over."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor.checkpoint.fill import Piece, check, on_rank, pieces_by_name, put, stream
from rtn_tensor.checkpoint.sources import Source, state_sources
from rtn_tensor.config import RTNConfig
from rtn_tensor.distributed import all_ranks, held, place, together
from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.integrations.transformers.models import ignored
from rtn_tensor.quantize.selection import tensors_of
from rtn_tensor.quantize.targets import is_finite
from rtn_tensor.reference import widened
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.wording import with_article


def _looked_through(state_dict: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of a state dict, on meta."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"rank 0 gave {with_article(type(state_dict).__name__)}; give it the state dict, the other "
            "ranks need none"
        )
    tensors = {name: t for name, t in state_dict.items() if isinstance(t, Tensor)}
    for name, t in tensors.items():
        if held(t) is not t:
            raise ValueError(
                f"{name} is a part of a tensor; give whole ones, as get_model_state_dict does "
                "with full_state_dict=True"
            )
        seen = widened(t.scale) if isinstance(t, RTNQuantizedTensor) else t
        if seen.dtype in (*FLOAT_DTYPES, torch.float64) and not is_finite(seen.detach()):
            raise ValueError(f"{name} holds NaN or inf; nothing was loaded")
    return {name: t.detach().to("meta") for name, t in tensors.items()}


def _kind(t: Tensor) -> str:
    if not isinstance(t, RTNQuantizedTensor):
        return "float"
    return (
        f"bits={t.bits}, group_size={t.group_size}, "
        f"scale_method={t.scale_method!r}{', transposed' if t.transposed else ''}, scales of {t.scale.dtype}"
    )


def load_from_rank0(model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> None:
    """Fills `model` on all ranks from a whole state dict that only rank 0 has, as
    `set_model_state_dict(broadcast_from_rank0=True)` does, which can send no quantized weights.

    One tensor at a time is beside the model. Of a quantized one its planes are sent, bit for bit; a float one
    goes as it is, and where the model's is quantized, each rank quantizes its own part. What has memory is
    filled where it lies, even in a model that has run; what is on meta gets memory. All ranks of the default
    process group call it.

    Args:
        model: sharded by `fully_shard`, `parallelize_module` or both, or not; its weights quantized as those
            of the state dict are (by `quantize_` on meta, say).
        state_dict: on rank 0; what is no tensor in it is not sent. That of other ranks is not looked at.

    Raises:
        TypeError, ValueError: on rank 0 there is no state dict; a tensor is missing, has no place, another
            shape, other bits, group_size or scale_method, is quantized and the model's is not, is cut inside
            a group, is a DTensor, or holds NaN or inf. All ranks raise, and `model` is unchanged.
        RuntimeError: there is no process group; or another rank failed. One that runs out of memory, say,
            leaves `model` filled in part.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            "load_from_rank0 needs a process group; call init_process_group, or in one "
            "process model.load_state_dict"
        )
    ranks, mine = all_ranks(model), state_dict if torch.distributed.get_rank() == 0 else None
    box: list[Any] = [None]
    with together(ranks):
        if torch.distributed.get_rank() == 0:
            box = [_looked_through(mine)]
    torch.distributed.broadcast_object_list(box, src=0)
    with together(ranks):
        # FSDP2 reshards meanwhile.
        state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        found = {source.name: source for source in state_sources(box[0], Path("rank 0's state_dict"))}
        pieces, _ = check(pieces_by_name(found, {}, {}), state, ignored(model))
        kinds = [
            (p.target, _kind(p.source.view()), _kind(held(state[p.target])))
            for p in pieces
            if p.source.quantized
        ]
        if unlike := [f"{name} has {got}, the model's has {own}" for name, got, own in kinds if got != own]:
            raise ValueError(
                "quantize_ the model as rank 0's state_dict is; nothing was loaded:\n  "
                + "\n  ".join(unlike[:10])
            )
        parts = [_part_here(piece, state[piece.target]) for piece in pieces]
    new: dict[int, dict[RTNConfig | None, Tensor]] = {}
    for piece, part in zip(pieces, parts, strict=True):
        old = state[piece.target]
        to = _receive(piece.source, mine, part, held(old), ranks)
        if old.is_meta:
            new[id(old)] = {None: to}
    put([place for place in tensors_of(model, buffers=True) if id(place[-1]) in new], new, {}, {}, {})


def _part_here(piece: Piece, to: Tensor) -> Piece | None:
    """What of `piece`, a whole tensor on meta, this rank puts into its part of `to`; None where that has no
    rows."""
    part = on_rank(piece, piece.source.shape, place(to))
    if part is not None:
        part.cut(part.source.view(), part.part)
    return part


def _receive(
    source: Source, mine: Mapping[str, Any] | None, part: Piece | None, to: Tensor, ranks: Any
) -> Tensor:
    """`to`, or memory in its stead, filled with the `part` of what rank 0 has as `mine`; `source` is a tensor
    of that, on meta."""
    with together(ranks, "the model may be filled in part"):
        if mine is None:
            whole = torch.empty_like(
                source.view(), device=ranks.device_type, memory_format=torch.contiguous_format
            )
        else:
            whole = mine[source.name].detach().to(ranks.device_type).contiguous()
        to = torch.empty_like(to, device=ranks.device_type) if to.is_meta else to
    torch.distributed.broadcast(whole, src=0)
    with together(ranks, "the model may be filled in part"):
        if part is not None:
            stream(
                [replace(part, source=replace(part.source, view=lambda: whole))],
                {part.target: [to]},
                lambda name, size: None,
            )
    return to
