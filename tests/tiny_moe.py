"""Every class of mixture-of-experts language model that transformers has of a kind, small and with random
weights."""

import torch
import transformers

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
JAMBA = {
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
}

CONFIGS = {
    "Mixtral": LOCAL,
    "Qwen2Moe": ROUTED | {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": ROUTED | {"moe_intermediate_size": 96, "head_dim": 16},
    "Olmoe": ROUTED,
    "DeepseekV2": DEEPSEEK,
    "DeepseekV3": DEEPSEEK,
    "GptOss": LOCAL | {"head_dim": 16},
    "Llama4": LOCAL
    | {"head_dim": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    "Jamba": ROUTED | JAMBA | {"use_mamba_kernels": False},
    "GraniteMoe": LOCAL,
    "Phimoe": LOCAL,
}


def tiny_moe(name, dtype=torch.float32):
    """A model of `CONFIGS`, in eval mode, whose every weight is large enough to matter."""
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")(
        **COMMON | CONFIGS[name]
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.06 if parameter.dim() > 1 else 0.02)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return model.to(dtype)
