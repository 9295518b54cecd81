"""Weights and inputs whose products are exact, and what tests of `RTNQuantizedTensor` ask of them."""

import pytest
import torch

from rtn_tensor import RTNQuantizedTensor
from rtn_tensor.formats import groups, pack

N, K = 5, 300  # K is no multiple of a chunk or a group
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Each width with each group size and each dtype, though not every three of them.
every_format = pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [
        (4, 32, torch.float32),
        (4, 128, torch.bfloat16),
        (4, -1, torch.float16),
        (8, 32, torch.bfloat16),
        (8, 128, torch.float16),
        (8, -1, torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_width = pytest.mark.parametrize("bits", [4, 8])


def exact(*shape, bits=4, group_size=32, dtype=torch.float32):
    """A weight of small integers and power-of-two scales: its products with `sparse` inputs are exact in
    every dtype and every order of summation, so tests ask for equality."""
    *rows, k = shape
    q = torch.randint(-8, 8, shape, dtype=torch.int8)
    scale = 0.5 ** torch.randint(1, 3, (*rows, groups(k, group_size)))
    return RTNQuantizedTensor(pack(q, bits), scale.to(dtype), bits, group_size, "absmax", k)


def sparse(*shape, dtype=torch.float32):
    """Rows with at most three entries that are not zero, each 1 or -1."""
    at = torch.randint(0, shape[-1], (*shape[:-1], 3))
    return torch.zeros(shape).scatter_(-1, at, torch.randint(0, 2, at.shape) * 2.0 - 1).to(dtype)


def gaussian(*shape, bits=4, group_size=32, **kwargs):
    return RTNQuantizedTensor.from_float(torch.randn(shape), bits, group_size, **kwargs)


def assert_same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a, b)


def assert_same_planes(a, b):
    assert_same(a.qdata, b.qdata)
    assert_same(a.scale, b.scale)


def message(kind, fn):
    with pytest.raises(kind) as caught:
        fn()
    return str(caught.value)


def names(calls):
    return [op for op, _ in calls]


def requantized(view, w):
    """What from_float makes of `w`, in the format of `view`."""
    fresh = RTNQuantizedTensor.from_float(
        w.mT if view.transposed else w, view.bits, view.group_size, view.scale_method, view.dtype
    )
    return fresh.mT if view.transposed else fresh
