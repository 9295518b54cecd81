"""Small models of transformers that do more with their weights than multiply by them."""

import pytest
import torch
import transformers
from torch import nn

IDS = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DECODER = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TEXT = {
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 128,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128} | TOKENS
BART = {
    **{
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
    **{
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "forced_eos_token_id": 2,
    },
    **TOKENS,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MOE = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}

MODELS = {
    # tied by the flag, by which these scale their output, too
    "UMT5ForConditionalGeneration": ("UMT5Config", T5, DECODER),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        T5 | {"num_decoder_layers": 2, "num_experts": 4},
        DECODER,
    ),
    # tied whatever config.json says of it
    "T5ForConditionalGeneration": ("T5Config", T5, DECODER),
    # tied biases beside tied weights
    "BertForMaskedLM": ("BertConfig", TEXT, {"input_ids": IDS}),
    "RobertaForMaskedLM": (
        "RobertaConfig",
        TEXT | {"pad_token_id": 1, "max_position_embeddings": 64},
        {"input_ids": IDS},
    ),
    "DebertaForMaskedLM": ("DebertaConfig", TEXT, {"input_ids": IDS}),
    # a name with no dot: final_logits_bias, logit_scale
    "BartForConditionalGeneration": ("BartConfig", BART, DECODER),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": VISION},
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
    # computed: one tensor of a file is three of the model, and experts are transposed
    "NomicBertForMaskedLM": ("NomicBertConfig", TEXT, {"input_ids": IDS}),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig",
        {
            "text_config": TEXT
            | MOE
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "depth": 2,
                "num_heads": 4,
                "out_hidden_size": 64,
            }
            | {"deepstack_visual_indexes": [0]},
            **{
                "image_token_id": 120,
                "video_token_id": 121,
                "vision_start_token_id": 122,
                "vision_end_token_id": 123,
            },
        },
        {"input_ids": IDS % 100},
    ),
    # a model of its own around another, whose names transformers tells apart by the prefix of the base model
    "ShieldGemma2ForImageClassification": (
        "ShieldGemma2Config",
        {
            "text_config": TEXT | {"num_key_value_heads": 2, "head_dim": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        }
        | {"image_token_index": 100, "yes_token_index": 7, "no_token_index": 8},
        {"input_ids": IDS % 90 + 4},
    ),
    # positions that no checkpoint holds
    "MarianMTModel": ("MarianConfig", BART, DECODER),
}
ALL = pytest.mark.parametrize("name", MODELS)


def make(name):
    """A float model of which no parameter is as its constructor leaves it, but for what it computes
    itself."""
    torch.manual_seed(0)
    config, sizes, _ = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for fqn, w in model.named_parameters():
            if fqn not in (model._keys_to_ignore_on_save or ()):
                w.add_(torch.randn_like(w), alpha=0.05)
    return model


@torch.inference_mode()
def output(name, model):
    return model(**MODELS[name][2])[0]


def assert_same(name, got, expected):
    """Every tensor, which of them are one, what the config says of that, and the answer."""
    names = [fqn for fqn, _ in expected.named_parameters(remove_duplicate=False)]
    assert [fqn for fqn, _ in got.named_parameters(remove_duplicate=False)] == names
    for fqn in names:
        a, b = got.get_parameter(fqn), expected.get_parameter(fqn)
        assert (type(a), a.dtype) == (type(b), b.dtype), fqn
        assert torch.equal(a, b), fqn
    assert ties(got) == ties(expected)
    assert getattr(got.config, "tie_word_embeddings", None) == getattr(
        expected.config, "tie_word_embeddings", None
    )
    # Strides may be others.
    torch.testing.assert_close(output(name, got), output(name, expected), rtol=1e-5, atol=1e-5)


def ties(model):
    places = {}
    for fqn, w in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(w), []).append(fqn)
    return sorted(fqns for fqns in places.values() if len(fqns) > 1)


def but_one_layer(module, fqn):
    """Of what a checkpoint has in one, some stays float."""
    return isinstance(module, nn.Linear) and not fqn.endswith("k_proj")
