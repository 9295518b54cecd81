"""Models that are more than a decoder of linear layers and experts."""

import torch
from engine import ROUNDING, difference, engine, greedy, rtn
from vllm_models import reference, saved, weights

from rtn_tensor import rtn_int4


def test_latent_attention(folder, tmp_path):
    """DeepSeek's: vLLM asks the layer kv_b_proj for its dequantized weight, and multiplies it into the
    queries and the outputs. Its backend for AMX, which it takes where it can, has no fp32."""
    path, config = folder("deepseek_v2"), rtn_int4(64, "absmax")
    with engine(path, attention_backend="CPU_MLA", **rtn(bits=4, group_size=64)) as llm:
        generated = greedy(llm)
        names = {name.rpartition(".layers.")[2] for name in weights(llm)}
    assert {"0.self_attn.kv_b_proj.weight", "0.self_attn.kv_a_proj_with_mqa.weight"} <= names
    assert difference(reference(path, config), generated) < ROUNDING["float32"]
    assert difference(reference(path), generated) > 100 * ROUNDING["float32"]
    with engine(saved(path, tmp_path / "q", config=config), dtype="bfloat16") as llm:
        generated = greedy(llm)
    assert difference(reference(path, config, torch.bfloat16), generated) < ROUNDING["bfloat16"]
