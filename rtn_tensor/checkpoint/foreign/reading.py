"""Checkpoints that other libraries quantized: recognised by their configs, and their planes put together to
weights."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtn_tensor.checkpoint.files import read_json
from rtn_tensor.checkpoint.foreign import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp4,
    fp8,
    gptq,
    torchao,
)
from rtn_tensor.checkpoint.foreign.names import FOREIGN, FOREIGN_NAMES, not_read
from rtn_tensor.checkpoint.sources import Source

Reader = Callable[[dict[str, Source], Mapping[str, Any], str], None]

# By quant_method: what puts the planes of each weight together, in a dict of all tensors by name.
READERS: dict[str, Reader] = {
    "awq": awq.read,
    "auto-round": auto_round.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "modelopt": fp4.read_modelopt,
    "mxfp4": fp4.read_mxfp4,
}
OURS = "torchao"
# Beside the config.json of older folders, and the quant_method that each is of.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Scales of activations and of caches, which are not quantized here.
OF_ACTIVATIONS = (
    r"\.(input|output|k|v|q|kv|prob)(_global)?_(scale|zero_point)(_inv)?$|\.(k|v|q)_proj\.(k|v|q)_scale$"
)


@dataclass(frozen=True)
class Description:
    """What a folder says of the way in which another library quantized its weights."""

    method: str
    options: Mapping[str, Any]
    where: str

    @property
    def kind(self) -> str:
        return FOREIGN.get(self.method, self.method)


def check_method(how: Any, where: str, key: str) -> str:
    """The quant_method of a quantization config.

    Raises:
        ValueError: it is no such config, or of a format that is not read.
    """
    if not isinstance(how, dict):
        raise ValueError(f"{where}: {key} is {str(how)[:100]}; it must be an object, or not there")
    old = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(how) else None
    unnamed = "mlx" if {"bits", "group_size"} <= set(how) else old
    method = how.get("quant_method", unnamed)
    if method == "modelopt_fp4":
        method = "modelopt"
    if not isinstance(method, str) or (method != OURS and method not in READERS):
        raise ValueError(not_read(FOREIGN.get(str(method), str(method)), f"{where} ({key})"))
    return method


def is_ours(how: Any) -> bool:
    """Whether a quantization config is one that this library wrote: of torchao's, with our own in it."""
    return isinstance(how, dict) and bool(re.search("RTN(Int[48]Weight)?Config", str(how)))


def configs_in(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The quantization configs in a model's config, or in those of its parts, and the keys that they lie
    under."""
    return [
        (key, about[key])
        for about in (config, *(part for part in config.values() if isinstance(part, dict)))
        for key in ("quantization_config", "compression_config")
        if about.get(key)
    ]


def description(path: Path, names: Iterable[str]) -> Description | None:
    """What the folder at `path`, with tensors of these `names`, says of the way in which another library
    quantized it; None where it says nothing.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, or is of a format that is not read.
    """
    if (file := path / "config.json").is_file():
        found = configs_in(read_json(file))
        methods = {check_method(how, str(file), key): (key, how) for key, how in found}
        if len(methods) > 1 or any(how != found[0][1] for _, how in found):
            raise ValueError(f"{file} says in two ways how its weights are quantized; remove what is not so")
        for method, (key, how) in methods.items():
            return None if method == OURS else Description(method, how, f"{file} ({key})")
    if not any(re.search(pattern, name) for name in names for pattern in FOREIGN_NAMES):
        return None  # they may be left of a checkpoint that was dequantized
    for name, method in FILES.items():
        if (file := path / name).is_file() and (how := read_json(file)):
            how = how.get("quantization", how) if method == "modelopt" else how
            if not isinstance(how, dict):
                raise ValueError(f"{file}: quantization is {str(how)[:100]}; it must be an object")
            return Description(check_method({"quant_method": method, **how}, str(file), name), how, str(file))
    return None


def put_together(path: Path, found: Mapping[str, Source]) -> tuple[dict[str, Source], Description | None]:
    """`found` with each weight in the place of the planes that another library made of it, and without scales
    of activations; and what the folder at `path` says of that library, where there is one.

    Raises:
        FileNotFoundError, ValueError: as `description`.
        ValueError: an option that is not read; a plane is missing, or not as the others say.
    """
    result = dict(found)
    if torchao.read(result):
        return result, Description(OURS, {}, str(path))
    if (how := description(path, found)) is not None:
        READERS[how.method](result, how.options, how.where)
        if found and not any(source.rows is not None for source in result.values()):
            raise ValueError(
                f"{how.where}: the weights are said to be quantized by {how.kind}, and the files hold none "
                "that is; remove that entry, or download the checkpoint again"
            )
        for name in found:
            if re.search(OF_ACTIVATIONS, name):
                result.pop(name, None)
    return result, how
