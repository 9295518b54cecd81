"""`language_model_only`: of a vision-language model the language model alone is quantized."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from transformers import TorchAoConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    dequantize_,
    fqn_config,
    language_model_only,
    load,
    quantize_,
    rtn_int4,
    rtn_int8,
    save,
)
from rtn_tensor.cli import main

TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 64,
}
QWEN = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
IMAGE = 290  # the token in whose places an image's features go

MODELS = {
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": TEXT | ROPE,
        "vision_config": QWEN
        | {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 32},
        "image_token_id": IMAGE,
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": TEXT | ROPE,
        "vision_config": QWEN
        | {
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        "image_token_id": IMAGE,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": TEXT,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "LlavaForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "SmolVLMForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION,
        "scale_factor": 2,
        "image_token_id": IMAGE,
    },
    "Idefics3ForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION,
        "scale_factor": 2,
        "image_token_id": IMAGE,
    },
    "PaliGemmaForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "gemma"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "projection_dim": 64,
    },
    "InternVLForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
        "image_token_id": IMAGE,
        "downsample_ratio": 0.5,
    },
}  # fmt: skip
FOUR = ("Gemma3", "Llava", "PaliGemma")  # of which an image of four patches is four tokens


def build(name):
    torch.manual_seed(0)
    kind = name.removesuffix("ForConditionalGeneration")
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**MODELS[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.05)
    return model


def inputs(name):
    torch.manual_seed(1)
    ids = torch.randint(3, 280, (1, 9))
    if name.startswith("Qwen"):
        patches = torch.randn(4, 3 * 2 * 8 * 8)
        kinds = {"mm_token_type_ids": torch.zeros(1, 9, dtype=torch.int64)}
        ids[0, 3] = IMAGE
        kinds["mm_token_type_ids"][0, 3] = 1
        return {
            "input_ids": ids,
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        } | kinds
    count = 4 if name.startswith(FOUR) else 1
    ids[0, 3 : 3 + count] = IMAGE
    image = torch.randn(1, 3, 16, 16)
    if name.startswith(("SmolVLM", "Idefics3")):
        image = image[None]
    more = {"token_type_ids": torch.zeros_like(ids)} if name.startswith("Gemma3") else {}
    return {"input_ids": ids, "pixel_values": image} | more


def quantized(model):
    return {name for name, p in model.named_parameters() if isinstance(p, RTNQuantizedTensor)}


@pytest.mark.parametrize("name", MODELS)
def test_vision_language_models(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    rules = [*language_model_only(model), ("*", rtn_int8(32))]
    assert language_model_only(tmp_path / "float") == rules[:-1]
    result = quantize_(model, rules)
    language = (
        model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
    )
    inside = {id(p) for p in [*language.parameters(), *model.lm_head.parameters()]}
    for row in result.rows:
        if len(row.shape) > 1:
            p = model.get_parameter(row.name)
            owner = model.get_submodule(row.name.rpartition(".")[0])
            assert bool(row.bits) == (id(p) in inside and isinstance(owner, nn.Linear)), row
            assert row.bits or row.note
    expected = copy.deepcopy(model)
    dequantize_(expected)
    streamed = load(tmp_path / "float", rules)
    # transformers' rule of the output layer
    assert quantized(streamed) == quantized(model) - {"lm_head.weight"}
    save(model, tmp_path / "saved")
    with torch.no_grad():
        given = inputs(name)
        logits = model(**given).logits
        torch.testing.assert_close(logits, expected(**given).logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(load(tmp_path / "saved")(**given).logits, logits, rtol=1e-4, atol=1e-5)
        assert streamed(**given).logits.isfinite().all()


def test_by_transformers(tmp_path):
    build("LlavaForConditionalGeneration").save_pretrained(tmp_path / "float")
    rules = [*language_model_only(tmp_path / "float"), ("*", rtn_int4(32))]
    config = TorchAoConfig(fqn_config(tmp_path / "float", rules))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "float", quantization_config=config
    )
    assert quantized(model) == quantized(load(tmp_path / "float", rules))


def test_on_the_command_line(tmp_path, capsys):
    build("SmolVLMForConditionalGeneration").save_pretrained(tmp_path / "float")
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "out"), "--language-model-only"]) == 0
    assert "language_model_only: true" in (tmp_path / "out" / "rtn_recipe.yaml").read_text()
    found = quantized(load(tmp_path / "out"))
    assert found
    assert all(name.startswith("model.text_model.") for name in found)
    capsys.readouterr()
    options = ["--language-model-only", "--bits-per-weight", "6", "--json"]
    assert main(["plan", str(tmp_path / "float"), *options]) == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    count = len(language_model_only(tmp_path / "float"))
    assert [how for _, how in rules[:count]] == [None] * count
    assert all(name.startswith("model.text_model.") for name, how in rules[count:] if how)


class Own(nn.Module):
    """Of one's own, with a language model by its name."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(64, 64), nn.Conv2d(3, 64, 8)])
        self.query = nn.Parameter(torch.randn(8, 64))
        self.language_model = nn.Sequential(nn.Linear(64, 64))
        self.activation = nn.GELU()


def test_a_model_of_ones_own():
    model = Own()
    assert language_model_only(model) == [("query", None), ("encoder.*", None)]
    quantize_(model, [*language_model_only(model), ("*", rtn_int4(32))])
    assert quantized(model) == {"language_model.0.weight"}


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(64, 64), lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))],
)
def test_what_has_nothing_beside_it(make):
    with pytest.raises(ValueError, match="does not tell its language model from the rest, or has nothing"):
        language_model_only(make())
