from itertools import pairwise

import pytest
import torch
from bounds import Planes, activations, apart, assert_linear_close, random_planes

from rtn_tensor import reference
from rtn_tensor.formats import FORMATS, SCALE_METHODS, SCALES_OF_8_BITS, groups, pack
from rtn_tensor.kernels import triton
from rtn_tensor.kernels.problem import make_problem
from rtn_tensor.kernels.registry import KERNELS, why_not

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = [method for method in SCALE_METHODS if method not in SCALES_OF_8_BITS]  # as kernels know them
GROUP_SIZES = [32, 64, 96, 128, -1]

# M, N, K, group_size: every value of each, with a short last group and a short last chunk in most.
SHAPES = [
    (0, 5, 100, 32),
    (1, 1, 32, 32),
    (1, 100, 1000, 128),
    (1, 5, 576, 96),
    (3, 5, 100, 64),
    (3, 100, 576, -1),
    (3, 1, 1000, 96),
    (17, 100, 100, 32),
    (17, 5, 1000, -1),
    (17, 1, 576, 128),
]


def runs_on(kernel, device):
    return kernel.name == "reference" or device in {
        "cpu": ["cpu"],
        "triton": ["cuda", *["cpu"] * triton.interpreting()],
    }.get(kernel.name, DEVICES)


def having(*ops):
    """Every kernel of the list, on every device it runs on, with every op of these that it has."""
    cases = [
        (kernel, op, device)
        for kernel in KERNELS
        for op in ops
        for device in DEVICES
        if getattr(kernel, op) and runs_on(kernel, device)
    ]
    return pytest.mark.parametrize(
        ("kernel", "op", "device"), [pytest.param(*c, id="-".join([c[0].name, *c[1:]])) for c in cases]
    )


products = having("linear", "linear_dx", "grouped", "grouped_dx")
each_bits = pytest.mark.parametrize("bits", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kind = pytest.mark.parametrize("method", ["absmax", "minmax"])  # without a plane `zero`, and with it


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory from torch.empty holds NaN: an element that a kernel forgets to write is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(kernel, op, x, w, bias=None, offs=None):
    if reason := why_not(
        kernel, make_problem(op, x.dtype, x.shape[0], w.k, w.qdata, w.scale, w.bits, w.group_size, w.zero)
    ):
        pytest.skip(reason)
    third = {"linear": (bias,), "linear_dx": (), "grouped": (offs,), "grouped_dx": (offs,)}[op]
    k = (w.k,) if op.endswith("dx") else ()
    return getattr(kernel, op)(x, w.qdata, w.scale, *third, w.bits, w.group_size, *k, w.zero)


def check(kernel, op, x, w, bias=None):
    """Runs the op and holds what comes out to the bound. For experts the rows are dealt as to one that is
    empty first, one in the middle, and nobody at the end."""
    rounds = kernel.rounds_weight(
        make_problem(op, x.dtype, x.shape[0], w.k, w.qdata, w.scale, w.bits, w.group_size, w.zero)
    )
    exact = w.exact(x.dtype if rounds else None)
    exact = exact.mT if op.endswith("dx") else exact
    terms = apart(w) if kernel.name == "cpu" else None
    if w.qdata.dim() == 2:
        return assert_linear_close(run(kernel, op, x, w, bias), x, exact, bias, terms)
    m = x.shape[0]
    offs = torch.tensor([0, m // 3, m // 3, m - m // 4], dtype=torch.int32, device=x.device)
    y = run(kernel, op, x, w, offs=offs)
    assert y.shape == (m, exact.shape[-2])
    for e, (start, end) in enumerate(pairwise([0, *offs.tolist()])):
        assert_linear_close(y[start:end], x[start:end], exact[e], terms=None if terms is None else terms[e])
    assert torch.equal(y[offs[-1] :], torch.zeros_like(y[offs[-1] :]))


def operands(op, m, n, k, bits, group_size, dtype, device, method="absmax"):
    experts = (4,) if op.startswith("grouped") else ()
    w = random_planes(
        *experts, n, k, bits=bits, group_size=group_size, dtype=dtype, device=device, method=method
    )
    return activations(m, n if op.endswith("dx") else k, dtype, device), w


def cut(w, at):
    """`w` with each plane indexed by `at`."""
    return w._replace(qdata=w.qdata[at], scale=w.scale[at], zero=None if w.zero is None else w.zero[at])


# -------------------------------------------------------------- products, within the bound


@products
@each_bits
@each_dtype
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
@each_kind
def test_product(kernel, op, device, bits, dtype, m, n, k, group_size, method):
    x, w = operands(op, m, n, k, bits, group_size, dtype, device, method)
    check(kernel, op, x, w)
    if op == "linear":
        check(kernel, op, x, w, torch.randn(n, device=device).to(dtype))


@products
@each_bits
@each_kind
def test_product_with_an_fp32_scale(kernel, op, device, bits, method):
    """As under autocast: the activations are bf16, the weight's dtype is fp32."""
    x, w = operands(op, 3, 5, 100, bits, 32, torch.float32, device, method)
    check(kernel, op, x.bfloat16(), w)


@products
@each_bits
@pytest.mark.parametrize("group_size", [32, 64, -1])
@each_kind
def test_product_with_strided_operands(kernel, op, device, bits, group_size, method):
    m, n, k = 17, 5, 164
    x, big = operands(op, m, n + 3, k, bits, group_size, torch.bfloat16, device, method)
    rows = cut(big, (..., slice(2, n + 2), slice(None)))
    # Columns 64: ; with group_size -1 the part keeps the whole scale.
    columns = cut(rows, (..., slice(0 if group_size == -1 else 64 // group_size, None)))
    columns = columns._replace(qdata=rows.qdata[..., 8 * bits :], k=k - 64)
    assert not columns.qdata.is_contiguous()
    for w in (rows, columns):
        x = activations(m, n if op.endswith("dx") else w.k, torch.bfloat16, device)
        wide = torch.full((m, x.shape[1] + 5), torch.nan, dtype=x.dtype, device=device)
        wide[:, 2:-3] = x
        for view in (x, x.t().contiguous().t(), wide[:, 2:-3], x[:1].expand(m, -1), x[::2]):
            check(kernel, op, view, w)
        if op == "linear":
            check(kernel, op, x, w, torch.randn(n, 2, device=device).bfloat16()[:, 0])


@products
@each_dtype
@pytest.mark.parametrize("k", [33, 100, 164, 192])
def test_a_row_that_is_not_a_number_stays_alone(kernel, op, device, dtype, k):
    """What follows the end of a row, another one or what is no part of x, does not come into it."""
    n, k = (k, 5) if op.endswith("dx") else (5, k)
    x, w = operands(op, 17, n, k, 4, 32, dtype, device)
    offs = torch.tensor([3, 3, 9, 17], dtype=torch.int32, device=device)
    expected = run(kernel, op, x, w, offs=offs)
    wide = torch.full((17, x.shape[1] + 40), torch.nan, dtype=dtype, device=device)
    wide[:, : x.shape[1]] = x
    rest = [row for row in range(17) if row != 5]
    for operand in (wide[:, : x.shape[1]], x):
        operand[5] = torch.nan
        y = run(kernel, op, operand, w, offs=offs)
        assert y[5].isnan().all()
        torch.testing.assert_close(y[rest], expected[rest], rtol=0.01, atol=0.01)


@products
@each_bits
@each_dtype
@each_kind
def test_product_with_planes_aligned_to_8_bytes(kernel, op, device, bits, dtype, method):
    """As a memory-mapped file gives them."""

    def shift(plane):
        buffer = torch.empty(8 + plane.nbytes, dtype=torch.uint8, device=device)
        shifted = buffer[8:].view(plane.dtype).view(plane.shape).copy_(plane)
        assert shifted.data_ptr() % 16 == 8
        return shifted

    x, w = operands(op, 17, 100, 576, bits, 64, dtype, device, method)
    zero = None if w.zero is None else shift(w.zero)
    check(kernel, op, x, w._replace(qdata=shift(w.qdata), scale=shift(w.scale), zero=zero))


@products
@each_bits
@each_kind
def test_product_with_two_threads(kernel, op, device, bits, method):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for m in (1, 17):
            check(kernel, op, *operands(op, m, 100, 576, bits, 64, torch.bfloat16, device, method))
    finally:
        torch.set_num_threads(before)


@products
@each_bits
@each_dtype
@pytest.mark.parametrize(("n", "k", "group_size"), [(5, 100, 32), (100, 576, 96), (5, 1000, -1)])
@each_kind
def test_product_is_exact_on_small_integers(kernel, op, device, bits, dtype, n, k, group_size, method):
    """Every partial sum is a multiple of 2^-6 below 2^16, so fp32 holds it whatever the order: one rounding
    at the end remains."""
    experts = (4,) if op.startswith("grouped") else ()
    q = torch.randint(FORMATS[bits].qmin, FORMATS[bits].qmax + 1, (*experts, n, k), dtype=torch.int8)
    scale = torch.exp2(torch.randint(-6, -2, (*experts, n, groups(k, group_size)))) * (
        1 - 2 * torch.randint(2, (n, 1))
    )
    zero = None
    if method == "minmax":
        limits = FORMATS[bits].qmin, FORMATS[bits].qmax + 1
        zero = torch.randint(*limits, scale.shape, dtype=torch.int8, device=device)
    w = Planes(pack(q, bits).to(device), scale.to(device, dtype), bits, group_size, k, zero)
    x = torch.randint(-4, 5, (17, n if op.endswith("dx") else k), device=device).to(dtype)
    bias = torch.randint(-4, 5, (n,), device=device).to(dtype) if op == "linear" else None
    offs = torch.tensor([0, 6, 6, 17], dtype=torch.int32, device=device)
    exact = w.exact().mT if op.endswith("dx") else w.exact()
    if experts:
        expected = torch.cat([x[:6].double() @ exact[1].mT, x[6:].double() @ exact[3].mT])
    else:
        expected = x.double() @ exact.mT + (0 if bias is None else bias.double())
    assert expected.abs().max() < 2**16
    assert torch.equal(run(kernel, op, x, w, bias, offs), expected.to(dtype))


# ------------------------------------------------------------- ops without sums: bit-exact


@having("dequantize")
@each_bits
@each_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@each_kind
def test_dequantize(kernel, op, device, bits, dtype, group_size, method):
    for shape in [(1, 32), (5, 100), (3, 5, 1000), (0, 64)]:
        for scale_dtype in DTYPES:
            w = random_planes(
                *shape, bits=bits, group_size=group_size, dtype=scale_dtype, device=device, method=method
            )
            if reason := why_not(
                kernel, make_problem(op, dtype, shape[0], w.k, w.qdata, w.scale, bits, group_size, w.zero)
            ):
                pytest.skip(reason)
            got = kernel.dequantize(w.qdata, w.scale, bits, group_size, w.k, dtype, w.zero)
            assert got.dtype == dtype
            assert torch.equal(got, w.exact().float().to(dtype))


@having("embedding")
@each_bits
@each_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@each_kind
def test_embedding(kernel, op, device, bits, dtype, group_size, method):
    w = random_planes(9, 1000, bits=bits, group_size=group_size, dtype=dtype, device=device, method=method)
    for indices in (
        torch.tensor([[8, 0], [3, 3]]),
        torch.tensor([1], dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
    ):
        indices = indices.to(device)
        if reason := why_not(
            kernel,
            make_problem(op, dtype, indices.numel(), w.k, w.qdata, w.scale, bits, group_size, w.zero),
        ):
            pytest.skip(reason)
        got = kernel.embedding(indices, w.qdata, w.scale, bits, group_size, w.k, w.zero)
        assert got.dtype == dtype
        assert torch.equal(got, w.exact().float().to(dtype)[indices])


def problem(op, dtype, m, w, bits, group_size, method):
    """Of quantizing `w`."""
    return make_problem(op, dtype, m, w.shape[-1], w, w, bits, group_size)._replace(zero=method == "minmax")


@having("quantize")
@each_bits
@each_dtype
@pytest.mark.parametrize("method", METHODS)
# There a case takes 2 s, and they are alike.
@pytest.mark.parametrize("group_size", [96, -1] if triton.interpreting() else GROUP_SIZES)
def test_quantize(kernel, op, device, bits, dtype, method, group_size):
    """Bit for bit what the reference gives on the CPU (test_reference holds that to the formulas), odd groups
    included."""
    w = torch.randn(3, 5, 1000) * torch.rand(3, 5, 1)
    w[0, 0] = 0
    w[0, 1] *= torch.finfo(dtype).tiny
    w[0, 2, 500], w[1, 2, 999], w[1, 3, 0] = torch.nan, torch.inf, -torch.inf
    w[0, 3, 130:] = w[0, 3, 130:].abs()
    w = w.to(dtype)
    for scale_dtype in DTYPES:
        for view in (w, w[1:, 1:4, :100], w[2].t().contiguous().t(), w[:, :0]):
            on_device = view.to(device)
            if reason := why_not(kernel, problem(op, dtype, 5, on_device, bits, group_size, method)):
                pytest.skip(reason)
            got = kernel.quantize(on_device, bits, group_size, method, scale_dtype)
            expected = reference.quantize(view, bits, group_size, method, scale_dtype)
            assert got[1].dtype == scale_dtype
            for plane, due in zip(got, expected, strict=True):
                torch.testing.assert_close(plane.cpu(), due, rtol=0, atol=0, equal_nan=True)


@having("quantize")
@each_bits
@pytest.mark.parametrize("group_size", [32, -1])
@each_kind
def test_quantize_into_planes_that_are_there(kernel, op, device, bits, group_size, method):
    for dtype, scale_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        w = torch.randn(2, 5, 100).to(dtype).to(device)
        if reason := why_not(kernel, problem(op, dtype, 10, w, bits, group_size, method)):
            pytest.skip(reason)
        expected = kernel.quantize(w, bits, group_size, method, scale_dtype)
        planes = [torch.zeros(4, *plane.shape[1:], dtype=plane.dtype, device=device) for plane in expected]
        out = tuple(plane[1:3] for plane in planes)
        assert all(
            a is b
            for a, b in zip(kernel.quantize(w, bits, group_size, method, scale_dtype, out), out, strict=True)
        )
        for plane, filled in zip(planes, expected, strict=True):
            assert torch.equal(plane[1:3], filled)
            assert not plane[[0, 3]].any()
