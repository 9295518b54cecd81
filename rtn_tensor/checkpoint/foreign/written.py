"""What the writers of all formats share: a weight that is to be written, its groups, and tensors that are
made when their turn to be written comes."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.formats import groups, unpack
from rtn_tensor.tensor import RTNQuantizedTensor

LARGEST, SMALLEST = 128, 32  # groups that the engines have kernels for
# Modules that vLLM and SGLang hold as one, so that they must be of one format, by the last parts of the
# names.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


@dataclass(frozen=True)
class Lazy:
    """A tensor of a file, which `make` gives when it is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, t: Tensor) -> "Lazy":
        return cls(t.dtype, tuple(t.shape), lambda: t)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weight:
    """A quantized matrix, and the group size that it has in the file: that of the tensor, or a part of it, in
    which case each scale is written several times."""

    module: str
    w: RTNQuantizedTensor
    group_size: int

    @property
    def format(self) -> tuple[int, int, bool]:
        """Bits, group size, and whether it is symmetric."""
        return self.w.bits, self.group_size, self.w.zero is None

    def q(self) -> Tensor:
        """The integers, `[N, K]` int8."""
        return unpack(self.w.qdata, self.w.bits, self.w.in_features)

    def scale(self) -> Tensor:
        """`[N, G]`, G of the file's groups."""
        return self._by_group(self.w.scale)

    def zero(self) -> Tensor:
        """The integers that stand for 0, `[N, G]`."""
        assert self.w.zero is not None
        return self._by_group(self.w.zero)

    def _by_group(self, plane: Tensor) -> Tensor:
        if self.group_size in (-1, self.w.group_size):
            return plane
        first = torch.arange(groups(self.w.in_features, self.group_size), device=plane.device)
        return plane[:, first * self.group_size // self.w.group_size]


@dataclass(frozen=True)
class Engine:
    """A program that reads a format: the version of which it was tried or read, whether it reads what is
    written here, and what there is to say."""

    name: str
    reads: bool
    note: str = ""

    def __str__(self) -> str:
        does = "reads it" if self.reads else "does not read it"
        return f"{self.name} {does}{f': {self.note}' if self.note else ''}"


def planes_of(w: RTNQuantizedTensor) -> list[str]:
    return [*w.__tensor_flatten__()[0]]


def group_sizes(weights: Mapping[str, RTNQuantizedTensor]) -> dict[str, int]:
    """For each of the weights, by module, the group size to write, -1 for one scale per row: one for all
    weights of a format, as not all readers take several.

    Raises:
        ValueError: a weight's groups cannot be cut into equal ones that any engine has.
    """
    formats: dict[tuple[int, int, bool], list[str]] = defaultdict(list)
    for module, w in weights.items():
        formats[w.bits, w.group_size, w.zero is None].append(module)
    sizes: dict[str, int] = {}
    for (_, group_size, _), modules in formats.items():

        def shared(modules: Iterable[str], group_size: int = group_size) -> int:
            return math.gcd(LARGEST, group_size, *(weights[module].in_features for module in modules))

        several = [m for m in modules if groups(weights[m].in_features, group_size) > 1]
        size = shared(modules) if several else -1
        if several and size < SMALLEST:  # rows of one group need not have the others' groups
            sizes |= dict.fromkeys(modules, -1)
            modules, size = several, shared(several)
        if several and size < SMALLEST:
            module = next(m for m in several if shared([m]) < SMALLEST)
            k = weights[module].in_features
            raise ValueError(
                f"{module}: K = {k} and group_size {group_size} share only {shared([module])}, and no "
                "engine has "
                f"groups smaller than {SMALLEST}. Quantize this weight with group_size -1, or leave it float"
            )
        sizes |= dict.fromkeys(modules, size)
    return sizes


def formats_of(weights: Iterable[Weight], floats: Iterable[str]) -> dict[str, tuple[int, int, bool] | None]:
    """The format of each module; None of a float one."""
    return {**dict.fromkeys(floats), **{weight.module: weight.format for weight in weights}}


def unlike_parts(formats: Mapping[str, Any]) -> str:
    """Why vLLM and SGLang do not read modules of such formats: they hold some as one that have several; or
    "" where they do."""
    for layer, found in layers_of_experts(formats).items():
        if len(found) > 1:
            return f"the experts in {layer} must have one format"
    for module in formats:
        parent, _, last = module.rpartition(".")
        for parts in FUSED.values():
            siblings = [sibling for part in parts if (sibling := f"{parent}.{part}") in formats]
            if last in parts and len({formats[sibling] for sibling in siblings}) > 1:
                return f"it holds {', '.join(siblings)} as one, and they have several formats"
    return ""


def notes(*texts: str) -> str:
    """Those of `texts` that say something, in one."""
    return "; ".join(filter(None, texts))


def layers_of_experts(formats: Mapping[str, Any]) -> dict[str, set[Any]]:
    """The formats of the experts of each layer, by the name of what holds them; `formats` as in
    `unlike_parts`."""
    found: dict[str, set[Any]] = defaultdict(set)
    for module, fmt in formats.items():
        if layer := re.match(r"(.*\.experts)(\.\d+\.|$)", module):
            found[layer[1]].add(fmt)
    return found
