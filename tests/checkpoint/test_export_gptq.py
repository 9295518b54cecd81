"""`export` to GPTQ."""

import json
import re

import pytest
import torch
from expecttest import assert_expected_inline
from exported import but_the_ends, llama, llava, read
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    export,
    quantize_,
    rtn_int4,
    rtn_int8,
)


def gptq_weight(found, module, bits, group_size):
    """w = S (u - zero) of one module, in fp32, read from the definition."""
    words, scale, zeros, index = (
        found[f"{module}.{end}"] for end in ("qweight", "scales", "qzeros", "g_idx")
    )
    shifts = torch.arange(0, 32, bits)
    mask = 2**bits - 1
    u = (words[:, None] >> shifts[:, None] & mask).flatten(0, 1)  # [K, N]
    zero = (zeros[..., None] >> shifts & mask).flatten(-2) + 1  # [G, N]
    assert torch.equal(index, (torch.arange(len(u)) // (len(u) if group_size == -1 else group_size)).int())
    return ((u - zero[index]) * scale.float()[index]).t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [rtn_int4(32, "signed"), rtn_int4(64), rtn_int4(-1), rtn_int8(-1), rtn_int8(32)], ids=str
)
def test_gptq(tmp_path, config, dtype):
    model = tiny_llama(dtype=dtype, tied=True)
    quantize_(model, config, but_the_ends)
    report = export(model, tmp_path / "a", format="gptq")
    found, about = read(tmp_path / "a")
    group_size = -1 if config.group_size == -1 else 32
    assert about == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": config.bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    assert json.loads((tmp_path / "a" / "quantize_config.json").read_text()) == about
    zeros = {int(word) for name, t in found.items() if name.endswith(".qzeros") for word in t.unique()}
    assert zeros == {{4: 0x77777777, 8: 0x7F7F7F7F}[config.bits]}
    weights = {name: w for name, w in model.named_parameters() if isinstance(w, RTNQuantizedTensor)}
    assert len(weights) == 14
    for name, w in weights.items():
        module = name.removesuffix(".weight")
        got = gptq_weight(found, module, config.bits, group_size)
        assert torch.equal(got, w.dequantize(torch.float32))
        assert found[f"{module}.scales"].dtype == dtype
        assert found[f"{module}.qweight"].is_contiguous()
    assert all(" reads it" in engine for engine in report.engines)


def test_gptq_formats_by_layer(tmp_path):
    rules = [
        ("*.0.*.gate_proj", rtn_int8(32)),
        ("*.0.*.up_proj", rtn_int8(32)),
        ("*.1.*.down_proj", rtn_int4(-1)),
        ("*.1.*.o_proj", None),
        ("lm_head", rtn_int8(32)),
        ("*", rtn_int4(32)),
    ]
    model = llama(rules, lambda module, fqn: isinstance(module, nn.Linear))
    report = export(model, tmp_path / "a", format="gptq")
    _, about = read(tmp_path / "a")
    assert (about["bits"], about["group_size"], about["lm_head"]) == (4, 32, True)
    assert_expected_inline(
        json.dumps(about["dynamic"], indent=1),
        """\
{
 "+:^lm_head$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.0\\\\.mlp\\\\.gate_proj$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.0\\\\.mlp\\\\.gate_up_proj$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.0\\\\.mlp\\\\.up_proj$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.1\\\\.mlp\\\\.down_proj$": {
  "bits": 4,
  "group_size": -1
 },
 "-:^model\\\\.layers\\\\.1\\\\.self_attn\\\\.o_proj$": {}
}""",
    )
    assert [" reads it" in engine for engine in report.engines] == [True, True, False]
    mixed = llama([("*.q_proj", rtn_int8(32)), ("*", rtn_int4(32))])
    report = export(mixed, tmp_path / "b", format="gptq")
    assert [" reads it" in engine for engine in report.engines] == [False, False, False]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_gptq_experts(tmp_path, name):
    model = tiny_moe(name, torch.bfloat16)
    quantize_(model, [("*.1.*.experts.*", rtn_int8(-1)), ("*", rtn_int4(32))])
    export(model, tmp_path / "a", format="gptq")
    found, about = read(tmp_path / "a")
    experts = [name for name in found if ".experts.0." in name and name.endswith("qweight")]
    assert len(experts) == 6
    for key in experts:
        module, first = key.removesuffix(".qweight"), ".0." in key.partition(".experts")[0]
        hits = [about["dynamic"][p] for p in about["dynamic"] if re.match(p[2:], module)]
        assert hits == ([] if first else [{"bits": 8, "group_size": -1}])
    layer = experts[-1].partition(".0.")[0]
    assert [how for p, how in about["dynamic"].items() if re.match(p[2:], layer)] == [
        {"bits": 8, "group_size": -1}
    ]
    gate = about["dynamic"].keys() & {rf"-:^{re.escape(layer.removesuffix('.experts') + '.gate')}$"}
    assert gate
    down = model.model.layers[1].mlp.experts.down_proj[3].dequantize(torch.float32)
    last = f"{layer}.3.{'w2' if name == 'Mixtral' else 'down_proj'}"
    assert torch.equal(gptq_weight(found, last, 8, -1), down)


def test_gptq_words_that_are_not_whole(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=320, **sizes), dtype=torch.bfloat16
    ).eval()
    quantize_(model, rtn_int4(-1), but_the_ends)
    why = r"down_proj: K = 100 is no multiple of 8, .*; leave it float, or use compressed-tensors"
    with pytest.raises(ValueError, match=why):
        export(model, tmp_path / "a", format="gptq")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "b")


def test_names_that_files_have_and_the_model_has_not(tmp_path):
    """GPTQModel asks by the model's names, vLLM by those in files."""
    model = llava()
    quantize_(
        model, [("*lm_head", rtn_int4(32)), ("*vision*", None), ("*.down_proj", None), ("*", rtn_int4(32))]
    )
    export(model, tmp_path / "a", format="gptq")
    found, about = read(tmp_path / "a")
    assert "language_model.lm_head.qweight" in found
    assert about["lm_head"] is True
    for name in (
        "language_model.model.layers.0.mlp.down_proj",
        "model.language_model.layers.0.mlp.down_proj",
    ):
        assert f"-:^{re.escape(name)}$" in about["dynamic"]
    assert not [pattern for pattern in about["dynamic"] if "lm_head" in pattern]
