"""The tensors of a GGUF file: Q4_0 and Q8_0 with their integers and scales, other types of blocks as floats.

`gguf.py` says how blocks lie.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.files import check_regular, corrupt
from rtn_tensor.checkpoint.foreign.gguf import BLOCK
from rtn_tensor.checkpoint.foreign.words import computed, quantized_rows
from rtn_tensor.checkpoint.rows import Kept
from rtn_tensor.checkpoint.sources import ReadOnly, Source

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KEPT_BITS = {"Q4_0": 4, "Q8_0": 8}
Order = Tensor | None  # of rows, where it is not their own


class File:
    """A GGUF file.

    Attributes:
        architecture: as llama.cpp calls it.
        tensors: what the reader says of each, by name.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is a part of a file only.
    """

    def __init__(self, path: Path):
        import gguf

        check_regular(path)
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
            self.architecture = self.value("general.architecture")
            self.layers = self.value(f"{self.architecture}.block_count")
            split = self.value("split.count") or 1
        except Exception as error:  # of the reader, on whatever lies there
            why = " ".join(str(error).split())[:200]
            raise corrupt(path, f"gguf reads no header in it, {type(error).__name__}: {why}") from error
        if self.reader.byte_order != "I" or split > 1:
            raise ValueError(
                f"{path} is of another byte order, or one part of several; merge them first "
                "(llama-gguf-split --merge)"
            )
        self.tensors = {t.name: t for t in self.reader.tensors}
        self.memory = ReadOnly(path)

    def value(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def source(self, there: str, name: str, expert: int | None = None, order: Order = None) -> Source:
        """The tensor `there` as the weight `name`: one of its matrices where `expert` says which, its rows in
        another order where that is given.

        Raises:
            ValueError: it does not lie in the file whole, or is of a type that gguf does not know.
        """
        import gguf

        t = self.tensors[there]
        shape: tuple[int, ...] = tuple(int(n) for n in reversed(t.shape))
        kind = t.tensor_type.name
        if len(shape) == 0:
            raise corrupt(self.path, f"{there} has no dims")
        lead = shape[:-2]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[t.tensor_type]
        row_bytes = shape[-1] // per_block * block_bytes
        size, end = math.prod(shape[:-1]) * row_bytes, int(t.data_offset) + int(t.n_bytes)
        if shape[-1] % per_block or size != int(t.n_bytes) or end > len(self.memory.memory):
            raise corrupt(self.path, f"{there}: {kind} {list(shape)} cannot lie from byte {t.data_offset} on")
        if expert is not None and (len(lead) != 1 or expert >= lead[0]):
            raise corrupt(self.path, f"{there}: {list(shape)} has no expert {expert}")
        if order is not None and (len(shape) not in (1, 2) or len(order) != shape[0]):
            raise corrupt(self.path, f"{there}: {list(shape)} has other rows than the heads of the model say")
        if (dtype := FLOATS.get(kind)) is not None:

            def plain() -> Tensor:
                whole = self.memory.tensor(dtype, shape, int(t.data_offset))
                whole = whole if expert is None else whole[expert]
                return whole if order is None else whole[order]

            of_one = shape if expert is None else shape[1:]
            return Source(self.path, name, of_one, dtype, lambda: plain().clone(), plain)
        if len(shape) not in (2, 3):
            raise corrupt(self.path, f"{there}: {kind} {list(shape)} is no matrix")
        bits = KEPT_BITS.get(kind)
        kept = Kept(bits, -1 if shape[-1] <= BLOCK else BLOCK, torch.float16) if bits else None
        read = _reader(t.tensor_type, kept, lambda why: corrupt(self.path, f"{there}: {why}"))

        def compute(leading: tuple[int, ...], start: int, stop: int) -> Tensor:
            data = self.memory.tensor(torch.uint8, (*shape[:-1], row_bytes), int(t.data_offset))
            rows = data[leading if expert is None else (expert,)]
            return read(rows[start:stop] if order is None else rows[order[start:stop]])

        place = Source(self.path, there, shape, torch.uint8, lambda: torch.empty(0), lambda: None)
        return computed(place, name, shape if expert is None else shape[1:], compute, kept)


def _reader(kind: Any, kept: Kept | None, error: Callable[[str], ValueError]) -> Callable[[Tensor], Tensor]:
    """What makes a weight of rows of blocks, `[n, bytes]`."""
    from gguf.quants import dequantize

    def quantized(rows: Tensor) -> Tensor:
        assert kept is not None
        blocks = rows.unflatten(-1, (-1, 2 + BLOCK * kept.bits // 8))
        scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        numbers = blocks[..., 2:]
        if kept.bits == 8:
            q = numbers.contiguous().view(torch.int8)
        else:
            q = torch.cat([numbers & 15, numbers >> 4], -1).view(torch.int8) - 8
        return quantized_rows(q.flatten(-2), scale, kept)

    def floats(rows: Tensor) -> Tensor:
        try:
            return torch.from_numpy(dequantize(rows.contiguous().numpy(), kind))
        except (NotImplementedError, ValueError) as why:
            raise error(f"gguf cannot read {kind.name} ({why})") from why

    return floats if kept is None else quantized
