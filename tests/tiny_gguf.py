"""GGUF files of small models, as llama.cpp's converter would write them."""

import re

import gguf
import numpy as np
import torch
from gguf.quants import quantize

from rtn_tensor.integrations.transformers.files import tensors_in_files

KINDS = gguf.GGMLQuantizationType


def permuted(t, heads):
    """As convert_hf_to_gguf.py has it."""
    return t.reshape(heads, 2, t.shape[0] // heads // 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)


def write_like(file, model, architecture="llama", kind=KINDS.BF16, change=lambda name, t: t, without=()):
    """A GGUF file of a float model, with some metadata of every type."""
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture],
        model.config.num_hidden_layers,
    )
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_file_type(32)
    writer.add_quantization_version(2)
    writer.add_name("tiny")
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(320)])
    writer.add_token_scores([0.5] * 320)
    writer.add_add_bos_token(True)
    stacked = {}
    for name, t in tensors_in_files(model)[0].items():
        if part := re.match(r"(.*\.experts)\.(\d+)\.(.*)$", name):
            stacked.setdefault(f"{part[1]}.{part[3]}", []).append(t)
        else:
            stacked[name] = t
    for name, t in stacked.items():
        t = torch.stack(t) if isinstance(t, list) else t
        t = t.detach().float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            about = model.config
            t = permuted(t, about.num_attention_heads if ".q_proj." in name else about.num_key_value_heads)
        new = names.get_name(name, (".weight", ".bias"))
        t = change(new, t)
        if new in without:
            continue
        if t.ndim == 1 or kind == KINDS.F32:
            writer.add_tensor(new, np.ascontiguousarray(t, dtype=np.float32))
        else:
            writer.add_tensor(new, quantize(t, kind), raw_dtype=kind)
    writer.add_tensor("rope_freqs.weight", np.ones(12, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
