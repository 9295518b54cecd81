"""Streaming: which part of a model each tensor of a checkpoint fills, and the filling, a few megabytes at a time."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.sources import Source
from rtn_tensor.tensor import FLOAT_DTYPES, RTNQuantizedTensor

CHUNK = 16 << 20  # bytes of a tensor that are read and quantized at once


# ------------------------------------------------------------------------------------------- what goes where


@dataclass(frozen=True)
class Piece:
    """A source, and the part of a parameter or buffer that it fills: all of it, an expert, some rows."""

    source: Source
    target: str
    index: tuple[int | slice, ...] = ()


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def pieces_by_name(found: Mapping[str, Source], rename: Mapping[str, str], fuse: Mapping[str, Sequence[str]]) -> list[Piece]:
    """Where `rename` and `fuse` say that each source goes."""
    pieces = []
    named = {_renamed(name, rename): source for name, source in found.items()}
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
            raise source.error(f"is to be fused with {', '.join(missing)}, which the checkpoint lacks; mend the fuse map")
        start = sum(named[sibling].shape[0] for sibling in siblings[: siblings.index(name)])
        target = ".".join([*path[:here], whole, *path[here + 1 :]])
        pieces.append(Piece(source, target, (slice(start, start + source.shape[0]),)))
    return pieces


def _part(shape: Sequence[int], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    """The shape of `t[index]`, for a tensor of `shape`."""
    return tuple(torch.empty(shape, device="meta")[index].shape)


def check(pieces: list[Piece], state: Mapping[str, Tensor], ignored: Sequence[str]) -> list[Piece]:
    """The pieces that have a place, once each; every place must be filled.

    Raises:
        ValueError: it lists what does not fit.
    """
    problems: list[str] = []
    kept: list[Piece] = []
    filled: dict[int, int] = defaultdict(int)
    taken: set[tuple] = set()
    misshapen: set[int] = set()
    for piece in pieces:
        source, to = piece.source, state.get(piece.target)
        if to is None:
            if not any(re.search(pattern, piece.target) for pattern in ignored):
                problems.append(f"{source.file.name}: {source.name} has no place in the model")
            continue
        try:
            shape = _part(to.shape, piece.index)
        except (IndexError, ValueError):
            shape = None
        if shape != source.shape:
            got, allowed = list(source.shape), list(to.shape) if not piece.index else f"a part of {list(to.shape)}"
            problems.append(f"{source.file.name}: {source.name} has shape {got}, the model's {piece.target} {allowed}")
            misshapen.add(id(to))
            continue
        place = id(to), str(piece.index)
        if place not in taken:  # of a weight that is shared, a file may hold one copy for each name
            taken.add(place)
            filled[id(to)] += math.prod(source.shape)
            kept.append(piece)
    lacking = {name: t for name, t in state.items() if filled[id(t)] < t.numel() and id(t) not in misshapen}
    problems += [f"the checkpoint lacks {name} {list(t.shape)}" for name, t in sorted(lacking.items())]
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError("the checkpoint does not fit the model, and nothing was loaded:\n  " + "\n  ".join(problems[:10]) + more)
    return kept


# ------------------------------------------------------------------------------------------- streaming


def _chunks(piece: Piece, to: Tensor) -> Iterator[tuple[tuple[int, ...], slice, Tensor]]:
    """The rows of a source, CHUNK bytes at a time: the index of their matrix, which of its rows, and where they go."""
    shape = piece.source.shape
    to = to[piece.index] if piece.index else to
    if not shape:
        yield (), slice(0, 1), to
        return
    for index in product(*map(range, shape[:-2])):
        matrix = to[index] if index else to
        rows = max(1, CHUNK // max(1, math.prod(shape[len(index) + 1 :]) * piece.source.dtype.itemsize))
        for start in range(0, shape[len(index)], rows):
            stop = min(start + rows, shape[len(index)])
            yield index, slice(start, stop), matrix[start:stop]


def _copy(piece: Piece, source: Tensor, to: Tensor) -> None:
    """Quantizes or converts rows into their place, and looks at them."""
    if not to.is_floating_point():
        to.copy_(source)
        return
    if source.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise piece.source.error(f"is {source.dtype}; load takes {', '.join(map(str, FLOAT_DTYPES))}")
    rows = source.to(to.device, to.dtype)
    to.copy_(rows)
    # Where a group held a NaN or inf, its scale is NaN.
    seen = to.scale if isinstance(to, RTNQuantizedTensor) else rows
    if seen.numel() and not torch.stack(seen.aminmax()).isfinite().all():
        raise piece.source.error("holds NaN or inf; the checkpoint is damaged, copy or download it again")


@torch.no_grad()
def stream(pieces: list[Piece], destinations: Mapping[str, list[Tensor]], meter: Callable[[int], Any]) -> None:
    """Fills `destinations`, by target, from the files."""

    work = ((p, *chunk) for p in pieces for to in destinations[p.target] for chunk in _chunks(p, to))
    row_bytes = (math.prod(p.source.shape[-1:]) * p.source.dtype.itemsize for p in pieces)
    size = max(CHUNK, *row_bytes, 0)
    buffers = cycle([torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)])
    following: tuple[Piece, Future[Tensor], Tensor] | None = None
    with ThreadPoolExecutor(1) as reader:  # one chunk is read while another is quantized
        for piece, index, rows, place in work:
            coming = piece, reader.submit(piece.source.read, index, rows, next(buffers)), place
            if following:
                _take(*following, meter)
            following = coming
        if following:
            _take(*following, meter)


def _take(piece: Piece, rows: Future[Tensor], to: Tensor, meter: Callable[[int], Any]) -> None:
    _copy(piece, rows.result(), to)
    meter(rows.result().nbytes)
