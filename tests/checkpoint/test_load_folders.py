"""Folders as they are found: `load` reads what transformers reads, and says what it does not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from rtn_tensor import RTNQuantizedTensor, load, quantize_, rtn_int4, save
from rtn_tensor.cli import main

IDS = torch.tensor([[5, 77, 130, 9, 201, 64]])


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama(layers=1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configured(folder, **changes):
    """Changes config.json; a value of ... removes the key."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def same_as_transformers(folder):
    loaded, theirs = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    a, b = loaded.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, theirs(IDS).logits)
    return loaded


# ----------------------------------------------------------------------------- which files


STRAY = [
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "adapter_model.safetensors",
    "._model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
]


@pytest.mark.parametrize("stray", STRAY)
def test_stray_weights(folder, stray):
    save_file(tiny_llama(layers=1, seed=1).state_dict(), folder / stray)
    same_as_transformers(folder)


@pytest.mark.parametrize(
    "stray", ["._model.safetensors", "consolidated.safetensors", "model-00009-of-00009.safetensors"]
)
def test_stray_weights_that_are_none(folder, stray):
    (folder / stray).write_bytes(b"\0\5\26\7")
    same_as_transformers(folder)


def test_stray_indices(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    (folder / "model.fp16.safetensors.index.json").write_text("{")
    same_as_transformers(folder)


@pytest.mark.parametrize("stray", [*STRAY[:4], "model-00009-of-00009.safetensors"])
def test_stray_weights_beside_shards(tmp_path, stray):
    tiny_llama(layers=1).save_pretrained(tmp_path, max_shard_size="100KB")
    save_file(tiny_llama(layers=1, seed=1).state_dict(), tmp_path / stray)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize(
    "stray",
    ["adapter_model.safetensors", "._pytorch_model.bin", "model.fp16.safetensors", "training_args.bin"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_stray_weights_beside_bin(tmp_path, stray, sharded):
    model = tiny_llama(layers=1)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    if sharded:
        names = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(names.values()):
            torch.save({name: t.clone() for name, t in state.items() if names[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": names})
        )
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    save_file(tiny_llama(layers=1, seed=1).state_dict(), tmp_path / stray)
    same_as_transformers(tmp_path)


def test_files_that_the_config_names(folder):
    save_file(tiny_llama(layers=1, seed=1).state_dict(), folder / "other.safetensors", {"format": "pt"})
    configured(folder, transformers_weights="other.safetensors")
    same_as_transformers(folder)
    configured(folder, transformers_weights="../other.safetensors")
    with pytest.raises(ValueError, match="config.json: transformers_weights is '../other.safetensors'"):
        load(folder)


def test_files_of_another_name(folder):
    """Which transformers does not read by itself."""
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert torch.equal(load(folder).lm_head.weight, tiny_llama(layers=1).lm_head.weight)
    save_file(load_file(folder / "model.fp16.safetensors"), folder / "consolidated.safetensors")
    with pytest.raises(ValueError, match="consolidated.safetensors, too"):
        load(folder)


def test_an_adapter_alone(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match="it holds an adapter alone: give the model that it belongs to"
    ):
        load(folder)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
@pytest.mark.parametrize("config", [None, rtn_int4(32)])
def test_an_adapter_beside_the_weights(folder, config, weights):
    expected = load(folder, config).state_dict()
    (folder / "adapter_config.json").write_text("{}")
    if weights:
        (folder / weights).write_bytes(b"")
    with pytest.warns(UserWarning, match="adapter_config.json is of an adapter, which is not merged") as seen:
        got = load(folder, config).state_dict()
    (warning,) = seen
    assert str(folder) in str(warning.message)
    assert warning.filename == __file__
    for name, t in expected.items():
        assert type(t) is type(got[name])
        assert torch.equal(t.dequantize() if config and "proj" in name else t, got[name].dequantize())


@pytest.mark.parametrize("config", [None, rtn_int4(32)])
def test_a_file_of_before_torch_1_6(folder, config):
    """No zip archive, which torch cannot map."""
    expected = load(folder, config)
    torch.save(
        load_file(folder / "model.safetensors"),
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    (folder / "model.safetensors").unlink()
    loaded = load(folder, config)
    for name, t in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name


# --------------------------------------------------------------------------- which tensors


def more(folder, **tensors):
    file = folder / "model.safetensors"
    save_file({name: t.clone() for name, t in load_file(file).items()} | tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "cls.seq_relationship.weight",
        "model.layers.0.attn.masked_bias",
        "v_head.weight",
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no place for")
def test_names_that_the_model_has_no_place_for(folder, name):
    more(folder, **{name: torch.ones(3)})
    same_as_transformers(folder)
    assert isinstance(load(folder, rtn_int4(32)).model.layers[0].mlp.up_proj.weight, RTNQuantizedTensor)


def test_they_are_said(folder):
    more(folder, **{f"model.layers.{i}.eh_proj.weight": torch.ones(3) for i in range(7)})
    with pytest.warns(
        UserWarning,
        match="LlamaForCausalLM has no place for, and load left out, model.layers.0.*eh.* and 2 more",
    ) as caught:
        load(folder)
    assert caught[0].filename == __file__
    # Of any other module nobody knows.
    with pytest.raises(ValueError, match="lm_head.weight has no place in the model"):
        load(folder, model=lambda: nn.ModuleDict({"extra": nn.Linear(2, 2)}))


def test_a_file_of_another_model(folder):
    save_file({"transformer.wte.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(
        ValueError,
        match="transformer.wte.weight has no place in the model\n  the checkpoint lacks lm_head.weight",
    ):
        load(folder)


def test_a_tie_that_the_file_denies(tmp_path):
    """As transformers: the two stay apart, and a warning says so."""
    tiny_llama(tied=False, layers=1).save_pretrained(tmp_path / "model")
    configured(tmp_path / "model", tie_word_embeddings=True)
    for config in (None, rtn_int4(32)):
        with pytest.warns(
            UserWarning,
            match="lm_head.weight, model.embed_tokens.weight are one weight|model.embed_tokens.weight, "
            "lm_head.weight are one weight",
        ) as caught:
            loaded = load(tmp_path / "model", config)
        assert caught[0].filename == __file__
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(loaded.lm_head.weight, expected.lm_head.weight)
        assert torch.equal(loaded.model.embed_tokens.weight, expected.model.embed_tokens.weight)
        assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
        loaded.tie_weights(recompute_mapping=False)
        assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
        save(loaded, tmp_path / "again", force=True)
        with pytest.warns(UserWarning, match="they are not tied"):
            again = load(tmp_path / "again")
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, loaded(IDS).logits)
            if config is None:
                assert torch.equal(loaded(IDS).logits, expected(IDS).logits)


def test_a_tie_that_both_copies_keep(tmp_path):
    model = tiny_llama(tied=True, layers=1)
    model.save_pretrained(tmp_path)
    more(tmp_path, **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    loaded = same_as_transformers(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_two_values_for_one_weight_of_any_module(tmp_path):
    def make():
        model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    save_file({"a.weight": torch.zeros(4, 4), "b.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.warns(
        UserWarning,
        match="a.weight, b.weight are one weight in the model, and the files hold different values",
    ):
        model = load(tmp_path, model=make)
    assert (model["a"].weight.sum(), model["b"].weight.sum()) == (0, 16)
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    assert load(tmp_path, model=make)["b"].weight.sum() == 16


# ----------------------------------------------------------------------------- config.json


CONFIGS = {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "null": "null",
    "no UTF-8": b"\xff\xfe\xff",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_cannot_be_read(folder, text, name):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="copy or download it again") as caught:
        load(folder)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(f"{folder / name} ")


CHANGES = {
    "no architectures": {"architectures": ...},
    "architectures of none": {"architectures": None},
    "no architecture": {"architectures": []},
    "architectures of text": {"architectures": "LlamaForCausalLM"},
    "an architecture that is a number": {"architectures": [3]},
    "an architecture that is a function": {"architectures": ["pipeline"]},
    "an architecture that is a module": {"architectures": ["utils"]},
    "an architecture that is no model": {"architectures": ["LlamaConfig"]},
    "an architecture of nobody": {"architectures": ["Nobody"]},
    "an architecture of another config": {"architectures": ["GPT2LMHeadModel"]},
    "no model_type": {"model_type": ...},
    "an unknown model_type": {"model_type": "nothing"},
    "model_type of a number": {"model_type": 3},
    "model_type of a list": {"model_type": ["llama"]},
    "hidden_size of text": {"hidden_size": "96"},
    "hidden_size of none": {"hidden_size": None},
    "negative hidden_size": {"hidden_size": -96},
    "hidden_size of a float": {"hidden_size": 96.5},
    "huge vocab_size": {"vocab_size": 1 << 50},
    "huger vocab_size": {"vocab_size": 1 << 70},
    "negative vocab_size": {"vocab_size": -1},
    "no heads": {"num_attention_heads": 0},
    "very many layers": {"num_hidden_layers": 1 << 40},
    "many layers": {"num_hidden_layers": 9_999},
    "layers of text": {"num_hidden_layers": "two"},
    "an activation of nobody": {"hidden_act": "nobody"},
    "quantized as text": {"quantization_config": "int4"},
    "quantized as a list": {"quantization_config": ["int4"]},
    "quantized by nobody": {"quantization_config": {"bits": 4}},
    "rope of text": {"rope_parameters": "linear"},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_configs_of_no_model(folder, changes):
    configured(folder, **changes)
    with pytest.raises(ValueError, match=r".") as caught:
        load(folder)
    assert type(caught.value) is ValueError
    assert str(folder) in str(caught.value) or "does not fit the model" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float7", "nn", ["float32"], "torch.float32"])
def test_a_dtype_of_nothing(folder, dtype):
    configured(folder, dtype=dtype)
    with pytest.raises(ValueError, match="transformers makes no model of it"):
        load(folder)


@pytest.mark.parametrize("dtype", ["int8", 3, None, "float8_e4m3fn"])
def test_a_dtype_that_no_model_has(folder, dtype):
    configured(folder, dtype=dtype)
    assert load(folder).dtype == torch.float32
    with pytest.raises(TypeError, match="dtype is torch.int8; a model has one of torch.float32"):
        load(folder, dtype=torch.int8)


INDICES = {
    "no JSON": "{",
    "a list": "[]",
    "no weight_map": "{}",
    "weight_map of a list": '{"weight_map": []}',
    "weight_map of nothing": '{"weight_map": {}}',
    "deep": "[" * 100_000,
    **{
        f"weight_map to {name!r}": json.dumps({"weight_map": {"lm_head.weight": name}})
        for name in (
            *(
                "../secret.safetensors",
                "/etc/passwd",
                "a/b.safetensors",
                "a\\b.safetensors",
                "",
                ".",
                "..",
                "a\0b",
                "\ud800",
                "x" * 300,
            ),
            *(3, None, ["model.safetensors"], {"a": 1}, True),
        )
    },
}


@pytest.mark.parametrize("text", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_indices_that_lead_elsewhere(folder, text, kind):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = folder / f"{kind}.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=".") as caught:
        load(folder)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(str(index))
    assert main(["inspect", str(folder)]) == 1


def test_quantized_folders_are_read_as_well(tmp_path):
    """Beside stray files, and with names that the model has no place for."""
    model = tiny_llama(layers=1)
    quantize_(model, rtn_int4(32), lambda module, fqn: isinstance(module, nn.Linear) and fqn != "lm_head")
    save(model, tmp_path / "model")
    save_file(tiny_llama(layers=1, seed=1).state_dict(), tmp_path / "model" / "consolidated.safetensors")
    same_as_transformers(tmp_path / "model")
