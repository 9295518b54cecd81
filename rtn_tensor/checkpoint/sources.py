"""The tensors of a checkpoint, left on disk until they are asked for."""

import functools
import json
import math
import mmap
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor.checkpoint.files import Entry, check_regular, parse_json, read_header, weight_files
from rtn_tensor.checkpoint.rows import Rows
from rtn_tensor.formats import check_version
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.tensor.attributes import ATTRIBUTES, DEFAULTS, FORMAT, PLANES
from rtn_tensor.wording import with_article

SAFETENSORS_DTYPES = {
    **{
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "BOOL": torch.bool,
    },
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "I8": torch.int8},
    **{
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "C64": torch.complex64,
    },
    **{
        "I16": torch.int16,
        "U16": torch.uint16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "I64": torch.int64,
        "U64": torch.uint64,
    },
}  # as safetensors calls them
TORCHAO = ("Int8Tensor",)  # torchao's own quantized weights that are read
# bytes; of one request Linux drops what is beyond the device's own read-ahead, at least this.
READ_AHEAD = 128 << 10


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, which stays on disk.

    `view` gives it to be read only, and so of no weight where a process's own memory is limited; `private` as
    a private copy, of which only the pages that are written to take memory. `read_soon` has the system bring
    a part of `view` into its cache meanwhile. `rows` are what a weight is computed of that another library
    quantized, and then its `view`; `about` is what a file's metadata says of a plane of torchao's.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    private: Callable[[], Tensor]
    view: Callable[[], Any]
    read_soon: Callable[[Tensor], None] = lambda part: None
    quantized: bool = False
    rows: Rows | None = None
    about: Mapping[str, Any] | None = None

    def error(self, why: str) -> ValueError:
        return ValueError(f"{self.file}: {self.name} {why}")


class ReadOnly:
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


IN_FILES = {"qdata": "qdata", "scale": "scale", "zero": "zero_point"}  # each plane, and its name there


def plane_names(fqn: str) -> dict[str, str]:
    """What each plane of the quantized weight `fqn` is called in a file, as by torchao."""
    module, _, name = fqn.rpartition(".")
    return {plane: f"{module}._{name}_{in_file}" for plane, in_file in IN_FILES.items()}


def flattened(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`tensors` with quantized ones as their planes, and the metadata that says so, as by torchao."""
    flat: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, t in tensors.items():
        if isinstance(t, RTNQuantizedTensor):
            about = {attribute: getattr(t, attribute) for attribute in FORMAT}
            if t.float_dtype is not None:
                about["float_dtype"] = {"_type": "torch.dtype", "_data": str(t.float_dtype)[len("torch.") :]}
            if t.activations is not None:
                about["activations"] = t.activations
            planes = [IN_FILES[plane] for plane in t.planes]
            metadata[name] = json.dumps(
                {"_type": type(t).__name__, "_data": about, "_tensor_data_names": planes}
            )
            in_file = plane_names(name)
            flat |= {in_file[plane]: data.contiguous() for plane, data in t.planes.items()}
        else:
            metadata[name] = json.dumps({"_type": "Tensor"})
            flat[name] = t.detach().contiguous()
    # torchao's reader takes every name in the list apart at its last dot.
    return flat, metadata | {"tensor_names": json.dumps([name for name in tensors if "." in name])}


def check_attributes(attributes: Any) -> None:
    """Raises ValueError unless a file's attributes of a quantized weight are those that it must have;
    `check_planes` looks at each."""
    if not isinstance(attributes, dict):
        raise ValueError(f"its attributes are {str(attributes)[:100]}; they must be a JSON object")
    check_version(attributes.get("version", 1))  # of a later one, others are to be expected
    allowed = ATTRIBUTES
    lacking = sorted({*allowed} - {*DEFAULTS} - {*attributes})
    if unknown := sorted({*attributes} - {*allowed}) or lacking:
        why = f"lack {', '.join(lacking)}" if lacking else f"have {', '.join(unknown)[:100]}, too"
        raise ValueError(f"its attributes {why}; they must be {', '.join(allowed)}")


def _attributes(name: str, text: str) -> dict[str, Any] | None:
    """The attributes of the quantized weight `name`, of which a file's metadata says `text`; None where that
    is about something else.

    Raises:
        ValueError: it is a quantized weight of another library, or of a format that this one does not read.
    """
    if not text.startswith("{"):
        return None
    try:
        about = parse_json(text)
    except ValueError:
        # Of a tensor that is not quantized it says nothing that is needed; the planes of one that is will be
        # missed.
        return None
    kind = about.get("_type", "Tensor")
    if kind == "Tensor":
        return None
    if kind in TORCHAO:
        return None
    if kind != RTNQuantizedTensor.__name__:
        raise ValueError(
            f"{name} is {with_article(str(kind)[:100])}, of another library; load it with that, or give a "
            "float checkpoint"
        )
    attributes = about.get("_data")
    if isinstance(attributes, dict) and isinstance(dtype := attributes.get("float_dtype"), dict):
        attributes = attributes | {"float_dtype": dtype.get("_data")}  # as torchao writes a dtype
    try:
        check_attributes(attributes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return attributes


def _of_torchao(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a file's metadata says of torchao's own quantized weights that are read, by the name of their
    plane `qdata`."""
    found = {}
    for name, text in metadata.items():
        try:
            about = parse_json(text)
        except ValueError:
            continue
        if isinstance(about, dict) and about.get("_type") in TORCHAO and isinstance(about.get("_data"), dict):
            found[plane_names(name)["qdata"]] = {"act_quant_kwargs": None, **about["_data"]}
    return found


def _safetensors(file: Path) -> tuple[list[Source], dict[str, dict]]:
    """The tensors of a file as they lie in it, and the attributes of each quantized weight by its name."""
    from safetensors import safe_open

    entries, metadata = read_header(file)
    formats = {}
    for name, text in metadata.items():
        try:
            if (attributes := _attributes(name, text)) is not None:
                formats[name] = attributes
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    of_torchao = _of_torchao(metadata)
    opened, read_only = (
        functools.cache(lambda: safe_open(file, "pt")),
        functools.cache(lambda: ReadOnly(file)),
    )
    tensors = []
    for entry in entries:
        if (dtype := SAFETENSORS_DTYPES.get(entry.dtype)) is None:
            raise ValueError(f"{file}: {entry.name} is {entry.dtype}, which this torch has no dtype for")

        def view(entry: Entry = entry, dtype: torch.dtype = dtype) -> Tensor:
            return read_only().tensor(dtype, entry.shape, entry.start)

        def private(
            entry: Entry = entry, dtype: torch.dtype = dtype, view: Callable[[], Tensor] = view
        ) -> Tensor:
            # torch maps no tensor that begins inside an element, and kernels read planes in words of 8 bytes.
            aligned = entry.start % (8 if dtype == torch.uint8 else dtype.itemsize) == 0
            return opened().get_tensor(entry.name) if aligned else view().clone()

        tensors.append(
            Source(
                file,
                entry.name,
                entry.shape,
                dtype,
                private,
                view,
                lambda part: read_only().read_soon(part),
                about=of_torchao.get(entry.name),
            )
        )
    return tensors, formats


def _quantized_source(planes: Mapping[str, Source], fqn: str, attributes: dict) -> Source:
    on_meta = {
        name: torch.empty(plane.shape, dtype=plane.dtype, device="meta") for name, plane in planes.items()
    }
    file = planes["qdata"].file
    try:
        w = RTNQuantizedTensor(**on_meta, **attributes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {fqn}: {error}") from None

    def private() -> Tensor:
        return RTNQuantizedTensor(**{name: plane.private() for name, plane in planes.items()}, **attributes)

    return Source(file, fqn, tuple(w.shape), w.dtype, private, private, quantized=True)


def _unreadable(file: Path, why: str) -> ValueError:
    """The error of a file that torch does not read, for the reason `why`, of which a user gets the first
    sentence: some of torch's go on to advise `weights_only=False`, which runs whatever the file holds."""
    lines = why.splitlines()
    first = lines[0].partition(". ")[0].removesuffix(".") if lines and lines[0] else ""
    why = first or ("it is empty" if not file.stat().st_size else "torch did not write it")
    return ValueError(f"{file} cannot be read ({why}); give a state_dict that torch.save wrote")


def _torch_file(file: Path) -> list[Source]:
    """The tensors of what torch.save wrote. An older file, which is no zip archive, is read at once."""
    check_regular(file)
    try:
        with open(file, "rb") as opened:
            archive = opened.read(4) == b"PK\3\4"
        state = torch.load(file, map_location="cpu", mmap=archive, weights_only=True)
    except pickle.UnpicklingError as error:
        if names := sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error)))):
            # torch advises to read it all the same, which runs whatever it holds.
            raise ValueError(
                f"{file} holds more than tensors ({', '.join(names)}), and to read that could run any code; "
                "save the state_dict alone: "
                "torch.save(model.state_dict(), file), or better as safetensors"
            ) from None
        raise _unreadable(file, str(error).rpartition("WeightsUnpickler error: ")[2]) from None
    except Exception as error:  # torch raises many kinds, and names no file
        raise _unreadable(file, str(error)) from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{file} holds {with_article(type(state).__name__)}; give a state_dict that torch.save wrote"
        )
    for name, t in state.items():
        if isinstance(t, Tensor):
            if not isinstance(name, str):
                raise ValueError(
                    f"{file} has a tensor under {str(name)[:100]!r}, which is no name; give a state_dict "
                    "that torch.save wrote"
                )
            kind = (
                type(t).__name__
                if type(t) not in (Tensor, nn.Parameter, RTNQuantizedTensor)
                else str(t.layout)
            )
            if kind != str(torch.strided) or t.is_quantized or t.is_meta:
                kind = with_article(str(t.dtype) if t.is_quantized else kind)
                kind = "on meta, without values" if t.is_meta else kind
                raise ValueError(
                    f"{file}: {name} is {kind}; load takes plain tensors, and those that rtn-tensor quantized"
                )
    return state_sources(state, file)


def state_sources(state: Mapping[str, Any], file: Path) -> list[Source]:
    """The tensors of a state dict; `file` is what errors say it is."""
    return [
        Source(
            file,
            name,
            tuple(t.shape),
            t.dtype,
            t.detach,
            t.detach,
            quantized=isinstance(t, RTNQuantizedTensor),
        )
        for name, t in state.items()
        if isinstance(t, Tensor)
    ]


def _read_files(path: Path) -> tuple[dict[str, Source], dict[str, dict]]:
    """The tensors as they lie in the files of a checkpoint, and the attributes of each quantized weight, by
    name."""
    found: dict[str, Source] = {}
    formats: dict[str, dict] = {}
    for file in weight_files(path):
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
        ValueError: a file of it is truncated or corrupt, is no regular file, names a tensor that another has,
            or says of a quantized weight what its planes are not.
    """
    found, formats = _read_files(Path(path))
    # transformers writes a tensor under the name that its model once had for it, and in the metadata as it
    # has now.
    names = {new(name): name for name in found} if formats else {}
    for fqn, attributes in formats.items():
        planes = {
            plane: found.pop(names[in_file])
            for plane, in_file in plane_names(fqn).items()
            if in_file in names
        }
        if not planes:  # it is shared, and saved under its other name
            continue
        if missing := [plane for plane in PLANES if plane not in planes]:
            raise next(iter(planes.values())).error(
                f"is a plane of {fqn}, of which {' and '.join(missing)} is missing; download the "
                "checkpoint again"
            )
        if fqn in found:
            raise found[fqn].error(
                f"is there twice, quantized as {planes['qdata'].name}, too; remove one of the two"
            )
        found[fqn] = _quantized_source(planes, fqn, attributes)
    for name, source in found.items():
        of_torchao = source.about is not None
        if (
            not of_torchao
            and re.fullmatch(r"(.*\.)?_.+_qdata", name)
            and name.removesuffix("qdata") + "scale" in found
        ):
            raise source.error(
                "is a plane of a quantized weight, of which the metadata says nothing that "
                "can be read; download it again"
            )
    return found


def tensor_names(path: str | os.PathLike) -> set[str]:
    """What the files of a checkpoint call their tensors, planes included.

    Raises:
        FileNotFoundError, ValueError: as `sources`.
    """
    return set(_read_files(Path(path))[0])


def saved_attributes(
    path: str | os.PathLike, renaming: Callable[[], Callable[[str], str]]
) -> dict[str, dict]:
    """The attributes of each quantized weight of a checkpoint, and its `scale_dtype`, by the name that its
    files give it; `renaming()` maps names there to the metadata's, and is asked for where they differ.

    Raises:
        FileNotFoundError, ValueError: as `sources`.
    """
    found, formats = _read_files(Path(path))
    names = {name: name for name in found}
    if not {plane_names(fqn)["qdata"] for fqn in formats} <= set(names):
        new = renaming()
        names = {new(name): name for name in found}
    attributes = {}
    for fqn in formats:
        planes = {
            plane: found[names[in_file]] for plane, in_file in plane_names(fqn).items() if in_file in names
        }
        if {*PLANES} <= {*planes}:  # else the weight is shared, and saved under its other name
            _quantized_source(planes, fqn, formats[fqn])
            module, _, name = planes["qdata"].name.rpartition(".")
            about = {**formats[fqn], "scale_dtype": planes["scale"].dtype}
            attributes[f"{module}.{name.removeprefix('_').removesuffix('_qdata')}"] = about
    return attributes
