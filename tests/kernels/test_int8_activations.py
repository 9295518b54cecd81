"""Products whose activations are rounded to int8: the rounding, and the C++ kernels in every instruction set."""

from itertools import pairwise, product

import pytest
import torch
from bounds import Planes, activations, assert_linear_close, random_planes
from cpu_library import DTYPES, each_bits, each_dtype, what_is_multiplied

from rtn_tensor import reference
from rtn_tensor.formats import SCALE_DTYPES, pack
from rtn_tensor.kernels import cpu

GROUP_SIZES = [32, 64, 96, 128, -1]
# Tokens below, at and above a tile of every instruction set, and more than a block of them.
SHAPES = [*product((0, 1, 2, 6, 7, 8, 14, 15, 40), (1, 17, 33, 100), (1, 32, 100, 576, 1000))]
LONG = [(16, 300, 2100), (600, 33, 4200)]

each_group_size = pytest.mark.parametrize("group_size", GROUP_SIZES)
each_kind = pytest.mark.parametrize("method", ["absmax", "minmax"])


def pieces(x):
    return torch.nn.functional.pad(x.double(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))


@each_dtype
def test_the_rounding(dtype):
    """By its formula in fp64: the error is half a step at most, and every piece has its own step."""
    x = (torch.randn(50, 100) * torch.logspace(-6, 4, 50)[:, None]).to(dtype)
    rounded = reference.rounded_to_int8(x)
    assert (rounded.dtype, rounded.shape) == (torch.float32, x.shape)
    step = pieces(x).abs().amax(-1, keepdim=True) / 127
    assert ((pieces(rounded) - pieces(x)).abs() <= step * (0.5 + 1e-5)).all()
    levels = pieces(rounded) / step
    assert (levels - levels.round()).abs().max() < 1e-4
    assert (levels.abs().amax(-1).round() == 127).all()


def test_ties_go_to_even():
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert reference.rounded_to_int8(x)[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


def awkward(k, dtype):
    limits = torch.finfo(dtype)
    x = torch.randn(12, k)
    x[1] = 0
    x[2, :32] = 0
    x[3, k // 2], x[4, 0], x[5, -1] = torch.nan, torch.inf, -torch.inf
    x[6] *= limits.tiny
    x[7] *= limits.tiny * limits.eps
    x[8] = limits.max
    x[9] *= 2.0**-61
    x[10] = torch.arange(k) % 32 + 0.5
    x[11] = -limits.max / 3
    return x.to(dtype)


@each_bits
@each_dtype
def test_kernels_round_as_the_reference(library, dtype, bits):
    """By weights of which each row has a single 1: every product is what one activation is rounded to, exactly."""
    k = 100
    qdata, scale = pack(torch.eye(k, dtype=torch.int8), bits), torch.ones(k, 4)
    x = torch.cat([awkward(k, dtype), activations(40, k, dtype)])
    y = cpu.linear(x, qdata, scale, None, bits, 32, None, True)
    due = reference.rounded_to_int8(x)
    due[due.view(torch.int32) == -(2**31)] = 0  # a sum has no negative zero
    nan, due = due.isnan().any(-1), due.to(dtype)
    rounded, *_ = what_is_multiplied("linear", x, Planes(qdata, scale, bits, 32, k), int8_x=True)
    if rounded:  # by AMX, which has no subnormal numbers
        due[due.abs() < torch.finfo(dtype).tiny] = 0
    assert torch.equal(y[~nan], due[~nan])
    # Of a piece with NaN or inf: all that is multiplied with it.
    assert nan.sum() == 3
    assert y[nan].isnan().any(-1).all()


def assert_close(y, x, rounded, exact, terms, bias=None):
    """`rounded`, `exact` and `terms` as `what_is_multiplied` has them."""
    x = reference.rounded_to_int8(x).to(x.dtype) if rounded else x
    assert_linear_close(y, x, exact, bias, terms, int8_x=not rounded)


def check(x, w, bias=None):
    y = cpu.linear(x, w.qdata, w.scale, bias, w.bits, w.group_size, w.zero, True)
    assert_close(y, x, *what_is_multiplied("linear", x, w, int8_x=True), bias)


@each_group_size
@each_bits
@each_dtype
@each_kind
def test_linear(library, dtype, bits, group_size, method):
    for m, n, k in SHAPES[GROUP_SIZES.index(group_size) + 5 * DTYPES.index(dtype) :: 15] + LONG:
        w = random_planes(n, k, bits=bits, group_size=group_size, dtype=dtype, method=method)
        check(activations(m, k, dtype), w, torch.randn(n).to(dtype) if n % 2 else None)


@each_bits
@each_kind
def test_another_scale_dtype_and_views(library, bits, method):
    for dtype, scale_dtype in product(DTYPES, SCALE_DTYPES if method != "minmax" else DTYPES):
        w = random_planes(35, 200, bits=bits, group_size=64, dtype=scale_dtype, method=method)
        wide = torch.full((30, 205), torch.nan, dtype=dtype)
        wide[:, 2:-3] = activations(30, 200, dtype)
        x = wide[:, 2:-3]
        for view in (x[:1], x, x.t().contiguous().t(), x[:1].expand(9, -1), x[::2]):
            check(view, w)


@each_bits
@each_dtype
@each_kind
def test_grouped(library, dtype, bits, method):
    w = random_planes(6, 35, 100, bits=bits, group_size=32, dtype=dtype, method=method)
    for m, ends in [(450, [0, 230, 230, 233, 440, 440]), (8, [1, 2, 3, 4, 5, 6]), (8, [0] * 6)]:
        offs = torch.tensor(ends, dtype=torch.int32)
        x = activations(m, 100, dtype)
        y = cpu.grouped(x, w.qdata, w.scale, offs, bits, 32, w.zero, True)
        rounded, exact, terms = what_is_multiplied("grouped", x, w, int8_x=True)
        for e, (start, end) in enumerate(pairwise([0, *ends])):
            of_expert = None if terms is None else terms[e]
            assert_close(y[start:end], x[start:end], rounded, exact[e], of_expert)
        assert torch.equal(y[ends[-1] :], torch.zeros_like(y[ends[-1] :]))


@each_bits
def test_the_largest_sums_are_exact(library, bits):
    """Weights at the ends of their range and activations at theirs, which an instruction that saturates, or sums
    of 16 bits, would get wrong."""
    for sign_w, sign_x in product((-1, 1), repeat=2):
        q = torch.full((20, 256), -(2 ** (bits - 1)) if sign_w < 0 else 2 ** (bits - 1) - 1, dtype=torch.int8)
        scale = torch.ones(20, 2)
        y = cpu.linear(
            torch.full((9, 256), 127.0 * sign_x), pack(q, bits), scale, None, bits, 128, None, True
        )
        assert torch.equal(y, torch.full((9, 20), 127.0 * sign_x * 256 * q[0, 0].item()))
