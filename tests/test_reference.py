import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bounds import Planes, activations, assert_linear_close, random_planes

from rtn_tensor import reference
from rtn_tensor.formats import FORMATS, SCALE_METHODS, SCALES_OF_8_BITS, pack, unpack

KNOWN = [method for method in SCALE_METHODS if method not in SCALES_OF_8_BITS]  # to the reference
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUP_SIZES = [32, 64, 96, 128, -1]
METHODS = ["absmax", "signed", "minmax"]  # those of one formula; "search" chooses among six

each_kind = pytest.mark.parametrize("method", ["absmax", "minmax"])  # without a plane `zero`, and with it


def fake_quantize(w, bits, group_size, method, scale_dtype):
    """(q, S of every group, zero), group by group from the formulas. A quotient of two fp32 numbers taken in fp64
    and then rounded to fp32 is the fp32 quotient (53 >= 2 * 24 + 2 digits), so this is exact and shares
    nothing with the implementation."""
    qs, scales, zeros = [], [], []
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for group in w.double().split(w.shape[-1] if group_size == -1 else group_size, dim=-1):
        high = group.abs().amax(-1, keepdim=True)
        if method == "signed":
            holds_negative = (group == -high).any(-1, keepdim=True)
            scale = torch.where(holds_negative, -high, high) / -(2 ** (bits - 1))
        elif method == "minmax":
            low, high = group.amin(-1, keepdim=True).clamp(max=0), group.amax(-1, keepdim=True).clamp(min=0)
            scale = (high / (2**bits - 1)).float() - (low / (2**bits - 1)).float()
        else:
            scale = 2 * high / (2**bits - 1)
        limits = torch.finfo(scale_dtype)
        ulp = limits.tiny * limits.eps
        away = (
            scale.double().sign() * (scale.double().abs() / ulp).ceil() * ulp
        )  # from 0: where it is subnormal
        scale = torch.where(scale.abs() < limits.tiny, away, scale.float().to(scale_dtype)).to(scale_dtype)
        zero = torch.zeros_like(scale, dtype=torch.float32)
        if method == "minmax":
            zero = (qmin - (low / scale.double()).float().round()).clamp(qmin, qmax)
        qs.append(((group / scale.double()).float().round() + zero).clamp(qmin, qmax))
        scales.append(scale)
        zeros.append(zero.to(torch.int8))
    return torch.cat(qs, -1), torch.cat(scales, -1), torch.cat(zeros, -1)


def steps_from_zero(qdata, bits, k, zero=None):
    """q - zero, of groups of 32."""
    q = unpack(qdata, bits, k).int()
    return q if zero is None else q - per_element(zero, 32, k)


def per_element(scale, group_size, k):
    return (
        scale.expand(*scale.shape[:-1], k)
        if group_size == -1
        else scale.repeat_interleave(group_size, -1)[..., :k]
    )


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_fake_quantization(bits, group_size, method, scale_dtype, dtype):
    for n, k in [(1, 1), (5, 31), (5, 33), (100, 100), (7, 576), (3, 1000)]:
        w = (torch.randn(n, k) * torch.rand(n, 1)).to(dtype)
        qdata, scale, *zero = reference.quantize(w, bits, group_size, method, scale_dtype)
        q, expected_scale, expected_zero = fake_quantize(w, bits, group_size, method, scale_dtype)
        assert (len(zero) == 1) == (method == "minmax")
        assert all(torch.equal(t, expected_zero) for t in zero)
        assert scale.dtype == scale_dtype
        assert torch.equal(scale, expected_scale)
        assert torch.equal(unpack(qdata, bits, k).float(), q)
        assert q.min() >= FORMATS[bits].qmin
        # Padding is zero fields, whatever was there.
        assert not unpack(qdata, bits, qdata.shape[-1] * 8 // bits)[:, k:].any()


@pytest.mark.parametrize("bits", FORMATS)
def test_quantize_rounds_ties_to_even(bits):
    qmax = FORMATS[bits].qmax
    between = [x for x in (0.5, 1.5, 2.5, -0.5, -1.5, -2.5) if abs(x) < qmax]
    w = torch.tensor([[qmax + 0.5, *between, -qmax - 0.5]])  # absmax makes S = 1
    qdata, scale = reference.quantize(w, bits, 32, "absmax", torch.float32)
    assert scale.tolist() == [[1.0]]
    assert unpack(qdata, bits, w.shape[1]).tolist() == [[qmax, *map(round, between), -qmax - 1]]


@pytest.mark.parametrize("bits", FORMATS)
def test_quantize_divides_by_the_rounded_scale(bits):
    """S is far from exact in bf16: rounding w by the fp32 S would give other integers."""
    w = torch.randn(64, 128)
    qdata, scale = reference.quantize(w, bits, -1, "absmax", torch.bfloat16)
    _, exact = reference.quantize(w, bits, -1, "absmax", torch.float32)
    q = unpack(qdata, bits, 128)
    assert torch.equal(q.float(), (w / scale.float()).round().clamp(FORMATS[bits].qmin, FORMATS[bits].qmax))
    assert (q.float() != (w / exact).round().clamp(FORMATS[bits].qmin, FORMATS[bits].qmax)).any()


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(
    ("scale_dtype", "u"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-22)]
)
def test_closed_form_bound(bits, group_size, scale_dtype, u):
    w = torch.randn(64, 1000)
    for method in METHODS:
        qdata, scale, *zero = reference.quantize(w, bits, group_size, method, scale_dtype)
        error = (w.double() - Planes(qdata, scale, bits, group_size, 1000, *zero).exact()).abs()
        size = per_element(scale.double().abs(), group_size, 1000)
        # signed has no level at +2^(b-1): what lies next to it comes down a whole step.
        half = torch.where(
            w.double() / per_element(scale.double(), group_size, 1000) > FORMATS[bits].qmax, 1.0, 0.5
        )
        largest = 2**bits - 1 if method == "minmax" else 2 ** (bits - 1)
        assert (error <= ((half if method == "signed" else 0.5) + largest * u) * size).all()


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_keeps_the_extreme(bits, dtype):
    w = torch.randn(50, 96).to(dtype)
    at = w.abs().argmax(-1, keepdim=True)
    w.scatter_(-1, at, w.gather(-1, at) * 1.5)  # in bf16 it might be tied
    qdata, scale = reference.quantize(w, bits, -1, "signed", dtype)
    assert (unpack(qdata, bits, 96).gather(-1, at) == FORMATS[bits].qmin).all()
    assert torch.equal(
        reference.dequantize(qdata, scale, bits, -1, 96, dtype).gather(-1, at), w.gather(-1, at)
    )
    assert torch.equal(scale < 0, w.gather(-1, at) > 0)
    assert (scale < 0).any()
    assert (scale > 0).any()


@pytest.mark.parametrize("bits", FORMATS)
def test_signed_tie_takes_the_negative_one(bits):
    w = torch.zeros(3, 32)
    w[0, 3], w[0, 9] = 2.0, -2.0
    w[1, 3], w[1, 9] = -2.0, 2.0
    w[2, 3], w[2, 9] = 2.0, 1.0  # no tie: the extreme is positive, and so S negative
    qdata, scale = reference.quantize(w, bits, 32, "signed", torch.float32)
    step, qmin = 2.0 / 2 ** (bits - 1), FORMATS[bits].qmin
    assert scale.flatten().tolist() == [step, step, -step]
    assert unpack(qdata, bits, 32)[:, [3, 9]].tolist() == [
        [-qmin - 1, qmin],
        [qmin, -qmin - 1],
        [qmin, qmin // 2],
    ]


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_search_takes_the_least_loss(bits, group_size, scale_dtype, dtype):
    """Group by group and in fp64: S is one of the six, none of which has less loss, and q is what rounding by
    it gives."""
    chosen = set()
    for n, k in [(1, 1), (5, 31), (7, 576), (3, 1000)]:
        w = (torch.randn(n, k) ** 3 * torch.rand(n, 1)).to(dtype)
        qdata, scale = reference.quantize(w, bits, group_size, "search", scale_dtype)
        q, got = unpack(qdata, bits, k).double(), scale.double()
        _, signed, _ = fake_quantize(w, bits, group_size, "signed", torch.float32)
        size = k if group_size == -1 else group_size
        for j, (group, levels) in enumerate(zip(w.double().split(size, -1), q.split(size, -1), strict=True)):
            factors = torch.tensor([1.0, 0.95, 0.9, 0.85, 0.8, 1.05])
            tried = (signed[:, j, None] * factors).to(scale_dtype).double()  # [n, 6]
            all_q = (group[:, None] / tried[..., None]).round().clamp(FORMATS[bits].qmin, FORMATS[bits].qmax)
            # As the number of the S before it is rounded counts, not the rounded one.
            error = (group[:, None] / tried[..., None] - all_q) * factors.double()[:, None]
            loss = (group.abs()[:, None] * error**2).sum(-1)
            mine = (got[:, j, None] - tried).abs().argmin(-1, keepdim=True)
            assert torch.equal(got[:, j, None], tried.gather(-1, mine))
            quantum = group.abs().amax(-1, keepdim=True) * group.shape[-1] * 2.0**-16
            assert (loss.gather(-1, mine) <= loss.amin(-1, keepdim=True) * (1 + 1e-5) + quantum).all()
            assert torch.equal(levels, all_q.gather(1, mine[..., None].expand(-1, -1, group.shape[-1]))[:, 0])
            chosen |= set(mine.flatten().tolist())
    assert len(chosen) > (2 if bits == 4 else 1)


def test_search_is_better_than_signed():
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))

    def loss(method):
        qdata, scale, *zero = reference.quantize(w, 4, 64, method, torch.bfloat16)
        return float(
            (w.abs() * (w - reference.dequantize(qdata, scale, 4, 64, 1024, torch.float32)) ** 2).sum()
        )

    assert loss("search") < 0.95 * loss("signed") < 0.95 * loss("absmax")


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("method", KNOWN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_groups(bits, method, dtype):
    w = torch.zeros(3, 100, dtype=dtype)
    w[1, 32:64] = 3.0
    w[2] = -0.0
    qdata, scale, *zero = reference.quantize(w, bits, 32, method, dtype)
    empty = torch.ones(3, 4, dtype=torch.bool)
    empty[1, 1] = False
    assert (scale[empty] == 1).all()
    assert (scale[1, 1] != 1).item()
    q = steps_from_zero(qdata, bits, 100, *zero)
    assert q[1, 32:64].all()
    q[1, 32:64] = 0
    assert not q.any()


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("method", KNOWN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_weights_keep_their_group(bits, method, dtype):
    """Groups whose extreme is 1 ... 400 of the smallest subnormal, of either sign: S is never 0 and nothing
    is NaN or inf."""
    ulp = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    steps = torch.arange(1, 401, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.5, -0.25, 0.0] * 8])
    for sign in (1, -1):
        w = (sign * steps * ulp).to(dtype)
        qdata, scale, *zero = reference.quantize(w, bits, 32, method, dtype)
        assert scale.isfinite().all()
        assert scale.all()
        assert (steps_from_zero(qdata, bits, 32, *zero)[:, 0] != 0).all()
        w2 = reference.dequantize(qdata, scale, bits, 32, 32, dtype, *zero)
        assert w2.isfinite().all()
        # There S is itself a rounded fp32 quotient, and may lie below the exact one.
        if dtype != torch.float32:
            assert ((w2.double() - w.double()).abs() <= scale.double().abs()).all()


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_subnormal_scale_rounds_away_from_zero(bits, method, dtype):
    limits = torch.finfo(dtype)
    ulp = limits.tiny * limits.eps
    w = torch.zeros(1000, 32)
    w[:, 5] = torch.linspace(-1.5, 1.5, 1000) * limits.tiny * 2 ** (bits - 1)
    qdata, exact, *_ = reference.quantize(w, bits, 32, method, torch.float32)
    qdata, scale, *zero = reference.quantize(w, bits, 32, method, dtype)
    exact, scale = exact.double(), scale.double()
    small = exact.abs() < limits.tiny
    assert small.sum() > 400
    assert torch.equal(scale.sign(), exact.sign())
    up = (exact[small].abs() / ulp).ceil() * ulp
    assert torch.equal(scale[small].abs(), up)
    assert torch.equal(scale[~small], exact[~small].to(dtype).double())


@pytest.mark.parametrize("method", METHODS)
def test_overflowing_scale_is_the_largest_finite(method):
    w = torch.full((2, 64), 1e3)
    w[0, :32], w[1, 32] = 3e6, -3e6
    qdata, scale, *_ = reference.quantize(w, 4, 32, method, torch.float16)
    huge = -65504.0 if method == "signed" else 65504.0
    small = 1e3 / {"absmax": 7.5, "signed": -8, "minmax": 15}[method]
    assert scale[0, 0] == huge
    assert scale[1, 1] == 65504.0
    torch.testing.assert_close(scale[[0, 1], [1, 0]].float(), torch.full((2,), small), rtol=2**-11, atol=0)
    assert unpack(qdata, 4, 64)[0, :32].tolist() == [-8 if method == "signed" else 7] * 32
    assert unpack(qdata, 4, 64)[1, 32] == -8


@pytest.mark.parametrize("method", KNOWN)
@pytest.mark.parametrize("bits", FORMATS)
def test_largest_fp32_does_not_overflow(bits, method):
    largest = torch.finfo(torch.float32).max
    w = torch.tensor([[largest, -largest]])
    qdata, scale, *zero = reference.quantize(w, bits, 32, method, torch.float32)
    assert scale.isfinite().all()
    if method != "search":  # which finds a scale that loses less
        assert unpack(qdata, bits, 2).tolist() == [[FORMATS[bits].qmax, FORMATS[bits].qmin]]


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("method", KNOWN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spoil_their_group_only(bits, method, dtype, bad):
    w = torch.randn(3, 100).to(dtype)
    clean_qdata, clean_scale, *clean_zero = reference.quantize(w, bits, 32, method, dtype)
    w[1, 40], w[2, 99] = bad, bad  # a middle group, and the short last one
    qdata, scale, *zero = reference.quantize(w, bits, 32, method, dtype)
    spoiled = torch.zeros(3, 4, dtype=torch.bool)
    spoiled[1, 1] = spoiled[2, 3] = True
    assert torch.equal(scale.isnan(), spoiled)
    assert torch.equal(scale[~spoiled], clean_scale[~spoiled])
    expected = unpack(clean_qdata, bits, 100)
    expected[per_element(spoiled, 32, 100)] = 0
    assert torch.equal(unpack(qdata, bits, 100), expected)
    w2 = reference.dequantize(qdata, scale, bits, 32, 100, dtype, *zero)
    assert torch.equal(w2.isnan(), per_element(spoiled, 32, 100))


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_leading_dims_and_strides(bits, group_size):
    w = torch.randn(2, 3, 5, 100)
    qdata, scale = reference.quantize(w, bits, group_size, "absmax", torch.bfloat16)
    assert qdata.shape == (2, 3, 5, FORMATS[bits].row_bytes(100))
    assert scale.shape == (2, 3, 5, 4 if group_size == 32 else 1)
    for got in (
        reference.quantize(w[1, 2], bits, group_size, "absmax", torch.bfloat16),
        # fmt: skip.
        reference.quantize(w[1, 2].t().contiguous().t(), bits, group_size, "absmax", torch.bfloat16),
    ):
        assert torch.equal(got[0], qdata[1, 2])
        assert torch.equal(got[1], scale[1, 2])
        assert got[0].is_contiguous()
        assert got[1].is_contiguous()
    w2 = reference.dequantize(qdata, scale, bits, group_size, 100, torch.float32)
    assert torch.equal(
        w2[1, 2, 3:4],
        reference.dequantize(qdata[1, 2, 3:4], scale[1, 2, 3:4], bits, group_size, 100, torch.float32),
    )


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("shape", [(0, 100), (5, 0), (0, 0), (0, 5, 64)])
def test_empty_weights(group_size, shape):
    qdata, scale = reference.quantize(torch.zeros(shape), 4, group_size, "absmax", torch.float32)
    assert reference.dequantize(qdata, scale, 4, group_size, shape[-1], torch.bfloat16).shape == shape


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once(bits, group_size, dtype):
    q = torch.randint(FORMATS[bits].qmin, FORMATS[bits].qmax + 1, (40, 1000), dtype=torch.int8)
    scale = torch.randn(40, 1 if group_size == -1 else -(-1000 // group_size))
    w2 = reference.dequantize(pack(q, bits), scale, bits, group_size, 1000, dtype)
    # q has 8 digits and S 24: their product is exact in fp64.
    assert torch.equal(w2, (q.double() * per_element(scale, group_size, 1000).double()).float().to(dtype))
    assert w2.is_contiguous()
    if dtype != torch.float32 and bits > 2:  # with 2 bits q is a power of two, or 0
        assert not torch.equal(w2, q.to(dtype) * per_element(scale, group_size, 1000).to(dtype))


SHAPES = [
    (0, 5, 100, 32),
    (1, 1, 32, 32),
    (3, 5, 100, 64),
    (17, 100, 576, 96),
    (3, 100, 1000, 128),
    (17, 5, 1000, -1),
]


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
@each_kind
def test_linear_and_linear_dx(bits, dtype, m, n, k, group_size, method):
    w = random_planes(n, k, bits=bits, group_size=group_size, dtype=dtype, method=method)
    x, dy, bias = activations(m, k, dtype), activations(m, n, dtype), torch.randn(n).to(dtype)
    planes, zero = (w.qdata, w.scale), w.zero
    assert_linear_close(reference.linear(x, *planes, None, bits, group_size, zero), x, w.exact())
    assert_linear_close(reference.linear(x, *planes, bias, bits, group_size, zero), x, w.exact(), bias)
    assert_linear_close(reference.linear_dx(dy, *planes, bits, group_size, k, zero), dy, w.exact().mT)


def test_linear_adds_the_bias_before_rounding():
    """256 + 1 + 1 is 258 in bf16, but 256 where the product is rounded first."""
    w = Planes(
        pack(torch.tensor([[1, 1]], dtype=torch.int8), 4), torch.ones(1, 1, dtype=torch.bfloat16), 4, 32, 2
    )
    x, bias = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.ones(1).bfloat16()
    assert reference.linear(x, w.qdata, w.scale, bias, 4, 32).item() == 258


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offs", [[0, 5, 5, 12], [17, 17, 17, 17], [0, 0, 0, 0], [1, 2, 3, 17]])
@each_kind
def test_grouped_and_grouped_dx(bits, dtype, offs, method):
    """Empty experts, first, middle and last; rows that no expert claims are zero."""
    w = random_planes(4, 5, 100, bits=bits, group_size=32, dtype=dtype, method=method)
    x, dy = activations(17, 100, dtype), activations(17, 5, dtype)
    ends = torch.tensor(offs, dtype=torch.int32)
    y = reference.grouped(x, w.qdata, w.scale, ends, bits, 32, w.zero)
    dx = reference.grouped_dx(dy, w.qdata, w.scale, ends, bits, 32, 100, w.zero)
    assert (y.shape, dx.shape) == ((17, 5), (17, 100))
    for e, (start, end) in enumerate(pairwise([0, *offs])):
        assert_linear_close(y[start:end], x[start:end], w.exact()[e])
        assert_linear_close(dx[start:end], dy[start:end], w.exact()[e].mT)
    assert not y[offs[-1] :].any()
    assert not dx[offs[-1] :].any()


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@each_kind
def test_embedding(bits, group_size, dtype, index_dtype, method):
    w = random_planes(9, 100, bits=bits, group_size=group_size, dtype=dtype, method=method)
    table = w.exact().float().to(dtype)
    for indices in (torch.tensor([[8, 0, 3], [3, 3, 1]]), torch.tensor(4), torch.zeros(2, 0)):
        indices = indices.to(index_dtype)
        got = reference.embedding(indices, w.qdata, w.scale, bits, group_size, 100, w.zero)
        assert torch.equal(got, table[indices])


def test_every_kernel_searches_the_same_scales():
    """The table stands in three languages, which share no source."""
    kernels = Path(reference.__file__).with_name("kernels")
    tried = re.search(r"TWENTIETHS\[TRIED\] = \{([\d, ]+)\}", (kernels / "csrc" / "planes.h").read_text())
    assert tuple(map(int, tried[1].split(","))) == reference.SEARCHED
    loop = re.search(
        r"for i in tl\.static_range\(1, (\d)\):.*?HALF,\s+(20 - i if i < 5 else 21),\s+SCALE",
        (kernels / "triton" / "planes_kernel.py").read_text(),
        re.DOTALL,
    )
    assert (20, *(eval(loop[2], {"i": i}) for i in range(1, int(loop[1])))) == reference.SEARCHED
