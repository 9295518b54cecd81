"""A tiny config of any class of transformers: sizes by the names of its fields, and a table of special cases."""

import re
from typing import Any

from transformers import PreTrainedConfig

# The first pattern that matches a field's name in full says how large an int there, or in a list there, may be.
SIZES: list[tuple[str, int]] = [
    (r"type_vocab_size|num_feat_extract_layers|index_topk|index_kpool|.*_labels|num_channels|in_channels|out_channels|in_chans|.*kernel.*|.*stride.*|.*conv_dim|.*_token_ids?|.*ratio", 1 << 40),
    (r".*(vocab_size|codebook_size|num_embeddings|n_tokens|head_out_channels)(_\w+)?|entity_vocab_size|bucket_size", 256),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*groups", 64),
    (r".*(num_|n_)(key_value|kv)_heads|multi_query_group_num|(linear_)?num_key_heads|linear_num_key_heads", 2),
    (r"(.*_)?(num_|n_)?(attention_)?heads?|num_heads\w*|index_n_heads|.*_heads", 4),
    (r".*head_dim|.*head_size|d_kv|kv_channels|d_head|mamba_d_head|dim_head|dim_key|mamba_headdim|rotary_dim", 16),
    (r".*(intermediate|ffn|ff|feed_?forward|inner|mlp).*|d_ff|n_inner|hidden_dim_ff", 96),
    (r"(.*_)?(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|blocks)|.*depth|n_layers?|depths?|num_layers_\w+|num_block_\w+|.*_layers", 2),
    (r"(.*_)?(image|input|crop|img)_size", 32),
    (r"patch_size", 8),
    (r"(n_|num_)?(routed_|local_|moe_)*(num_)?experts|.*num_experts", 4),
    (r".*experts_per_tok(en)?|.*top_?k|moe_k|.*_topk", 2),
    (r"n_shared_experts|n_group|topk_group|num_expert_groups?", 1),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_.*positions|max_seq_len\w*|max_position|max_2d_position_embeddings)", 128),
    (r".*(num_queries|num_query_tokens|num_latents|query_length|num_proposals|n_queries|num_denoising)", 8),
    (r".*chunk_size", 8),
    (r"first_k_dense_replace", 1),
    (r"ssm_state_size|state_size|mamba_d_state|.*window_size", 16),
    (r".*(hidden|embed|d_model|n_embd|width|_dim|channels|proj|rank|query_pre_attn_scalar|num_filters|dim).*", 64),
]  # fmt: skip


def limit(name: str) -> int | None:
    """How large an int in a field of this name may be; None for one that says no size."""
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


LAYERED = re.compile(r".*layer_types|layers_block_type|.*_layers_types|hybrid_override_pattern")


def shrunk(
    config: PreTrainedConfig,
    ids: dict[int, int],
    only_layers: bool,
    keep_layers: bool = False,
    keep_given: bool = False,
) -> dict[str, Any]:
    """The fields of a config tiny in place of those of `config`."""
    new: dict[str, Any] = {}
    fields = {n: v for n, v in vars(config).items() if not n.startswith("_") and n not in IGNORED}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            # What indexes the layers of a backbone lies beside it.
            keep = keep_layers or name == "backbone_config"
            new[name] = tiny(type(value), value, ids, only_layers, keep, keep_given)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int) and re.fullmatch(r".*token_(id|index)|.*_token_ids?|.*_id", name):
            if value >= 100:
                new[name] = ids.setdefault(value, 100 + len(ids))
        elif isinstance(value, int):
            most = limit(name)
            if keep_layers and most == 2 and "layer" in name:
                continue
            if only_layers and most not in (2, 256, 128):
                continue
            if most is not None and value > most:
                new[name] = most
        elif isinstance(value, list | tuple) and value and not LAYERED.fullmatch(name):
            most = limit(name)
            if most is not None and not only_layers and all(type(v) is int for v in value):
                new[name] = type(value)(min(v, 2 if v == 3 and most == 4 else most) for v in value)
    return new


IGNORED = {"id2label", "label2id", "num_labels", "chunk_size_feed_forward", "transformers_version", "dtype"}


def tiny(
    kind: type[PreTrainedConfig],
    config: PreTrainedConfig | None = None,
    ids: dict[int, int] | None = None,
    only_layers: bool = False,
    keep_layers: bool = False,
    keep_given: bool = False,
) -> PreTrainedConfig:
    """A tiny config of the class `kind`, made of a default one; `only_layers` leaves the widths, and
    `keep_given` what is no size, where the config around it gave another value than the default."""
    config = kind(**BEFORE.get(kind.model_type, {})) if config is None else config
    new = shrunk(config, {} if ids is None else ids, only_layers, keep_layers, keep_given)
    if keep_given:
        given = {n: v for n, v in config.to_diff_dict().items() if n in vars(config) and n not in IGNORED}
        new = {n: v for n, v in given.items() if not n.startswith("_")} | new
    new |= SPECIAL.get(kind.model_type, {})
    for name in ("num_key_value_heads", "num_kv_heads"):
        if name in new and vars(config)[name] == getattr(config, "num_attention_heads", None):
            new[name] = new.get("num_attention_heads", 4)  # as latent attention has it
    if rope := fitting_rope(config, new):
        new["rope_parameters"] = rope
    # Layers of every type that it has, each once.
    for name, value in vars(config).items():
        if LAYERED.fullmatch(name) and isinstance(value, list | tuple) and value:
            kinds = list(dict.fromkeys(value))
            new.setdefault(name, kinds if len(kinds) > 1 else kinds * 2)
            if name in ("layer_types", "layers_block_type") and "num_hidden_layers" in new:
                new["num_hidden_layers"] = len(new[name])
    count = getattr(config, "num_hidden_layers", None)
    if isinstance(count, int) and count > 6 and new.get("num_hidden_layers", count) != count:
        for name, value in vars(config).items():
            if isinstance(value, list | tuple) and len(value) == count and not LAYERED.fullmatch(name):
                new[name] = type(value)(new.get(name, value)[: new["num_hidden_layers"]])
    if getattr(config, "mlp_layer_types", None) and getattr(config, "layer_types", None):
        n = max(len(new[k]) for k in ("mlp_layer_types", "layer_types"))
        for k in ("mlp_layer_types", "layer_types"):
            new[k] = (new[k] * n)[:n]
        new["num_hidden_layers"] = n
    return kind(**new)


def fitting_rope(config: PreTrainedConfig, new: dict[str, Any]) -> dict[str, Any] | None:
    """The rope of several axes, whose parts add up to half of what a tiny head rotates."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return None
    head = new.get("head_dim", getattr(config, "head_dim", None)) or 64 // 4
    half = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


RESNET = {
    "embedding_size": 64,
    "hidden_sizes": [32, 64, 64, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def resnet(*stages: str) -> dict[str, Any]:
    """In place of timm's, which is not needed for what is tested."""
    return {
        "backbone_config": {"model_type": "resnet"} | RESNET | {"out_features": list(stages)},
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
    }


def axes(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


BEFORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "table-transformer"), resnet("stage4")),
    **dict.fromkeys(("deformable_detr",), resnet("stage2", "stage3", "stage4")),
    **dict.fromkeys(
        (
            "rt_detr",
            "rt_detr_v2",
            "d_fine",
            "deimv2",
            "pp_doclayout_v2",
            "pp_doclayout_v3",
            "pp_doclayout_v4",
        ),
        resnet("stage2", "stage3", "stage4"),
    ),
    "upernet": resnet("stage1", "stage2", "stage3", "stage4") | {"auxiliary_in_channels": 64},
    **dict.fromkeys(
        ("depth_anything", "prompt_depth_anything", "chmv2"),
        {
            "backbone_config": {
                "model_type": "dinov2",
                "num_hidden_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
                "reshape_hidden_states": False,
            }
        },
    ),
    **dict.fromkeys(("chameleon", "emu3"), {"vocabulary_map": {"<image>": 100, "IMGIMGBSA": 101}}),
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
}
SERIES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3]}
ZAMBA = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "mamba_d_conv": 4, "mamba_expand": 2},
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 256},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "depth_pro": {"patch_size": 32},
    "fun_asr_nano": {
        "adaptor_config": {
            "hidden_size": 64,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    },
    "lw_detr_vit": {
        "num_windows": 4,
        "num_hidden_layers": 4,
        "window_block_indices": [0, 1],
        "out_indices": [2, 4],
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 32, "num_frames": 2},
    "vitmatte": {"fusion_hidden_sizes": [64, 64, 32, 16], "convstream_hidden_sizes": [48, 96, 192]},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), {"head_dim": 16}),
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "mamba2": {"num_heads": 8},
    **dict.fromkeys(
        (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "glm4v_text",
            "glm_ocr_text",
            "glm_image_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "ernie4_5_vl_moe_text",
            "glm46v_text",
        ),
        axes(2, 3, 3),
    ),
    "glm4v_moe_text": axes(2, 1, 1),
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), SERIES),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid"),
        {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    ),
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "zamba2": ZAMBA
    | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1}
    | {"mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 8}
    | {"use_mem_eff_path": False},
    "zamba": ZAMBA
    | {"attention_hidden_size": None}
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32}
    | {"mamba_dt_rank": 8, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 16],
        "max_position_embeddings": 128,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "mistral4": {
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "qk_head_dim": 32,
        "v_head_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "wav2vec2-bert": {"vocab_size": 64},
    "longcat_flash": {
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "head_dim": 16,
        "qk_head_dim": 32,
        "v_head_dim": 16,
    },
    "perceiver": {
        "d_latents": 64,
        "num_latents": 8,
        "d_model": 64,
        "max_position_embeddings": 64,
        "num_cross_attention_heads": 4,
        "num_self_attention_heads": 4,
        "num_self_attends_per_block": 2,
    },
    "vits": {"vocab_size": 64},
    "led": {
        "max_encoder_position_embeddings": 256,
        "max_decoder_position_embeddings": 128,
        "attention_window": 8,
    },
}
