"""Weights that are computed a few rows at a time from what lies in a file, so that none is held whole."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """The format in which a weight of another library's can be kept without loss."""

    bits: int
    group_size: int
    scale_dtype: torch.dtype
    asymmetric: bool = False  # whether there is a plane `zero`


@dataclass(frozen=True)
class Rows:
    """A weight `[N, K]`, or `[E, N, K]` of experts, that cuts like a tensor and is computed when it is read.

    Attributes:
        compute: gives rows from one place up to another, of the expert whose index comes first: as floats, or
            as quantized rows where `kept` is given.
        cuts: of each dim what is left of it.
        kept: as what its rows come quantized.
        transposed: whether the last two dims stand swapped.
    """

    compute: Callable[[tuple[int, ...], int, int], Any]
    cuts: tuple[Any, ...]  # a range, or the index of an expert
    columns: int
    kept: Kept | None = None
    transposed: bool = False

    dtype = torch.float32  # in which they are computed

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        compute: Callable[[tuple[int, ...], int, int], Any],
        kept: Kept | None = None,
    ) -> "Rows":
        return cls(compute, tuple(map(range, shape)), shape[-1], kept)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [len(cut) for cut in self.cuts if isinstance(cut, range)]
        return tuple([*sizes[:-2], sizes[-1], sizes[-2]] if self.transposed else sizes)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def mT(self) -> "Rows":
        return replace(self, transposed=not self.transposed)

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> "Rows":
        places = [i for i, cut in enumerate(self.cuts) if isinstance(cut, range)]
        if self.transposed:
            places[-2:] = places[:-3:-1]
        cuts = list(self.cuts)
        for place, i in zip(places, index if isinstance(index, tuple) else (index,), strict=False):
            cuts[place] = cuts[place][i]
        return replace(self, cuts=tuple(cuts))

    def __iter__(self) -> Iterator["Rows"]:
        return (self[i] for i in range(self.shape[0]))

    def read(self) -> Any:
        """What it stands for, of a matrix: some rows, best."""
        *expert, rows, columns = self.cuts
        t = self.compute(tuple(expert), rows.start, rows.stop)
        if columns != range(self.columns):
            t = t[:, columns.start : columns.stop]
        return t.mT if self.transposed else t

    def whole(self) -> Tensor:
        """All of it as floats."""
        if self.dim() > 2:
            return torch.stack([part.whole() for part in self])
        t = self.read()
        return t if self.kept is None else t.dequantize(torch.float32)
