"""Streaming: which part of a model each tensor of a checkpoint fills, and the filling, a few megabytes at a
time."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor.checkpoint.rows import Rows
from rtn_tensor.checkpoint.sources import Source
from rtn_tensor.config import RTNConfig
from rtn_tensor.distributed import as_part
from rtn_tensor.formats import FLOAT_DTYPES, GIVEN, GIVEN_ASYMMETRIC
from rtn_tensor.kernels import cpu
from rtn_tensor.quantize.report import untied_from
from rtn_tensor.quantize.targets import is_finite, too_large
from rtn_tensor.reference import widened
from rtn_tensor.tensor.attributes import ATTRIBUTES, user_attributes
from rtn_tensor.tensor.quantized import RTNQuantizedTensor

# Bytes of a tensor that are quantized at once, and fewer where quantizing copies them first: a transposed
# weight's are laid row by row, and plain torch takes ten times as much meanwhile, in fp32. Copies of 16 MiB
# left the heap of glibc in pieces: 75 MB beside a GPT-OSS, not 16.
CHUNK, SMALL_CHUNK = 16 << 20, 2 << 20


# ------------------------------------------------------------------------- what goes where


@dataclass(frozen=True)
class Piece:
    """A source, or a `part` of it, and the part of a parameter or buffer that it fills: all of it, an expert,
    some rows."""

    source: Source
    target: str
    index: tuple[int | slice, ...] = ()
    part: tuple[slice, ...] = ()

    def cut(self, t: Any, part: tuple[slice, ...]) -> Any:
        """The `part` of `t`, which the source holds."""
        try:
            return t[part]
        except ValueError as error:  # inside a group
            raise self.source.error(str(error).removeprefix(f"{self.source.name}: ")) from None

    @property
    def nbytes(self) -> int:
        return math.prod(_part(self.source.shape, self.part)) * self.source.dtype.itemsize


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def pieces_by_name(
    found: Mapping[str, Source], rename: Mapping[str, str], fuse: Mapping[str, Sequence[str]]
) -> list[Piece]:
    """Where `rename` and `fuse` say that each source goes."""
    pieces = []
    named: dict[str, Source] = {}
    for source in found.values():
        if (other := named.setdefault(name := _renamed(source.name, rename), source)) is not source:
            raise source.error(f"is renamed to {name}, and so is {other.name}; mend the rename map")
    part_of = {part: (whole, parts) for whole, parts in fuse.items() for part in parts}
    for name, source in named.items():
        path = name.split(".")
        here = next((i for i, module in enumerate(path) if module in part_of), None)
        if here is None:
            pieces.append(Piece(source, name))
            continue
        whole, parts = part_of[path[here]]
        siblings = [".".join([*path[:here], part, *path[here + 1 :]]) for part in parts]
        if missing := [sibling for sibling in siblings if sibling not in named]:
            raise source.error(
                f"is to be fused with {', '.join(missing)}, which the checkpoint lacks; mend the fuse map"
            )
        start = sum(named[sibling].shape[0] for sibling in siblings[: siblings.index(name)])
        target = ".".join([*path[:here], whole, *path[here + 1 :]])
        pieces.append(Piece(source, target, (slice(start, start + source.shape[0]),)))
    return pieces


def _part(shape: Sequence[int], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    """The shape of `t[index]`, for a tensor of `shape`."""
    return tuple(torch.empty(shape, device="meta")[index].shape)


def same(one: list[Piece], other: list[Piece], dtype: torch.dtype) -> bool:
    """Whether what a checkpoint has for two names of one tensor of `dtype` is the same."""
    if len(one) != len(other):
        return False
    by_index = [sorted(pieces, key=lambda piece: str(piece.index)) for pieces in (one, other)]
    return all(
        a.index == b.index and _equal(a.source, b.source, dtype) for a, b in zip(*by_index, strict=True)
    )


def _equal(one: Source, other: Source, dtype: torch.dtype) -> bool:
    if one.shape != other.shape or one.quantized != other.quantized:
        return False
    if one.rows is not None or other.rows is not None:
        kept = one.rows and one.rows.kept, other.rows and other.rows.kept
        return kept[0] == kept[1] and one.shape == other.shape and torch.equal(one.private(), other.private())
    a, b = one.view(), other.view()
    if isinstance(a, RTNQuantizedTensor) and isinstance(b, RTNQuantizedTensor):
        alike = a.planes.keys() == b.planes.keys() and all(
            getattr(a, name) == getattr(b, name) for name in ATTRIBUTES
        )
        return alike and all(torch.equal(plane, b.planes[name]) for name, plane in a.planes.items())
    # A file of torch.save has it once.
    if a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(a.to(dtype), b.to(dtype))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check(
    pieces: list[Piece], state: Mapping[str, Tensor], ignored: Sequence[str], strict: bool = True
) -> tuple[list[Piece], list[str]]:
    """The pieces that have a place, once each; and the names of the tensors that have none, and match none of
    `ignored`, which are none where `strict`. Every place must be filled.

    Raises:
        ValueError: it lists what does not fit.
    """
    problems: list[str] = []
    kept: list[Piece] = []
    left_out: list[Source] = []
    filled: dict[int, int] = defaultdict(int)
    taken: set[tuple] = set()
    misshapen: set[int] = set()
    for piece in pieces:
        source, to = piece.source, state.get(piece.target)
        if to is None:
            if not any(re.search(pattern, piece.target) for pattern in ignored):
                left_out.append(source)
            continue
        try:
            shape = _part(to.shape, piece.index)
        except (IndexError, ValueError):
            shape = None
        if shape != source.shape:
            got, allowed = (
                list(source.shape),
                list(to.shape) if not piece.index else f"a part of {list(to.shape)}",
            )
            problems.append(
                f"{source.file.name}: {source.name} has shape {got}, the model's {piece.target} {allowed}"
            )
            misshapen.add(id(to))
            continue
        place = id(to), str(piece.index)
        if place not in taken:  # of a weight that is shared, a file may hold one copy for each name
            taken.add(place)
            filled[id(to)] += math.prod(source.shape)
            kept.append(piece)
    lacking = {name: t for name, t in state.items() if filled[id(t)] < t.numel() and id(t) not in misshapen}
    problems += [f"the checkpoint lacks {name} {list(t.shape)}" for name, t in sorted(lacking.items())]
    if problems or (strict and left_out) or not kept:
        problems = [
            f"{source.file.name}: {source.name} has no place in the model" for source in left_out
        ] + problems
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            "the checkpoint does not fit the model, and nothing was loaded:\n  "
            + "\n  ".join(problems[:10])
            + more
        )
    return kept, [source.name for source in left_out]


def on_rank(piece: Piece, shape: Sequence[int], held: Sequence[slice]) -> Piece | None:
    """What a rank that holds the part `held` of the target, of `shape` in all, reads of `piece`, and where in
    that part it goes; None where it reads nothing."""
    index: list[int | slice] = []
    part: list[slice] = []
    for at, size, here in itertools.zip_longest(piece.index, shape, held):
        start, stop = (
            (0, size) if at is None else (at, at + 1) if isinstance(at, int) else (at.start, at.stop)
        )
        first, last = max(start, here.start), min(stop, here.stop)
        if first >= last:
            return None
        if isinstance(at, int):
            index.append(first - here.start)
        else:
            index.append(slice(first - here.start, last - here.start))
            part.append(slice(first - start, last - start))
    return replace(piece, index=tuple(index), part=tuple(part))


# ------------------------------------------------------------------------------- streaming


def _chunks(source: Any, to: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Rows of `source`, some bytes at a time, and where they go."""
    computed = isinstance(source, Rows)
    # Its groups lie along the columns of `source`; or its rows are computed one by one.
    turned = to.transposed if isinstance(to, RTNQuantizedTensor) else computed and source.transposed
    if turned:
        source, to = source.mT, to.mT
    if not (computed or isinstance(to, RTNQuantizedTensor)) and source.is_contiguous() and to.is_contiguous():
        # A convolution's weight is a matrix of one column, or three, for each pair of channels.
        source, to = (t.flatten(0, -2) if t.dim() > 2 else t for t in (source, to))
    if source.dim() > 2:
        for part, place in zip(source, to, strict=True):
            yield from _chunks(part, place)
    elif source.dim() == 0:
        yield source, to
    else:
        plain = not computed and to.is_cpu and cpu.isa() and source.stride(-1) == 1
        chunk = CHUNK if plain else SMALL_CHUNK
        rows = max(1, chunk // max(1, source[:1].nbytes))
        for start in range(0, source.shape[0], rows):
            yield source[start : start + rows], to[start : start + rows]


def check_finite(source: Source, t: Tensor) -> None:
    """Raises ValueError where `t`, of `source`, holds a NaN or inf."""
    if not is_finite(t):
        raise source.error("holds NaN or inf; the checkpoint is damaged, copy or download it again")


def _copy(piece: Piece, source: Any, to: Tensor) -> None:
    """Quantizes or converts rows into their place, and looks at them."""
    if isinstance(source, Rows):
        source = source.read()
    if isinstance(source, RTNQuantizedTensor):
        if isinstance(to, RTNQuantizedTensor) and (
            to.scale_method in (GIVEN, GIVEN_ASYMMETRIC) or _format(to) == _format(source)
        ):
            check_finite(piece.source, widened(source.scale))
            if to.zero is not None and source.zero is None:  # of a part that is symmetric
                source = with_zeros(source)
            to.copy_(source.to(to.device))
            return
        source = source.dequantize(torch.float32)
    if not to.is_floating_point():
        to.copy_(source)
        return
    if source.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise piece.source.error(f"is {source.dtype}; load takes {', '.join(map(str, FLOAT_DTYPES))}")
    rows = source.to(to.device, to.dtype)
    to.copy_(rows)
    if isinstance(to, RTNQuantizedTensor) and (why := too_large(rows, to.scale_method)):
        raise piece.source.error(why)
    # Where a group held a NaN or inf, its scale is NaN.
    check_finite(piece.source, widened(to.scale) if isinstance(to, RTNQuantizedTensor) else rows)


def _format(w: RTNQuantizedTensor) -> tuple:
    return w.bits, w.group_size, w.scale_method


def with_zeros(w: RTNQuantizedTensor) -> RTNQuantizedTensor:
    zero = torch.zeros_like(w.scale, dtype=torch.int8)
    return RTNQuantizedTensor(
        w.qdata, w.scale, w.bits, w.group_size, GIVEN_ASYMMETRIC, w.in_features, zero=zero
    )


@torch.no_grad()
def stream(
    pieces: list[Piece], destinations: Mapping[str, list[Tensor]], meter: Callable[[str, int], Any]
) -> None:
    """Fills `destinations`, by target, from the files."""
    # One after the other: what transformers computes from a file takes memory from here on.
    work = (
        (piece, *chunk)
        for piece in pieces
        for to in destinations[piece.target]
        for chunk in _chunks(piece.cut(piece.source.view(), piece.part), to[piece.index])
    )
    now = next(work, None)
    while now is not None:
        piece, rows, place = now
        now = next(work, None)
        # The disk reads on while this chunk is quantized. A thread of ours that read would take a core from
        # the quantizing.
        if now is not None:
            now[0].source.read_soon(now[1])
        _copy(piece, rows, place)
        meter(piece.target, rows.nbytes)


def put(
    places: list[tuple[str, nn.Module, str, Tensor]],
    new: Mapping[int, Mapping[RTNConfig | None, Tensor]],
    configs: Mapping[str, RTNConfig],
    fqns: Mapping[int, list[str]],
    apart: Mapping[str, list[str]],
) -> None:
    """Puts what `_read` gives in the places of the old tensors; `fqns`, by their ids: where each lies, and
    `apart`, where those are that it shared with before: to tell what was untied."""
    parameters: dict[int, Tensor] = {}
    for fqn, module, name, old in places:
        t = new[id(old)][configs.get(fqn)]
        if name in module._buffers:
            module._buffers[name] = as_part(t, old)
        else:
            if id(t) not in parameters:
                floats = [other for other in fqns.get(id(old), []) if other not in configs] + list(
                    apart.get(fqn, [])
                )
                if quantized := isinstance(t, RTNQuantizedTensor):
                    t.fqn = fqn  # for the errors of a later slice or product
                    if floats := floats or untied_from(old):
                        t.untied_from = floats
                parameter = nn.Parameter(as_part(t, old), requires_grad=old.requires_grad and not quantized)
                vars(parameter).update(user_attributes(old))
                parameters[id(t)] = parameter
            module._parameters[name] = parameters[id(t)]  # type: ignore[assignment]
