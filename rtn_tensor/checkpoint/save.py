"""`save` writes a model as a folder of safetensors.

On disk a quantized weight `a.b.weight` is its two planes, `a.b._weight_qdata` and `a.b._weight_scale`, and a
line of JSON in the file's metadata, as torchao flattens a tensor subclass; so transformers and torchao read
what `save` writes.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rtn_tensor.checkpoint.folders import new_folder
from rtn_tensor.checkpoint.sources import flattened
from rtn_tensor.integrations.diffusers import is_diffusers
from rtn_tensor.integrations.transformers.description import described
from rtn_tensor.integrations.transformers.models import is_pretrained
from rtn_tensor.quantize.report import untied_from
from rtn_tensor.quantize.selection import check_module, tensors_of


def _to_write(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state_dict, those that are shared once; but each of those that are not shared any more
    with some that they were shared with, as who reads them cannot know with which."""
    places = list(tensors_of(model, buffers=True))
    untied = {fqn: names for fqn, _, _, t in places if (names := untied_from(t))}
    apart = {*untied, *(name for names in untied.values() for name in names)}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for fqn, _, _, t in places:
        if id(t) not in seen:
            tensors[fqn] = t
        elif fqn in apart:
            tensors[fqn] = t.detach().clone()
        seen.add(id(t))
    return tensors


def _write(model: nn.Module, folder: Path, max_shard_size: str | int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors, metadata = flattened(_to_write(model))
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def save(model: Any, path: str | os.PathLike, max_shard_size: str | int = "5GB", force: bool = False) -> None:
    """Writes `model`, quantized or not, as a folder of safetensors that `load` reads back bit for bit; a
    transformers model with its config, so that transformers reads it, too.

    It is written under a temporary name beside `path` and renamed at the end, so a folder named `path` is
    always whole. What an earlier process was killed over is removed, or put back where it was the only one.

    Args:
        model: any module.
        path: the folder to make; a name that ends as a file's, as in "model.safetensors", is refused.
        max_shard_size: bytes, or as "5GB", from which on a file is split.
        force: replace the model folder that is at `path`, once the new one is whole.

    Raises:
        FileExistsError: there is something at `path`, and not `force`, or something other than a model
            folder.
        OSError: it could not be written (a full disk, say); nothing stays behind.
        ValueError: `path` is named as a file is.
        TypeError: `model` is no module.
    """
    check_module(model)
    with new_folder(path, force) as folder:
        write(model, folder, max_shard_size)


def write(model: Any, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """What `save` does, into a folder that is there."""
    from safetensors import SafetensorError

    try:
        if is_pretrained(model):
            with described(model):
                model.save_pretrained(folder, max_shard_size=max_shard_size)
        elif is_diffusers(model):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            _write(model, folder, max_shard_size)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"could not be written ({error})", str(folder)) from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(
            error.errno, error.strerror or str(error), str(folder)
        ) from error  # a disk that is full
