"""Safetensors that are written tensor by tensor, so that of what is written only one is in memory."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from rtn_tensor.checkpoint.foreign.written import Lazy
from rtn_tensor.checkpoint.sources import SAFETENSORS_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_file(file: Path, tensors: Mapping[str, Lazy]) -> None:
    """Writes one file of safetensors."""
    # The largest elements first, so that each tensor begins at a multiple of its own.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        t = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at := at + t.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            t = tensors[name].make().detach().cpu().contiguous()
            assert (t.dtype, tuple(t.shape)) == (tensors[name].dtype, tensors[name].shape), name
            opened.write(t.flatten().view(torch.uint8).numpy().data)


def write_shards(folder: Path, tensors: Mapping[str, Lazy], limit: int) -> None:
    """Writes a model's tensors as one file, or as several of at most `limit` bytes and an index."""
    shards: list[dict[str, Lazy]] = [{}]
    size = 0
    for name, t in tensors.items():
        if size and size + t.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0])
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
