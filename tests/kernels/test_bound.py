"""The bound that every product is held to rejects kernels that are wrong."""

import pytest
import torch
from bounds import activations, assert_linear_close, random_planes
from test_kernels import each_dtype

from rtn_tensor.kernels.registry import REFERENCE


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory from torch.empty holds NaN: an element that a kernel forgets to write is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _zeroed_row(y, x, w, bias):
    y[:, 3] = 0
    return y


def _row_two_percent_off(y, x, w, bias):
    y[:, 3] *= 1.02
    return y


def _unwritten_row(y, x, w, bias):
    new = torch.empty_like(y)
    new[:-1] = y[:-1]
    return new


def _one_nan(y, x, w, bias):
    y[0, 0] = torch.nan
    return y


def _swapped_nibbles(y, x, w, bias):
    return _again(x, w._replace(qdata=w.qdata >> 4 | w.qdata << 4), bias)


def _scale_of_the_next_group(y, x, w, bias):
    scale = w.scale.clone()
    scale[3, 2] = w.scale[3, 3]
    return _again(x, w._replace(scale=scale), bias)


def _last_element_ignored(y, x, w, bias):
    x = x.clone()
    x[:, -1] = 0
    return _again(x, w, bias)


def _bias_dropped(y, x, w, bias):
    return _again(x, w, None)


def _groups_reversed(y, x, w, bias):
    return _again(x, w._replace(scale=w.scale.flip(-1)), bias)


def _again(x, w, bias):
    return REFERENCE.linear(x, w.qdata, w.scale, bias, w.bits, w.group_size)


WRONG = [
    _zeroed_row,
    _row_two_percent_off,
    _unwritten_row,
    _one_nan,
    _scale_of_the_next_group,
    _last_element_ignored,
    _bias_dropped,
    _groups_reversed,
]


@pytest.mark.parametrize(
    ("bits", "wrong"),
    [*((4, wrong) for wrong in [*WRONG, _swapped_nibbles]), *((8, wrong) for wrong in WRONG)],
)
@each_dtype
@pytest.mark.parametrize("m", [1, 17])
def test_bound_rejects_a_wrong_kernel(wrong, bits, dtype, m):
    w = random_planes(32, 1000, bits=bits, group_size=128, dtype=dtype)
    x, bias = activations(m, 1000, dtype), torch.randn(32).to(dtype)
    y = _again(x, w, bias)
    assert_linear_close(y, x, w.exact(), bias)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_linear_close(wrong(y, x, w, bias), x, w.exact(), bias)


def test_bound_rejects_another_shape_and_dtype():
    w, x = random_planes(5, 64), activations(3, 64, torch.float32)
    y = _again(x, w, None)
    for other in (y[:, :1], y.double(), y[None]):
        with pytest.raises(AssertionError):
            assert_linear_close(other, x, w.exact())
