"""Folders that other libraries quantized in ways that this library can hold: their integers and scales are kept,
and run packed."""

import json
from contextlib import nullcontext
from functools import partial

import foreign_formats as made
import pytest
import torch
from kept_formats import AUTO_ROUND, BF16, CT, F16, F32, FORMATS, same_planes
from safetensors.torch import load_file
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe

from rtn_tensor import (
    RTNQuantizedTensor,
    dequantize_,
    load,
    rtn_int4,
    rtn_int8,
    save,
)


@pytest.mark.parametrize(("make", "config", "dtype", "fmt"), FORMATS.values(), ids=FORMATS)
def test_bit_for_bit(tmp_path, make, config, dtype, fmt):
    model = tiny_llama(layers=1, dtype=dtype)
    stands_for = made.write(tmp_path / "theirs", model, make, config)
    loaded = load(tmp_path / "theirs")
    assert len(stands_for) == 7
    for name, w in stands_for.items():
        got = loaded.get_parameter(name)
        assert isinstance(got, RTNQuantizedTensor), name
        bits, group_size = fmt
        assert (got.bits, got.group_size) == (bits, -1 if w.shape[1] <= group_size else group_size)
        assert got.scale_method == ("given" if got.zero is None else "given_asymmetric")
        assert torch.equal(got.dequantize(torch.float32), w), name
    save(loaded, tmp_path / "ours")
    again = load(tmp_path / "ours")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.equal(again(ids).logits, logits)
        for name, w in stands_for.items():
            same_planes(again.get_parameter(name), loaded.get_parameter(name))
            model.get_parameter(name).copy_(w)
        torch.testing.assert_close(
            logits, model(ids).logits, rtol=0.05, atol=0.05 * float(logits.abs().max())
        )


@pytest.mark.parametrize(
    "name", ["GPTQ", "GPTQ, asymmetric", "AWQ", "compressed-tensors", "bitsandbytes, int8"]
)
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_scales_keep_their_dtype(tmp_path, name, dtype):
    """As float16 scales in a bfloat16 model, which are not rounded; through files, and transformers, too."""
    from transformers import AutoModelForCausalLM

    make, config, scale_dtype, _ = FORMATS[name]
    stands_for = made.write(tmp_path / "theirs", tiny_llama(layers=1, dtype=dtype), make, config)
    loaded = load(tmp_path / "theirs")
    for weight, w in stands_for.items():
        got = loaded.get_parameter(weight)
        assert (got.dtype, got.scale.dtype) == (dtype, scale_dtype)
        assert torch.equal(got.dequantize(F32), w)
    ids = torch.arange(8)[None]
    save(loaded, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    again = load(tmp_path / "ours")
    with torch.no_grad():
        logits = loaded(ids).logits
        assert logits.dtype == dtype
        for other in (again, theirs):
            assert torch.equal(other(ids).logits, logits)
            for weight in stands_for:
                same_planes(other.get_parameter(weight), loaded.get_parameter(weight))


@pytest.mark.parametrize("name", ["GPTQ", "compressed-tensors, 8 bits", "bitsandbytes, int8"])
def test_with_a_config_they_are_quantized_anew(tmp_path, name):
    make, config, dtype, _ = FORMATS[name]
    stands_for = made.write(tmp_path, tiny_llama(layers=1, dtype=dtype), make, config)
    with pytest.warns(UserWarning, match="quantized anew"):
        loaded = load(tmp_path, rtn_int8(32))
    for name, w in stands_for.items():
        due = RTNQuantizedTensor.from_float(w.to(dtype), 8, 32)
        same_planes(loaded.get_parameter(name), due)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "DeepseekV3", "Mixtral"])
@pytest.mark.parametrize("name", ["GPTQ", "compressed-tensors"])
def test_experts(tmp_path, kind, name):
    """Files have a module for each expert, transformers one parameter for all of them, gate and up in one."""
    make, config, dtype, _ = FORMATS[name]
    model = tiny_moe(kind, dtype)
    chosen = lambda n: n.endswith(".weight") and ".experts." in n  # noqa: E731
    stands_for = made.write(tmp_path, model, make, config, chosen)
    loaded = load(tmp_path)
    mlp = loaded.model.layers[1].mlp
    prefix = "model.layers.1." + ("block_sparse_moe" if kind == "Mixtral" else "mlp") + ".experts.2."
    gate, down, up = ("w1", "w2", "w3") if kind == "Mixtral" else ("gate_proj", "down_proj", "up_proj")
    experts = mlp.experts
    assert (experts.gate_up_proj.bits, experts.gate_up_proj.scale_method) == (4, "given")
    gate_up = torch.cat([stands_for[f"{prefix}{part}.weight"] for part in (gate, up)])
    assert torch.equal(experts.gate_up_proj[2].dequantize(torch.float32), gate_up)
    assert torch.equal(experts.down_proj[2].dequantize(torch.float32), stands_for[f"{prefix}{down}.weight"])
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = loaded(ids).logits
        dequantize_(loaded)
        due = loaded(ids).logits
    torch.testing.assert_close(logits, due, rtol=0.05, atol=0.05 * float(due.abs().max()))


def test_experts_of_unlike_formats_become_floats(tmp_path):
    model = tiny_moe("Qwen3Moe", F16)

    def make(n, k):
        make.count += 1
        return made.gptq(n, k, bits=8 if make.count == 3 else 4)

    make.count = 0
    eighth = {"bits": 8}
    model.save_pretrained(tmp_path)
    names = [n for n in load_file(tmp_path / "model.safetensors") if ".experts." in n]
    config = made.gptq_config(dynamic={f"+:{names[2].removesuffix('.weight')}": eighth})
    made.rewrite(tmp_path, make, config, lambda n: n in names)
    with pytest.warns(UserWarning, match=r"stay float, model.layers.\d.mlp.experts"):
        loaded = load(tmp_path)
    kinds = [isinstance(layer.mlp.experts.gate_up_proj, RTNQuantizedTensor) for layer in loaded.model.layers]
    kinds += [isinstance(layer.mlp.experts.down_proj, RTNQuantizedTensor) for layer in loaded.model.layers]
    assert sorted(kinds) == [False, True, True, True]


def test_formats_by_layer(tmp_path):
    """GPTQModel's `dynamic`, of which the first match counts."""
    model = tiny_llama(dtype=F16)
    config = made.gptq_config(
        dynamic={
            r"+:.*\.1\..*down_proj": {"bits": 8, "group_size": 64},
            r".*\.down_proj": {"group_size": 64},
            r"-:.*\.o_proj": {},
        }
    )
    model.save_pretrained(tmp_path)
    due = {}
    for pattern, make, fmt in (
        (".1.mlp.down_proj.", partial(made.gptq, bits=8, group_size=64), (8, 64)),
        (".0.mlp.down_proj.", partial(made.gptq, group_size=64), (4, 64)),
        ("up_proj", made.gptq, (4, 32)),
    ):
        chosen = lambda n, pattern=pattern: pattern in n and n.endswith("weight")  # noqa: E731
        found = made.rewrite(tmp_path, make, config, chosen)
        due |= {name: (w, fmt) for name, w in found.items()}
    loaded = load(tmp_path)
    for name, (w, fmt) in due.items():
        got = loaded.get_parameter(name)
        assert (got.bits, got.group_size) == fmt
        assert torch.equal(got.dequantize(torch.float32), w)
    assert not isinstance(loaded.model.layers[0].self_attn.o_proj.weight, RTNQuantizedTensor)


def test_config_groups(tmp_path):
    """compressed-tensors' targets: names in full, patterns, and the class."""
    model = tiny_llama(dtype=BF16)
    config = CT()
    one = config["config_groups"]["group_0"]
    for i, (targets, changes) in enumerate(
        [
            (["re:.*down_proj"], {"num_bits": 8, "group_size": 64}),
            (["model.layers.1.mlp.down_proj"], {"num_bits": 4, "strategy": "channel", "group_size": None}),
        ],
        1,
    ):
        config["config_groups"][f"group_{i}"] = one | {
            "targets": targets,
            "weights": one["weights"] | changes,
        }
    model.save_pretrained(tmp_path)
    for pattern, make in (
        (".1.mlp.down_proj.", partial(made.compressed, group_size=-1)),
        (".0.mlp.down_proj.", partial(made.compressed, bits=8, group_size=64)),
        ("up_proj", made.compressed),
    ):
        made.rewrite(tmp_path, make, config, lambda n, p=pattern: p in n and n.endswith("weight"))
    layers = load(tmp_path).model.layers
    formats = [(w.bits, w.group_size) for w in (layer.mlp.down_proj.weight for layer in layers)]
    assert formats == [(8, 64), (4, -1)]
    assert (layers[1].mlp.up_proj.weight.bits, layers[1].mlp.up_proj.weight.group_size) == (4, 32)


def test_config_groups_that_name_modules_as_the_model_does(tmp_path):
    """As llm-compressor writes of LLaVA, whose files have other names: the one group that fits the planes."""
    config = CT(targets=["re:model.language_model.layers.*down_proj"])
    one = config["config_groups"]["group_0"]
    about = {"num_bits": 8, "strategy": "channel", "group_size": None}
    config["config_groups"]["group_1"] = one | {
        "targets": ["model.language_model.layers.0.mlp.up_proj"],
        "weights": one["weights"] | about,
    }
    model = tiny_llama(layers=1, dtype=BF16)
    model.save_pretrained(tmp_path)
    due = {}
    for name, make in (
        ("down_proj.weight", made.compressed),
        ("up_proj.weight", partial(made.compressed, bits=8, group_size=-1)),
    ):
        due |= made.rewrite(tmp_path, make, config, lambda n, end=name: n.endswith(end))
    loaded = load(tmp_path)
    for name, w in due.items():
        assert torch.equal(loaded.get_parameter(name).dequantize(F32), w)
    # Which are as many groups of 160 columns as those of 32 are.
    config["config_groups"]["group_2"] = one | {"weights": one["weights"] | {"group_size": 33}}
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"quantization_config": config}))
    with pytest.raises(ValueError, match="down_proj.weight_packed .* not one alone fits its planes"):
        load(tmp_path)


def test_activations_that_were_quantized(tmp_path):
    """compressed-tensors' W8A8: the weights are as they are, and the activations stay float."""
    config = CT("int-quantized", 8, None)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "type": "int"}
    stands_for = made.write(tmp_path, tiny_llama(layers=1, dtype=BF16), made.int_quantized, config)
    with pytest.warns(UserWarning, match="the activations were quantized, too, and load does not"):
        loaded = load(tmp_path)
    for name, w in stands_for.items():
        assert torch.equal(loaded.get_parameter(name).dequantize(F32), w)


@pytest.mark.parametrize("name", ["auto-round", "GPTQ", "AWQ"])
def test_activations_of_auto_round(tmp_path, name):
    make, config, dtype, _ = FORMATS[name]
    made.write(tmp_path, tiny_llama(layers=1, dtype=dtype), make, config | {"act_bits": 8})
    with pytest.warns(UserWarning, match="the activations were quantized, too"):
        load(tmp_path)


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
@pytest.mark.parametrize("other", [None, "gptq_v2"])
def test_a_version_said_by_either_option(tmp_path, key, other):
    """One that is null says nothing."""
    keys = {"checkpoint_format", "format"}
    config = made.gptq_config() | {key: "gptq_v2"} | dict.fromkeys(keys - {key}, other)
    model = tiny_llama(layers=1, dtype=F16)
    stands_for = made.write(tmp_path, model, partial(made.gptq, v2=True), config)
    loaded = load(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(loaded.get_parameter(name).dequantize(F32), stands_for[name])


def test_layers_of_auto_round(tmp_path):
    model = tiny_llama(layers=1, dtype=F16)
    model.save_pretrained(tmp_path)
    extra = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64}}
    config = AUTO_ROUND | {"extra_config": extra}
    chosen = lambda n: n.endswith("down_proj.weight")  # noqa: E731
    made.rewrite(tmp_path, partial(made.gptq, bits=8, group_size=64), config, chosen)
    made.rewrite(tmp_path, made.gptq, config, lambda n: n.endswith("up_proj.weight"))
    mlp = load(tmp_path).model.layers[0].mlp
    assert (mlp.down_proj.weight.bits, mlp.up_proj.weight.bits) == (8, 4)


def test_an_output_layer_of_its_own(tmp_path):
    model = tiny_llama(layers=1, dtype=F16)
    chosen = lambda n: n.endswith(("_proj.weight", "lm_head.weight"))  # noqa: E731
    stands_for = made.write(tmp_path, model, made.gptq, made.gptq_config(lm_head=True), chosen)
    loaded = load(tmp_path)
    assert torch.equal(loaded.lm_head.weight.dequantize(F32), stands_for["lm_head.weight"])


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor", "PerGroup"])
@pytest.mark.parametrize("activations", [False, True])
def test_torchao(tmp_path, granularity, activations):
    """What transformers writes of torchao's Int8Tensor."""
    from torchao import quantization
    from transformers import AutoModelForCausalLM, TorchAoConfig

    if activations and granularity != "PerRow":
        return
    kind = getattr(quantization, granularity)
    kind = kind(32) if granularity == "PerGroup" else kind()
    name = "Int8DynamicActivationInt8WeightConfig" if activations else "Int8WeightOnlyConfig"
    config = getattr(quantization, name)(version=2, granularity=kind)
    tiny_llama(layers=1, dtype=BF16).save_pretrained(tmp_path / "float")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=TorchAoConfig(config), dtype=BF16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="quantized the activations, too") if activations else nullcontext():
        loaded = load(tmp_path / "theirs")
    count = 0
    for name, w in theirs.named_parameters():
        if type(w).__name__ != "Int8Tensor":
            continue
        got, count = loaded.get_parameter(name), count + 1
        assert (got.bits, got.group_size, got.dtype) == (8, 32 if granularity == "PerGroup" else -1, BF16)
        size = w.shape[1] // w.scale.shape[1]
        exact = w.qdata.float() * w.scale.float().expand(len(w), -1).repeat_interleave(size, 1)
        assert torch.equal(got.dequantize(F32), exact)
    assert count == 7
    save(loaded, tmp_path / "ours")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours")(ids).logits, loaded(ids).logits)
    if not activations:
        with pytest.warns(UserWarning, match="quantized by torchao; they are dequantized"):
            assert load(tmp_path / "theirs", rtn_int4(32)).model.layers[0].mlp.up_proj.weight.bits == 4
