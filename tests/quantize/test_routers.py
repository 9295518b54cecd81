"""Which linears choose among experts, and so stay float: those of transformers' models, of others' code, and
what only looks like them."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.dbrx.modeling_dbrx import DbrxConfig, DbrxFFN
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Config, HunYuanMoEV1Moe

from rtn_tensor import quantize_, rtn_int4
from rtn_tensor.quantize.experts import routers


def names(model):
    found = routers(model)
    return sorted(name for name, module in model.named_modules() if module in found)


def mlp(width=64):
    return nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, 64))


def model(**children):
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


def experts(count=10):
    return nn.ModuleList(mlp() for _ in range(count))


def inside(name, **children):
    return model(embed=nn.Embedding(8, 64), layers=nn.ModuleList([model(**{name: model(**children)}), mlp()]))


# ------------------------------------------------------------------------- of transformers


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("Afmoe", {"num_dense_layers": 0}, {"router.gate"}),
        (
            "Gemma4Text",
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
            {"router.proj"},
        ),
        ("JetMoe", {}, {"router.layer"}),
        ("Llama4Text", {"interleave_moe_layer_step": 1}, {"router"}),
        ("LongcatFlash", {}, {"router.classifier"}),
        ("NllbMoe", {"encoder_sparse_step": 1, "decoder_sparse_step": 1}, {"router.classifier"}),
        ("Phimoe", {}, {"router"}),
        (
            "SwitchTransformers",
            {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
            {"router.classifier"},
        ),
        (
            "Zaya",
            {},
            {"gate.down_proj", "gate.router_mlp.fc1", "gate.router_mlp.fc2", "gate.router_mlp.out_proj"},
        ),
        ("Doge", {"is_moe": True}, {"router_gate"}),
        (
            "Gemma3nText",
            {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2},
            {"modality_router"},
        ),
    ],
)
def test_those_of_transformers(kind, settings, expected):
    sizes = {
        "num_hidden_layers": 2,
        "num_layers": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
    }
    config = getattr(transformers, f"{kind}Config")()
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        found = names(getattr(transformers, f"{kind}Model")(config))
    assert found
    assert all(any(name.endswith(f".{last}") for last in expected) for name in found), found
    assert all(any(name.endswith(f".{last}") for name in found) for last in expected), found


def test_blocks_by_themselves():
    hunyuan = HunYuanMoEV1Config(hidden_size=64, intermediate_size=32, num_experts=4, num_hidden_layers=1)
    with torch.device("meta"):
        assert names(DbrxFFN(DbrxConfig())) == ["router.layer"]
        assert names(HunYuanMoEV1Moe(hunyuan, 0)) == ["gate.wg"]


# ------------------------------------------------------------------------------- of others


class Top2Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.wg = nn.Linear(64, 10, bias=False)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = experts()


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 10)
        self.up = nn.Parameter(torch.zeros(10, 192, 64))
        self.down = nn.Parameter(torch.zeros(10, 64, 96))


ROUTED = {
    "gate beside a list of experts": (model(gate=nn.Linear(64, 10), experts=experts()), ["gate"]),
    "any name beside experts": (model(choose=nn.Linear(64, 10), experts=experts()), ["choose"]),
    "a gate and a head of as many classes": (
        model(gate=nn.Linear(64, 10), experts=experts(), head=nn.Linear(64, 10)),
        ["gate"],
    ),
    "deep in a model": (inside("moe", w_gate=nn.Linear(64, 10), experts=experts()), ["layers.0.moe.w_gate"]),
    "a gate beside branches": (model(gating=nn.Linear(64, 10), branches=experts()), ["gating"]),
    "a router of two layers": (
        model(router=nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), mlps=experts()),
        ["router.0", "router.2"],
    ),
    "one of a class of its own": (model(noisy=Top2Gate(), experts=experts()), ["noisy.wg"]),
    "experts of a class of their own": (model(gate=Top2Gate(), ffn=Experts()), ["gate.wg"]),
    "experts by name": (
        model(switch=nn.Linear(64, 10), experts=nn.ModuleDict({f"e{i}": mlp() for i in range(10)})),
        ["switch"],
    ),
    "experts of several sizes": (
        model(gate=nn.Linear(64, 3), experts=nn.ModuleList([mlp(32), mlp(), nn.Identity()])),
        ["gate"],
    ),
    "parameters of the same module": (Stacked(), ["gate"]),
    "a router by its name": (model(router=nn.Linear(64, 12), body=mlp()), ["router"]),
}
FLOAT_FOR_NO_REASON = {
    "a head beside layers": model(layers=experts(), head=nn.Linear(64, 10)),
    "a classifier beside linears": model(
        layers=nn.ModuleList(nn.Linear(64, 64) for _ in range(10)), classifier=nn.Linear(64, 10)
    ),
    "a score beside transformer layers": model(
        h=nn.ModuleList(nn.TransformerEncoderLayer(64, 4) for _ in range(4)), score=nn.Linear(64, 4)
    ),
    "a head beside heads": model(
        heads=nn.ModuleList(nn.Linear(64, 2) for _ in range(10)), out=nn.Linear(64, 10)
    ),
    "a head beside convolutions": model(
        convs=nn.ModuleList(nn.Conv1d(4, 4, 3) for _ in range(10)), fc=nn.Linear(64, 10)
    ),
    "a gate of another size": model(layers=experts(), gate=nn.Linear(64, 64)),
    "a gate of other inputs": model(layers=experts(), gate=nn.Linear(128, 10)),
    "a gated MLP": model(gate_proj=nn.Linear(64, 96), up_proj=nn.Linear(64, 96), down_proj=nn.Linear(96, 64)),
    "one expert": model(experts=nn.ModuleList([mlp()]), out=nn.Linear(64, 1)),
    "a shared expert": model(shared_experts=experts(), out=nn.Linear(64, 10)),
    "a head beside a mixture": model(
        moe=model(gate=Top2Gate(), experts=Experts()).experts, proj=nn.Linear(64, 12)
    ),
}


@pytest.mark.parametrize("case", ROUTED)
def test_routers(case):
    built, expected = ROUTED[case]
    assert names(built) == expected


@pytest.mark.parametrize("case", FLOAT_FOR_NO_REASON)
def test_none(case):
    assert names(FLOAT_FOR_NO_REASON[case]) == []


def test_a_head_of_as_many_classes_as_layers_is_quantized():
    classifier = model(layers=nn.ModuleList(nn.Linear(64, 64) for _ in range(10)), head=nn.Linear(64, 10))
    assert {row.name: row.bits for row in quantize_(classifier, rtn_int4(32)).rows}["head.weight"] == 4
