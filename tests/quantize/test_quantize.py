import copy
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from tiny_model import Experts, Model, all_weights, formats
from torch import nn
from torchao.quantization import FqnToConfig

from rtn_tensor import (
    dequantize_,
    quantize_,
    rtn,
    rtn_int4,
    rtn_int8,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def fake_quantized(w, bits=4, group_size=128):
    """q * S by the formula, in plain torch."""
    out = []
    for group in w.detach().float().split(w.shape[-1] if group_size == -1 else group_size, dim=-1):
        scale = (2 * group.abs().amax(-1, keepdim=True) / (2**bits - 1)).to(w.dtype).float()
        out.append((group / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
    return torch.cat(out, -1).to(w.dtype)


def select(*names):
    return lambda module, fqn: fqn in names


# --------------------------------------------------------------------------- which weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_linears_are_quantized_and_run(dtype, bits, group_size):
    model = Model().to(dtype)
    expected = copy.deepcopy(model)
    for linear in (expected.up, expected.down, expected.head):
        linear.weight.data = fake_quantized(linear.weight, bits, group_size)
    embedding, norm, bias = model.embed.weight, model.norm.weight, model.up.bias
    quantize_(model, rtn(bits, group_size, "absmax"))
    assert formats(model) == dict.fromkeys(["up.weight", "down.weight", "head.weight"], (bits, group_size))
    assert (model.embed.weight, model.norm.weight, model.up.bias) == (embedding, norm, bias)
    for name in ("up", "down", "head"):
        w = model.get_submodule(name).weight
        assert isinstance(w, nn.Parameter)
        assert (w.dtype, w.requires_grad) == (dtype, False)
        torch.testing.assert_close(w.dequantize(), expected.get_submodule(name).weight.data, rtol=0, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=4 * eps, atol=4 * eps)


def test_scale_method_reaches_the_weight():
    model = Model()
    w = model.up.weight.detach()
    quantize_(model, rtn_int4(32, "signed"))
    assert model.up.weight.scale_method == "signed"
    extreme = w[:, :32].abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(
        model.up.weight.dequantize().gather(1, extreme), w.gather(1, extreme), rtol=2**-22, atol=0
    )


def test_short_names():
    for config, expected in [
        (rtn_int4(), (4, 64)),
        (rtn_int4(group_size=32), (4, 32)),
        (rtn_int8(64), (8, 64)),
        (rtn(8), (8, 128)),
    ]:
        model = Model()
        quantize_(model, config)
        assert formats(model)["up.weight"] == expected


def test_filter_fn_sees_modules_and_names():
    model = Model()
    seen = {}
    quantize_(model, rtn_int4(), lambda module, fqn: seen.setdefault(fqn, module) is model.down)
    assert seen == dict(model.named_modules())
    assert list(formats(model)) == ["down.weight"]


def test_filter_fn_by_name_may_match_what_has_no_weight():
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), nn.Linear(32, 32))
    quantize_(model, rtn_int4(), lambda module, fqn: fqn.startswith("0"))
    assert list(formats(model)) == ["0.0.weight"]


def test_default_has_the_output_of_attention():
    """nn.MultiheadAttention reads the weight of its out_proj past the module, and multiplies by it; torchao
    leaves it out."""
    model = nn.MultiheadAttention(64, 2)
    quantize_(model, rtn_int4())
    assert formats(model) == {"in_proj_weight": (4, 64), "out_proj.weight": (4, 64)}


def test_embedding_where_selected():
    model = Model()
    expected = F.embedding(IDS, fake_quantized(model.embed.weight, 8, 32))
    quantize_(model, rtn_int8(32), select("embed"))
    assert formats(model) == {"embed.weight": (8, 32)}
    torch.testing.assert_close(model.embed(IDS), expected, rtol=0, atol=0)


def test_a_lone_linear():
    model = nn.Linear(64, 16)
    result = quantize_(model, rtn_int4())
    assert formats(model) == {"weight": (4, 64)}
    assert [row.name for row in result.rows] == ["weight", "bias"]


def test_expert_parameters_by_name():
    model = nn.ModuleDict({"mlp": Experts()})
    w = model["mlp"].gate_up_proj.detach()
    quantize_(model, FqnToConfig({"mlp.gate_up_proj": rtn_int4(32, "absmax")}))
    assert formats(model) == {"mlp.gate_up_proj": (4, 32)}
    assert model["mlp"].gate_up_proj.shape == (3, 40, 64)
    torch.testing.assert_close(
        model["mlp"].gate_up_proj.dequantize(), fake_quantized(w, 4, 32), rtol=0, atol=0
    )


def test_nothing_selected_warns():
    model = Model()
    with pytest.warns(UserWarning, match="no weight is selected") as caught:
        quantize_(model, rtn_int4(), lambda module, fqn: False)
    assert caught[0].filename == __file__
    assert_expected_inline(
        str(caught[0].message),
        """no weight is selected, and so none quantized; check filter_fn or the names in the config""",
    )


# -------------------------------------------------------------------- devices and progress


def test_meta_model():
    with torch.device("meta"):
        model = Model(tied=True)
    quantize_(model, rtn_int4(32), all_weights)
    assert formats(model) == dict.fromkeys(
        ["embed.weight", "up.weight", "down.weight", "head.weight"], (4, 32)
    )
    assert model.head.weight is model.embed.weight
    assert (model.up.weight.qdata.device.type, model.up.weight.qdata.shape, model.up.weight.scale.shape) == (
        "meta",
        (96, 32),
        (96, 2),
    )
    assert model(IDS.to("meta")).shape == (2, 4, 20)


def test_to_meta():
    model = Model(tied=True)
    quantize_(model, rtn_int4(), all_weights, device="meta")
    assert {w.device.type for w in model.parameters()} == {"meta"}
    assert len(formats(model)) == 4
    assert model.head.weight is model.embed.weight


def test_modules_move_one_by_one(monkeypatch):
    model = Model()
    names = {module: fqn for fqn, module in model.named_modules()}
    calls = []
    to = nn.Module.to

    def record(self, *args, **kwargs):
        calls.append((names[self], args, list(formats(model))))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", record)
    quantize_(model, rtn_int4(), device="cpu")
    assert calls == [
        ("up", ("cpu",), []),
        ("down", ("cpu",), ["up.weight"]),
        ("head", ("cpu",), ["up.weight", "down.weight"]),
        ("", ("cpu",), ["up.weight", "down.weight", "head.weight"]),
    ]


def test_nothing_moves_unasked(monkeypatch):
    monkeypatch.setattr(nn.Module, "to", None)
    quantize_(Model(), rtn_int4())


def test_progress_wraps_the_weights():
    seen = []

    def progress(items):
        seen.append(len(items))
        for item in items:
            seen.append(len(formats(model)))
            yield item

    model = Model()
    quantize_(model, rtn_int4(), progress=progress)
    assert seen == [3, 0, 1, 2]
    assert len(formats(model)) == 3


def test_float_weights_are_freed_on_the_way():
    """A model that only fits once must be quantizable: no float weight may outlive its turn."""
    model = Model(tied=True)
    floats = {name: weakref.ref(w) for name, w in model.named_parameters()}
    alive = []

    def progress(items):
        for item in items:
            yield item
            alive.append(
                [name for name in ("embed.weight", "up.weight", "down.weight") if floats[name]() is not None]
            )

    quantize_(model, rtn_int4(), lambda module, fqn: fqn in ("up", "down"), progress=progress)
    assert alive == [["embed.weight", "down.weight"], ["embed.weight"]]


# ----------------------------------------------------------------------------- dequantize_


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_undoes(dtype):
    model = Model(tied=True).to(dtype)
    expected = {
        name: fake_quantized(w, 8, 32) if w.dim() > 1 else w.detach().clone()
        for name, w in model.named_parameters()
    }
    quantize_(model, rtn_int8(32), all_weights)
    y = model(IDS)
    result = dequantize_(model)
    assert model.head.weight is model.embed.weight
    assert formats(model) == {}
    for name, w in model.named_parameters():
        assert type(w) is nn.Parameter
        torch.testing.assert_close(w.detach(), expected[name], rtol=0, atol=0)
    # The kernels add in another order, and keep integers exact where a float weight is rounded.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model(IDS), y, rtol=64 * eps, atol=64 * eps)
    assert result.bytes_after == result.bytes_before
    quantize_(model, rtn_int4())  # and the model can be quantized anew


def test_dequantize_undoes_experts():
    model = Experts()
    expected = fake_quantized(model.gate_up_proj, 4, 32)
    quantize_(model, FqnToConfig({"gate_up_proj": rtn_int4(32, "absmax")}))
    dequantize_(model)
    torch.testing.assert_close(model.gate_up_proj.detach(), expected, rtol=0, atol=0)


def test_dequantize_leaves_a_float_model():
    model = Model()
    before = list(model.parameters())
    dequantize_(model)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


# ------------------------------------------------------------------- names in later errors


def test_later_errors_name_the_layer():
    model = nn.ModuleDict({"layers": nn.ModuleList([Model()])})
    quantize_(model, rtn_int4(32))
    w = model["layers"][0].down.weight
    with pytest.raises(ValueError, match="cannot slice") as caught:
        w[:, 16:64]
    assert_expected_inline(
        str(caught.value),
        """layers.0.down.weight: cannot slice columns 16:64; with bits=4 and group_size=32 cuts must be multiples of 32, or at the end, 96""",
    )
    with pytest.raises(ValueError, match=re.escape("layers.0.down.weight: x of shape (3, 64) does not fit")):
        F.linear(torch.randn(3, 64), w)
    with pytest.raises(ValueError, match=re.escape("layers.0.down.weight: cannot slice columns 1:96")):
        w[2:5].detach()[:, 1:]  # a view of a copy still knows its name
