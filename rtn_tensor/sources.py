"""The tensors of a checkpoint, left on disk until they are asked for."""

import functools
import json
import math
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
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
READ_AHEAD = 128 << 10  # bytes; of one request Linux drops what is beyond the device's own read-ahead, at least this


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, which stays on disk.

    `view` gives it to be read only, and so of no weight where a process's own memory is limited; `map` as a private copy, of which only the
    pages that are written to take memory. `read_soon` has the system bring a part of `view` into its cache meanwhile.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    map: Callable[[], Tensor]
    view: Callable[[], Tensor]
    read_soon: Callable[[Tensor], None] = lambda part: None
    quantized: bool = False

    def error(self, why: str) -> ValueError:
        return ValueError(f"{self.file}: {self.name} {why}")


class _ReadOnly:
    """A file, mapped to be read only."""

    def __init__(self, file: Path):
        with open(file, "rb") as opened:
            self.memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.address = self._tensor(torch.uint8, len(self.memory), 0).data_ptr()

    def _tensor(self, dtype: torch.dtype, count: int, at: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it must not be written to
            return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=at)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], at: int) -> Tensor:
        count = math.prod(shape)
        return self._tensor(dtype, count, at).view(shape) if count else torch.empty(shape, dtype=dtype)

    def read_soon(self, part: Tensor) -> None:
        if hasattr(mmap, "MADV_WILLNEED"):
            start = part.data_ptr() - self.address
            for at in range(start - start % mmap.PAGESIZE, start + part.nbytes, READ_AHEAD):
                self.memory.madvise(mmap.MADV_WILLNEED, at, min(READ_AHEAD, start + part.nbytes - at))


def plane_names(fqn: str) -> list[str]:
    """What the planes of the quantized weight `fqn` are called in a file, as by torchao."""
    module, _, name = fqn.rpartition(".")
    return [f"{module}._{name}_{plane}" for plane in RTNQuantizedTensor.tensor_data_names]


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
    private, read_only = functools.cache(lambda: safe_open(file, "pt")), functools.cache(lambda: _ReadOnly(file))
    tensors = []
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if (dtype := DTYPES.get(about["dtype"])) is None:
            raise ValueError(f"{file}: {name} is {about['dtype']}, which this torch has no dtype for")
        shape, at = tuple(about["shape"]), 8 + size + about["data_offsets"][0]
        tensors.append(
            Source(
                file,
                name,
                shape,
                dtype,
                map=lambda name=name: private().get_tensor(name),
                view=lambda dtype=dtype, shape=shape, at=at: read_only().tensor(dtype, shape, at),
                read_soon=lambda part: read_only().read_soon(part),
            )
        )
    return tensors, formats


def _quantized(qdata: Source, scale: Source, fqn: str, attributes: dict) -> Source:
    shape = [*qdata.shape[:-1], attributes["in_features"]]
    if attributes["transposed"]:
        shape[-2:] = shape[:-3:-1]

    def map() -> Tensor:
        return RTNQuantizedTensor(qdata.map(), scale.map(), **attributes)

    return Source(qdata.file, fqn, tuple(shape), scale.dtype, map, map, quantized=True)


def _torch_file(file: Path) -> list[Source]:
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds, and names no file
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}); give a state_dict that torch.save wrote") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    return state_sources(state, file)


def state_sources(state: Mapping[str, Any], file: Path) -> list[Source]:
    """The tensors of a state dict; `file` is what errors say it is."""
    return [
        Source(file, name, tuple(t.shape), t.dtype, t.detach, t.detach, quantized=isinstance(t, RTNQuantizedTensor))
        for name, t in state.items()
        if isinstance(t, Tensor)
    ]


def _read(path: Path) -> tuple[dict[str, Source], dict[str, dict]]:
    """The tensors as they lie in the files of a checkpoint, and the attributes of each quantized weight, by name."""
    found: dict[str, Source] = {}
    formats: dict[str, dict] = {}
    for file in _files(path):
        tensors, attributes = _safetensors(file) if file.suffix == ".safetensors" else (_torch_file(file), {})
        formats |= attributes
        for source in tensors:
            if source.name in found:
                raise source.error(f"is in {found[source.name].file.name}, too; remove one of the files")
            found[source.name] = source
    return found, formats


def sources(path: str | os.PathLike, new: Callable[[str], str] = str) -> dict[str, Source]:
    """The tensors of a checkpoint by name, in the order in which they lie on disk.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: a file of it is truncated or corrupt, or names a tensor that another has.
    """
    found, formats = _read(Path(path))
    # transformers writes a tensor under the name that its model once had for it, and in the metadata as it has now.
    names = {new(name): name for name in found} if formats else {}
    for fqn, attributes in formats.items():
        qdata, scale = (found.pop(names.get(plane, ""), None) for plane in plane_names(fqn))
        if qdata and scale:
            found[fqn] = _quantized(qdata, scale, fqn, attributes)
        elif source := qdata or scale:
            raise source.error(f"is one of the two planes of {fqn}, and the other is missing; download the checkpoint again")
    return found


def saved_attributes(path: str | os.PathLike, renaming: Callable[[], Callable[[str], str]]) -> dict[str, dict]:
    """The attributes of each quantized weight of a checkpoint, by the name that its files give it; `renaming()` maps names there to the
    metadata's, and is asked for where they differ.

    Raises:
        FileNotFoundError, ValueError: as `sources`.
    """
    found, formats = _read(Path(path))
    planes = {fqn: plane_names(fqn)[0] for fqn in formats}
    names = {name: name for name in found}
    if not set(planes.values()) <= set(names):
        new = renaming()
        names = {new(name): name for name in found}
    attributes = {}
    for fqn, plane in planes.items():
        if plane in names:  # else the weight is shared, and saved under its other name
            module, _, name = names[plane].rpartition(".")
            attributes[f"{module}.{name.removeprefix('_').removesuffix('_qdata')}"] = formats[fqn]
    return attributes
