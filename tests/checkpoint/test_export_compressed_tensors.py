"""`export` to compressed-tensors, against its own library and transformers."""

import json
import math

import pytest
import torch
from expecttest import assert_expected_inline
from exported import assert_same, but_the_ends, from_transformers, llama, llava, read
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    export,
    load,
    quantize_,
    rtn,
    rtn_int4,
    rtn_int8,
)
from rtn_tensor.formats import FORMATS, pack_gptq


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("k", [1, 31, 64, 100, 1000])
def test_words_are_those_of_its_packer(bits, k):
    packer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    fmt = FORMATS[bits]
    q = torch.randint(fmt.qmin, fmt.qmax + 1, (5, k), dtype=torch.int8)
    q[0], q[1] = fmt.qmin, fmt.qmax
    assert torch.equal(pack_gptq(q, bits), packer.pack_to_int32(q, bits))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        rtn_int4(32, "signed"),
        rtn_int4(64),
        rtn_int4(128),
        rtn_int4(-1, "absmax"),
        rtn_int8(-1),
        rtn_int8(96),
        [("*.down_proj", rtn_int8(128)), ("*layers.1.*o_proj", None), ("*", rtn_int4(32))],
    ],
    ids=str,
)
def test_transformers_reads_the_same_weights(tmp_path, config, tied, monkeypatch):
    model = llama(config, tied=tied)
    report = export(model, tmp_path / "a")
    assert report.format == "compressed-tensors"
    got = from_transformers(tmp_path / "a", monkeypatch)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied
    assert_same(got, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_keep_their_dtype(tmp_path, dtype, monkeypatch):
    model = tiny_llama(dtype=dtype)
    quantize_(model, rtn_int4(32), but_the_ends)
    report = export(model, tmp_path / "a")
    assert ("float32 scales" in report.engines[0]) == (dtype == torch.float32)
    scales = [t for name, t in read(tmp_path / "a")[0].items() if name.endswith("weight_scale")]
    assert {t.dtype for t in scales} == {dtype}
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "Olmoe"])
@pytest.mark.parametrize("mixed", [False, True])
def test_experts_are_one_module_each(tmp_path, name, mixed, monkeypatch):
    model = tiny_moe(name, torch.bfloat16)
    rest = rtn_int4(32)
    quantize_(model, [("*.experts.*", rtn_int8(-1)), ("*", rest)] if mixed else rest)
    report = export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    experts = [name for name in found if ".experts.0." in name and name.endswith("weight_packed")]
    assert experts
    assert all(found[name].dim() == 2 for name in experts)
    if mixed:
        targets = {
            group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()
        }
        assert targets[8] == [r"re:.*\.experts\.\d+\..*"]
        assert "re:" not in "".join(targets[4])
    assert all(" reads it" in engine for engine in report.engines)
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


def test_an_output_layer_of_its_own(tmp_path, monkeypatch):
    """quantize_ unties it from the embedding, which stays float."""
    model = llama(filter_fn=lambda module, fqn: isinstance(module, nn.Linear), tied=True)
    export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(found)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_embedding_is_written_float(tmp_path, tied, monkeypatch):
    def all_of_it(module, fqn):
        return isinstance(module, nn.Linear | nn.Embedding)

    model = llama(filter_fn=all_of_it, tied=tied)
    report = export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert ("lm_head.weight_packed" in found) == (not tied)
    assert config["ignore"] == (["lm_head"] if tied else [])
    assert report.changes[-1] == "Written float, as engines keep embeddings float: model.embed_tokens.weight."
    row = next(row for row in report.rows if row.name == "model.embed_tokens.weight")
    assert (row.bits, row.bytes_after) == (None, 320 * 96 * 2)
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


def test_few_rows_are_written_float(tmp_path, monkeypatch):
    model = tiny_moe("Qwen2Moe", torch.bfloat16)
    quantize_(model, rtn_int8(32))
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate.weight, RTNQuantizedTensor)
    report = export(model, tmp_path / "a")
    assert report.changes == [
        "Written float, as engines have no kernel for 1 rows (but for multiples of 4 from 32 on): "
        "model.layers.0.mlp.shared_expert_gate.weight, model.layers.1.mlp.shared_expert_gate.weight."
    ]
    found, config = read(tmp_path / "a")
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 64)
    assert "model.layers.0.mlp.shared_expert_gate" in config["ignore"]
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


def test_groups_are_cut_where_they_must_be(tmp_path):
    """K = 96 and 160: of groups of 64, 32 fit both."""
    model = llama(rtn_int4(64))
    w = model.model.layers[0].self_attn.q_proj.weight
    assert w.scale.shape == (96, 2)
    report = export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    assert [group["weights"]["group_size"] for group in config["config_groups"].values()] == [32]
    scale = found["model.layers.0.self_attn.q_proj.weight_scale"]
    assert torch.equal(scale, w.scale[:, [0, 0, 1]])
    assert report.changes == [
        "Groups of 64 are written as groups of 32, the scale of each several times (14 weights)."
    ]
    row = next(row for row in report.rows if row.name.endswith("0.self_attn.q_proj.weight"))
    size = sum(t.nbytes for name, t in found.items() if name.startswith("model.layers.0.self_attn.q_proj."))
    assert (row.bits, row.group_size, row.bytes_after) == (4, 32, size)


@pytest.mark.parametrize(
    ("hidden", "group_size", "works"), [(1000, 32, False), (1000, 1024, True), (1000, -1, True)]
)
def test_groups_that_no_engine_has(tmp_path, hidden, group_size, works, monkeypatch):
    config = LlamaConfig(
        vocab_size=320, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    quantize_(model, rtn_int4(group_size), but_the_ends)
    if works:
        export(model, tmp_path / "a")
        assert_same(from_transformers(tmp_path / "a", monkeypatch), model)
        return
    with pytest.raises(
        ValueError, match="gate_proj: K = 1000 and group_size 32 share only 8, and no engine"
    ) as caught:
        export(model, tmp_path / "a")
    assert "group_size -1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["GptOss", "Llama4"])
def test_transposed_experts_are_refused(tmp_path, name):
    model = tiny_moe(name, torch.bfloat16)
    quantize_(model, rtn_int4(32))
    with pytest.raises(ValueError, match=r"layers.0.*experts.*stored as \[in_features, out_features\]"):
        export(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_parts_that_engines_fuse(tmp_path):
    mixed = [("*.q_proj", rtn_int8(32)), ("*", rtn_int4(32))]
    report = export(llama(mixed), tmp_path / "a")
    assert_expected_inline(
        "\n".join(report.engines).replace("compressed-tensors", "c-t"),
        """\
vLLM 0.32 does not read it: it holds model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj as one, and they have several formats.
SGLang 0.5.23 does not read it: it holds model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj as one, and they have several formats.
transformers 5.23 with c-t 0.20 reads it: it dequantizes at the first forward, so that no memory is saved; with dequantize=True it does not, as there are several formats.""",
    )
    report = export(llama([("*.0.*.k_proj", None), ("*", rtn_int4(32))]), tmp_path / "b")
    assert "does not read" in report.engines[0]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    "config", [rtn(4, 64, "minmax"), rtn(4, -1, "minmax"), rtn(8, 32, "minmax")], ids=str
)
def test_zero_points(tmp_path, config):
    """By compressed-tensors' own code, and by transformers, which makes room for them in one way only."""
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme
    from loguru import logger
    from transformers import CompressedTensorsConfig

    logger.remove()
    model = llama(config)
    report = export(model, tmp_path / "a")
    found, about = read(tmp_path / "a")
    scheme = QuantizationScheme(**about["config_groups"]["group_0"])
    for name, w in model.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            planes = {key.rpartition(".")[2]: t for key, t in found.items() if key.startswith(f"{name}_")}
            assert set(planes) == {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
            got = compressors.PackedQuantizationCompressor.decompress(planes, scheme)["weight"]
            assert torch.equal(got, w.dequantize())
    assert "reads it: with CompressedTensorsConfig(dequantize=True)" in report.engines[2]
    whole = CompressedTensorsConfig(dequantize=True)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=whole).eval(), model)


def test_zero_points_come_back(tmp_path):
    model = llama(rtn(4, 32, "minmax"))
    export(model, tmp_path / "a")
    again = load(tmp_path / "a")
    for name, w in model.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            assert torch.equal(again.get_parameter(name).zero, w.zero)
            assert torch.equal(again.get_parameter(name).dequantize(), w.dequantize())
    export(again, tmp_path / "b")
    one, two = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def test_scales_of_another_dtype_than_the_model(tmp_path):
    """As those of GPTQ checkpoints in a bfloat16 model: they are written as they are."""
    model = tiny_llama(dtype=torch.float16)
    quantize_(model, rtn_int4(32), but_the_ends)
    export(model, tmp_path / "a", "gptq")
    for name in ("compressed-tensors", "gptq"):
        report = export(load(tmp_path / "a", dtype=torch.bfloat16), tmp_path / name, name)
        assert ("rounds the float16 scales" in report.engines[0]) == (name == "compressed-tensors")
        found, about = read(tmp_path / name)
        scales = [t for key, t in found.items() if key.endswith(("weight_scale", "scales"))]
        assert {t.dtype for t in scales} == {torch.float16}
        assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    again, _ = read(tmp_path / "gptq")
    first, _ = read(tmp_path / "a")
    assert all(
        torch.equal(again[key], t) for key, t in first.items() if t.dtype == torch.int32 or "scales" in key
    )


def test_zero_points_beyond_the_bits(tmp_path):
    """As GPTQ's may be."""
    model = llama(rtn(4, 32, "minmax"))
    model.model.layers[1].mlp.up_proj.weight.zero[3, 1] = 8
    why = (
        r"layers.1.mlp.up_proj: a zero point is 8 or -?\d, and 4 bits hold -8 to 7; load the checkpoint with"
    )
    with pytest.raises(ValueError, match=why):
        export(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_scales_of_any_kind(tmp_path):
    """Negative ones, and the least integer, which has no opposite."""
    for method in ("absmax", "signed", "search"):
        model = llama(rtn(4, 32, method))
        export(model, tmp_path / method)
        found, _ = read(tmp_path / method)
        w = model.model.layers[0].mlp.up_proj.weight
        words = found["model.layers.0.mlp.up_proj.weight_packed"]
        u = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(-2)
        scale = found["model.layers.0.mlp.up_proj.weight_scale"]
        assert torch.equal((u - 8) * scale.float().repeat_interleave(32, -1), w.dequantize(torch.float32))
        assert math.prod(found["model.layers.0.mlp.up_proj.weight_shape"]) == w.numel()


@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (llava, rtn_int4(32)),
        (llava, [("*lm_head", None), ("*vision*", rtn_int8(-1)), ("*", rtn_int4(32))]),
        (lambda: tiny_moe("Phimoe"), rtn_int4(32)),
    ],
    ids=["an output layer", "names of several formats", "a router that is a linear layer"],
)
def test_names_that_files_have_and_the_model_has_not(tmp_path, make, rules, monkeypatch):
    """transformers looks them up by the model's names, and made what it did not find anew."""
    model = make()
    quantize_(model, rules)
    export(model, tmp_path / "a")
    kind = type(model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", kind.from_pretrained)
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)
