"""What `quantize_` refuses, before it changes anything."""

import pytest
import torchao.quantization
from expecttest import assert_expected_inline
from test_quantize import DTYPES, select
from tiny_model import Model, formats, rejected
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

from rtn_tensor import (
    quantize_,
    rtn_int4,
    rtn_int8,
)


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
  up.weight (and 2 more) is Parameter of torch.float64; only plain torch.float32, torch.bfloat16, torch.float16 weights can be quantized. Convert it, or leave it out""",
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
  down.weight is Parameter of torch.float64; only plain torch.float32, torch.bfloat16, torch.float16 weights can be quantized. Convert it, or leave it out""",
    )


@pytest.mark.parametrize("config", [rtn_int4(32), [("up", rtn_int4(32))]])
def test_a_filter_that_is_no_function(config):
    model = Model()
    with pytest.raises(TypeError, match=r"^filter_fn is 'up'; give a function of a module and its name, or"):
        quantize_(model, config, "up")
    assert formats(model) == {}


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
