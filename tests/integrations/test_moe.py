"""Mixture-of-experts models: their experts are found, quantized, and run by kernels, whatever the
implementation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from tiny_moe import CONFIGS, tiny_moe
from torch import nn
from torchao.quantization import FqnToConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    dequantize_,
    ops,
    quantize_,
    rtn_int4,
    rtn_int8,
)
from rtn_tensor.quantize.experts import transposed_experts, unknown_experts

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
each_model = pytest.mark.parametrize("name", CONFIGS)


def quantized(name, config=None, dtype=torch.float32):
    model = tiny_moe(name, dtype)
    quantize_(model, config or rtn_int4(group_size=32))
    return model


def dense(model):
    """A copy with the weights dequantized, run as transformers runs float experts one by one."""
    model = copy.deepcopy(model)
    dequantize_(model)
    choose(model, "eager")
    return model


def choose(model, implementation):
    if any(hasattr(module, "is_transposed") for module in model.modules()):  # Llama-4 has no choice
        model.set_experts_implementation(implementation)


def stacks(model):
    return {name: w for name, w in model.named_parameters() if w.dim() == 3 and "conv1d" not in name}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def close(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


@each_model
@pytest.mark.parametrize("config", [rtn_int4(group_size=32), rtn_int8(group_size=-1)], ids=str)
def test_every_implementation_gives_what_the_dequantized_weights_give(name, config, monkeypatch):
    model = quantized(name, config)
    experts = stacks(model)
    assert experts
    assert all(isinstance(w, RTNQuantizedTensor) for w in experts.values())
    routers = [w for n, w in model.named_parameters() if "router" in n or n.endswith("mlp.gate.weight")]
    assert routers
    assert not any(isinstance(w, RTNQuantizedTensor) for w in routers)
    expected = logits(dense(model))
    called = []
    for op in ("grouped", "routed"):
        run = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *args, run=run, op=op: called.append(op) or run(*args))
    assert close(logits(model), expected)
    layers = len(experts) // 2
    chosen = any(hasattr(module, "is_transposed") for module in model.modules())
    assert called == (["routed"] if chosen else ["grouped"]) * 2 * layers, (
        "two products per layer, whatever the routing"
    )
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        choose(model, implementation)
        assert close(logits(model), expected), implementation


def test_each_block_within_the_bound():
    """Element by element, a block of experts in bf16 against fp64, with every rounding of the way counted."""
    model = quantized("Mixtral", dtype=torch.bfloat16)
    block = model.model.layers[0].mlp.experts
    x = torch.randn(17, 64).bfloat16()
    index = torch.stack([torch.randperm(4)[:2] for _ in range(17)])
    weights = torch.rand(17, 2).bfloat16()
    with torch.no_grad():
        got = block(x, index, weights).double()
    up, down = (getattr(block, n).dequantize(torch.float32).double() for n in ("gate_up_proj", "down_proj"))
    u = 2**-8
    for t in range(17):
        expected, allowed = torch.zeros(64).double(), torch.zeros(64).double()
        for e, weight in zip(index[t], weights[t].double(), strict=True):
            gate, rise = (up[e] @ x[t].double()).chunk(2)
            size = up[e].abs() @ x[t].double().abs()
            gate_error, rise_error = (u * torch.cat([gate, rise]).abs() + 2**-16 * size).chunk(2)
            h = F.silu(gate) * rise
            h_error = u * h.abs() + 1.1 * gate_error * rise.abs() + gate.abs() * rise_error
            y = down[e] @ h
            expected += y * weight
            allowed += weight * (2 * u * y.abs() + (down[e].abs() @ (h_error + 2**-16 * h.abs())))
        assert ((got[t] - expected).abs() <= allowed + 2 * u * expected.abs()).all()


def test_report():
    model = tiny_moe("Qwen2Moe")
    text = str(
        quantize_(
            model,
            FqnToConfig(
                {"re:.*experts\\.gate_up_proj": rtn_int4(32), "re:.*experts\\.down_proj": rtn_int8(32)}
            ),
        )
    )
    rows = [
        line.rstrip() for line in text.splitlines() if "layers.1.mlp" in line or line.startswith("weight ")
    ]
    assert_expected_inline(
        "\n".join(rows),
        """\
weight                                                    shape   bits  group  bytes before  bytes after  note
model.layers.1.mlp.gate.weight                           4 x 64  float                1,024        1,024  router
model.layers.1.mlp.experts.gate_up_proj            4 x 192 x 64      4     32       196,608       30,720
model.layers.1.mlp.experts.down_proj                4 x 64 x 96      8     32        98,304       27,648
model.layers.1.mlp.shared_expert.gate_proj.weight       64 x 64  float               16,384       16,384  not selected
model.layers.1.mlp.shared_expert.up_proj.weight         64 x 64  float               16,384       16,384  not selected
model.layers.1.mlp.shared_expert.down_proj.weight       64 x 64  float               16,384       16,384  not selected
model.layers.1.mlp.shared_expert_gate.weight             1 x 64  float                  256          256  not selected""",
    )


def test_chosen_layers_and_experts_modules():
    model = tiny_moe("Mixtral")
    quantize_(model, rtn_int4(32), filter_fn=lambda module, name: name.endswith("layers.1.mlp.experts"))
    assert {n for n, w in model.named_parameters() if isinstance(w, RTNQuantizedTensor)} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    expected = logits(dense(model))
    for implementation in ("rtn", "eager", "batched_mm", "grouped_mm"):  # float experts beside quantized ones
        choose(model, implementation)
        assert close(logits(model), expected)
    named = tiny_moe("Mixtral")
    quantize_(named, FqnToConfig({"model.layers.1.mlp.experts": rtn_int4(32)}))
    assert {n for n, w in named.named_parameters() if isinstance(w, RTNQuantizedTensor)} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    everything = tiny_moe("Mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao deprecates _default
        quantize_(everything, FqnToConfig({"_default": rtn_int4(32)}))
    assert all(isinstance(w, RTNQuantizedTensor) for w in stacks(everything).values())


class PerExpert(nn.Module):
    """Experts in a ModuleList, as many models outside transformers have them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)) for _ in range(4)
        )

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


def test_experts_of_a_module_list_are_ordinary_linears():
    model = PerExpert()
    rows = {row.name: row for row in quantize_(model, rtn_int4(32)).rows}
    assert sum(row.bits == 4 for row in rows.values()) == 8
    assert (rows["gate.weight"].bits, rows["gate.weight"].note) == (None, "router")
    x = torch.randn(5, 64)
    y = model(x)
    dequantize_(model)
    assert close(y, model(x))


class Stacked(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        for i, shape in enumerate(shapes):
            setattr(self, f"w{i}", nn.Parameter(torch.randn(shape)))


def test_which_shapes_fit_one_another():
    plain, swapped = {"w0": False, "w1": False}, {"w0": True, "w1": True}
    for shapes, expected in {
        ((4, 192, 64), (4, 64, 96)): plain,  # gate and up, down
        ((4, 64, 96), (4, 192, 64)): plain,
        ((4, 64, 192), (4, 96, 64)): swapped,
        ((4, 96, 64), (4, 64, 96)): {},  # up and down: either way
        ((4, 128, 64), (4, 64, 64)): plain,
        ((4, 64, 64), (4, 64, 64)): {},
        ((4, 192, 64), (3, 64, 96)): {},
        ((4, 192, 64),): {},
        ((4, 96, 64), (4, 96, 64), (4, 64, 96)): {},
    }.items():
        assert transposed_experts(Stacked(*shapes)) == expected, shapes
    assert transposed_experts(nn.Conv1d(4, 4, 3)) == transposed_experts(nn.Bilinear(40, 40, 40)) == {}
    assert unknown_experts(Stacked((1, 577, 64))) == unknown_experts(Stacked((4, 8, 64))) == []
    assert unknown_experts(nn.Bilinear(40, 40, 40)) == []


class ParallelExperts(nn.Module):
    """JetMoE's: up and down are modules of their own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 96, 64))


def test_what_may_be_experts():
    """One table of positions (Gemma 4) or projections of several heads (Zamba) may not."""
    both = ["w0", "w1"]
    for shapes, expected in {
        ((2, 1024, 64),): [],
        ((2, 36, 64), (2, 64, 32)): [],
        ((4, 96, 64), (4, 64, 96)): both,
        ((4, 64, 64), (4, 64, 64)): both,
        ((4, 192, 64), (4, 96, 64)): both,
        ((4, 96, 64), (4, 96, 64), (4, 64, 96)): [*both, "w2"],
        ((4, 96, 64), (3, 64, 96)): [],
    }.items():
        assert unknown_experts(Stacked(*shapes)) == expected, shapes
    assert unknown_experts(ParallelExperts()) == ["weight"]


def test_experts_that_are_not_understood_are_named():
    model = nn.Sequential(nn.Linear(64, 64), Stacked((4, 96, 64), (4, 64, 96)))
    with pytest.warns(UserWarning, match="may be experts' weights") as caught:
        result = quantize_(model, rtn_int4(32))
    assert_expected_inline(
        str(caught[0].message).replace("; ", ";\n"),
        """\
1.w0 and 1 more may be experts' weights, but how they are used is not understood, and they stay float;
name them in a rule or FqnToConfig, to quantize them along their last dim""",
    )
    assert caught[0].filename == __file__
    assert_expected_inline(
        "\n".join(f"{row.name}: {row.note}" for row in result.rows if row.name.startswith("1.")),
        """\
1.w0: experts of a Stacked? not understood
1.w1: experts of a Stacked? not understood""",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(Stacked((4, 96, 64), (4, 64, 96)), FqnToConfig({"w0": rtn_int4(32), "w1": None}))
