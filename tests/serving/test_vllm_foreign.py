"""Folders that other libraries quantized, run by this library's kernels in vLLM: the tokens are those of `load`."""

import json

import foreign_formats as ff
import pytest
import torch
from engine import ROUNDING, difference, engine, greedy, rtn
from foreign_folders import (
    auto_round,
    awq,
    bitsandbytes,
    ct_experts,
    ct_mixed,
    gptq_mixed,
    gptq_rows,
    gptq_v2,
    int8,
    linears,
    quantized,
)
from vllm.engine.arg_utils import EngineArgs
from vllm_models import places, saved, weights

from rtn_tensor import load, save
from rtn_tensor import rtn as rtn_config
from rtn_tensor.integrations.vllm import RTNQuantizationConfig

FOLDERS = {
    "gptq": ("llama", gptq_mixed, {(4, 32, "given"), (8, 64, "given_asymmetric")}, torch.float16),
    "gptq-v2": ("llama", gptq_v2, {(4, 128, "given_asymmetric")}, torch.float16),
    "int-quantized": ("tied", int8, {(8, -1, "given")}, torch.bfloat16),
    "auto-round": ("llama", auto_round, {(4, 32, "given_asymmetric")}, torch.float16),
    "bitsandbytes": ("llama", bitsandbytes, {(8, -1, "given")}, torch.float32),
    "experts-awq": ("qwen3_moe", awq, {(4, 32, "given_asymmetric")}, torch.float16),
    "experts-gptq": ("mixtral", gptq_rows, {(4, -1, "given")}, torch.bfloat16),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_tokens(folder, tmp_path, calls, kind):
    name, make, formats, scale_dtype = FOLDERS[kind]
    path = make(folder(name), tmp_path / "quantized")
    with engine(path, quantization="rtn") as llm:
        generated = greedy(llm, new=8)
        found = weights(llm).values()
        assert {(w.bits, w.group_size, w.scale_method) for w in found} == formats
        assert {w.scale.dtype for w in found} == {scale_dtype}  # as they are in the files
        assert len(found) == 8 + (kind == "gptq-v2")  # of each layer four, and the output layer
    assert calls["linear"] >= 8 * 4
    assert bool(calls["routed"]) == ("experts" in kind)
    assert difference(load(path, dtype=torch.float32), generated) < ROUNDING["float32"]


def test_reload_takes_another_folder(folder, tmp_path):
    """Into the memory of the first."""
    source = folder("qwen3_moe")
    before, after = (ct_experts(source, tmp_path / str(seed), seed) for seed in (3, 4))
    other = int8(source, tmp_path / "other")
    with engine(before, quantization="rtn") as llm:
        where = places(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(after)})
        llm.reset_prefix_cache()
        generated = greedy(llm, new=8)
        assert where == places(llm)
        with pytest.raises(ValueError, match="proj.weight is not as in the folder that the engine started"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert difference(load(after, dtype=torch.float32), generated) < ROUNDING["float32"]
    assert difference(load(before, dtype=torch.float32), generated) > 100 * ROUNDING["float32"]


def test_saved_by_us_after_load(folder, tmp_path):
    """Zero points, and scales of another dtype than the model's, in our own format."""
    path = gptq_mixed(folder("llama"), tmp_path / "quantized")
    model = load(path, dtype=torch.bfloat16)
    save(model, tmp_path / "saved")
    with engine(tmp_path / "saved", dtype="bfloat16", skip_tokenizer_init=True) as llm:
        generated = greedy(llm, new=8)
        found = {name: (w.dtype, w.scale.dtype, w.zero is not None) for name, w in weights(llm).items()}
    assert {*found.values()} == {(torch.bfloat16, torch.float16, zero) for zero in (False, True)}
    assert difference(model, generated) < ROUNDING["bfloat16"]


@pytest.mark.parametrize("method", ["minmax", "search8"])
def test_other_planes_while_it_loads_and_saved(folder, tmp_path, method):
    """Zero points, and scales of 8 bits."""
    name = "mixtral"
    config = rtn_config(4, 32, method)
    model = load(folder(name), config, dtype=torch.float32)
    path = saved(folder(name), tmp_path / "saved", config=config, dtype=torch.float32)
    options = rtn(bits=4, group_size=32, scale_method=method)
    for source, how in ((folder(name), options), (path, {})):
        with engine(source, **how) as llm:
            generated = greedy(llm, new=8)
            for w in weights(llm).values():
                assert (w.zero is not None) == (method == "minmax")
                assert (w.scale.dtype == torch.uint8) == (method == "search8")
        assert difference(model, generated) < ROUNDING["float32"]


# -------------------------------------------------------------------------------- refused


def ask(path, **options):
    """What vLLM decides of a folder before it loads anything."""
    return EngineArgs(model=str(path), **{"dtype": "float32"} | options).create_engine_config()


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            lambda n, k: ff.gptq(n, k, act_order=True),
            ff.gptq_config(desc_act=True),
            r"_proj.weight \(of 14 such\) is quantized by GPTQ .* by rtn-tensor quantize .* DST; or leave out",
        ),
        (
            lambda n, k: ff.fp8(n, k, "channel", end="_scale"),
            ff.ct_config("float-quantized", 8, None, kind="float"),
            r"is quantized by compressed-tensors .* rtn-tensor quantize .* DST; or leave out quantization='rtn'",
        ),
        (
            lambda n, k: ff.gptq(n, k, 4),
            ff.gptq_config(3),
            r"bits is '3'; load reads 4, 8.*or leave out quantization='rtn', for vLLM's own kernels",
        ),
        (
            lambda n, k: {name: t for name, t in ff.gptq(n, k)[0].items() if name != "scales"},
            ff.gptq_config(),
            r"qweight has no model.layers.0.\S*.scales beside it",
        ),
    ],
    ids=["act-order", "fp8", "3 bits", "a plane is missing"],
)
def test_what_is_not_kept_is_refused(folder, tmp_path, make, config, message):
    def planes(n, k):
        made = make(n, k)
        return made if isinstance(made, tuple) else (made, None)

    path = quantized(folder("llama"), tmp_path / "quantized", config, (linears, planes))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ask(path, quantization="rtn")


def test_activations_that_are_quantized_are_refused(folder, tmp_path):
    path = int8(folder("llama"), tmp_path / "quantized")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8,
        "type": "int",
    }
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the activations are quantized, too.*leave out quantization='rtn'"):
        ask(path, quantization="rtn")


@pytest.mark.parametrize("whose", ["GPTQ", "this library"])
def test_another_format_by_options_is_refused(folder, tmp_path, whose):
    path = tmp_path / "quantized"
    if whose == "GPTQ":
        gptq_rows(folder("llama"), path)
    else:
        saved(folder("llama"), path, config=rtn_config(4))
    message = f"the weights are quantized by {whose} already, and the quantization_config that was given asks"
    with pytest.raises(ValueError, match=message):
        ask(path, **rtn(bits=4))


def test_experts_that_differ_are_refused(folder, tmp_path):
    config = ff.gptq_config(4, 32, dynamic={r"+:.*\.experts\.2\.": {"bits": 8}})

    def third(name):
        return linears(name) and ".experts.2." in name

    path = quantized(
        folder("qwen3_moe"),
        tmp_path / "quantized",
        config,
        (third, lambda n, k: ff.gptq(n, k, 8)),
        (lambda name: linears(name) and not third(name), ff.gptq),
    )
    message = r"experts is one layer here.*\(gate_proj int4 g32 given, up_proj int4 g32 given, gate_proj int8"
    with pytest.raises(ValueError, match=message), engine(path, quantization="rtn"):
        pass


@pytest.mark.parametrize(("make", "method"), [(gptq_rows, "auto_gptq"), (ct_mixed, "compressed-tensors")])
def test_without_being_asked_it_is_vllms_own(folder, tmp_path, make, method):
    config = ask(make(folder("llama"), tmp_path / "quantized"), dtype="bfloat16")
    assert config.model_config.quantization == method
    assert not isinstance(config.quant_config, RTNQuantizationConfig)


def test_an_older_folder_says_it_in_a_file_beside_its_config(folder, tmp_path):
    path = gptq_rows(folder("llama"), tmp_path / "quantized")
    config = json.loads((path / "config.json").read_text())
    (path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (path / "config.json").write_text(json.dumps(config))
    quant_config = ask(path, quantization="rtn").quant_config
    assert {*quant_config.options.saved.values()} == {*quant_config.folder.formats.values()}
    assert len(quant_config.options.saved) == 14
