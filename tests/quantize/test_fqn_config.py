"""torchao's FqnToConfig, and its own `quantize_`."""

import copy
import random
import warnings

import pytest
import torch
import torchao.quantization
from expecttest import assert_expected_inline
from tiny_model import Experts, Model, formats, rejected
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn, rtn_int4, rtn_int8


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
    other = 12 - first
    assert chosen({r"re:(up|down)\.weight": rtn(first), r"re:.*p\.weight": rtn(other)}) == {
        "up.weight": first,
        "down.weight": first,
    }
    assert chosen({"re:up|down": rtn(first), "re:.*p": rtn(other)}) == {
        "up.weight": first,
        "down.weight": first,
    }


def test_none_at_an_exact_name_beats_patterns():
    model = nn.ModuleDict({"mlp": Experts()})
    model["mlp"].register_parameter("down_proj", nn.Parameter(torch.randn(3, 64, 32)))
    model["mlp"].register_parameter("router", nn.Parameter(torch.randn(3, 64)))
    assert chosen({"mlp.down_proj": None, "mlp.bias": None, "re:mlp.*": rtn_int4()}, model) == {
        "mlp.gate_up_proj": 4,
        "mlp.router": 4,
    }
    assert chosen({"up": None, "re:.*(up|down)": rtn_int4()}) == {"down.weight": 4}
    assert chosen({"up.weight": None, "up": rtn_int4(), "down": rtn_int4()}) == {"down.weight": 4}


def test_none_may_name_what_is_never_quantized():
    assert chosen({"norm": None, "re:no.*": None, r"re:norm\.bias": None, "up": rtn_int4()}) == {
        "up.weight": 4
    }


def test_none_as_the_first_pattern_excludes():
    assert chosen({r"re:.*(up|head)\.weight": None, "re:.*": rtn_int4()}) == {
        "embed.weight": 4,
        "down.weight": 4,
    }
    assert chosen({"re:.*(up|head)": None, "re:[^.]*": rtn_int4()}) == {"embed.weight": 4, "down.weight": 4}


def test_default_is_for_linears():
    with pytest.warns(UserWarning, match="_default is deprecated"):
        table = FqnToConfig({"_default": rtn_int4(), "head": None, "down": rtn_int8()}).fqn_to_config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Config Deprecation: _default")
        assert chosen(table) == {"up.weight": 4, "down.weight": 8}


def test_a_misspelt_name_raises():
    table = {
        "up": rtn_int4(),
        "down_proj": rtn_int4(),
        "head.wieght": rtn_int8(),
        "embde": None,
        "re:.*rom": None,
        "norm": None,
    }
    message = rejected(Model(), FqnToConfig(table))
    assert_expected_inline(
        message,
        """FqnToConfig names down_proj, embde, head.wieght, re:.*rom, which is no parameter and no linear or embedding of the model; use a name from model.named_parameters(), or a pattern 're:...' that matches the whole of one""",
    )
    assert rejected(Model(), FqnToConfig({"re:[u": rtn_int4()})).startswith(
        "FqnToConfig: 're:[u' is no regular expression: "
    )


def test_fqn_to_config_takes_no_filter_fn():
    assert_expected_inline(
        rejected(Model(), FqnToConfig({"up": rtn_int4()}), lambda module, fqn: True),
        """FqnToConfig says itself which weights to quantize; leave filter_fn out""",
    )


# ----------------------------------------------------------------- torchao's own quantize_


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
        {
            "layer.up": rtn_int4(32),
            r"re:.*\.down\.weight": rtn_int8(),
            "experts.gate_up_proj": rtn_int4(64),
            "layer.head": None,
        }
    )
    ours = nn.ModuleDict({"layer": Model(), "experts": Experts()})
    theirs = copy.deepcopy(ours)
    quantize_(ours, config)
    torchao.quantization.quantize_(theirs, config, filter_fn=None)
    assert formats(theirs) == {
        "layer.up.weight": (4, 32),
        "layer.down.weight": (8, 128),
        "experts.gate_up_proj": (4, 64),
    }
    assert_same_model(ours, theirs)


def test_torchao_quantize_names_the_parameter():
    model = Model()
    model.up.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Linear\.weight holds NaN or inf"):
        torchao.quantization.quantize_(model, rtn_int4())


KEYS = [
    *(
        "up",
        "down",
        "embed",
        "head",
        "up.weight",
        "down.weight",
        "embed.weight",
        "experts.gate_up_proj",
        "experts.bias",
    ),
    *(
        "re:.*",
        "re:up|down",
        "re:.*p",
        r"re:.*\.weight",
        r"re:(up|head)\.weight",
        "re:[^.]*",
        "re:e.*",
        r"re:experts\..*",
        r"re:.*\.gate_up.*",
    ),
    *(r"re:up\..*", "re:u.*|d.*", r"re:(?!head).*\.weight"),
]


def nested():
    return nn.ModuleDict({**dict(Model().named_children()), "experts": Experts()})


@pytest.mark.filterwarnings(
    "ignore:.*may be experts' weights:UserWarning", "ignore:no weight is selected:UserWarning"
)
@pytest.mark.parametrize("seed", range(60))
def test_overlapping_keys_do_the_same_in_both(seed):
    """Whatever the table, and whichever of its keys wins."""
    pick = random.Random(seed)
    table = {
        key: pick.choice([None, rtn_int4(), rtn_int8(), rtn(4, 64)])
        for key in pick.sample(KEYS, pick.randint(1, 6))
    }
    table |= {"up.bias": None} if pick.random() < 0.5 else {}
    ours = nested()
    theirs = copy.deepcopy(ours)
    quantize_(ours, FqnToConfig(table))
    torchao.quantization.quantize_(theirs, FqnToConfig(table), filter_fn=None)
    assert_same_model(ours, theirs)


def test_torchaos_own_configs_are_torchaos():
    """Beside ours in one table, and alone."""
    for table in (
        {"up": Int8WeightOnlyConfig(), "re:.*": rtn_int4()},
        {"re:up|head": Int8WeightOnlyConfig()},
    ):
        model = Model()
        torchao.quantization.quantize_(model, FqnToConfig(table), filter_fn=None)
        assert type(model.up.weight).__module__.startswith("torchao.")
        assert isinstance(model.down.weight, RTNQuantizedTensor) == ("up" in table)
