"""The vLLM plugin, in vLLM's CPU build: its tokens are those of transformers with our quantized weights."""

import shutil

import pytest
import torch
from engine import ROUNDING, difference, engine, greedy, rtn
from torchao.quantization import FqnToConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.model_loader.reload import layerwise
from vllm_models import BY_TURNS, ODD, reference, saved, weights

from rtn_tensor import RTNQuantizedTensor, rtn_int4, rtn_int8
from rtn_tensor.integrations.vllm import quantization
from rtn_tensor.integrations.vllm.linear import RTNLinearMethod
from rtn_tensor.reference import SwiGLU

# ---------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "smollm2"])
def test_tokens(folder, calls, name):
    path = folder(name)
    with engine(path, **rtn(bits=4, group_size=64, rules=[[ODD, {"bits": 8, "group_size": -1}]])) as llm:
        generated = greedy(llm, new=8)
        assert {(w.bits, w.group_size) for w in weights(llm).values()} == {(4, 64), (8, -1)}
    assert calls["linear"] >= 8 * 4  # tokens, and at least two layers of two linears
    assert calls["routed"] >= 8 * 4 or name == "smollm2"
    assert difference(reference(path, BY_TURNS), generated) < ROUNDING["float32"]
    assert difference(reference(path), generated) > 100 * ROUNDING["float32"]  # the check tells float weights


def test_weights_that_8_bit_scales_cannot_hold(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for name, weight in (
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("llama", "model.layers.0.mlp.down_proj.weight"),
    ):
        path = shutil.copytree(folder(name), tmp_path / name)
        tensors = load_file(path / "model.safetensors")
        tensors[weight].view(-1)[7] = 100
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        how = rtn(bits=4, group_size=64, scale_method="search8")
        with (
            pytest.raises(ValueError, match="(?s)layers.0.mlp.*down_proj.* 8-bit scales"),
            engine(path, **how),
        ):
            pass


@pytest.mark.parametrize(
    ("kind", "settings", "gate"),
    [
        ("silu", (0.05, None, None), SwiGLU(limit=0.05)),
        ("swigluoai_uninterleave", (0.1, 1.5, 1.0), SwiGLU(1.5, 1.0, 0.1)),
    ],
)
def test_what_a_model_sets_of_its_activation(folder, monkeypatch, kind, settings, gate):
    """As models' own code does by arguments of FusedMoE."""
    make = quantization.RTNQuantizationConfig._experts_method

    def with_settings(self, layer, prefix):
        layer.activation = MoEActivation(kind)
        layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta = settings
        return make(self, layer, prefix)

    monkeypatch.setattr(quantization.RTNQuantizationConfig, "_experts_method", with_settings)
    path = folder("mixtral")
    with engine(path, **rtn(bits=4, group_size=64)) as llm:
        generated = greedy(llm, new=8)
    model = reference(path, rtn_int4(64, "absmax"))
    assert difference(model, generated) > 100 * ROUNDING["float32"]
    for layer in model.model.layers:
        layer.mlp.experts._apply_gate = gate
    assert difference(model, generated) < ROUNDING["float32"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "smollm2"])
def test_tokens_in_bf16(folder, calls, name):
    path = folder(name)
    with engine(path, dtype="bfloat16", **rtn(bits=4, group_size=32, scale_method="signed")) as llm:
        generated = greedy(llm)
        assert all(w.dtype == torch.bfloat16 for w in weights(llm).values())
    assert (
        difference(reference(path, rtn_int4(32, "signed"), torch.bfloat16), generated) < ROUNDING["bfloat16"]
    )
    assert calls["linear"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_int8_activations(folder, tmp_path, name):
    """Asked for while a float folder loads, and as a quantized folder has it. The last bits of fp32, which are
    the engine's own, round some activations to the next integer."""
    path, config = folder(name), rtn_int4(64, "absmax", "int8")
    rounded, exact = reference(path, config), reference(path, rtn_int4(64, "absmax"))
    folder_of_it = saved(path, tmp_path / "q", config=config, dtype=torch.float32)
    for served, asked in ((path, rtn(bits=4, group_size=64, activations="int8")), (folder_of_it, {})):
        with engine(served, **asked) as llm:
            generated = greedy(llm, new=8)
            assert {w.activations for w in weights(llm).values()} == {"int8"}
        near, far = difference(rounded, generated), difference(exact, generated)
        assert near < min(0.02, far / 2)


def test_the_old_variables_and_one_float_layer_at_a_time(folder, monkeypatch):
    process, alive = RTNLinearMethod.process_weights_after_loading, []
    # What tests before left half loaded, and is not collected yet.
    earlier = list(layerwise.LAYERWISE_INFO)

    def counted(self, layer):
        if not getattr(layer, "_already_called_process_weights_after_loading", False):
            infos = [m for m in layerwise.LAYERWISE_INFO if not any(m is other for other in earlier)]
            floats = [m for m in infos if isinstance(getattr(m, "quant_method", None), RTNLinearMethod)]
            alive.append(
                sum(not m.weight.is_meta and not isinstance(m.weight, RTNQuantizedTensor) for m in floats)
            )
        return process(self, layer)

    monkeypatch.setattr(RTNLinearMethod, "process_weights_after_loading", counted)
    monkeypatch.setenv("RTN_NUM_BITS", "4")
    monkeypatch.setenv("RTN_GROUP_SIZE", "32")
    with engine(folder("llama"), quantization="rtn") as llm:
        assert {(w.bits, w.group_size) for w in weights(llm).values()} == {(4, 32)}
    assert alive == [1] * 8
    monkeypatch.delenv("RTN_NUM_BITS")
    monkeypatch.delenv("RTN_GROUP_SIZE")
    default = (
        quantization.RTNQuantizationConfig().options.default
    )  # as vLLM makes it when it is given no more
    assert (default.bits, default.group_size) == (8, 128)  # vLLM's own method had these


# ------------------------------------------------------------------- which layers, and how


def test_rules_and_ignore(folder, calls):
    path = folder("llama")
    rules = [["*.down_proj", {"bits": 8, "group_size": -1}], [r"re:model\.layers\.0\..*", {"group_size": 32}]]
    with engine(
        path, **rtn(bits=4, group_size=64, ignore=["model.layers.1.self_attn.o_proj"], rules=rules)
    ) as llm:
        generated = greedy(llm)
        formats = {name: (w.bits, w.group_size) for name, w in weights(llm).items()}
    assert formats == {
        "model.layers.0.self_attn.qkv_proj.weight": (4, 32),
        "model.layers.0.self_attn.o_proj.weight": (4, 32),
        "model.layers.0.mlp.gate_up_proj.weight": (4, 32),
        "model.layers.0.mlp.down_proj.weight": (8, -1),
        "model.layers.1.self_attn.qkv_proj.weight": (4, 64),
        "model.layers.1.mlp.gate_up_proj.weight": (4, 64),
        "model.layers.1.mlp.down_proj.weight": (8, -1),
    }
    config = FqnToConfig(
        {
            r"re:.*\.down_proj": rtn_int8(-1),
            "model.layers.1.self_attn.o_proj": None,
            r"re:model\.layers\.0\..*_proj": rtn_int4(32, "absmax"),
            r"re:.*\.layers\..*_proj": rtn_int4(64, "absmax"),
        }
    )
    assert calls["linear"] >= 16 * 7
    assert difference(reference(path, config), generated) < ROUNDING["float32"]


def test_experts_of_two_precisions_and_what_is_said(folder, calls, monkeypatch):
    path, said = folder("qwen3_moe"), []
    monkeypatch.setattr(quantization.logger, "info", said.append)
    with engine(
        path, **rtn(bits=4, group_size=32, rules=[["*.experts.down_proj", {"bits": 8, "group_size": -1}]])
    ) as llm:
        generated = greedy(llm)
        experts = {name: w.bits for name, w in weights(llm).items() if "experts" in name and ".0." in name}
        assert sorted(experts.values()) == [4, 8]
        assert not any(name.endswith("mlp.gate.weight") for name in weights(llm))
    config = FqnToConfig(
        {
            r"re:.*experts\.down_proj": rtn_int8(-1),
            r"re:.*(experts\.gate_up|[qkvo])_proj": rtn_int4(32, "absmax"),
        }
    )
    assert difference(reference(path, config), generated) < ROUNDING["float32"]
    assert difference(reference(path), generated) > 100 * ROUNDING["float32"]
    assert calls["linear"] >= 16 * 4
    assert calls["routed"] >= 16 * 4
    assert said == [
        "rtn: 6 int4 g32, 2 int8 g-1; 7.9 MB of weights are 1.5 MB; float, as routers, steps of a recurrent "
        "state and layers of fewer than 32 rows or columns are by default: model.layers.*.mlp.gate (2)"
    ]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embedding_and_lm_head_by_request(folder, name):
    path = folder(name)
    with engine(
        path,
        **rtn(
            bits=8,
            rules=[["model.embed_tokens", {}], *([] if name == "tied" else [["lm_head", {"bits": 4}]])],
        ),
    ) as llm:
        generated = greedy(llm)
        assert ("lm_head.weight" in weights(llm)) == (name == "llama")
    parts = {
        "model.embed_tokens": rtn_int8(),
        "lm_head": rtn_int8() if name == "tied" else rtn_int4(128, "absmax"),
        r"re:.*\.layers\..*_proj": rtn_int8(),
    }
    assert difference(reference(path, FqnToConfig(parts)), generated) < ROUNDING["float32"]
