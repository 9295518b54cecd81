"""What lies on disk as a checkpoint, looked at before it is believed: which files, JSON, and the headers of
safetensors."""

import json
import math
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
# Bits of an element, by safetensors' names for dtypes.
DTYPE_BITS = {
    **{
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
    },
    **{
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
    },
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
# Of a transformers or diffusers folder, or with .index.json; the first that is there counts.
MODEL_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


def check_regular(file: Path) -> None:
    """Raises unless `file` is one with content: to read a pipe or a device might never end.

    Raises:
        FileNotFoundError: there is none, or a link that leads nowhere.
        ValueError: it is a folder, a pipe, a device or a socket.
    """
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        why = f"is a link to {file.readlink()}, which is not there" if file.is_symlink() else "is not there"
        raise FileNotFoundError(f"{file} {why}; copy or download it again") from None
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{file} is a {kinds.get(stat.S_IFMT(mode), 'device')} and no regular file; remove or replace it"
        )


def corrupt(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is truncated or corrupt ({why}); copy or download it again")


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What `json.loads` gives, of text of which nothing is known; `pairs` makes an object of its pairs.

    Raises:
        ValueError: it is no JSON, or nests too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it names {key!r} twice")
        found[key] = value
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
        FileNotFoundError, ValueError: as `check_regular`; or it holds no JSON, or JSON that is no object.
    """
    check_regular(file)
    try:
        if (size := file.stat().st_size) > HEADER_LIMIT:
            raise ValueError(f"it has {size} bytes")
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); copy or download it again") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} holds a JSON {type(found).__name__}, and not an object; copy or download it again"
        )
    return found


# ----------------------------------------------------------------------------- which files


def _there(file: Path) -> bool:
    return file.exists() or file.is_symlink()


def is_file_name(name: Any) -> bool:
    """Whether `name` names a file in a folder, without a way out of it."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    # A lone surrogate, which has no bytes, is not printable.
    return name.isprintable() and len(name.encode()) <= 255


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of which are there."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map of names to files; copy or download it again")
    for tensor, name in names.items():
        if not is_file_name(name):
            raise ValueError(
                f"{index}: weight_map gives {name!r} for {tensor}; it must be the name of a "
                "file beside it, without a folder"
            )
    files = [index.parent / name for name in sorted(set(names.values()))]
    if missing := [file.name for file in files if not _there(file)]:
        raise FileNotFoundError(
            f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; "
            "download the checkpoint again"
        )
    return files


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint: `path` itself, or those that transformers would read of a folder, or else
    all of one kind in it.

    Raises:
        FileNotFoundError: there is none, or one that an index names is not there.
        ValueError: an index is corrupt, or names a file outside of the folder.
    """
    if not path.is_dir():
        if path.exists():
            check_regular(path)
            return [path]
        raise FileNotFoundError(
            f"{path} is not there, and so holds no checkpoint; give a folder with *.safetensors or *.bin, or "
            "one such file"
        )
    if named := _named_by_config(path):
        return named
    for name in MODEL_FILES:
        if _there(path / name):
            return [path / name]
        if _there(index := path / f"{name}.index.json"):
            return _shards(index)
    for end in ("*.safetensors", "pytorch_model*.bin"):
        indices, files = (
            # As macOS's ._model.safetensors.
            [file for file in sorted(path.glob(pattern)) if not file.name.startswith((".", "adapter_"))]
            for pattern in (f"{end}.index.json", end)
        )
        if len(indices) > 1:
            raise ValueError(
                f"{path} holds several checkpoints "
                f"({', '.join(index.name for index in indices)}); leave one of them there"
            )
        if indices or files:
            return _shards(indices[0]) if indices else files
    alone = (
        "; it holds an adapter alone: give the model that it belongs to"
        if _there(path / "adapter_config.json")
        else ""
    )
    raise FileNotFoundError(
        f"{path} holds no checkpoint; give a folder with *.safetensors or "
        f"pytorch_model*.bin, or one such file{alone}"
    )


def _named_by_config(path: Path) -> list[Path] | None:
    """The files that config.json names in the place of transformers' usual ones."""
    if (
        not (path / "config.json").is_file()
        or (name := read_json(path / "config.json").get("transformers_weights")) is None
    ):
        return None
    if not is_file_name(name) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"{path / 'config.json'}: transformers_weights is {name!r}; it must be the name of "
            "a safetensors file beside it"
        )
    return _shards(path / name) if name.endswith(".json") else [path / name]


# ----------------------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file, as its header has it; `start` counts from the file's begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(file: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a safetensors file in the order in which they lie there, and its metadata. Each lies
    whole inside the file, and no two overlap.

    Raises:
        FileNotFoundError, ValueError: as `check_regular`; or the header is not one of safetensors, or not one
            of this file.
    """
    check_regular(file)
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise corrupt(
                file,
                f"its {size} bytes cannot begin with a header of {length}"
                if size >= 8
                else f"it has {size} bytes",
            )
        text = opened.read(length)
    try:
        header = parse_json(text, _once)
    except ValueError as error:
        raise corrupt(file, f"its header is none: {error}") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(file, "its header is no object, or its metadata not one of strings")
    spans = []
    for name, about in header.items():
        entry, stop = _entry(name, about, lambda why, name=name: corrupt(file, f"{name}: {why}"))
        spans.append((entry.start, stop, entry))
    spans.sort(key=lambda span: span[:2])
    at, end = 0, size - 8 - length
    for start, stop, entry in spans:
        if start != at:
            raise corrupt(file, f"{entry.name} begins at byte {start}, and what lies before it ends at {at}")
        at = stop
    if at != end:
        raise corrupt(file, f"its tensors take {at} bytes, and it holds {end} after its header")
    return [Entry(e.name, e.dtype, e.shape, 8 + length + e.start) for _, _, e in spans], metadata


def _entry(name: str, about: Any, error: Callable[[str], ValueError]) -> tuple[Entry, int]:
    """A tensor as the header has it, and where its bytes end."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(about, dict) or not {"dtype", "shape", "data_offsets"} <= set(about):
        raise error("it lacks dtype, shape or data_offsets")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise error(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPE_BITS)}")
    # A tensor without elements has sizes, too, whose strides torch computes.
    if not counts(shape) or len(shape) > 64 or math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise error(f"shape is {str(shape)[:100]}; it must be a list of sizes")
    if not counts(offsets) or len(offsets) != 2:
        raise error(f"data_offsets are {str(offsets)[:100]}; they must be where it begins and where it ends")
    start, stop = offsets
    if 8 * (stop - start) != math.prod(shape) * DTYPE_BITS[dtype]:
        raise error(f"{dtype} {shape} cannot lie from byte {start} to {stop}")
    return Entry(name, dtype, tuple(shape), start), stop
