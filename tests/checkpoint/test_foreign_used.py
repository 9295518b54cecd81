"""A folder that another library quantized, once it is loaded: copied into, saved, exported, fused by the caller."""

import json

import foreign_formats as made
import pytest
import torch
from kept_formats import BF16, CT, F16, F32, FORMATS, same_planes
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama

from rtn_tensor import (
    RTNQuantizedTensor,
    export,
    load,
    quantize_,
    report,
    rtn_int4,
    rtn_int8,
    save,
)
from rtn_tensor.formats import unpack


def test_what_is_copied_into_them_gets_the_default_scales(tmp_path):
    make, config, dtype, _ = FORMATS["GPTQ"]
    made.write(tmp_path, tiny_llama(layers=1, dtype=dtype), make, config)
    w = load(tmp_path).model.layers[0].mlp.up_proj.weight
    new = torch.randn(w.shape, dtype=dtype)
    w.copy_(new)
    due = RTNQuantizedTensor.from_float(new, 4, 32)
    assert torch.equal(w.qdata, due.qdata)
    assert torch.equal(w.scale, due.scale)


def test_transformers_reads_what_is_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    make, config, dtype, _ = FORMATS["compressed-tensors"]
    made.write(tmp_path / "theirs", tiny_llama(dtype=dtype), make, config)
    loaded = load(tmp_path / "theirs")
    save(loaded, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for (name, a), b in zip(loaded.named_parameters(), theirs.parameters(), strict=True):
        if isinstance(a, RTNQuantizedTensor):
            same_planes(a, b)
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("config", [rtn_int4(32), rtn_int4(64, "signed"), rtn_int8(), rtn_int8(-1)])
def test_exported_and_loaded(tmp_path, format_name, config):
    """The same integers and scales come back; groups may be smaller, with scales repeated."""
    model = tiny_llama(dtype=F16)
    quantize_(model, [("model.*", config)])
    export(model, tmp_path / "out", format_name)
    loaded = load(tmp_path / "out")
    for name, w in model.named_parameters():
        got = loaded.get_parameter(name)
        if not isinstance(w, RTNQuantizedTensor):
            assert torch.equal(got, w), name
            continue
        assert torch.equal(
            unpack(got.qdata, got.bits, got.in_features), unpack(w.qdata, w.bits, w.in_features)
        )
        assert torch.equal(got.dequantize(F32), w.dequantize(F32))
    again = tmp_path / "again"
    export(loaded, again, format_name)
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", again))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_commands(tmp_path, run):
    make, config, dtype, _ = FORMATS["GPTQ"]
    made.write(tmp_path / "theirs", tiny_llama(layers=1, dtype=dtype), make, config)
    status, out, err = run("inspect", tmp_path / "theirs", "--json")
    assert status == 0, err
    shown = {row["name"]: row["bits"] for row in json.loads(out)["weights"]}
    assert shown["model.layers.0.mlp.up_proj.weight"] == 4
    status, _, err = run("quantize", tmp_path / "theirs", tmp_path / "ours")
    assert status == 0, err
    assert "keeps the integers and scales that it has" in err
    a, b = (load(tmp_path / name) for name in ("theirs", "ours"))
    for row in report(a).rows:
        if row.bits:
            same_planes(a.get_parameter(row.name), b.get_parameter(row.name))
    assert "torchao" in (tmp_path / "ours" / "config.json").read_text()
    status, _, err = run("quantize", tmp_path / "theirs", tmp_path / "anew", "--bits", 8)
    assert status == 0, err
    assert load(tmp_path / "anew").model.layers[0].mlp.up_proj.weight.bits == 8


def test_a_model_that_is_not_transformers(tmp_path):
    planes, w = made.compressed(64, 96)
    save_file({f"0.{name}": plane for name, plane in planes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CT()}))
    loaded = load(tmp_path, model=torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False, dtype=BF16)))
    assert torch.equal(loaded[0].weight.dequantize(F32), w)


def test_fused_by_the_caller(tmp_path):
    parts = {name: made.gptq(n, 96) for name, n in {"q": 64, "k": 32}.items()}
    save_file(
        {f"{name}.{end}": plane for name, (planes, _) in parts.items() for end, plane in planes.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": made.gptq_config()}))
    model = torch.nn.ModuleDict({"qk": torch.nn.Linear(96, 96, bias=False, dtype=F16)})
    loaded = load(tmp_path, model=model, fuse={"qk": ["q", "k"]})
    due = torch.cat([w for _, w in parts.values()])
    assert torch.equal(loaded["qk"].weight.dequantize(F32), due)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["AWQ", "GPTQ", "compressed-tensors, asymmetric", "bitsandbytes, int8"])
def test_adapters_train_over_them_and_merge(tmp_path, name):
    """Of float16 scales in a bfloat16 model, or float32 ones, and with zero points."""
    peft = pytest.importorskip("peft")
    make, config, _, _ = FORMATS[name]
    stands_for = made.write(tmp_path, tiny_llama(layers=1, dtype=BF16), make, config)
    model = load(tmp_path)
    about = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, about)
    ids = torch.tensor([[5, 77, 30, 9]])
    adapted(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    key = "model.layers.0.mlp.down_proj"
    layer = adapted.get_submodule(f"base_model.model.{key}")
    base = layer.base_layer.weight
    assert torch.equal(base.dequantize(F32), stands_for[f"{key}.weight"])
    due = stands_for[f"{key}.weight"] + layer.get_delta_weight("default").detach()
    merged = adapted.merge_and_unload().get_parameter(f"{key}.weight")
    assert isinstance(merged, RTNQuantizedTensor)
    assert (merged.bits, merged.zero is None) == (base.bits, base.zero is None)
    off = (merged.dequantize(F32) - due).norm() / due.norm()
    assert off < (0.15 if base.bits == 4 else 0.02)
