"""Models with a recurrent state: its steps and convolutions stay float, and the report says why."""

import copy

import pytest
import torch
import transformers
from torch import nn

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, quantize_, rtn_int4, rtn_int8, save

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "layer_types": ["linear_attention", "full_attention"],
}
# What sets the steps of the state, and what stays float beside it.
MODELS = {
    "Mamba": ({**TEXT, "state_size": 8, "time_step_rank": 8}, {"x_proj", "dt_proj"}),
    "FalconMamba": ({**TEXT, "state_size": 8, "time_step_rank": 8}, {"x_proj", "dt_proj"}),
    "Mamba2": (
        {**TEXT, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}, set()
    ),
    "Jamba": (
        {**TEXT, **EXPERTS, **MAMBA, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
        {"x_proj", "dt_proj"},
    ),
    "Bamba": ({**TEXT, **MAMBA2, "attn_layer_indices": [1]}, set()),
    "Zamba": (
        {**TEXT, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
         "attention_head_dim": 32, "mamba_dt_rank": 8, "n_mamba_heads": 2, "use_mamba_kernels": False},
        set(),
    ),
    "Zamba2": (
        {**TEXT, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
         "num_mem_blocks": 1, "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8,
         "mamba_headdim": 16, "chunk_size": 8, "use_mem_eff_path": False},
        set(),
    ),
    "FalconH1": ({**TEXT, **MAMBA2, "mamba_d_ssm": 128}, set()),
    "GraniteMoeHybrid": (
        {**TEXT, **EXPERTS, **MAMBA2, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
        set(),
    ),
    "NemotronH": (
        {**TEXT, **EXPERTS, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"],
         "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8,
         "use_mamba_kernels": False},
        set(),
    ),
    "Lfm2": ({**TEXT, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, set()),
    "Qwen3Next": ({**TEXT, **EXPERTS, **DELTA}, {"in_proj_ba"}),
    "Qwen3_5": ({**TEXT, **DELTA}, {"in_proj_a", "in_proj_b"}),
    "Qwen3_5Moe": ({**TEXT, **EXPERTS, **DELTA}, {"in_proj_a", "in_proj_b"}),
    "KimiLinear": ({**TEXT}, {"f_a_proj", "f_b_proj", "b_proj"}),
    "OlmoHybrid": ({**TEXT, **DELTA}, {"a_proj", "b_proj"}),
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**MODELS[name][0])).eval()
    with torch.no_grad():
        for fqn, p in model.named_parameters():
            if p.dim() > 1 and "A_log" not in fqn:
                p.normal_(std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_hybrids(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    result = quantize_(model, rtn_int8(32))
    found = set()
    for row in result.rows:
        owner = model.get_submodule(row.name.rpartition(".")[0])
        if isinstance(owner, nn.Conv1d) and len(row.shape) > 1:
            assert (row.bits, row.note) == (None, "weight of a Conv1d: no kernel")
        if row.note == "steps of a recurrent state":
            found.add(row.name.split(".")[-2])
        elif isinstance(owner, nn.Linear) and len(row.shape) > 1:
            assert row.bits == 8 or row.note == "router", row
        elif len(row.shape) > 1:
            assert row.bits or row.note, row
    assert found == MODELS[name][1]
    expected = copy.deepcopy(model)
    dequantize_(expected)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
    save(model, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    streamed = load(tmp_path / "float", rtn_int4(32))
    dense = copy.deepcopy(streamed)
    dequantize_(dense)
    torch.testing.assert_close(logits(streamed), logits(dense), rtol=1e-3, atol=1e-3)


def test_steps_by_name():
    model = build("Mamba")
    quantize_(model, [("backbone.layers.0.mixer.x_proj", rtn_int8(32)), ("*", rtn_int4(32))])
    mixer = model.backbone.layers[0].mixer
    assert mixer.x_proj.weight.bits == 8
    assert mixer.in_proj.weight.bits == 4
    assert not isinstance(mixer.dt_proj.weight, RTNQuantizedTensor)
