import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors import safe_open
from tiny_llama import tiny_llama
from torch import nn
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, quantize_, rtn, rtn_int4, rtn_int8, save

IDS = torch.tensor([[5, 77, 130, 9, 201, 64]])


def all_weights(module, fqn):
    return isinstance(module, nn.Linear | nn.Embedding)


def but_the_ends(module, fqn):
    return isinstance(module, nn.Linear) and fqn != "lm_head"


def greedy(model):
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return out.tolist()


def assert_same(loaded, model):
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert [name for name, _ in loaded.named_parameters(remove_duplicate=False)] == names
    for name in names:
        a, b = loaded.get_parameter(name), model.get_parameter(name)
        assert (a.dtype, type(a)) == (b.dtype, type(b)), name
        assert torch.equal(a, b), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (
        model.lm_head.weight is model.model.embed_tokens.weight
    )
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    assert greedy(loaded) == greedy(model)


def keys_and_metadata(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return list(file.keys()), file.metadata()


# -------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, dtype, bits, tied):
    model = tiny_llama(tied, dtype)
    quantize_(model, rtn(bits, 64), but_the_ends)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert type(loaded) is LlamaForCausalLM
    assert not loaded.training
    assert isinstance(loaded.model.layers[1].mlp.down_proj.weight, RTNQuantizedTensor)
    assert_same(loaded, model)


FORMATS = {
    "embedding and lm_head": (rtn_int4(64), all_weights),
    "embedding alone": (rtn_int8(64), lambda module, fqn: isinstance(module, nn.Embedding)),
    "every linear": (rtn_int4(64, "signed"), None),
    "one group per row": (rtn_int4(-1), but_the_ends),
    "skipped layers": (
        rtn_int4(32),
        lambda module, fqn: but_the_ends(module, fqn) and "layers.0" not in fqn and "k_proj" not in fqn,
    ),
    "mixed": (
        FqnToConfig(
            {"re:.*q_proj": rtn_int8(32), "re:.*mlp.*": rtn_int4(-1, "signed"), "lm_head": rtn_int4(64)}
        ),
        None,
    ),
    "mixed with embedding": (
        FqnToConfig({"re:.*_proj": rtn_int4(64), "model.embed_tokens": rtn_int8(), "lm_head": rtn_int8()}),
        None,
    ),
    "float": (None, None),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_of_every_choice(tmp_path, name, tied):
    """Where a tied model has just one of the pair quantized, the other must not be tied to it on the way
    back."""
    config, filter_fn = FORMATS[name]
    model = tiny_llama(tied)
    if config:
        quantize_(model, config, filter_fn)
    save(model, tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


def test_transformers_reads_it(tmp_path):
    model = tiny_llama(tied=True)
    quantize_(model, rtn_int4(64), all_weights)
    save(model, tmp_path / "model")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


def test_a_fresh_process_reads_it(tmp_path):
    model = tiny_llama()
    quantize_(model, rtn_int4(64), but_the_ends)
    save(model, tmp_path / "model")
    program = f"""
import rtn_tensor, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
assert type(model.model.layers[0].mlp.up_proj.weight) is rtn_tensor.RTNQuantizedTensor
print(model.generate(torch.tensor({IDS.tolist()}), max_new_tokens=12, do_sample=False, pad_token_id=0).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == greedy(model)


def test_save_again(tmp_path):
    model = tiny_llama(tied=True)
    quantize_(model, rtn_int4(64), all_weights)
    save(model, tmp_path / "first")
    loaded = load(tmp_path / "first")
    save(loaded, tmp_path / "second")
    assert_same(load(tmp_path / "second"), model)
    assert (tmp_path / "first" / "config.json").read_text() == (
        tmp_path / "second" / "config.json"
    ).read_text()
    assert keys_and_metadata(tmp_path / "first") == keys_and_metadata(tmp_path / "second")


def test_save_dequantized(tmp_path):
    model = tiny_llama()
    quantize_(model, rtn_int4(64), but_the_ends)
    save(model, tmp_path / "quantized")
    loaded = load(tmp_path / "quantized")
    dequantize_(loaded)
    save(loaded, tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert_same(load(tmp_path / "float"), loaded)


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_through_a_file(tmp_path, tied):
    model = tiny_llama(tied)
    quantize_(model, rtn_int4(64), all_weights)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = tiny_llama(tied, seed=1)
    assert greedy(fresh) != greedy(model)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), assign=True)
    fresh.tie_weights()
    assert_same(fresh, model)


# ------------------------------------------------------------------------- what is on disk


def test_names_on_disk(tmp_path):
    model = tiny_llama()
    config = FqnToConfig(
        {
            "model.layers.0.self_attn.q_proj": rtn_int4(64),
            "model.layers.0.mlp.down_proj": rtn_int8(-1, "signed"),
        }
    )
    quantize_(model, config)
    save(model, tmp_path / "model")
    keys, metadata = keys_and_metadata(tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_expected_inline(
        "\n".join(key for key in keys if "layers.1" not in key),
        """\
lm_head.weight
model.embed_tokens.weight
model.layers.0.input_layernorm.weight
model.layers.0.mlp.down_proj._weight_qdata
model.layers.0.mlp.down_proj._weight_scale
model.layers.0.mlp.gate_proj.weight
model.layers.0.mlp.up_proj.weight
model.layers.0.post_attention_layernorm.weight
model.layers.0.self_attn.k_proj.weight
model.layers.0.self_attn.o_proj.weight
model.layers.0.self_attn.q_proj._weight_qdata
model.layers.0.self_attn.q_proj._weight_scale
model.layers.0.self_attn.v_proj.weight
model.norm.weight""",
    )
    assert metadata["format"] == "pt"
    assert json.loads(metadata["tensor_names"]) == [name for name, _ in model.named_parameters()]
    assert metadata["model.norm.weight"] == '{"_type": "Tensor"}'
    assert_expected_inline(
        metadata["model.layers.0.self_attn.q_proj.weight"],
        """{"_type": "RTNQuantizedTensor", "_data": {"bits": 4, "group_size": 64, "scale_method": "search", "in_features": 96, "transposed": false, "version": 1}, "_tensor_data_names": ["qdata", "scale"]}""",
    )
    assert_expected_inline(
        metadata["model.layers.0.mlp.down_proj.weight"],
        """{"_type": "RTNQuantizedTensor", "_data": {"bits": 8, "group_size": -1, "scale_method": "signed", "in_features": 160, "transposed": false, "version": 1}, "_tensor_data_names": ["qdata", "scale"]}""",
    )
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        w = model.model.layers[0].self_attn.q_proj.weight
        assert torch.equal(file.get_tensor("model.layers.0.self_attn.q_proj._weight_qdata"), w.qdata)
        assert torch.equal(file.get_tensor("model.layers.0.self_attn.q_proj._weight_scale"), w.scale)


def quantization_config(path):
    return json.dumps(json.loads((path / "config.json").read_text())["quantization_config"], indent=1)


def test_config_on_disk(tmp_path):
    model = tiny_llama()
    quantize_(
        model, rtn_int4(64), lambda module, fqn: but_the_ends(module, fqn) and "layers.1.mlp" not in fqn
    )
    save(model, tmp_path / "model")
    assert_expected_inline(
        quantization_config(tmp_path / "model"),
        """\
{
 "include_input_output_embeddings": false,
 "modules_to_not_convert": [
  "model.embed_tokens",
  "model.layers.1.mlp.gate_proj",
  "model.layers.1.mlp.up_proj",
  "model.layers.1.mlp.down_proj",
  "lm_head"
 ],
 "quant_method": "torchao",
 "quant_type": {
  "default": {
   "_data": {
    "activations": null,
    "bits": 4,
    "group_size": 64,
    "scale_method": "search"
   },
   "_type": "RTNInt4WeightConfig",
   "_version": 1
  }
 },
 "untie_embedding_weights": false
}""",
    )


def test_mixed_config_on_disk(tmp_path):
    model = tiny_llama(tied=True)
    both = {"model.embed_tokens": rtn_int8(), "lm_head": rtn_int8()}
    quantize_(model, FqnToConfig({"model.layers.1.mlp.up_proj": rtn_int4(64), **both}))
    save(model, tmp_path / "model")
    config = json.loads(quantization_config(tmp_path / "model"))
    assert config["include_input_output_embeddings"]
    assert len(config["modules_to_not_convert"]) == 13
    assert config["quant_type"]["default"]["_type"] == "FqnToConfig"
    table = config["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert_expected_inline(
        "\n".join(f"{name}: {json.dumps(value['_data'])}" for name, value in table.items()),
        """\
lm_head: {"activations": null, "bits": 8, "group_size": 128, "scale_method": "absmax"}
model.embed_tokens: {"activations": null, "bits": 8, "group_size": 128, "scale_method": "absmax"}
model.layers.1.mlp.up_proj: {"activations": null, "bits": 4, "group_size": 64, "scale_method": "search"}""",
    )


def test_tied_weights_are_stored_once(tmp_path):
    for tied in (False, True):
        model = tiny_llama(tied)
        size = quantize_(model, rtn_int4(64), all_weights).bytes_after
        save(model, tmp_path / str(tied))
        file = tmp_path / str(tied) / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - header == size
        keys, _ = keys_and_metadata(tmp_path / str(tied))
        assert [key for key in keys if "lm_head" in key] == (
            [] if tied else ["lm_head._weight_qdata", "lm_head._weight_scale"]
        )


# -------------------------------------------------------------------------------- failures


def test_existing_destination_is_untouched(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("text")
    with pytest.raises(FileExistsError) as caught:
        save(tiny_llama(), tmp_path / "model")
    assert (
        str(caught.value)
        == f"{tmp_path / 'model'} exists; choose another name, or pass force=True to replace it"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["precious"]


def test_what_is_replaced_comes_back_where_the_rename_fails(tmp_path, monkeypatch):
    save(tiny_llama(), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no more")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no more"):
        save(tiny_llama(seed=1), tmp_path / "model", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_missing_parents_are_made(tmp_path):
    save(tiny_llama(), tmp_path / "a" / "b" / "model")
    assert (tmp_path / "a" / "b" / "model" / "config.json").is_file()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, error):
    model = tiny_llama(tied=True)
    torchao_quantize_(model, rtn_int4(64))  # lm_head alone of the pair: the config would change in the file
    before, attributes = model.config.to_dict(), set(vars(model))
    write = type(model).save_pretrained

    def fail(self, path, **kwargs):
        assert self.config.to_dict() != before
        write(self, path, **kwargs)
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(type(error)):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    assert model.config.to_dict() == before
    assert set(vars(model)) == attributes


def test_a_save_leaves_the_model_as_it_was(tmp_path):
    model = tiny_llama(tied=True)
    torchao_quantize_(model, rtn_int4(64))  # of which transformers knows nothing
    before, attributes = model.config.to_dict(), set(vars(model))
    save(model, tmp_path / "first")
    assert model.config.to_dict() == before
    assert set(vars(model)) == attributes
    loaded = load(tmp_path / "first")
    before, attributes = loaded.config.to_dict(), dict(vars(loaded))
    save(loaded, tmp_path / "second")
    assert loaded.config.to_dict() == before
    assert vars(loaded) == attributes
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
def test_truncated_file(tmp_path, length):
    model = tiny_llama()
    quantize_(model, rtn_int4(64), but_the_ends)
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="is truncated or corrupt") as caught:
        load(tmp_path / "model")
    assert str(caught.value).startswith(f"{file} is truncated")
    assert str(caught.value).endswith("; copy or download it again")


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for name, why in [
        (
            "file",
            "it is a file; give the folder that it lies in, or to load() the module to fill, as model=",
        ),
        (
            "empty",
            "it has no config.json; add its model's, or give load() the module to fill, as model=",
        ),
        ("missing", "it is not there; a model of the hub has a name as in Qwen/Qwen3-0.6B"),
    ]:
        with pytest.raises(FileNotFoundError) as caught:
            load(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} is not a model folder: {why}"
