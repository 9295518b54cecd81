"""What plugins for serving engines decide, without an engine. The engines themselves: `make test-serving`."""

import json
import logging
import re
import sys
import types

import pytest
import torch
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn
from torchao.quantization import FqnToConfig

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn, rtn_int4, rtn_int8, save
from rtn_tensor.integrations import plugins
from rtn_tensor.integrations.experts import run
from rtn_tensor.integrations.options import (
    KeptConfig,
    Options,
    activation_of,
    check_cut,
    check_router,
    has_own_output,
    is_saved,
    saved_formats,
    worth_it,
)
from rtn_tensor.reference import SwiGLU

NAME = "model.layers.3.self_attn.qkv_proj"
PARTS = [f"model.layers.3.self_attn.{part}_proj" for part in "qkv"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("RTN_NUM_BITS", raising=False)
    monkeypatch.delenv("RTN_GROUP_SIZE", raising=False)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_whose_modules_moved_is_told_in_one_line(engine, monkeypatch, caplog):
    """The plugin is loaded for users of other methods, too."""
    moved = types.ModuleType(engine)
    moved.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, engine, moved)
    with caplog.at_level(logging.WARNING):
        getattr(plugins, f"register_{engine}")()
    (line,) = caplog.messages
    assert line.startswith(
        f"quantization 'rtn' is not there: rtn-tensor 0.1.0 was made for {plugins.TRIED[engine]}, and this is version 9.9 "
        "(ModuleNotFoundError: No module named"
    )
    assert "\n" not in line


def test_what_is_left_out_is_the_old_variables(monkeypatch):
    assert Options.read({}).default == rtn(8, 128)
    monkeypatch.setenv("RTN_NUM_BITS", "4")
    monkeypatch.setenv("RTN_GROUP_SIZE", "-1")
    assert Options.read({}).default == rtn(4, -1, "absmax")
    assert Options.read({"bits": 8, "scale_method": "signed"}).default == rtn(8, -1, "signed")
    monkeypatch.setenv("RTN_NUM_BITS", "four")
    with pytest.raises(ValueError, match="RTN_NUM_BITS='four' is no number; use RTN_NUM_BITS=8, or unset it"):
        Options.read({})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RTN_NUM_BITS", "3", "RTN_NUM_BITS=3: bits=3 is not supported; use 4 or 8, or unset RTN_NUM_BITS"),
        ("RTN_NUM_BITS", "", "RTN_NUM_BITS='' is no number; use RTN_NUM_BITS=8, or unset it"),
        ("RTN_NUM_BITS", "4.0", "RTN_NUM_BITS='4.0' is no number"),
        ("RTN_GROUP_SIZE", "48", "RTN_GROUP_SIZE=48: group_size=48 is not supported; use a multiple of 32"),
        ("RTN_GROUP_SIZE", "-2", "RTN_GROUP_SIZE=-2: group_size=-2 is not supported"),
    ],
)
def test_a_variable_that_is_wrong_is_named(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Options.read({})


def test_int8_activations(tmp_path):
    given = {"activations": "int8", "rules": [["*.q_proj", {"activations": None}]]}
    options = Options.read(given)
    assert options.default == rtn(8, 128, "absmax", "int8")
    assert options.of("model.layers.0.self_attn.q_proj") == rtn(8, 128, "absmax")
    with pytest.raises(ValueError, match="quantization_config: activations='fp8' is not supported"):
        Options.read({"activations": "fp8"})
    model = tiny_llama()
    quantize_(model, rtn_int4(32, activations="int8"), but_the_ends)
    save(model, tmp_path / "saved")
    assert {*saved_formats(tmp_path / "saved").values()} == {rtn_int4(32, activations="int8")}


@pytest.mark.parametrize("method", ["minmax", "search8"])
def test_planes_that_an_engine_may_not_hold(tmp_path, method):
    """SGLang's plugin does not, and vLLM's does."""
    asked = ({"scale_method": method}, {"rules": [["*.q_proj", {"scale_method": method}]]})
    message = f"the scale method {method!r} has planes that this engine does not hold yet; use 'search'"
    for config in asked:
        with pytest.raises(ValueError, match=message):
            Options.read(config)
    assert Options.read(asked[0], unserved=()).default == rtn(8, 128, method)
    model = tiny_llama()
    quantize_(model, rtn_int4(32, method), but_the_ends)
    save(model, tmp_path / "saved")
    assert {*saved_formats(tmp_path / "saved").values()} == {rtn_int4(32, method)}


def test_scales_of_a_folder_that_keep_their_dtype(tmp_path):
    """As of a GPTQ checkpoint that `load` took over and `save` wrote."""
    model = tiny_llama().bfloat16()
    quantize_(model, rtn_int4(32), but_the_ends)
    weight = model.model.layers[0].mlp.down_proj.weight
    planes = {"qdata": weight.qdata, "scale": weight.scale.to(torch.float16)}
    about = {"bits": 4, "group_size": 32, "scale_method": "given", "in_features": weight.in_features}
    kept = RTNQuantizedTensor(**planes, **about, float_dtype=torch.bfloat16)
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(kept, requires_grad=False)
    save(model, tmp_path / "saved")
    formats = saved_formats(tmp_path / "saved")
    assert formats.pop("model.layers.0.mlp.down_proj.weight") == KeptConfig(
        4, 32, "given", scale_dtype=torch.float16
    )
    assert {*formats.values()} == {rtn_int4(32)}


def test_the_first_rule_that_matches_counts():
    rules = [["*.3.*", {"bits": 8}], ["re:.*q_proj", None], ["*", {"group_size": 32}]]
    options = Options.read({"bits": 4, "ignore": ["lm_head"], "rules": rules})
    assert options.of("lm_head") is None
    assert options.of("model.layers.3.mlp.down_proj") == rtn_int8()
    assert options.of("model.layers.4.self_attn.q_proj") is None
    assert options.of("model.layers.4.mlp.down_proj") == rtn_int4(32, "absmax")
    options.check()


def test_wildcards_reach_what_is_quantized_by_default():
    """As in quantize_: a router at 4 bits would choose other experts."""
    options = Options.read({"bits": 8, "rules": [["model.embed_tokens", {}], ["*", {"bits": 4}]]})
    assert options.of("model.layers.4.mlp.gate", by_default=False) is None
    assert options.of("model.embed_tokens", by_default=False) == rtn_int8()
    with pytest.raises(
        ValueError, match=r"no layer matches '\*', or only such as stay float unless named in " r"full"
    ):
        options.check()
    assert options.of("model.layers.4.mlp.up_proj") == rtn_int4(128, "absmax")
    options.check()


def test_by_default():
    options = Options.read({"bits": 4})
    assert options.of("a") == rtn_int4(128, "absmax")
    assert options.of("a", by_default=False) is None


def test_a_plan_names_weights():
    names = {
        part: rtn_int8() if i < 2 else rtn_int4(32, "absmax")
        for i, part in enumerate([*PARTS[:2], "model.layers.0.mlp.down_proj"])
    }
    plan = [
        [f"{part}.weight", {"bits": config.bits, "group_size": config.group_size}]
        for part, config in names.items()
    ]
    options = Options.read({"bits": 4, "rules": plan})
    assert options.of("qk", PARTS[:2]) == rtn_int8()
    assert options.of("model.layers.0.mlp.down_proj") == rtn_int4(32, "absmax")
    options.check()


def test_parts_of_a_fused_layer():
    assert Options.read({"ignore": ["*.[qkv]_proj"]}).of(NAME, PARTS) is None
    assert Options.read({"rules": [[NAME, {"bits": 4}]]}).of(NAME, PARTS) == rtn_int4(128, "absmax")
    options = Options.read(
        {"rules": [["*.v_proj", {"bits": 4, "scale_method": "signed"}], ["*.k_proj", None]]}
    )
    expected = "(q_proj int8 g128, k_proj float, v_proj int4 g128 signed); give all of them one"
    with pytest.raises(
        ValueError,
        match=re.escape(f"{NAME} is one layer here, and its parts would be of different formats {expected}"),
    ):
        options.of(NAME, PARTS)


def test_rules_that_match_nothing_are_refused():
    options = Options.read({"ignore": ["*.o_proj"], "rules": [["*.o_proj", {"bits": 4}]]})
    with pytest.raises(ValueError, match=r"no layer matches '\*\.o_proj'"):
        options.check()
    options.of("a.o_proj")
    options.check()  # an earlier rule that takes all is no mistake


def test_experts():
    options = Options.read(
        {
            "bits": 4,
            "rules": [["a.experts.down_proj", {"bits": 8}], ["b.experts", None], ["c.*.down_proj", None]],
        }
    )
    assert options.of_experts("a.experts") == (rtn_int4(128, "absmax"), rtn_int8())
    assert options.of_experts("b.experts") is None
    with pytest.raises(ValueError, match="c.experts: down_proj would stay float, and the other not"):
        options.of_experts("c.experts")


def test_layers_that_stay_float():
    assert worth_it("model.layers.0.mlp.gate_proj", 64, 64)
    assert not worth_it("model.layers.0.mlp.gate", 2048, 128)
    assert not worth_it("model.layers.0.mlp.shared_expert_gate", 2048, 1)
    assert not worth_it("model.layers.0.mixer.x_proj", 2048, 128)
    assert not worth_it("model.layers.0.linear_attn.in_proj_ba", 2048, 64)
    assert worth_it("model.layers.0.linear_attn.in_proj_qkvz", 2048, 4096)
    assert not worth_it("proj", 2048, 31)
    assert not worth_it("proj", 31, 2048)


def test_targets_leave_all_other_layers_float():
    """As vLLM's own online quantization spells it."""
    options = Options.read({"bits": 4, "ignore": ["*.0.*"], "targets": {"re:.*down_proj": {"bits": 8}}})
    down, up = (f"model.layers.1.mlp.{part}_proj" for part in ("down", "up"))
    assert options.of_linear(down, {}, 512, 512, 2) == rtn(8, 128)
    assert options.of_linear(up, {}, 512, 512, 2) is None
    assert options.of_linear(down.replace("1", "0"), {}, 512, 512, 2) is None
    options.check()
    other = Options.read({"targets": {"re:.*q_proj": {}}})
    other.of_linear(down, {}, 512, 512, 2)
    with pytest.raises(ValueError, match=r"no layer matches 're:\.\*q_proj'"):
        other.check()
    for given, said in (
        ({"targets": ["*"]}, r"targets is \['\*'\]; give the one or the other"),
        ({"targets": {"*": {}}, "rules": [["*", {}]]}, "targets is there beside rules"),
        ({"targets": {"*": {}}, "moe": {"bits": 4}}, "targets is there beside moe"),
        ({"targets": {"*": {"bits": 5}}}, r"rules\[0\]: bits=5 is not supported"),
        (
            {"targets": {"*": "fp8_per_tensor"}},
            r"targets\['\*'\] is 'fp8_per_tensor', which is not supported",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            Options.read(given)


def test_sections_of_linear_layers_and_experts():
    """As vLLM's own online quantization spells them: one that is left out leaves its layers float."""
    linear, experts = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts"
    weight_only = {"weight": "int8_per_channel_static", "activation": None}
    for given, expected in (
        ({"linear": {"bits": 4}}, (rtn_int4(128, "absmax"), None)),
        ({"moe": "int4_per_group_32"}, (None, rtn_int4(32, "absmax"))),
        ({"linear": weight_only, "moe": {"group_size": 64}, "bits": 4}, (rtn(8, -1), rtn_int4(64, "absmax"))),
        ({"linear": None, "bits": 4}, (rtn_int4(128, "absmax"),) * 2),
    ):
        options = Options.read(given)
        both = options.of_experts(experts)
        assert (options.of_linear(linear, {}, 512, 512, 2), both and both[0]) == expected
    options = Options.read({"moe": {"bits": 4}, "rules": [["*.o_proj", {"bits": 8}], ["lm_head", {}]]})
    assert options.of_linear(linear, {}, 512, 512, 2) == rtn(8, 128)
    assert options.of("lm_head", by_default=False) == rtn(8, 128)
    for given, said in (
        (
            {"linear": "fp8_per_tensor"},
            "linear is 'fp8_per_tensor', which is not supported; use 'int4_per_group_32'",
        ),
        ({"moe": {"bits": 5}}, "moe: bits=5 is not supported"),
        ({"moe": {"bitz": 4}}, r"moe has 'bitz'; .* \(for 'bitz', is 'bits' meant\?\)"),
        (
            {"linear": {"weight": "int4_per_group_32", "activation": "mxfp8"}},
            "has 'activation' beside 'weight'",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            Options.read(given)


def test_an_unknown_option_is_told_the_nearest():
    with pytest.raises(
        ValueError, match=r"has 'groupsize', 'x'; it takes .*'moe' \(for 'groupsize', is 'group_size'"
    ):
        Options.read({"groupsize": 64, "x": 1})


def test_summary():
    options = Options.read({})
    for layer in range(2):
        options.note(f"model.layers.{layer}.mlp.down_proj", rtn_int4(128, "absmax"), 96 * 512, 96, 2)
        options.note(f"model.layers.{layer}.mlp.gate", None, 4 * 512, 4, 2)
    options.note("lm_head", rtn_int8(-1, "signed"), 1000 * 512, 1000, 2)
    assert options.summary() == (
        "rtn: 2 int4 g128, 1 int8 g-1 signed; 1.2 MB of weights are 0.6 MB; float, as routers, steps of a "
        "recurrent state and layers of fewer than 32 rows or columns are by default: model.layers.*.mlp.gate (2)"
    )


@pytest.mark.parametrize("config", [rtn_int4(64), rtn_int8(64)])
def test_cuts(config):
    check_cut("a", config, 256, 128)
    check_cut("a", config, 96, 96)
    expected = "a: tensor parallelism gives each rank 96 of its 192 columns, a cut inside a group of 64; use group_size 32"
    with pytest.raises(ValueError, match=expected):
        check_cut("a", config, 192, 96)
    check_cut("a", rtn(config.bits, -1), 192, 96)
    with pytest.raises(ValueError, match="keep the layer float, or use fewer ranks"):
        check_cut("a", rtn_int4(-1), 96, 48)


def test_formats_of_a_folder(tmp_path):
    model = tiny_llama()
    quantize_(
        model, FqnToConfig({r"re:.*down_proj": rtn_int8(32), "model.embed_tokens": rtn_int4(-1, "signed")})
    )
    save(model, tmp_path / "saved")
    assert saved_formats(tmp_path / "saved") == {
        "model.layers.0.mlp.down_proj.weight": rtn_int8(32),
        "model.layers.1.mlp.down_proj.weight": rtn_int8(32),
        "model.embed_tokens.weight": rtn_int4(-1, "signed"),
    }
    assert is_saved(
        model.config.to_dict()
        | {"quant_method": "torchao", "quant_type": {"default": {"_type": "RTNInt4WeightConfig"}}}
    )
    assert not is_saved(
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}
    )
    with pytest.raises(FileNotFoundError, match="is no folder on this machine"):
        saved_formats(tmp_path / "nothing")


def test_formats_are_found_under_the_names_in_the_files(tmp_path):
    """transformers writes Mixtral's experts under an older name than its own."""
    model = tiny_moe("Mixtral")
    quantize_(model, rtn_int4(32))
    save(model, tmp_path / "saved")
    names = set(saved_formats(tmp_path / "saved"))
    assert "model.layers.0.block_sparse_moe.experts.gate_up_proj" in names
    assert not any(".mlp." in name for name in names)


def test_experts_whose_dims_are_swapped_are_refused_unless_the_engine_takes_them(tmp_path):
    model = tiny_moe("GptOss")
    quantize_(model, rtn_int4(32))
    save(model, tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"is saved as \[in_features, out_features\]; serve the float folder " r"instead"
    ):
        saved_formats(tmp_path / "saved")
    taken = saved_formats(tmp_path / "saved", swapped=r"\.experts\.(gate_up|down)_proj$")
    assert "model.layers.0.mlp.experts.gate_up_proj" in taken


def but_the_ends(module, fqn):
    return isinstance(module, nn.Linear) and fqn != "lm_head"


def only_the_embedding(module, fqn):
    return isinstance(module, nn.Embedding)


@pytest.mark.parametrize(
    "filter_fn", [None, but_the_ends, only_the_embedding], ids=["output", "neither", "embedding"]
)
def test_a_folder_says_whether_its_output_layer_is_the_embedding(tmp_path, filter_fn):
    """config.json says tied, of a model of which one of the two was quantized, too."""
    model = tiny_llama(tied=True)
    quantize_(model, rtn_int8(32), filter_fn)
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert has_own_output(tmp_path / "saved") == (filter_fn is not but_the_ends)


# --------------------------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("silu", (None, None, None), "silu"),
        ("silu", (None, 1.0, 0.0), "silu"),
        ("silu", (10.0, None, None), SwiGLU(limit=10.0)),
        ("silu", (1000, 1, 0), SwiGLU(limit=1000)),
        ("swigluoai", (None, None, None), "gpt_oss"),
        ("swigluoai", (7, 1.702, 1), "gpt_oss"),
        ("swigluoai", (10.0, None, None), SwiGLU(1.702, 1.0, 10.0, interleaved=True)),
        ("swigluoai_uninterleave", (7.0, 1.702, 1.0), SwiGLU(1.702, 1.0, 7.0)),
        ("swigluoai_uninterleave", (7.0, None, None), SwiGLU(limit=7.0)),
    ],
)
def test_what_the_experts_of_an_engine_compute(kind, settings, expected):
    assert activation_of("experts", kind, *settings) == expected


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gelu", (None, None, None)),
        ("silu_no_mul", (None, None, None)),
        ("swiglustep", (7.0, None, None)),
        ("silu", (None, 1.702, None)),
        ("silu", (None, None, 1.0)),
        ("silu", (0.0, None, None)),
        ("silu", (float("nan"), None, None)),
        ("swigluoai_uninterleave", (None, 1.702, 1.0)),
    ],
)
def test_experts_of_another_kind_are_refused_by_name(kind, settings):
    with pytest.raises(
        ValueError,
        match=f"^layers.0.experts: experts with the activation '{kind}' .*name 'layers.0.experts' in ignore",
    ):
        activation_of("layers.0.experts", kind, *settings)


def test_the_message_has_the_settings():
    with pytest.raises(
        ValueError,
        match=re.escape("the activation 'silu' and swiglu_limit=10.0, swiglu_beta=1.0 are not supported"),
    ):
        activation_of("experts", "silu", 10.0, None, 1.0)


def test_router_weights_on_inputs():
    check_router("experts", True, 1)
    check_router("experts", False, 2)
    with pytest.raises(
        ValueError, match="experts: apply_router_weight_on_input with 2 experts per token is not supported"
    ):
        check_router("experts", True, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamped_gate_between_two_launches(dtype):
    """As the reference has it, in fp32 between the products' roundings."""
    torch.manual_seed(0)
    up, down = (
        RTNQuantizedTensor.from_float(torch.randn(*shape, dtype=dtype), 8, 32)
        for shape in ((4, 192, 64), (4, 64, 96))
    )
    x, experts, router = torch.randn(5, 64, dtype=dtype) * 3, torch.randint(0, 4, (10,)), torch.rand(10)
    gate = SwiGLU(1.702, 1.0, 10.0)
    got = run(x, up, down, None, None, experts, router, 2, gate)
    for p, e in enumerate(experts):
        h = up.dequantize(torch.float32)[e] @ x[p // 2].float()
        gate_h, up_h = h.chunk(2)
        h = gate_h.clamp(max=10) * torch.sigmoid(1.702 * gate_h.clamp(max=10)) * (up_h.clamp(-10, 10) + 1)
        expected = down.dequantize(torch.float32)[e] @ h * router[p]
        torch.testing.assert_close(
            got[p].float(),
            expected,
            rtol=0,
            atol=float(expected.abs().max()) * (1e-5 if dtype == torch.float32 else 0.03),
        )
