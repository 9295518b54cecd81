"""GGUF files: of architectures whose tensors are known here read row by row, of others by transformers, which
dequantizes all of them at once."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from rtn_tensor.checkpoint.files import check_regular
from rtn_tensor.checkpoint.fill import Piece
from rtn_tensor.checkpoint.foreign.blocks import File
from rtn_tensor.checkpoint.foreign.gguf import COMPUTED
from rtn_tensor.checkpoint.sources import Source
from rtn_tensor.integrations.transformers.files import tensors_in_files
from rtn_tensor.integrations.transformers.folders import made, of_library
from rtn_tensor.integrations.transformers.models import default_filter
from rtn_tensor.integrations.transformers.names import placed
from rtn_tensor.quantize.api import quantize_
from rtn_tensor.quantize.kinds import FilterFn
from rtn_tensor.quantize.selection import Rules

# Whose files hold what transformers' do, but for what is named here.
READ = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "phi3", "starcoder2", "gemma2", "gemma3")
PERMUTED = (
    "llama",
)  # llama.cpp's rope turns neighbouring rows of q and k, transformers' the halves of a head
NORMS_LESS_ONE = ("gemma2", "gemma3")  # in transformers


def pieces_of(file: File, model: Any) -> list[Piece]:
    """The tensors of a GGUF file, and where in `model` each goes.

    Raises:
        ValueError: a tensor does not lie in the file whole, or has no name there.
    """
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[file.architecture], file.layers)
    about = model.config.get_text_config()
    heads = {
        "q_proj": about.num_attention_heads,
        "k_proj": about.num_key_value_heads or about.num_attention_heads,
    }
    found: dict[str, Source] = {}
    taken = set(COMPUTED)
    for name in tensors_in_files(model)[0]:
        expert = re.match(r"(.*\.experts)\.(\d+)\.(.*)$", name)
        there = names.get_name(f"{expert[1]}.{expert[3]}" if expert else name, (".weight", ".bias"))
        if there is None or there not in file.tensors:
            continue  # and the checkpoint lacks it, which is an error
        taken.add(there)
        module = name.rpartition(".")[0].rpartition(".")[2]
        n = int(file.tensors[there].shape[-1])
        order = None
        if file.architecture in PERMUTED and module in heads and n % (2 * heads[module]) == 0:
            order = torch.arange(n).view(heads[module], -1, 2).transpose(1, 2).flatten()
        source = file.source(there, name, int(expert[2]) if expert else None, order)
        if file.architecture in NORMS_LESS_ONE and name.endswith("norm.weight"):
            source = _less_one(source)
        found[name] = source
    for name in file.tensors:
        if name not in taken:
            found[name] = file.source(name, name)
    return [Piece(*place) for place in placed(model, found)]


def _less_one(source: Source) -> Source:
    def view() -> Tensor:
        return source.view() - 1

    return Source(source.file, source.name, source.shape, source.dtype, view, view)


def empty_of_gguf(path: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model that a GGUF file describes, its parameters on meta."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make() -> Any:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))

    model = made(path, make, dtype or torch.bfloat16).eval()
    model.name_or_path = str(path.parent)
    return model


def load_by_transformers(
    path: Path,
    config: AOBaseConfig | Rules | None,
    device: Any,
    dtype: torch.dtype | None,
    filter_fn: FilterFn | None,
) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    check_regular(path)
    with of_library(path, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype or torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()
    if config is not None:
        quantize_(model, config, default_filter(model, config, filter_fn), device)
    return model if device is None else model.to(device)
