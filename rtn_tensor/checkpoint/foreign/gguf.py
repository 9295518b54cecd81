"""GGUF files, which llama.cpp, Ollama and LM Studio read.

A row of K is a run of blocks of 32. Q4_0: a float16 scale d, then 16 bytes, of which byte j holds element j
in its low four bits and element j + 16 in its high four, each with 8 added. Q8_0: d, then 32 bytes. w = d q.

No package converts tokenizers and metadata, and so a file is grafted: the key-values are those of a GGUF file
of the same model, and each of its tensors is replaced by the model's, or is looked at, whether it is the
same.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.files import check_regular
from rtn_tensor.formats import unpack
from rtn_tensor.tensor import RTNQuantizedTensor

BLOCK = 32
BLOCK_BYTES = {4: 18, 8: 34}
FILE_TYPES = {4: 2, 8: 7}  # as llama.cpp numbers them: mostly Q4_0, mostly Q8_0
QUANTIZATION_VERSION = 2
# Key-values of `like` that are not the new file's: of its own header, of parts, of how it was quantized.
NOT_COPIED = (
    r"GGUF\..*|split\..*|quantize\..*|general\.(architecture|alignment|file_type|quantization_version)"
)
COMPUTED = {
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
}  # of the config alone
LOOKED_AT = 64  # rows of a tensor that are compared
# Of a tensor of `like` from the model's: more than any quantization, and less than any other order of rows.
ANOTHER, ROUNDED = 0.5, 2**-7


def blocks(w: RTNQuantizedTensor) -> Tensor:
    """A matrix `[N, K]` as blocks, `[N, K / 32 * BLOCK_BYTES]` uint8."""
    q = unpack(w.qdata, w.bits, w.in_features)
    d = half_scales(w).contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
    if w.bits == 8:
        numbers = q.contiguous().view(torch.uint8).unflatten(-1, (-1, BLOCK))
    else:
        low, high = (q + 8).view(torch.uint8).unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
        numbers = low | high << 4
    return torch.cat([d, numbers], -1).flatten(-2)


def half_scales(w: RTNQuantizedTensor) -> Tensor:
    """The scale of each block, `[N, K / 32]` float16."""
    size = w.in_features if w.group_size == -1 else w.group_size
    block = torch.arange(w.in_features // BLOCK, device=w.scale.device)
    return w.scale.half()[..., block * BLOCK // max(size, 1)]


@dataclass(frozen=True)
class Matrices:
    """What goes into one tensor of the file: a tensor of the model, or the experts' in their order.

    Attributes:
        name: by which errors call it.
        parts: the tensors, one unless they are stacked.
        stacked: whether they are the matrices of a 3-D tensor.
    """

    name: str
    parts: list[Tensor]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (*([len(self.parts)] if self.stacked else []), *self.parts[0].shape)

    @property
    def quantized(self) -> RTNQuantizedTensor | None:
        first = self.parts[0]
        return first if isinstance(first, RTNQuantizedTensor) else None


@dataclass(frozen=True)
class Written:
    """One tensor of the file, its GGUF type, its shape in bytes where it has blocks, and what makes it."""

    kind: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Any]


class Like:
    """A GGUF file of the model that is to be written.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is a part of a file only.
    """

    def __init__(self, file: Path):
        import gguf

        check_regular(file)
        self.file = file
        try:
            self.reader = gguf.GGUFReader(file)
            self.tensors = {t.name: t for t in self.reader.tensors}
            self.architecture = self.value("general.architecture")
            kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
            names = gguf.get_tensor_name_map(
                kinds[self.architecture], self.value(f"{self.architecture}.block_count")
            )
        except Exception as error:  # of the reader, on whatever lies there
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                f"{file} is no GGUF file of a model that gguf knows ({why}); give another"
            ) from error
        if self.reader.byte_order != "I" or (self.value("split.count") or 1) > 1:
            raise ValueError(
                f"{file} is of another byte order, or one part of several; merge them first "
                "(llama-gguf-split --merge)"
            )
        self.names = names

    def value(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def error(self, why: str) -> ValueError:
        return ValueError(
            f"{self.file}: {why}; give the GGUF file of this very model, as convert_hf_to_gguf.py writes "
            "it with "
            "--outtype bf16"
        )

    def grouped(self, found: Mapping[str, Tensor]) -> dict[str, Matrices]:
        """`found`, the tensors of a checkpoint, by the names that they have here, experts together."""
        experts: dict[str, dict[int, Tensor]] = {}
        single: dict[str, Tensor] = {}
        for name, t in found.items():
            if part := re.match(r"(.*\.experts)\.(\d+)\.(.*)$", name):
                experts.setdefault(f"{part[1]}.{part[3]}", {})[int(part[2])] = t
            else:
                single[name] = t
        groups = {name: Matrices(name, [t], False) for name, t in single.items()}
        groups |= {name: Matrices(name, [t[i] for i in sorted(t)], True) for name, t in experts.items()}
        result: dict[str, Matrices] = {}
        for name, group in groups.items():
            new = self.names.get_name(name, (".weight", ".bias"))
            if new is None:
                raise self.error(f"gguf has no name for {name} in a model of the kind {self.architecture!r}")
            if new in result:
                raise self.error(f"{result[new].name} and {name} are both {new} there")
            if new not in self.tensors and new != "output.weight":  # which like may have tied
                raise self.error(f"it has no tensor {new}, which {name} is there")
            result[new] = group
        if more := [name for name in self.tensors if name not in result and name not in COMPUTED]:
            raise self.error(f"it has {more[0]}, of which the model has nothing")
        return result

    def order(self, new: str, group: Matrices, heads: Mapping[str, int]) -> Tensor | None:
        """The order in which the rows of a tensor are there, as an index; None for their own. And it is the
        same tensor but for rounding; of one on meta only the shape is looked at.

        Raises:
            ValueError: it is another.
        """
        there = self.tensors.get(new) or self.tensors["token_embd.weight"]
        shape = tuple(int(n) for n in reversed(there.shape))
        if shape != group.shape:
            raise self.error(f"{new} has shape {list(shape)}, and {group.name} {list(group.shape)}")
        if group.parts[0].is_meta:
            return None
        n = group.parts[0].shape[0]
        rows = torch.linspace(0, n - 1, min(n, LOOKED_AT)).long()
        orders: list[Tensor | None] = [None]
        for module, count in heads.items():
            if f".{module}." in group.name and n % (2 * count) == 0:
                # llama.cpp's rope turns neighbours, and transformers' the two halves of a head.
                orders.append(torch.arange(n).view(count, 2, -1).transpose(1, 2).flatten())
        quantized = group.quantized is not None or not self.is_float(new)
        ours = {order: _rows(group.parts[-1], rows if order is None else order[rows]) for order in orders}
        theirs = self._rows(there, rows, group)
        off = {order: _distance(t, theirs) for order, t in ours.items()}
        if theirs.dim() == 1 and not quantized:  # Gemma's norms are stored less one
            off[None] = min(off[None], _distance(ours[None] + 1, theirs))
        best = min(off, key=lambda order: off[order])
        if not off[best] < (ANOTHER if quantized else ROUNDED):
            raise self.error(f"{new} holds other numbers than {group.name}")
        return best

    def is_float(self, new: str) -> bool:
        there = self.tensors.get(new)
        return there is not None and there.tensor_type.name in ("F32", "F16", "BF16")

    def _rows(self, there: Any, rows: Tensor, group: Matrices) -> Tensor:
        from gguf.quants import dequantize

        data = there.data[-1] if group.stacked else there.data
        try:
            found = dequantize(data[rows.numpy()], there.tensor_type)
        except NotImplementedError as error:
            raise self.error(f"{there.name} is {there.tensor_type.name}, which gguf cannot read") from error
        return torch.from_numpy(found)


def _rows(t: Tensor, rows: Tensor) -> Tensor:
    t = t[rows.to(t.device)]
    return (t.dequantize(torch.float32) if isinstance(t, RTNQuantizedTensor) else t.float()).cpu()


def _distance(one: Tensor, other: Tensor) -> float:
    """How far `one` is from `other`, as a part of that."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def planned(
    found: Mapping[str, Tensor], like: Like, heads: Mapping[str, int]
) -> tuple[dict[str, Written], int]:
    """The tensors of the new file, by name, all of them checked; and the number of weights whose scales
    float16 rounds.

    Args:
        found: those of a checkpoint of the model, under their names there.
        like: the file that is grafted onto.
        heads: the number of heads of the modules whose rows llama.cpp may have in another order.

    Raises:
        ValueError: `like` is of another model; or a weight does not fit into blocks.
    """
    import gguf

    written: dict[str, Written] = {}
    rounded = 0
    for new, group in like.grouped(found).items():
        order = like.order(new, group, heads)
        if (first := group.quantized) is not None:
            rounded += _check_quantized(group)
            kind = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}[first.bits]
            shape = (*group.shape[:-1], group.shape[-1] // BLOCK * BLOCK_BYTES[first.bits])
            written[new] = Written(kind, shape, torch.uint8, _maker(group, order, blocks))
        elif like.is_float(new):  # the same, and as llama.cpp wants it
            there = like.tensors[new]
            written[new] = Written(there.tensor_type, there.data.shape, _dtype(there), lambda t=there: t.data)
        elif len(group.shape) == 1:
            raise like.error(f"{new}, a vector, is {like.tensors[new].tensor_type.name}")
        else:
            half = torch.float16 if group.parts[0].dtype == torch.float16 else torch.bfloat16
            kind = getattr(gguf.GGMLQuantizationType, "F16" if half == torch.float16 else "BF16")
            shape = (*group.shape[:-1], 2 * group.shape[-1])
            make = _maker(group, order, lambda t, half=half: t.to(half).contiguous().view(torch.uint8))
            written[new] = Written(kind, shape, torch.uint8, make)
    for name in like.tensors.keys() & COMPUTED:
        there = like.tensors[name]
        written[name] = Written(there.tensor_type, there.data.shape, _dtype(there), lambda t=there: t.data)
    order_there = {name: i for i, name in enumerate(like.tensors)}
    return dict(sorted(written.items(), key=lambda item: order_there.get(item[0], len(written)))), rounded


def _dtype(there: Any) -> torch.dtype:
    return getattr(torch, str(there.data.dtype))


def _maker(group: Matrices, order: Tensor | None, convert: Callable[[Any], Tensor]) -> Callable[[], Any]:
    def make() -> Any:
        parts = [t if order is None else t[order.to(t.device)] for t in group.parts]
        made = [convert(t.detach()).cpu() for t in parts]
        return (torch.stack(made) if group.stacked else made[0]).numpy()

    return make


def _check_quantized(group: Matrices) -> bool:
    """Whether float16 rounds the scales.

    Raises:
        ValueError: it cannot hold them; or the rows are no whole blocks.
    """
    rounds = False
    formats = set()
    for w in group.parts:
        if not isinstance(w, RTNQuantizedTensor) or w.dim() != 2:
            raise ValueError(f"{group.name}: some experts are quantized and some float; let all be either")
        formats.add(w.bits)
        if w.in_features % BLOCK or len(formats) > 1:
            raise ValueError(
                f"{group.name}: K = {w.in_features} is no multiple of {BLOCK}, as a GGUF file's blocks "
                "are; leave it "
                "float"
                if w.in_features % BLOCK
                else f"{group.name}: experts of one tensor must have the same bits; quantize all with 4, or 8"
            )
        if w.is_meta:
            continue
        half = w.scale.half()
        if not bool(half.isfinite().all()):
            raise ValueError(
                f"{group.name}: a scale of {float(w.scale.abs().max()):.3g} is beyond float16, which a "
                "GGUF file's "
                "blocks have; leave it float"
            )
        rounds |= not torch.equal(half.to(w.scale.dtype), w.scale)
    return rounds


def write(file: Path, written: Mapping[str, Written], like: Like, bits: int) -> None:
    """Writes the file, tensor by tensor; `bits` are those of most weights."""
    import gguf

    writer = gguf.GGUFWriter(file, like.architecture)
    if (alignment := like.value("general.alignment")) is not None:
        writer.add_custom_alignment(alignment)
    for key, field in like.reader.fields.items():
        if not re.fullmatch(NOT_COPIED, key):
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None
            )
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[bits])
    for name, t in written.items():
        numpy_dtype = torch.empty(0, dtype=t.dtype).numpy().dtype
        size = torch.Size(t.shape).numel() * t.dtype.itemsize
        writer.add_tensor_info(name, t.shape, numpy_dtype, size, raw_dtype=t.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in written.values():
            writer.write_tensor_data(t.make())
    finally:
        writer.close()
