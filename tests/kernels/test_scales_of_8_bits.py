"""Scales of 8 bits, 2^-7 times float8_e4m3fn: the reference's, and every kernel against it."""

import pytest
import torch
from bounds import activations, random_planes
from test_kernels import DTYPES, check, each_bits, having, operands, products

from rtn_tensor import reference
from rtn_tensor.formats import SCALE8
from rtn_tensor.kernels import triton
from rtn_tensor.kernels.problem import make_problem
from rtn_tensor.kernels.registry import why_not

CODES = torch.arange(256).to(SCALE8)
SYMMETRIC = ["absmax", "signed", "search"]


def test_what_they_stand_for():
    wide = reference.widened(CODES)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(
        wide, CODES.view(torch.float8_e4m3fn).float() / 128, rtol=0, atol=0, equal_nan=True
    )
    assert wide[1] == 2.0**-16
    assert wide[8] == 2.0**-13
    assert wide[126] == 3.5
    assert torch.equal(reference.narrowed(wide, SCALE8), CODES)


def test_rounding():
    """To nearest, but no scale is lost below, and above it goes to the largest."""
    exact = torch.tensor(
        [1.0, 1.06, 1.0625, 1.1875, -1.06, 3.49, 3.6, 1e30, -1e30, 2.0**-16 * 1.5, 1e-12, -1e-40, 0]
    )
    got = reference.widened(reference.round_scale(exact, SCALE8)).tolist()
    assert got[:9] == [1.0, 1.0, 1.0, 1.25, -1.0, 3.5, 3.5, 3.5, -3.5]
    assert got[9:] == [2.0**-15, 2.0**-16, -(2.0**-16), 0.0]
    assert reference.widened(reference.round_scale(torch.tensor([torch.nan]), SCALE8)).isnan()


@products
@each_bits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"),
    [(1, 5, 576, 96), (3, 100, 1000, 32), (17, 5, 100, -1), (40, 33, 1024, 128)],
)
def test_product(kernel, op, device, bits, dtype, m, n, k, group_size):
    if triton.interpreting() and (dtype, bits) != (torch.bfloat16, 4):
        pytest.skip("the interpreter takes seconds for each")
    _, w = operands(op, m, n, k, bits, group_size, SCALE8, device)
    check(kernel, op, activations(m, n if op.endswith("dx") else k, dtype, device), w)


@having("dequantize")
@each_bits
@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_dequantize(kernel, op, device, bits, group_size):
    for dtype in DTYPES:
        w = random_planes(5, 1000, bits=bits, group_size=group_size, dtype=SCALE8, device=device)
        w = w._replace(scale=CODES[torch.arange(w.scale.numel()).view_as(w.scale) * 7 % 256].to(device))
        if reason := why_not(kernel, make_problem(op, dtype, 5, w.k, w.qdata, w.scale, bits, group_size)):
            pytest.skip(reason)
        got = kernel.dequantize(w.qdata, w.scale, bits, group_size, w.k, dtype)
        torch.testing.assert_close(got, w.exact().float().to(dtype), rtol=0, atol=0, equal_nan=True)


@having("quantize")
@each_bits
@pytest.mark.parametrize("method", SYMMETRIC)
@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_quantize(kernel, op, device, bits, method, group_size):
    w = torch.randn(12, 1000) * torch.logspace(-7, 3, 12)[:, None]
    w[3] = 0
    w[4, 500], w[5, 999] = torch.nan, -torch.inf
    for dtype in (torch.float32, torch.bfloat16) if not triton.interpreting() else (torch.bfloat16,):
        view = w.to(dtype).to(device)
        if reason := why_not(kernel, make_problem(op, dtype, 12, 1000, view, view, bits, group_size)):
            pytest.skip(reason)
        got = kernel.quantize(view, bits, group_size, method, SCALE8)
        due = reference.quantize(w.to(dtype), bits, group_size, method, SCALE8)
        assert got[1].dtype == SCALE8
        assert torch.equal(got[0].cpu(), due[0])
        scales = [reference.widened(planes[1].cpu()) for planes in (got, due)]
        torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
