"""The report of what of a model is quantized."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor.distributed import held
from rtn_tensor.quantize import printing  # noqa: F401  (print(model) names what is quantized)
from rtn_tensor.quantize.kinds import kept_float, why_float
from rtn_tensor.quantize.selection import check_module, tensors_of
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.text_table import table


@dataclass(frozen=True)
class Row:
    """One parameter. `bits` and `group_size` are None where it stayed float; `note` then says why. Bytes of a
    shared one are counted at its first place only."""

    name: str
    shape: tuple[int, ...]
    bits: int | None
    group_size: int | None
    bytes_before: int
    bytes_after: int
    note: str


@dataclass(frozen=True)
class Report:
    """What of a model is quantized. Printed, one row per weight; vectors (norms, biases) share a row.

    Attributes:
        rows: one `Row` a parameter, vectors included.
    """

    rows: list[Row]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters, had none been quantized."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters as they are, scales included."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits a parameter takes on average, over the whole model: those that stayed float, and the scales,
        are counted."""
        count = sum(torch.Size(row.shape).numel() for row in self.rows if row.bytes_before)
        return 8 * self.bytes_after / count if count else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types, ready for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "weights": [asdict(row) | {"shape": list(row.shape)} for row in self.rows],
        }

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            if len(row.shape) > 1:
                shape = " x ".join(map(str, row.shape))
                bits, group = ("float", "") if row.bits is None else (str(row.bits), str(row.group_size))
                lines.append(
                    [row.name, shape, bits, group, f"{row.bytes_before:,}", f"{row.bytes_after:,}", row.note]
                )
        vectors = [row for row in self.rows if len(row.shape) < 2]
        if vectors:
            before, after = (
                sum(getattr(row, key) for row in vectors) for key in ("bytes_before", "bytes_after")
            )
            count = f"{len(vectors)} vectors" if len(vectors) > 1 else "1 vector"
            lines.append([count, "", "float", "", f"{before:,}", f"{after:,}", "norms and biases"])
        total = [
            "total",
            "",
            f"{self.bits_per_weight:.2f}",
            "",
            f"{self.bytes_before:,}",
            f"{self.bytes_after:,}",
            "",
        ]
        return table(
            ["weight", "shape", "bits", "group", "bytes before", "bytes after", "note"], [*lines, total]
        )


def untied_from(w: Tensor) -> list[str]:
    """The names that the parameter `w` was shared with, and that kept the float weight when it was
    quantized."""
    part = held(w)
    return getattr(part, "untied_from", []) if isinstance(part, RTNQuantizedTensor) else []


def report(model: nn.Module) -> Report:
    """Says of every parameter of `model` how it is stored, or why it stayed float; of a sharded one, the part
    that this rank holds."""
    check_module(model)
    rows: list[Row] = []
    first: dict[int, str] = {}
    untied: dict[str, str] = {}
    for fqn, _, _, w in tensors_of(model):
        for other in untied_from(w):
            untied.setdefault(other, fqn)
    kept = kept_float(model)
    for fqn, module, name, whole in tensors_of(model):
        w = held(whole)
        quantized = isinstance(w, RTNQuantizedTensor)
        before = w.numel() * w.dtype.itemsize
        after = w.nbytes if quantized else before
        if id(whole) in first:
            note, before, after = f"shared with {first[id(whole)]}", 0, 0
        elif quantized and untied_from(whole):
            # The float weight it shared is counted there.
            note, before = f"untied from {', '.join(untied_from(whole))}", 0
        elif quantized:
            note = ""
        elif fqn in untied:
            note = f"untied from {untied[fqn]}"
        else:
            note = why_float(module, name, w, kept)
        if w is not whole and w.dim() > 1:
            note = f"part of {' x '.join(map(str, whole.shape))}{', ' if note else ''}{note}"
        if (activations := getattr(w, "activations", None)) is not None:
            note = f"{note}{', ' if note else ''}{activations} activations"
        first.setdefault(id(whole), fqn)
        bits, group_size = getattr(w, "bits", None), getattr(w, "group_size", None)
        rows.append(Row(fqn, tuple(w.shape), bits, group_size, before, after, note))
    return Report(rows)
