import copy
import json
import re
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

from rtn_tensor import RTNQuantizedTensor, dequantize_, quantize_, report, rtn, rtn_int4, rtn_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Model(nn.Module):
    """An embedding, two linears with a norm between, and a head that may share the embedding's weight."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 40, 64))
        self.bias = nn.Parameter(torch.randn(3, 40))


IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def fake_quantized(w, bits=4, group_size=128):
    """q * S by the formula, in plain torch."""
    out = []
    for group in w.detach().float().split(w.shape[-1] if group_size == -1 else group_size, dim=-1):
        scale = (2 * group.abs().amax(-1, keepdim=True) / (2**bits - 1)).to(w.dtype).float()
        out.append((group / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
    return torch.cat(out, -1).to(w.dtype)


def formats(model):
    """{name: (bits, group_size)} of every quantized parameter."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: (w.bits, w.group_size) for name, w in parameters if isinstance(w, RTNQuantizedTensor)}


def select(*names):
    return lambda module, fqn: fqn in names


def all_weights(module, fqn):
    return isinstance(module, nn.Linear | nn.Embedding)


def rejected(model, *args, **kwargs):
    """The message of the ValueError that `quantize_` raises, having changed nothing."""
    before = [(name, w, w.detach().clone()) for name, w in model.named_parameters(remove_duplicate=False)]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is the result)
        quantize_(model, *args, **kwargs)
    after = list(model.named_parameters(remove_duplicate=False))
    assert [name for name, _ in after] == [name for name, _, _ in before]
    for (name, now), (_, was, value) in zip(after, before, strict=True):
        assert now is was, name
        torch.testing.assert_close(now, value, rtol=0, atol=0, equal_nan=True)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- which weights


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
    torch.testing.assert_close(model.up.weight.dequantize().gather(1, extreme), w.gather(1, extreme), rtol=2**-22, atol=0)


def test_short_names():
    for config, expected in [(rtn_int4(), (4, 128)), (rtn_int4(group_size=32), (4, 32)), (rtn_int8(64), (8, 64)), (rtn(8), (8, 128))]:
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
    torch.testing.assert_close(model["mlp"].gate_up_proj.dequantize(), fake_quantized(w, 4, 32), rtol=0, atol=0)


def test_nothing_selected_warns():
    model = Model()
    with pytest.warns(UserWarning, match="no weight is selected") as caught:
        quantize_(model, rtn_int4(), lambda module, fqn: False)
    assert caught[0].filename == __file__
    assert_expected_inline(
        str(caught[0].message),
        """no weight is selected, and so none quantized; check filter_fn or the names in the config""",
    )


# ------------------------------------------------------------------------------------------- check all, then change


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
        rejected(nn.Sequential(nn.Linear(32, 32), nn.Conv1d(32, 32, 3), nn.LayerNorm(32)), rtn_int4(), lambda module, fqn: True),
        """\
cannot quantize, and nothing was changed:
  1.weight belongs to a Conv1d; a filter can select only nn.Linear and nn.Embedding weights. Leave it out, or name it in FqnToConfig
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
    with pytest.raises(ValueError, match=r"1\.weight is UninitializedParameter of torch.float32; only plain"):
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
  down.weight has a Int8WeightOnlyConfig as its config; use rtn_int4(), rtn_int8() or None here, or torchao's own quantize_""",
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
        TypeError, match=r"^config is a \w+; use rtn_int4\(\), rtn_int8\(\), rtn\(\.\.\.\), a list of rules, or FqnToConfig"
    ):
        quantize_(model, config)
    assert formats(model) == {}


# ------------------------------------------------------------------------------------------- FqnToConfig


def chosen(table, model=None):
    """{name: bits} of the parameters that `FqnToConfig(table)` quantizes."""
    model = model or Model()
    quantize_(model, FqnToConfig(table))
    return {name: bits for name, (bits, _) in formats(model).items()}


def test_module_name():
    assert chosen({"up": rtn_int4(), "embed": rtn_int8()}) == {"embed.weight": 8, "up.weight": 4}


def test_parameter_name_beats_module_name():
    assert chosen({"up": rtn_int4(), "up.weight": rtn_int8()}) == {"up.weight": 8}
    assert chosen({"up": rtn_int4(), "up.weight": None, "down": rtn_int4()}) == {"down.weight": 4}


def test_module_name_beats_a_pattern():
    assert chosen({r"re:.*\.weight": rtn_int4(), "down": rtn_int8(), "embed": None, "norm": None}) == {
        "up.weight": 4,
        "down.weight": 8,
        "head.weight": 4,
    }


def test_pattern_on_the_parameter_beats_one_on_the_module():
    assert chosen({"re:up": rtn_int4(), r"re:up\.weight": rtn_int8()}) == {"up.weight": 8}


def test_patterns_match_whole_names():
    assert chosen({"re:do.*": rtn_int8()}) == {"down.weight": 8}
    with pytest.raises(ValueError, match="FqnToConfig names re:u, which is no parameter"):
        chosen({"re:u": rtn_int4(), "re:do.*": rtn_int8()})


def test_a_pattern_leaves_vectors():
    assert chosen({r"re:up\..*": rtn_int4()}) == {"up.weight": 4}


@pytest.mark.parametrize("first", [4, 8])
def test_first_of_two_patterns_wins(first):
    """torchao 0.18 quantizes such a weight twice."""
    other = 12 - first
    assert chosen({r"re:(up|down)\.weight": rtn(first), r"re:.*p\.weight": rtn(other)}) == {"up.weight": first, "down.weight": first}
    assert chosen({"re:up|down": rtn(first), "re:.*p": rtn(other)}) == {"up.weight": first, "down.weight": first}


def test_none_at_an_exact_name_beats_patterns():
    """torchao 0.18 removes the wrong parameter from those that the patterns may match, if any but the first is excluded."""
    model = nn.ModuleDict({"mlp": Experts()})
    model["mlp"].register_parameter("down_proj", nn.Parameter(torch.randn(3, 64, 32)))
    model["mlp"].register_parameter("router", nn.Parameter(torch.randn(3, 64)))
    assert chosen({"mlp.down_proj": None, "mlp.bias": None, "re:mlp.*": rtn_int4()}, model) == {"mlp.gate_up_proj": 4, "mlp.router": 4}
    assert chosen({"up": None, "re:.*(up|down)": rtn_int4()}) == {"down.weight": 4}
    assert chosen({"up.weight": None, "up": rtn_int4(), "down": rtn_int4()}) == {"down.weight": 4}


def test_none_may_name_what_is_never_quantized():
    assert chosen({"norm": None, "re:no.*": None, r"re:norm\.bias": None, "up": rtn_int4()}) == {"up.weight": 4}


def test_none_as_the_first_pattern_excludes():
    assert chosen({r"re:.*(up|head)\.weight": None, "re:.*": rtn_int4()}) == {"embed.weight": 4, "down.weight": 4}
    assert chosen({"re:.*(up|head)": None, "re:[^.]*": rtn_int4()}) == {"embed.weight": 4, "down.weight": 4}


def test_default_is_for_linears():
    with pytest.warns(UserWarning, match="_default is deprecated"):
        table = FqnToConfig({"_default": rtn_int4(), "head": None, "down": rtn_int8()}).fqn_to_config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Config Deprecation: _default")
        assert chosen(table) == {"up.weight": 4, "down.weight": 8}


def test_a_misspelt_name_raises():
    table = {"up": rtn_int4(), "down_proj": rtn_int4(), "head.wieght": rtn_int8(), "embde": None, "re:.*rom": None, "norm": None}
    message = rejected(Model(), FqnToConfig(table))
    assert_expected_inline(
        message,
        """FqnToConfig names down_proj, embde, head.wieght, re:.*rom, which is no parameter and no linear or embedding of the model; use a name from model.named_parameters(), or a pattern 're:...' that matches the whole of one""",  # noqa: E501
    )
    assert rejected(Model(), FqnToConfig({"re:[u": rtn_int4()})).startswith("FqnToConfig: 're:[u' is no regular expression: ")


def test_fqn_to_config_takes_no_filter_fn():
    assert_expected_inline(
        rejected(Model(), FqnToConfig({"up": rtn_int4()}), lambda module, fqn: True),
        """FqnToConfig says itself which weights to quantize; leave filter_fn out""",
    )


# ------------------------------------------------------------------------------------------- torchao's own quantize_


def assert_same_model(a, b):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert type(x) is type(y), name
        assert torch.equal(x, y), name


@pytest.mark.parametrize("config", [rtn(bits=4), rtn_int8(32, "signed")])
def test_torchao_quantize_is_ours(config):
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    quantize_(ours, config)
    torchao.quantization.quantize_(theirs, config)
    assert len(formats(theirs)) == 3
    assert_same_model(ours, theirs)


def test_torchao_fqn_to_config_is_ours():
    config = FqnToConfig(
        {"layer.up": rtn_int4(32), r"re:.*\.down\.weight": rtn_int8(), "experts.gate_up_proj": rtn_int4(64), "layer.head": None}
    )
    ours = nn.ModuleDict({"layer": Model(), "experts": Experts()})
    theirs = copy.deepcopy(ours)
    quantize_(ours, config)
    torchao.quantization.quantize_(theirs, config, filter_fn=None)
    assert formats(theirs) == {"layer.up.weight": (4, 32), "layer.down.weight": (8, 128), "experts.gate_up_proj": (4, 64)}
    assert_same_model(ours, theirs)


def test_torchao_quantize_names_the_parameter():
    model = Model()
    model.up.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Linear\.weight holds NaN or inf"):
        torchao.quantization.quantize_(model, rtn_int4())


# ------------------------------------------------------------------------------------------- devices and progress


def test_meta_model():
    with torch.device("meta"):
        model = Model(tied=True)
    quantize_(model, rtn_int4(32), all_weights)
    assert formats(model) == dict.fromkeys(["embed.weight", "up.weight", "down.weight", "head.weight"], (4, 32))
    assert model.head.weight is model.embed.weight
    assert (model.up.weight.qdata.device.type, model.up.weight.qdata.shape, model.up.weight.scale.shape) == ("meta", (96, 32), (96, 2))
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
            alive.append([name for name in ("embed.weight", "up.weight", "down.weight") if floats[name]() is not None])

    quantize_(model, rtn_int4(), lambda module, fqn: fqn in ("up", "down"), progress=progress)
    assert alive == [["embed.weight", "down.weight"], ["embed.weight"]]


# ------------------------------------------------------------------------------------------- shared weights


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


# ------------------------------------------------------------------------------------------- dequantize_


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_undoes(dtype):
    model = Model(tied=True).to(dtype)
    expected = {name: fake_quantized(w, 8, 32) if w.dim() > 1 else w.detach().clone() for name, w in model.named_parameters()}
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


# ------------------------------------------------------------------------------------------- report


def test_report_table():
    model = nn.ModuleDict({"layer": Model(tied=True), "conv": nn.Conv1d(4, 4, 3), "experts": Experts()}).bfloat16()
    config = FqnToConfig({"layer.head": rtn_int8(32), "layer.up": rtn_int4(), "experts.gate_up_proj": rtn_int4(-1)})
    result = quantize_(model, config)
    assert_expected_inline(
        str(result),
        """\
weight                      shape   bits  group  bytes before  bytes after  note
--------------------  -----------  -----  -----  ------------  -----------  ------------------------------
layer.embed.weight        20 x 64  float                2,560        2,560  untied from layer.head.weight
layer.up.weight           96 x 64      4    128        12,288        3,264
layer.down.weight         64 x 96  float               12,288       12,288  not selected
layer.head.weight         20 x 64      8     32             0        1,360  untied from layer.embed.weight
conv.weight             4 x 4 x 3  float                   96           96  weight of a Conv1d
experts.gate_up_proj  3 x 40 x 64      4     -1        15,360        4,080
experts.bias               3 x 40  float                  240          240  weight of a Experts
4 vectors                          float                  584          584  norms and biases
total                               9.02               43,416       24,472""",
    )
    assert str(report(model)) == str(result)
    # Rows of 64 int4 are 32 bytes, rows of 64 int8 64, of scales 2 each.
    after = {"layer.embed.weight": 20 * 64 * 2, "layer.up.weight": 96 * (32 + 2), "layer.up.bias": 96 * 2}
    after |= {"layer.norm.weight": 96 * 2, "layer.norm.bias": 96 * 2, "layer.down.weight": 64 * 96 * 2}
    after |= {"layer.head.weight": 20 * (64 + 4), "conv.weight": 4 * 4 * 3 * 2, "conv.bias": 4 * 2}
    after |= {"experts.gate_up_proj": 3 * 40 * (32 + 2), "experts.bias": 3 * 40 * 2}
    assert {row.name: row.bytes_after for row in result.rows} == after
    assert result.bytes_after == sum(after.values())
    parameters = 20 * 64 + 96 * 64 + 96 * 3 + 64 * 96 + 48 + 4 + 3 * 40 * 64 + 3 * 40
    assert result.bytes_before == 2 * parameters
    assert result.bits_per_weight == 8 * sum(after.values()) / parameters


def test_report_to_dict():
    model = Model(tied=True)
    as_dict = quantize_(model, rtn_int4(32), all_weights).to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert_expected_inline(
        json.dumps(as_dict, indent=1),
        """\
{
 "bytes_before": 55424,
 "bytes_after": 9632,
 "bits_per_weight": 5.561200923787529,
 "weights": [
  {
   "name": "embed.weight",
   "shape": [
    20,
    64
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 5120,
   "bytes_after": 800,
   "note": ""
  },
  {
   "name": "up.weight",
   "shape": [
    96,
    64
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 24576,
   "bytes_after": 3840,
   "note": ""
  },
  {
   "name": "up.bias",
   "shape": [
    96
   ],
   "bits": null,
   "group_size": null,
   "bytes_before": 384,
   "bytes_after": 384,
   "note": "vector"
  },
  {
   "name": "norm.weight",
   "shape": [
    96
   ],
   "bits": null,
   "group_size": null,
   "bytes_before": 384,
   "bytes_after": 384,
   "note": "vector"
  },
  {
   "name": "norm.bias",
   "shape": [
    96
   ],
   "bits": null,
   "group_size": null,
   "bytes_before": 384,
   "bytes_after": 384,
   "note": "vector"
  },
  {
   "name": "down.weight",
   "shape": [
    64,
    96
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 24576,
   "bytes_after": 3840,
   "note": ""
  },
  {
   "name": "head.weight",
   "shape": [
    20,
    64
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 0,
   "bytes_after": 0,
   "note": "shared with embed.weight"
  }
 ]
}""",
    )


def test_report_counts_padding():
    """K = 100 takes 4 chunks of 16 bytes at int4."""
    model = nn.Linear(100, 5, bias=False)
    result = quantize_(model, rtn_int4(32))
    assert (result.bytes_before, result.bytes_after) == (5 * 100 * 4, 5 * (64 + 4 * 4))


def test_report_of_a_float_model():
    result = report(Model())
    assert {row.note for row in result.rows} == {"not selected", "vector"}
    assert result.bits_per_weight == 32


def test_report_of_nothing():
    assert report(nn.ReLU()).bits_per_weight == 0
    assert_expected_inline(
        str(report(nn.ReLU())),
        """\
weight  shape  bits  group  bytes before  bytes after  note
------  -----  ----  -----  ------------  -----------  ----
total          0.00                    0            0""",
    )


# ------------------------------------------------------------------------------------------- names in later errors


def test_later_errors_name_the_layer():
    model = nn.ModuleDict({"layers": nn.ModuleList([Model()])})
    quantize_(model, rtn_int4(32))
    w = model["layers"][0].down.weight
    with pytest.raises(ValueError, match="cannot slice") as caught:
        w[:, 16:64]
    assert_expected_inline(
        str(caught.value),
        """layers.0.down.weight: cannot slice columns 16:64; with bits=4 and group_size=32 cuts must be multiples of 32, or at the end, 96""",  # noqa: E501
    )
    with pytest.raises(ValueError, match=re.escape("layers.0.down.weight: x of shape (3, 64) does not fit")):
        F.linear(torch.randn(3, 64), w)
    with pytest.raises(ValueError, match=re.escape("layers.0.down.weight: cannot slice columns 1:96")):
        w[2:5].detach()[:, 1:]  # a view of a copy still knows its name
