"""The SGLang plugin, as far as a machine without a GPU allows: SGLang's own modules, with no model run.

Its parallel layers do not come to be outside its server, so what is served is replicated layers, and experts
in a stand-in for their layer.
"""

import argparse

import pytest
import stand_ins  # noqa: F401  (before SGLang)
import torch

# isort: split
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
from torch import nn

from rtn_tensor import RTNQuantizedTensor, reference
from rtn_tensor.integrations.sglang import RTNQuantizationConfig, register


def config(**options):
    return RTNQuantizationConfig.from_config({"quant_method": "rtn", **options})


def test_registered_by_its_entry_point():
    load_plugins()
    register()
    assert get_quantization_config("rtn") is RTNQuantizationConfig


def test_server_arguments():
    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert parser.parse_args(["--model-path", "x", "--quantization", "rtn"]).quantization == "rtn"


def test_the_old_variables(monkeypatch):
    monkeypatch.setenv("RTN_NUM_BITS", "4")
    assert (
        RTNQuantizationConfig().options.default.bits,
        RTNQuantizationConfig().options.default.group_size,
    ) == (4, 128)


def test_linear():
    quant = config(bits=4, group_size=32)
    layer = ReplicatedLinear(
        96, 64, params_dtype=torch.bfloat16, quant_config=quant, prefix="model.layers.0.mlp.down_proj"
    )
    w, bias, x = (torch.randn(*shape).bfloat16() for shape in ((64, 96), (64,), (5, 96)))
    layer.weight_loader(layer.weight, w)
    layer.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)
    assert isinstance(layer.weight, RTNQuantizedTensor)
    expected = RTNQuantizedTensor.from_float(w, 4, 32, "absmax")
    assert layer.weight.equal(expected)
    y, _ = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, expected, bias), rtol=0, atol=0)


def test_merged_parts_are_copied_into_rows():
    """As SGLang's loaders of merged layers do: into part of `param.data`."""
    quant = config(bits=8, group_size=32)
    layer = ReplicatedLinear(
        96, 64, bias=False, params_dtype=torch.float32, quant_config=quant, prefix="gate_up_proj"
    )
    gate, up = torch.randn(32, 96), torch.randn(32, 96)
    layer.weight.data.narrow(0, 0, 32).copy_(gate)
    with pytest.raises(ValueError, match="gate_up_proj.weight holds NaN or inf, or not all of it was loaded"):
        layer.quant_method.process_weights_after_loading(layer)
    layer.weight.data.narrow(0, 32, 32).copy_(up)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.equal(RTNQuantizedTensor.from_float(torch.cat([gate, up]), 8, 32))


def test_routers_and_ignored_layers_stay_float():
    quant = config(bits=4, ignore=["*.o_proj"])
    for name in ("model.layers.0.mlp.gate", "model.layers.0.self_attn.o_proj"):
        layer = ReplicatedLinear(
            64, 64, bias=False, params_dtype=torch.float32, quant_config=quant, prefix=name
        )
        assert type(layer.weight) is nn.Parameter


class Experts(FusedMoE):
    """The class of SGLang's layer, without what needs its server."""

    def __init__(self, quant, ranks=1, **about):
        nn.Module.__init__(self)
        self.moe_tp_size, self.moe_runner_config = ranks, MoeRunnerConfig(num_experts=4, top_k=2, **about)
        self.quant_method = quant.get_quant_method(self, "model.layers.0.mlp.experts")
        self.quant_method.create_weights(self, 4, 64, 96 // ranks, torch.float32)
        self.quant_method.create_moe_runner(self, self.moe_runner_config)


@pytest.mark.parametrize(
    ("about", "gate"),
    [
        ({}, reference.ACTIVATIONS["silu"]),
        ({"routed_scaling_factor": 2.5}, reference.ACTIVATIONS["silu"]),
        ({"swiglu_limit": 2.0}, reference.SwiGLU(limit=2.0)),
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, reference.ACTIVATIONS["gpt_oss"]),
        (
            {"gemm1_alpha": 1.5, "gemm1_clamp_limit": 2.0, "gate_up_interleaved": False},
            reference.SwiGLU(1.5, 1.0, 2.0),
        ),
    ],
)
def test_experts(about, gate):
    layer = Experts(config(bits=4, group_size=32), **about)
    w13, w2, x = torch.randn(4, 192, 64), torch.randn(4, 64, 96), torch.randn(3, 64)
    for e in range(4):  # as SGLang's loader does, an expert and one of gate and up at a time
        layer.w13_weight.data[e].narrow(0, 0, 96).copy_(w13[e, :96])
        layer.w13_weight.data[e].narrow(0, 96, 96).copy_(w13[e, 96:])
        layer.w2_weight.data[e].copy_(w2[e])
    layer.quant_method.process_weights_after_loading(layer)
    ids, weights = torch.tensor([[0, 2], [1, 3], [3, 0]], dtype=torch.int32), torch.rand(3, 2)
    got = layer.quant_method.apply(
        layer, StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, None))
    ).hidden_states
    up, down = (RTNQuantizedTensor.from_float(w, 4, 32, "absmax").dequantize() for w in (w13, w2))
    expected = torch.zeros(3, 64)
    for t in range(3):
        for e, weight in zip(ids[t].tolist(), weights[t], strict=True):
            expected[t] += weight * (down[e] @ gate(up[e] @ x[t]))
    torch.testing.assert_close(got, expected * about.get("routed_scaling_factor", 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("about", "what"),
    [
        ({"activation": "gelu"}, "the activation 'gelu'"),
        ({"activation": "situ", "gemm1_alpha": 4.0, "gemm1_clamp_limit": 1.0}, "the activation 'situ'"),
        ({"is_gated": False}, "no gate"),
        ({"no_combine": True}, "no_combine"),
        ({"gemm1_clamp_limit": 7.0}, "only one of gemm1_alpha and gemm1_clamp_limit"),
        ({"gemm1_alpha": 1.702}, "only one of gemm1_alpha and gemm1_clamp_limit"),
        ({"gemm1_beta": 1.0}, "gemm1_beta but no gemm1_alpha"),
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "swiglu_limit": 10.0},
            "gemm1_alpha and swiglu_limit",
        ),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input with 2 experts per token"),
    ],
    ids=str,
)
def test_experts_of_another_kind_are_refused(about, what):
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.experts: .*{what}"):
        Experts(config(bits=4, group_size=32), **about)


def test_ranks_that_would_cut_a_group():
    with pytest.raises(
        ValueError,
        match="experts.down_proj: tensor parallelism gives each rank 48 of its 96 columns, a cut "
        "inside a group of 32",
    ):
        Experts(config(bits=4, group_size=32), ranks=2)


def test_patterns_of_no_layer_are_refused():
    quant = config(bits=4, ignore=["*.no_proj"])
    layer = ReplicatedLinear(
        64, 64, bias=False, params_dtype=torch.float32, quant_config=quant, prefix="a.o_proj"
    )
    layer.weight_loader(layer.weight, torch.randn(64, 64))
    with pytest.raises(ValueError, match=r"no layer matches '\*\.no_proj'"):
        layer.quant_method.process_weights_after_loading(layer)
