"""Models that are exported, and what lies in the folders that `export` writes."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_llama import tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from rtn_tensor import (
    dequantize_,
    load,
    quantize_,
    rtn_int4,
    save,
)

IDS = torch.tensor([[5, 77, 30, 9, 101, 64]])


def but_the_ends(module, fqn):
    return isinstance(module, nn.Linear) and fqn != "lm_head"


def llama(config=None, filter_fn=but_the_ends, **kwargs):
    model = tiny_llama(dtype=torch.bfloat16, **kwargs)
    quantize_(model, config if config is not None else rtn_int4(32), filter_fn)
    return model


def llava():
    """Whose files have `language_model.lm_head` and `language_model.model` for the model's own `lm_head` and
    `model.language_model`."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=128)
    vision = CLIPVisionConfig(**shape, image_size=32, patch_size=8, projection_dim=64)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()


def read(folder):
    """The tensors of a folder, and its quantization config."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found, json.loads((folder / "config.json").read_text())["quantization_config"]


def from_transformers(folder, monkeypatch, **kwargs):
    """The model that transformers makes of a folder with compressed-tensors, dequantized."""
    pytest.importorskip("compressed_tensors")
    from loguru import logger

    logger.remove()
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    with torch.no_grad():
        model(IDS)  # at which it dequantizes
    return model


def assert_same(got, model):
    """The weights of `got` are bitwise those of `model`, dequantized."""
    dequantize_(model)
    expected = dict(model.named_parameters(remove_duplicate=False))
    found = dict(got.named_parameters(remove_duplicate=False))
    for name, w in expected.items():
        assert torch.equal(found[name], w), name
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, model(IDS).logits, rtol=0, atol=1e-2)


def load_of_ours(tmp_path):
    save(llama(tied=True), tmp_path / "ours")
    return load(tmp_path / "ours")
