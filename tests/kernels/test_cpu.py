"""The C++ library of the CPU kernels, in every instruction set and build that `library` has."""

from itertools import pairwise, product

import pytest
import torch
from bounds import activations, assert_linear_close, random_planes
from cpu_library import DTYPES, assert_same, each_bits, each_dtype, need_library, what_is_multiplied

from rtn_tensor import reference
from rtn_tensor.formats import FORMATS, SCALE8, SCALE_DTYPES, groups
from rtn_tensor.kernels import cpu

GROUP_SIZES = [32, 64, 96, 128, -1]
# Tokens below, at and above a tile of every instruction set, then more than a block of them and than a block
# of K.
SHAPES = [*product((0, 1, 2, 3, 12, 13, 17, 24, 25, 200), (1, 5, 33, 100), (32, 100, 576, 1000))]
# Several steps along K; blocks of rows that share them, and runs of tokens.
LONG = [(25, 300, 2100), (600, 33, 2100)]

each_group_size = pytest.mark.parametrize("group_size", GROUP_SIZES)
each_kind = pytest.mark.parametrize("method", ["absmax", "minmax"])  # without a plane `zero`, and with it


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory from torch.empty holds NaN: an element that is never written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(x, w, bias=None):
    y = cpu.linear(x, w.qdata, w.scale, bias, w.bits, w.group_size, w.zero)
    _, exact, terms = what_is_multiplied("linear", x, w)
    assert_linear_close(y, x, exact, bias, terms)


@each_group_size
@each_bits
@each_dtype
@each_kind
def test_linear(library, dtype, bits, group_size, method):
    # A part of the shapes for each group size and dtype: all of them together.
    for m, n, k in SHAPES[GROUP_SIZES.index(group_size) + 5 * DTYPES.index(dtype) :: 15] + LONG:
        w = random_planes(n, k, bits=bits, group_size=group_size, dtype=dtype, method=method)
        check(activations(m, k, dtype), w, torch.randn(n).to(dtype) if n % 2 else None)


@each_group_size
@each_bits
@each_kind
def test_linear_with_another_scale_dtype(library, bits, group_size, method):
    for dtype, scale_dtype in product(DTYPES, SCALE_DTYPES if method != "minmax" else DTYPES):
        for m in (1, 30):
            check(
                activations(m, 200, dtype),
                random_planes(35, 200, bits=bits, group_size=group_size, dtype=scale_dtype, method=method),
            )


@each_bits
@each_dtype
@each_kind
def test_linear_of_views(library, dtype, bits, method):
    n, k = 33, 164
    big = random_planes(n + 3, k, bits=bits, group_size=32, dtype=dtype, method=method)

    def changed(w, change, **others):
        return w._replace(scale=change(w.scale), zero=None if w.zero is None else change(w.zero), **others)

    rows = changed(big, lambda t: t[2 : n + 2], qdata=big.qdata[2 : n + 2])
    columns = changed(rows, lambda t: t[:, 2:], qdata=rows.qdata[:, 8 * bits :], k=k - 64)
    fortran = changed(rows, lambda t: t.t().contiguous().t())

    def shift(plane):
        buffer = torch.empty(8 + plane.nbytes, dtype=torch.uint8)
        shifted = buffer[8:].view(plane.dtype).view(plane.shape).copy_(plane)
        assert shifted.data_ptr() % 16 == 8
        return shifted

    shifted = changed(rows, shift, qdata=shift(rows.qdata))
    for m, w in product((1, 14, 40), (rows, columns, fortran, shifted)):
        x = activations(m, w.k, dtype)
        wide = torch.full((m, w.k + 5), torch.nan, dtype=dtype)
        wide[:, 2:-3] = x
        for view in (wide[:, 2:-3], x.t().contiguous().t(), x[:1].expand(m, -1), x[::2]):
            check(view, w, torch.randn(n, 2).to(dtype)[:, 0])


@each_group_size
@each_bits
@each_dtype
@each_kind
def test_grouped(library, dtype, bits, group_size, method):
    """Experts with no rows, with few, and with more than one block; rows that belong to none, and ends past
    the last row."""
    w = random_planes(6, 35, 100, bits=bits, group_size=group_size, dtype=dtype, method=method)
    cases = [
        (450, [0, 230, 230, 233, 440, 440]),
        (8, [1, 2, 3, 4, 5, 6]),
        (8, [0] * 6),
        (450, [450] * 6),
        (8, [3, 20, 20, 20, 20, 20]),
    ]
    for m, ends in cases:
        offs = torch.tensor(ends, dtype=torch.int32)
        x = activations(m, 100, dtype)
        y = cpu.grouped(x, w.qdata, w.scale, offs, bits, group_size, w.zero)
        _, exact, terms = what_is_multiplied("grouped", x, w)
        for e, (start, end) in enumerate(pairwise([0, *ends])):
            of_expert = None if terms is None else terms[e]
            assert_linear_close(y[start:end], x[start:end], exact[e], terms=of_expert)
        assert torch.equal(y[ends[-1] :], torch.zeros_like(y[ends[-1] :]))


def awkward_weight(k, dtype):
    limits = torch.finfo(dtype)
    w = torch.randn(20, k)
    w[1], w[2] = 0, -0.0
    w[3] *= limits.tiny
    w[4] *= limits.tiny * limits.eps  # subnormal, where it is not zero
    w[5, k // 2], w[6, -1], w[7, 0] = torch.nan, torch.inf, -torch.inf
    w[8] *= limits.max / 4  # overflows, or its scale does in another dtype
    w[9] = w[9].clamp(-1, 1)
    w[10] *= 1e-6
    w[11] *= 1e-41
    w[12] = torch.arange(k) % 16 * 0.5 - 4  # ties
    w[13], w[14] = w[13].abs(), -w[14].abs()
    w[15, 1:] = 0
    w[16] = limits.max
    w[17] = -limits.max
    w[18] = limits.tiny * limits.eps
    return w.to(dtype)


@pytest.mark.parametrize("method", ["absmax", "signed", "search"])
@each_group_size
@each_bits
@each_dtype
def test_quantize(library, dtype, bits, group_size, method):
    for k, scale_dtype in product((32, 100, 1000), SCALE_DTYPES):
        w = awkward_weight(k, dtype)
        for view in (w, w[3:9, : k - 1], w.t().contiguous().t()):
            got = cpu.quantize(view, bits, group_size, method, scale_dtype)
            expected = reference.quantize(view, bits, group_size, method, scale_dtype)
            for plane, due in zip(got, expected, strict=True):
                wide = reference.widened if plane is got[1] else torch.clone
                assert_same(wide(plane), wide(due))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@each_kind
def test_every_quotient_rounds_as_a_division(library, dtype, bits, method):
    """Every mantissa as a row's largest weight, over every mantissa of what may round to one or more:
    quotients that are ties included."""
    mantissas = torch.arange(128 if dtype == torch.bfloat16 else 1024)[:: 1 if dtype == torch.bfloat16 else 8]
    one = torch.tensor(1.0, dtype=dtype).view(torch.int16).item()
    largest = (one + mantissas).to(torch.int16).view(dtype)
    others = torch.cat([largest * 2.0**-e for e in range(bits + 1)]).expand(len(largest), -1)
    w = torch.cat([largest[:, None], torch.where(others <= largest[:, None], others, -others / 2)], dim=1)
    for scaled in (w, -w * 2**4, w * 2**-8):
        got = cpu.quantize(scaled, bits, -1, method, dtype)
        for plane, due in zip(got, reference.quantize(scaled, bits, -1, method, dtype), strict=True):
            assert torch.equal(plane, due)


@each_group_size
@each_bits
@each_dtype
@each_kind
def test_dequantize(library, dtype, bits, group_size, method):
    for k, scale_dtype in product((1, 32, 100, 1000), DTYPES):
        limits = torch.finfo(scale_dtype)
        scale = torch.randn(40, groups(k, group_size)) * torch.logspace(-45, 38, 40)[:, None]
        scale[0], scale[1], scale[2], scale[3], scale[4] = (
            torch.nan,
            torch.inf,
            0,
            limits.tiny * limits.eps,
            limits.max,
        )
        scale = scale.to(scale_dtype)
        qdata = torch.randint(256, (40, FORMATS[bits].row_bytes(k)), dtype=torch.uint8)
        zero = torch.randint(-128, 128, scale.shape, dtype=torch.int8)
        for rows in (slice(None), slice(3, 7), slice(0, 0)):
            z = zero[rows] if method == "minmax" else None
            got = cpu.dequantize(qdata[rows], scale[rows], bits, group_size, k, dtype, z)
            assert_same(got, reference.dequantize(qdata[rows], scale[rows], bits, group_size, k, dtype, z))


@each_bits
@each_dtype
def test_dequantize_by_every_scale_of_8_bits(library, dtype, bits):
    qdata = torch.randint(256, (16, FORMATS[bits].row_bytes(512)), dtype=torch.uint8)
    scale = torch.arange(256).to(SCALE8).view(16, 16)
    got = cpu.dequantize(qdata, scale, bits, 32, 512, dtype)
    assert_same(got, reference.dequantize(qdata, scale, bits, 32, 512, dtype))


@each_bits
@each_dtype
@each_kind
def test_embedding(library, dtype, bits, method):
    w = random_planes(9, 100, bits=bits, group_size=64, dtype=dtype, method=method)
    for indices in (
        torch.tensor([[8, 0, 3], [3, 3, 1]]),
        torch.tensor([7, 2], dtype=torch.int32),
        torch.zeros(2, 0, dtype=torch.int64),
    ):
        expected = reference.embedding(indices, w.qdata, w.scale, bits, 64, 100, w.zero)
        assert_same(cpu.embedding(indices, w.qdata, w.scale, bits, 64, 100, w.zero), expected)


@pytest.mark.parametrize(("indices", "named"), [([0, 9], 9), ([-1, 3], -1)])
def test_embedding_out_of_range(indices, named):
    need_library()
    w = random_planes(9, 100)
    with pytest.raises(IndexError, match=f"index {named} is out of range: the weight has 9 rows"):
        cpu.embedding(torch.tensor(indices), w.qdata, w.scale, 4, 32, 100)


def test_set_isa_refuses_what_there_is_not():
    need_library()
    before = cpu.isa()
    for name in ("avx1024", ""):
        with pytest.raises(ValueError, match=f"'{name}' is not available here; {before} is in use"):
            cpu.set_isa(name)
    assert cpu.isa() == before
