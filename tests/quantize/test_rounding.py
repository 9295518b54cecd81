"""Rounding column by column, against the plain method in fp64."""

import pytest
import torch

from rtn_tensor import RTNQuantizedTensor, reference, rtn
from rtn_tensor.formats import FORMATS, SCALE_METHODS, pack, scale_dtype_of, unpack
from rtn_tensor.quantize.rounding import COLUMNS, fit_scales, objective, refine, round_columns, spread


def moments(k, rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 4 * k, k, generator=generator) * torch.logspace(-1, 1, k)
    x += 2 * torch.randn(len(x), 1, generator=generator)
    return x.T @ x / len(x)


def by_elimination(w, scale_NK, h, damping, order, qmin, qmax):
    """The update as it stands in the paper, fp64: the inverse anew for the columns that are left."""
    w, scale_NK = w.double().clone(), scale_NK.double()
    h = h.double() + damping * torch.eye(len(h), dtype=torch.float64)
    q = torch.zeros_like(w)
    for i, j in enumerate(order.tolist()):
        left = order[i:]
        inverse = torch.linalg.inv(h[left][:, left])
        q[:, j] = (w[:, j] / scale_NK[:, j]).round().clamp(qmin, qmax)
        error = (w[:, j] - q[:, j] * scale_NK[:, j]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    return q


def scales(w, bits, group_size, method="signed"):
    k = w.shape[1]
    _, scale = reference.quantize(w, bits, group_size, method, w.dtype)
    return scale, scale.float().repeat_interleave(k if group_size == -1 else group_size, 1)[:, :k]


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(5, 40, 32), (3, 2 * COLUMNS + 8, 64), (1, 33, -1)])
def test_the_integers_are_those_of_the_method_in_fp64(bits, n, k, group_size):
    w, h = torch.randn(n, k), moments(k)
    _, scale_NK = scales(w, bits, group_size)
    by = spread(h)
    fmt = FORMATS[bits]
    q = round_columns(w, scale_NK, by, fmt)
    expected = by_elimination(w, scale_NK, h, by.damping, by.order, fmt.qmin, fmt.qmax)
    assert torch.equal(q.double(), expected)
    plain = (w / scale_NK).round().clamp(fmt.qmin, fmt.qmax)
    assert not torch.equal(q, plain)
    assert objective(w - q * scale_NK, h) < objective(w - plain * scale_NK, h)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("method", SCALE_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_by_equal_moments_it_is_plain_rounding(bits, method, dtype):
    w = torch.randn(6, 100).to(dtype)
    qdata, scale, *zero = reference.quantize(w, bits, 32, method, dtype)
    weighed = reference.quantize(w, bits, 32, method, dtype, importance=torch.full((100,), 3.5))
    assert torch.equal(weighed[1], scale)
    scale_NK, *zero_NK = (t.float().repeat_interleave(32, 1)[:, :100] for t in (scale, *zero))
    fmt = FORMATS[bits]
    steps = round_columns(w.float(), scale_NK, spread(3.5 * torch.eye(100)), fmt, *zero_NK)
    q = steps + zero_NK[0] if zero else steps
    assert torch.equal(pack(q.to(torch.int8), bits), qdata)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("method", SCALE_METHODS)
@pytest.mark.parametrize("rows", [1, 10, 400])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_no_weight_comes_out_worse_than_plain(bits, method, rows, group_size):
    w, h = torch.randn(7, 72).bfloat16(), moments(72, rows)
    config = rtn(bits, group_size, method)
    done = refine(w, config, spread(h))
    more = {"float_dtype": w.dtype, "zero": [*done.planes, None][2]}
    q = RTNQuantizedTensor(*done.planes[:2], bits, group_size, method, 72, **more)
    plain = RTNQuantizedTensor.from_float(w, bits, group_size, method)
    error, before = (objective(w.float() - t.dequantize(torch.float32), h) for t in (q, plain))
    assert done.error == pytest.approx(error, rel=1e-3)
    assert done.plain_error == pytest.approx(before, rel=1e-3)
    assert error <= before
    assert done.planes[1].dtype == scale_dtype_of(method, w.dtype)
    if rows == 400:
        assert error < 0.9 * before


def test_plain_rounding_is_kept_where_it_is_better(monkeypatch):
    monkeypatch.setattr("rtn_tensor.quantize.rounding.round_columns", lambda w, *others: torch.zeros_like(w))
    w, config = torch.randn(4, 64), rtn(4, 32, "absmax")
    done = refine(w, config, spread(moments(64)))
    qdata, scale = reference.quantize(w, 4, 32, "absmax", w.dtype)
    assert torch.equal(done.planes[0], qdata)
    assert torch.equal(done.planes[1], scale)
    assert done.error == done.plain_error


def test_fitted_scales_are_no_worse_and_stay_scales():
    w, h = torch.randn(5, 96), moments(96)
    w[0, :32] = 0
    scale, scale_NK = scales(w, 4, 32)
    q = (w / scale_NK).round().clamp(-8, 7)
    by = spread(h)
    damped = h + by.damping * torch.eye(96)
    fitted = fit_scales(w, q, scale, 32, by)
    assert fitted[0, 0] == scale[0, 0]  # of zeros nothing can be fitted
    assert fitted.isfinite().all()
    assert (fitted != 0).all()
    after, before = (objective(w - q * s.repeat_interleave(32, 1), damped) for s in (fitted, scale))
    assert after < 0.99 * before
    # The best scale of a single group has a closed form.
    one = fit_scales(w[1:, :32], q[1:, :32], scale[1:, :1], 32, spread(h[:32, :32]))
    d = h[:32, :32] + spread(h[:32, :32]).damping * torch.eye(32)
    best = ((w[1:, :32] @ d) * q[1:, :32]).sum(1) / ((q[1:, :32] @ d) * q[1:, :32]).sum(1)
    torch.testing.assert_close(one[:, 0], best, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "h",
    [
        torch.zeros(40, 40),
        torch.ones(40, 40),
        torch.diag(torch.cat([torch.ones(20), torch.zeros(20)])),
        1e30 * torch.ones(40, 40),
        1e-30 * torch.eye(40),
        torch.eye(40) - 0.03,  # not positive: sums of rounding errors
    ],
    ids=["zeros", "one direction", "dead columns", "huge", "tiny", "indefinite"],
)
def test_moments_that_cannot_be_inverted(h):
    by = spread(h)
    assert by.upper.isfinite().all()
    assert torch.equal(by.upper, by.upper.triu())
    assert (by.upper.diagonal() > 0).all()
    done = refine(torch.randn(3, 40).bfloat16(), rtn(4, 32, "search"), by)
    q = RTNQuantizedTensor(*done.planes, 4, 32, "search", 40)
    assert q.dequantize().isfinite().all()


def test_damping_grows_until_the_moments_can_be_factored():
    assert spread(torch.eye(8)).damping == pytest.approx(0.01)
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    assert spread(indefinite).damping == pytest.approx(1.0)


def test_a_dead_column_keeps_its_plain_rounding():
    h = moments(64)
    h[10] = h[:, 10] = 0
    w = torch.randn(4, 64)
    scale, scale_NK = scales(w, 4, 32)
    q = round_columns(w, scale_NK, spread(h), FORMATS[4])
    assert torch.equal(q[:, 10], (w / scale_NK).round().clamp(-8, 7)[:, 10])
    assert unpack(pack(q.to(torch.int8), 4), 4, 64).shape == (4, 64)
