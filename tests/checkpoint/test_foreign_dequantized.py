"""Folders that other libraries quantized in ways that this one's planes do not hold: they are dequantized while
they are read."""

import json
from contextlib import nullcontext
from functools import partial

import foreign_formats as made
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe

from rtn_tensor import RTNQuantizedTensor, load, quantize_, rtn_int4, rtn_int8

CT = made.ct_config
BY_AUTO_ROUND = {"act_bits": 16, "autoround_version": "0.16.1", "bits": 8, "data_type": "fp", "sym": True}
AUTO_ROUND = BY_AUTO_ROUND | {"quant_method": "auto-round", "regex_config": {}}
AUTO_ROUND_FP4 = AUTO_ROUND | {"bits": 4, "packing_format": "auto_round:llm_compressor"}
FORMATS = {
    "fp8 of blocks": (made.fp8, made.FP8_CONFIG),
    "fp8 of small blocks": (
        partial(made.fp8, block=(32, 16)),
        made.FP8_CONFIG | {"weight_block_size": [32, 16]},
    ),
    "fp8 of blocks, scales bf16": (partial(made.fp8, dtype=torch.bfloat16), made.FP8_CONFIG),
    "fp8 of blocks, scales powers": (partial(made.fp8, dtype=torch.float8_e8m0fnu), made.FP8_CONFIG),
    "fp8 per tensor": (partial(made.fp8, kind="tensor"), made.FP8_CONFIG | {"weight_block_size": None}),
    "fp8 e5m2": (
        partial(made.fp8, kind="tensor", fp8=torch.float8_e5m2),
        {"quant_method": "fp8", "fmt": "e5m2"},
    ),
    "FBGEMM": (
        partial(made.fp8, kind="channel", end="_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
    "compressed-tensors, fp8": (
        partial(made.fp8, kind="channel", end="_scale"),
        CT("float-quantized", 8, None, kind="float"),
    ),
    "compressed-tensors, fp8 of blocks": (
        partial(made.fp8, end="_scale"),
        CT("float-quantized", 8, None, kind="float", block_structure=[128, 128]),
    ),
    "compressed-tensors, NVFP4": (
        partial(made.nvfp4, compressed=True),
        CT("nvfp4-pack-quantized", 4, 16, kind="float"),
    ),
    "compressed-tensors, MXFP4": (made.ct_mxfp4, CT("mxfp4-pack-quantized", 4, 32, kind="float")),
    "compressed-tensors, asymmetric": (partial(made.compressed, symmetric=False), CT(symmetric=False)),
    "compressed-tensors, asymmetric rows of 8 bits": (
        partial(made.compressed, bits=8, group_size=-1, symmetric=False),
        CT(bits=8, group_size=None, symmetric=False),
    ),
    "compressed-tensors, sorted columns": (
        partial(made.compressed, act_order=True),
        CT(actorder="group"),
    ),
    "compressed-tensors, int8 asymmetric": (
        partial(made.int_quantized, symmetric=False),
        CT("int-quantized", 8, None, symmetric=False),
    ),
    "ModelOpt, NVFP4": (
        made.nvfp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {}},
    ),
    "ModelOpt, fp8": (
        partial(made.fp8, kind="tensor", end="_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None},
    ),
    "bitsandbytes, nf4": (made.bnb4, made.BNB4_CONFIG),
    "bitsandbytes, nf4, nested": (partial(made.bnb4, nested=True), made.BNB4_CONFIG),
    "bitsandbytes, fp4, blocks over rows": (partial(made.bnb4, kind="fp4", block=128), made.BNB4_CONFIG),
    "GPTQ, asymmetric": (partial(made.gptq, symmetric=False), made.gptq_config(sym=False)),
    "GPTQ, asymmetric, 8 bits": (
        partial(made.gptq, bits=8, symmetric=False),
        made.gptq_config(8, sym=False),
    ),
    "GPTQ, sorted columns": (partial(made.gptq, act_order=True), made.gptq_config(desc_act=True)),
    "GPTQ, sorted, asymmetric, v2": (
        partial(made.gptq, act_order=True, symmetric=False, v2=True),
        made.gptq_config(desc_act=True, sym=False, checkpoint_format="gptq_v2"),
    ),
    "GPTQ, small groups": (partial(made.gptq, group_size=16), made.gptq_config(group_size=16)),
    "auto-round": (
        partial(made.gptq, symmetric=False),
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"},
    ),
    "auto-round, fp8 of blocks": (
        partial(made.fp8, dtype=torch.bfloat16),
        AUTO_ROUND | {"packing_format": "auto_round:fp8", "weight_block_size": [128, 128]},
    ),
    "auto-round, fp8 of rows": (
        partial(made.fp8, kind="vector", end="_scale"),
        AUTO_ROUND | {"packing_format": "auto_round:fp8_static", "activation_scheme": "static"},
    ),
    "auto-round, MXFP4": (made.ct_mxfp4, AUTO_ROUND_FP4 | {"data_type": "mx_fp"}),
    "auto-round, NVFP4": (partial(made.nvfp4, compressed=True), AUTO_ROUND_FP4 | {"data_type": "nv_fp"}),
    "fp8 of blocks, by auto-round": (made.fp8, BY_AUTO_ROUND | made.FP8_CONFIG | {"group_size": [128, 128]}),
    "compressed-tensors, MXFP4, by auto-round": (
        made.ct_mxfp4,
        CT("mxfp4-pack-quantized", 4, 32, kind="float") | {"provider": "auto-round"},
    ),
    "AWQ": (made.awq, made.AWQ_CONFIG),
}


@pytest.mark.parametrize(("make", "config"), FORMATS.values(), ids=FORMATS)
def test_anew(tmp_path, make, config):
    """As the float model is quantized that the folder stands for; nothing remembers the other library."""
    model = tiny_llama(layers=1, dtype=torch.bfloat16)
    stands_for = made.write(tmp_path, model, make, config)
    with pytest.warns(UserWarning, match="dequantized as they are read, and quantized anew"):
        loaded = load(tmp_path, rtn_int4(32))
    with torch.no_grad():
        for name, w in stands_for.items():
            model.get_parameter(name).copy_(w)
    quantize_(model, [("*_proj", rtn_int4(32))])
    for (name, got), due in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert isinstance(got, RTNQuantizedTensor) == name.endswith("_proj.weight")
        assert (
            torch.equal(got.dequantize(), due.dequantize()) if name in stands_for else torch.equal(got, due)
        )
    assert "torchao" in str(loaded.config.quantization_config)


@pytest.mark.parametrize(
    "name", ["fp8 of blocks", "bitsandbytes, nf4, nested", "GPTQ, sorted columns", "GPTQ, small groups"]
)
def test_without_a_config_they_become_floats(tmp_path, name):
    make, config = FORMATS[name]
    stands_for = made.write(tmp_path, tiny_llama(layers=1), make, config)
    with pytest.warns(
        UserWarning, match="they are dequantized as they are read, and stay float, model.layers"
    ):
        loaded = load(tmp_path)
    for name, w in stands_for.items():
        assert torch.equal(loaded.get_parameter(name), w), name
    assert not hasattr(loaded.config, "quantization_config")


def test_the_command(tmp_path, run):
    make, config = FORMATS["fp8 of blocks"]
    made.write(tmp_path / "fp8", tiny_llama(layers=1), make, config)
    status, _, err = run("quantize", tmp_path / "fp8", tmp_path / "out", "--bits", 4)
    assert status == 0, err
    assert "the weights are quantized by fp8 with a scale for each block; they are dequantized" in err
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "torchao"
    assert "weight_block_size" not in about
    assert load(tmp_path / "out").model.layers[0].mlp.up_proj.weight.bits == 4


def test_experts_a_module_each(tmp_path):
    """Files have one module an expert; transformers has one parameter for all, gate and up in one."""
    model = tiny_moe("DeepseekV3", torch.bfloat16)
    chosen = lambda name: "proj" in name and "norm" not in name and name.endswith(".weight")  # noqa: E731
    make = partial(made.fp8, block=(32, 16))
    config = made.FP8_CONFIG | {"weight_block_size": [32, 16]}
    stands_for = made.write(tmp_path, model, make, config, chosen)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stands_for
    with pytest.warns(UserWarning, match="quantized anew"):
        loaded = load(tmp_path, rtn_int8(32))
    experts = loaded.model.layers[1].mlp.experts
    prefix = "model.layers.1.mlp.experts.3"
    gate, up = (stands_for[f"{prefix}.{name}_proj.weight"].bfloat16() for name in ("gate", "up"))
    due = RTNQuantizedTensor.from_float(torch.cat([gate, up]), 8, 32)
    assert torch.equal(experts.gate_up_proj[3].qdata, due.qdata)
    assert torch.equal(experts.gate_up_proj[3].scale, due.scale)


def test_experts_in_one_fp8_tensor(tmp_path):
    model = tiny_moe("Qwen3Moe", torch.bfloat16)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = [name for name in state if ".experts." in name and ".layers.0." in name]
    for name in names:
        del state[name]
    prefix, due = "model.layers.0.mlp.experts", {}
    for name, (n, k) in {"gate_up_proj": (192, 64), "down_proj": (64, 96)}.items():
        parts = [made.fp8(n, k, block=(32, 32)) for _ in range(4)]
        due[name] = torch.stack([w for _, w in parts])
        state[f"{prefix}.{name}"] = torch.stack([planes["weight"] for planes, _ in parts])
        state[f"{prefix}.{name}_scale_inv"] = torch.stack([planes["weight_scale_inv"] for planes, _ in parts])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    about = json.loads((tmp_path / "config.json").read_text())
    about["quantization_config"] = made.FP8_CONFIG | {"weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="stay float"):
        loaded = load(tmp_path)
    for name, w in due.items():
        assert torch.equal(getattr(loaded.model.layers[0].mlp.experts, name), w.bfloat16())


@pytest.mark.parametrize("config", [None, rtn_int4(32)])
def test_gpt_oss(tmp_path, config):
    model = tiny_moe("GptOss", torch.bfloat16)
    model.save_pretrained(tmp_path)
    state, due = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        e, k, n = state.pop(name).shape
        planes, due[name] = made.mxfp4(e, n, k)
        state |= {f"{name}{end}": plane for end, plane in planes.items()}
    assert len(due) == 4
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    about = json.loads((tmp_path / "config.json").read_text())
    about["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="quantized by MXFP4"):
        loaded = load(tmp_path, config)
    for name, w in due.items():
        got = loaded.get_parameter(name)
        if config is not None:
            assert got.transposed
            w = RTNQuantizedTensor.from_float(w.bfloat16().mT, 4, 32).dequantize().mT
            got = got.dequantize()
        assert torch.equal(got, w.bfloat16())


def test_scales_of_activations_are_left_out(tmp_path):
    make, config = FORMATS["ModelOpt, fp8"]

    def with_others(n, k):
        planes, w = make(n, k)
        return planes | {"input_scale": torch.ones(()), "k_scale": torch.ones(())}, w

    made.write(tmp_path, tiny_llama(layers=1), with_others, config)
    with pytest.warns(UserWarning, match="ModelOpt"):
        load(tmp_path)


def test_configs_beside_the_models(tmp_path):
    """AutoGPTQ's, AutoAWQ's and ModelOpt's older folders have theirs in a file of its own."""
    cases = {
        "quantize_config.json": ("AWQ", {"quant_method": "awq", "bits": 4, "group_size": 32}),
        "quant_config.json": ("AWQ", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
        "hf_quant_config.json": (
            "ModelOpt, NVFP4",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}},
        ),
    }
    for name, (kind, config) in cases.items():
        folder = tmp_path / name.removesuffix(".json")
        stands_for = made.write(folder, tiny_llama(layers=1), FORMATS[kind][0], None)
        (folder / name).write_text(json.dumps(config))
        with pytest.warns(UserWarning, match="stay float") if kind != "AWQ" else nullcontext():
            loaded = load(folder)
        for weight, w in stands_for.items():
            got = loaded.get_parameter(weight)
            assert torch.equal(got.dequantize() if kind == "AWQ" else got, w)
        with pytest.warns(UserWarning, match="quantized anew"):
            assert load(folder, rtn_int8()).model.layers[0].mlp.up_proj.weight.bits == 8


def test_a_model_that_is_not_transformers(tmp_path):
    planes, w = made.gptq(64, 96, act_order=True)
    save_file({f"0.{name}": plane for name, plane in planes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": made.gptq_config()}))
    with pytest.warns(UserWarning, match="stay float"):
        loaded = load(tmp_path, model=torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False)))
    assert torch.equal(loaded[0].weight, w)
