import copy
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from expecttest import assert_expected_inline
from tiny_model import Experts, Model, all_weights, formats, rejected
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    dequantize_,
    load,
    quantize_,
    report,
    rtn,
    rtn_int4,
    rtn_int8,
    save,
)
from rtn_tensor.tensor.attributes import user_attributes

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
    quantize_(model, rtn(bits, group_size))
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
        (rtn_int4(), (4, 128)),
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


def test_default_leaves_the_output_of_attention():
    """nn.MultiheadAttention reads the weight of its out_proj past the module; torchao leaves it out too."""
    model = nn.MultiheadAttention(64, 2)
    with pytest.warns(UserWarning, match="no weight is selected"):
        quantize_(model, rtn_int4())
    assert formats(model) == {}


def test_embedding_where_selected():
    model = Model()
    expected = F.embedding(IDS, fake_quantized(model.embed.weight, 8, 32))
    quantize_(model, rtn_int8(32), select("embed"))
    assert formats(model) == {"embed.weight": (8, 32)}
    torch.testing.assert_close(model.embed(IDS), expected, rtol=0, atol=0)


def test_a_lone_linear():
    model = nn.Linear(64, 16)
    result = quantize_(model, rtn_int4())
    assert formats(model) == {"weight": (4, 128)}
    assert [row.name for row in result.rows] == ["weight", "bias"]


def test_expert_parameters_by_name():
    model = nn.ModuleDict({"mlp": Experts()})
    w = model["mlp"].gate_up_proj.detach()
    quantize_(model, FqnToConfig({"mlp.gate_up_proj": rtn_int4(32)}))
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


# ------------------------------------------------------------------ check all, then change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_refused(value, dtype):
    model = Model().to(dtype)
    model.head.weight.data[7, 5] = value  # the last one: those before it must not have changed
    assert_expected_inline(
        rejected(model, rtn_int4()),
        """\
cannot quantize, and nothing was changed:
  head.weight holds NaN or inf; repair the checkpoint, or leave the weight out""",
    )
    quantize_(model, rtn_int4(), select("up", "down"))
    assert list(formats(model)) == ["up.weight", "down.weight"]


def test_other_dtypes_are_refused():
    assert_expected_inline(
        rejected(Model().double(), rtn_int4()),
        """\
cannot quantize, and nothing was changed:
  up.weight (and 2 more) is Parameter of torch.float64; only plain torch.float32, torch.bfloat16, torch.float16 weights can be quantized""",
    )


def test_quantized_weights_are_refused():
    model = Model()
    quantize_(model, rtn_int4(32), select("down"))
    down = model.down.weight
    with pytest.raises(ValueError, match="already") as caught:
        quantize_(model, rtn_int8())
    assert formats(model) == {"down.weight": (4, 32)}
    assert model.down.weight is down
    assert_expected_inline(
        str(caught.value),
        """\
cannot quantize, and nothing was changed:
  down.weight is already quantized (4 bits, group_size=32); leave it out, or dequantize_ the model first""",
    )


def test_torchao_weights_are_refused():
    model = Model()
    torchao.quantization.quantize_(model.down, Int8WeightOnlyConfig(version=2))
    with pytest.raises(ValueError, match="down.weight is Int8Tensor of torch.float32; only plain"):
        quantize_(model, rtn_int4())
    assert formats(model) == {}


def test_other_modules_are_refused():
    assert_expected_inline(
        rejected(
            nn.Sequential(nn.Linear(32, 32), nn.Conv1d(32, 32, 3), nn.LayerNorm(32)),
            rtn_int4(),
            lambda module, fqn: True,
        ),
        """\
cannot quantize, and nothing was changed:
  1.weight belongs to an nn.Conv1d, which no kernel here computes with a quantized weight; leave it out
  2.weight has shape (32,); a weight must be [N, K], or [E, N, K] for experts. Leave it out""",
    )


def test_parametrized_weights_are_refused():
    model = nn.Sequential(nn.Linear(32, 32), weight_norm(nn.Linear(32, 32)))
    assert_expected_inline(
        rejected(model, rtn_int4()),
        """\
cannot quantize, and nothing was changed:
  1.weight is computed by its module, not stored (a parametrization?); remove that first, or leave the module out""",
    )


def test_lazy_linears_are_refused():
    model = nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(32))
    with pytest.raises(
        ValueError, match=r"1\.weight is uninitialized until its module has run; call the " r"model once"
    ):
        quantize_(model, rtn_int4())
    assert formats(model) == {}


def test_conflicting_configs_of_a_shared_weight_are_refused():
    assert_expected_inline(
        rejected(Model(tied=True), FqnToConfig({"embed": rtn_int8(), "up": rtn_int4(), "head": rtn_int4()})),
        """\
cannot quantize, and nothing was changed:
  head.weight shares its weight with embed.weight but has another config; give both the same""",
    )


def test_vectors_are_refused():
    assert_expected_inline(
        rejected(Model(), FqnToConfig({"up": rtn_int4(), "up.bias": rtn_int4()})),
        """\
cannot quantize, and nothing was changed:
  up.bias has shape (96,); a weight must be [N, K], or [E, N, K] for experts. Leave it out""",
    )


def test_torchao_configs_are_refused():
    assert_expected_inline(
        rejected(Model(), FqnToConfig({"up": rtn_int4(), "down": Int8WeightOnlyConfig(version=2)})),
        """\
cannot quantize, and nothing was changed:
  down.weight has an Int8WeightOnlyConfig as its config; use rtn_int4(), rtn_int8() or None here, or torchao's own quantize_""",
    )


def test_every_unfit_weight_is_named_at_once():
    model = Model()
    model.up.weight.data[0, 0] = float("nan")
    model.head.weight.data[0, 0] = float("inf")
    model.down.double()
    assert_expected_inline(
        rejected(model, rtn_int4()),
        """\
cannot quantize, and nothing was changed:
  up.weight (and 1 more) holds NaN or inf; repair the checkpoint, or leave the weight out
  down.weight is Parameter of torch.float64; only plain torch.float32, torch.bfloat16, torch.float16 weights can be quantized""",
    )


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(version=2), "int4", 4, None, rtn_int4])
def test_other_configs_are_refused(config):
    model = Model()
    with pytest.raises(
        TypeError,
        match=r"^config is (a \w+|an (Int8\w+|int)); use rtn_int4\(\), rtn_int8\(\), rtn\(\.\.\.\), a list of rules, "
        r"or FqnToConfig",
    ):
        quantize_(model, config)
    assert formats(model) == {}


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


# -------------------------------------------------------------------------- shared weights


def test_tied_weights_stay_tied():
    model = Model(tied=True)
    w = fake_quantized(model.embed.weight, 8)
    result = quantize_(model, rtn_int8(), all_weights)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed.weight, RTNQuantizedTensor)
    torch.testing.assert_close(model.embed(IDS), F.embedding(IDS, w), rtol=0, atol=0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model.head(x), x @ w.T)
    assert_expected_inline(
        str(result),
        """\
weight          shape   bits  group  bytes before  bytes after  note
------------  -------  -----  -----  ------------  -----------  ------------------------
embed.weight  20 x 64      8    128         5,120        1,360
up.weight     96 x 64      8    128        24,576        6,528
down.weight   64 x 96      8    128        24,576        6,400
head.weight   20 x 64      8    128             0            0  shared with embed.weight
3 vectors              float                1,152        1,152  norms and biases
total                   8.91               55,424       15,440""",
    )


def test_linears_that_share_a_weight():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    quantize_(model, rtn_int4())
    assert model[2].weight is model[0].weight
    assert model[1].weight is not model[0].weight
    assert [row.note for row in report(model).rows if row.bits] == ["", "", "shared with 0.weight"]


@pytest.mark.parametrize(("quantized", "kept"), [("head", "embed"), ("embed", "head")])
def test_one_of_a_tied_pair(quantized, kept):
    model = Model(tied=True)
    w, x = model.embed.weight, torch.randn(3, 64)
    expected = {"embed": F.embedding(IDS, w), "head": x @ w.T}
    fake = fake_quantized(w)
    expected[quantized] = F.embedding(IDS, fake) if quantized == "embed" else x @ fake.T
    result = quantize_(model, rtn_int4(), select(quantized))
    assert formats(model) == {f"{quantized}.weight": (4, 128)}
    assert model.get_submodule(kept).weight is w
    torch.testing.assert_close(model.embed(IDS), expected["embed"])
    torch.testing.assert_close(model.head(x), expected["head"])
    notes = {row.name: row.note for row in result.rows}
    assert notes[f"{quantized}.weight"] == f"untied from {kept}.weight"
    assert notes[f"{kept}.weight"] == f"untied from {quantized}.weight"


def test_two_of_three_that_share():
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
    model[1].weight = model[2].weight = model[0].weight
    result = quantize_(model, rtn_int4(32), select("0", "2"))
    assert model[0].weight is model[2].weight
    assert [(row.note, row.bytes_before) for row in result.rows] == [
        ("untied from 1.weight", 0),
        ("untied from 0.weight", 4096),
        ("shared with 0.weight", 0),
    ]


def test_attributes_of_the_parameter_are_kept():
    model = Model(tied=True)
    loader = object()
    model.up.weight.weight_loader = loader
    model.embed.weight.tag = "tied"
    quantize_(model, rtn_int4(), all_weights)
    assert model.up.weight.weight_loader is loader
    assert model.head.weight.tag == "tied"


def test_attributes_of_users_and_those_of_the_tensor_are_apart(tmp_path):
    """A float weight may have attributes that are called like a quantized one's own."""
    model, plain = Model(), Model()
    for name, value in {"fqn": 3, "untied_from": 5, "scale": 2.0, "bits": 16, "kept": "yes"}.items():
        setattr(model.up.weight, name, value)
    plain.load_state_dict(model.state_dict())
    assert str(quantize_(model, rtn_int4(32))) == str(quantize_(plain, rtn_int4(32)))
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=0)
    w = model.up.weight
    assert user_attributes(w) == {"kept": "yes"}
    for copied in (copy.deepcopy(w), w[2:], w.t(), nn.Parameter(w), w.to(torch.bfloat16)):
        assert (copied.fqn, copied.kept) == ("up.weight", "yes")
    model.up.weight.bits_of_users = 16
    folder = tmp_path / "model"
    save(model, folder)
    load(folder, model=model)
    assert (model.up.weight.fqn, user_attributes(model.up.weight)) == (
        "up.weight",
        {"kept": "yes", "bits_of_users": 16},
    )


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
    quantize_(model, FqnToConfig({"gate_up_proj": rtn_int4(32)}))
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
