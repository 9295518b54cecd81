"""The tensors of a checkpoint, left on disk until they are asked for."""

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.formats import VERSION, check_version
from rtn_tensor.tensor import RTNQuantizedTensor

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "I8": torch.int8},
    **{"I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64},
}  # as safetensors calls them


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, which stays on disk.

    `map` gives it as a private map of the file. `offset` is where its bytes begin; None where they cannot be read by themselves (of a
    quantized tensor, and in a file of torch.save's).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    map: Callable[[], Tensor]
    offset: int | None = None

    @property
    def quantized(self) -> bool:
        return self.offset is None and isinstance(self.map(), RTNQuantizedTensor)

    def error(self, why: str) -> ValueError:
        return ValueError(f"{self.file}: {self.name} {why}")

    def read(self, index: tuple[int, ...], rows: slice, buffer: Tensor) -> Tensor:
        """`self[index][rows]`, read into `buffer`, bytes, if it can be."""
        if self.offset is None:
            part = self.map()[index][rows] if self.shape else self.map()
            if part.is_contiguous():
                part.view(-1).view(torch.uint8)[::4096].sum()  # has its pages read here, in this thread
            return part
        shape = [len(range(*rows.indices(self.shape[len(index)]))), *self.shape[len(index) + 1 :]] if self.shape else []
        start = sum(i * math.prod(self.shape[d + 1 :]) for d, i in enumerate(index)) + (rows.start * math.prod(shape[1:]) if shape else 0)
        part = buffer[: math.prod(shape) * self.dtype.itemsize]
        into: Any = memoryview(part.numpy())  # type: ignore[arg-type]
        at = self.offset + start * self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as file:
            file.seek(at)
            while len(into):
                if not (count := file.readinto(into)):
                    raise self.error("ends early; the file is truncated, copy or download it again")
                into = into[count:]
        return part.view(self.dtype).view(shape)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for kind in ("safetensors", "bin"):
        if index := sorted(path.glob(f"*.{kind}.index.json")):
            files = [path / name for name in sorted(set(json.loads(index[0].read_text())["weight_map"].values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{path} lacks {', '.join(missing)}, which {index[0].name} names; download the checkpoint again")
            return files
        if files := sorted(path.glob("*.safetensors" if kind == "safetensors" else "pytorch_model*.bin")):
            return files
    raise FileNotFoundError(f"{path} holds no checkpoint; give a folder with *.safetensors or pytorch_model*.bin, or one such file")


def _safetensors(file: Path) -> tuple[list[Source], dict[str, dict]]:
    """The tensors of a file as they lie in it, and the attributes of each quantized weight by its name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):  # looks at the header and the size
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}); copy or download it again") from error
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    formats = {}
    for name, text in header.pop("__metadata__", {}).items():
        if text.startswith("{") and (about := json.loads(text)).get("_type") not in (None, "Tensor"):
            if about["_type"] != RTNQuantizedTensor.__name__:
                raise ValueError(f"{file}: {name} is a {about['_type']}, of another library; load it with that, or give a float checkpoint")
            try:
                check_version(about["_data"].get("version", VERSION))
            except ValueError as error:
                raise ValueError(f"{file}: {name}: {error}") from None
            formats[name] = about["_data"]
    mapped = functools.cache(lambda: safe_open(file, "pt"))
    tensors = []
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if (dtype := DTYPES.get(about["dtype"])) is None:
            raise ValueError(f"{file}: {name} is {about['dtype']}, which this torch has no dtype for")
        at = 8 + size + about["data_offsets"][0]
        tensors.append(Source(file, name, tuple(about["shape"]), dtype, lambda name=name: mapped().get_tensor(name), at))
    return tensors, formats


def _quantized(qdata: Source, scale: Source, fqn: str, attributes: dict) -> Source:
    shape = [*qdata.shape[:-1], attributes["in_features"]]
    if attributes["transposed"]:
        shape[-2:] = shape[:-3:-1]
    return Source(qdata.file, fqn, tuple(shape), scale.dtype, lambda: RTNQuantizedTensor(qdata.map(), scale.map(), **attributes))


def _torch_file(file: Path) -> list[Source]:
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds, and names no file
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}); give a state_dict that torch.save wrote") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    return [Source(file, name, tuple(t.shape), t.dtype, t.detach) for name, t in state.items() if isinstance(t, Tensor)]


def sources(path: str | os.PathLike, new: Callable[[str], str] = str) -> dict[str, Source]:
    """The tensors of a checkpoint by name, in the order in which they lie on disk.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: a file of it is truncated or corrupt, or names a tensor that another has.
    """
    found: dict[str, Source] = {}
    formats: dict[str, dict] = {}
    for file in _files(Path(path)):
        tensors, attributes = _safetensors(file) if file.suffix == ".safetensors" else (_torch_file(file), {})
        formats |= attributes
        for source in tensors:
            if source.name in found:
                raise source.error(f"is in {found[source.name].file.name}, too; remove one of the files")
            found[source.name] = source
    # transformers writes a tensor under the name that its model once had for it, and in the metadata as it has now.
    names = {new(name): name for name in found} if formats else {}
    for fqn, attributes in formats.items():
        module, _, name = fqn.rpartition(".")
        qdata, scale = (found.pop(names.get(f"{module}._{name}_{plane}", ""), None) for plane in RTNQuantizedTensor.tensor_data_names)
        if qdata and scale:
            found[fqn] = _quantized(qdata, scale, fqn, attributes)
        elif source := qdata or scale:
            raise source.error(f"is one of the two planes of {fqn}, and the other is missing; download the checkpoint again")
    return found
