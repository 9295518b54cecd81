import dataclasses
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from bounds import Planes, activations, assert_linear_close, random_planes
from expecttest import assert_expected_inline
from torch.testing import assert_close

from rtn_tensor import RTNQuantizedTensor, explain, ops, reference
from rtn_tensor.formats import FORMATS, SCALE_METHODS, groups, pack
from rtn_tensor.kernels import dense, registry, triton
from rtn_tensor.kernels.problem import Kernel, make_problem
from rtn_tensor.kernels.registry import KERNELS, REFERENCE, choose, why_not

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = SCALE_METHODS
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


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory from torch.empty holds NaN: an element that a kernel forgets to write is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use():
    """Puts other kernels in the list."""
    before = list(registry.KERNELS)

    def put(*others):
        registry.KERNELS[:] = others

    yield put
    registry.KERNELS[:] = before


def run(kernel, op, x, w, bias=None, offs=None):
    if reason := why_not(
        kernel, make_problem(op, x.dtype, x.shape[0], w.k, w.qdata, w.scale, w.bits, w.group_size)
    ):
        pytest.skip(reason)
    third = {"linear": (bias,), "linear_dx": (), "grouped": (offs,), "grouped_dx": (offs,)}[op]
    k = (w.k,) if op.endswith("dx") else ()
    return getattr(kernel, op)(x, w.qdata, w.scale, *third, w.bits, w.group_size, *k)


def check(kernel, op, x, w, bias=None):
    """Runs the op and holds what comes out to the bound. For experts the rows are dealt as to one that is
    empty first, one in the middle, and nobody at the end."""
    rounds = kernel.rounds_weight(
        make_problem(op, x.dtype, x.shape[0], w.k, w.qdata, w.scale, w.bits, w.group_size)
    )
    exact = w.exact(x.dtype if rounds else None)
    exact = exact.mT if op.endswith("dx") else exact
    if w.qdata.dim() == 2:
        return assert_linear_close(run(kernel, op, x, w, bias), x, exact, bias)
    m = x.shape[0]
    offs = torch.tensor([0, m // 3, m // 3, m - m // 4], dtype=torch.int32, device=x.device)
    y = run(kernel, op, x, w, offs=offs)
    assert y.shape == (m, exact.shape[-2])
    for e, (start, end) in enumerate(pairwise([0, *offs.tolist()])):
        assert_linear_close(y[start:end], x[start:end], exact[e])
    assert torch.equal(y[offs[-1] :], torch.zeros_like(y[offs[-1] :]))


def operands(op, m, n, k, bits, group_size, dtype, device):
    experts = (4,) if op.startswith("grouped") else ()
    w = random_planes(*experts, n, k, bits=bits, group_size=group_size, dtype=dtype, device=device)
    return activations(m, n if op.endswith("dx") else k, dtype, device), w


# -------------------------------------------------------------- products, within the bound


@products
@each_bits
@each_dtype
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
def test_product(kernel, op, device, bits, dtype, m, n, k, group_size):
    x, w = operands(op, m, n, k, bits, group_size, dtype, device)
    check(kernel, op, x, w)
    if op == "linear":
        check(kernel, op, x, w, torch.randn(n, device=device).to(dtype))


@products
@each_bits
def test_product_with_an_fp32_scale(kernel, op, device, bits):
    """As under autocast: the activations are bf16, the weight's dtype is fp32."""
    x, w = operands(op, 3, 5, 100, bits, 32, torch.float32, device)
    check(kernel, op, x.bfloat16(), w)


@products
@each_bits
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_product_with_strided_operands(kernel, op, device, bits, group_size):
    m, n, k = 17, 5, 164
    x, big = operands(op, m, n + 3, k, bits, group_size, torch.bfloat16, device)
    rows = Planes(big.qdata[..., 2 : n + 2, :], big.scale[..., 2 : n + 2, :], bits, group_size, k)
    # Columns 64: ; with group_size -1 the part keeps the whole scale.
    skipped = 0 if group_size == -1 else 64 // group_size
    columns = Planes(rows.qdata[..., 8 * bits :], rows.scale[..., skipped:], bits, group_size, k - 64)
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
@each_bits
@each_dtype
def test_product_with_planes_aligned_to_8_bytes(kernel, op, device, bits, dtype):
    """As a memory-mapped file gives them."""

    def shift(plane):
        buffer = torch.empty(8 + plane.nbytes, dtype=torch.uint8, device=device)
        shifted = buffer[8:].view(plane.dtype).view(plane.shape).copy_(plane)
        assert shifted.data_ptr() % 16 == 8
        return shifted

    x, w = operands(op, 17, 100, 576, bits, 64, dtype, device)
    check(kernel, op, x, w._replace(qdata=shift(w.qdata), scale=shift(w.scale)))


@products
@each_bits
def test_product_with_two_threads(kernel, op, device, bits):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for m in (1, 17):
            check(kernel, op, *operands(op, m, 100, 576, bits, 64, torch.bfloat16, device))
    finally:
        torch.set_num_threads(before)


@products
@each_bits
@each_dtype
@pytest.mark.parametrize(("n", "k", "group_size"), [(5, 100, 32), (100, 576, 96), (5, 1000, -1)])
def test_product_is_exact_on_small_integers(kernel, op, device, bits, dtype, n, k, group_size):
    """Every partial sum is a multiple of 2^-6 below 2^16, so fp32 holds it whatever the order: one rounding
    at the end remains."""
    experts = (4,) if op.startswith("grouped") else ()
    q = torch.randint(FORMATS[bits].qmin, FORMATS[bits].qmax + 1, (*experts, n, k), dtype=torch.int8)
    scale = torch.exp2(torch.randint(-6, -2, (*experts, n, groups(k, group_size)))) * (
        1 - 2 * torch.randint(2, (n, 1))
    )
    w = Planes(pack(q, bits).to(device), scale.to(device, dtype), bits, group_size, k)
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


# ------------------------------------------------------------------------- the bound bites


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


# ------------------------------------------------------------- ops without sums: bit-exact


@having("dequantize")
@each_bits
@each_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_dequantize(kernel, op, device, bits, dtype, group_size):
    for shape in [(1, 32), (5, 100), (3, 5, 1000), (0, 64)]:
        for scale_dtype in DTYPES:
            w = random_planes(*shape, bits=bits, group_size=group_size, dtype=scale_dtype, device=device)
            if reason := why_not(
                kernel, make_problem(op, dtype, shape[0], w.k, w.qdata, w.scale, bits, group_size)
            ):
                pytest.skip(reason)
            got = kernel.dequantize(w.qdata, w.scale, bits, group_size, w.k, dtype)
            assert got.dtype == dtype
            assert torch.equal(got, w.exact().float().to(dtype))


@having("embedding")
@each_bits
@each_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_embedding(kernel, op, device, bits, dtype, group_size):
    w = random_planes(9, 1000, bits=bits, group_size=group_size, dtype=dtype, device=device)
    for indices in (
        torch.tensor([[8, 0], [3, 3]]),
        torch.tensor([1], dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
    ):
        indices = indices.to(device)
        if reason := why_not(
            kernel, make_problem(op, dtype, indices.numel(), w.k, w.qdata, w.scale, bits, group_size)
        ):
            pytest.skip(reason)
        got = kernel.embedding(indices, w.qdata, w.scale, bits, group_size, w.k)
        assert got.dtype == dtype
        assert torch.equal(got, w.exact().float().to(dtype)[indices])


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
            if reason := why_not(
                kernel, make_problem(op, dtype, 5, view.shape[-1], on_device, on_device, bits, group_size)
            ):
                pytest.skip(reason)
            qdata, scale = kernel.quantize(on_device, bits, group_size, method, scale_dtype)
            expected_qdata, expected_scale = reference.quantize(view, bits, group_size, method, scale_dtype)
            assert torch.equal(qdata.cpu(), expected_qdata)
            assert scale.dtype == scale_dtype
            torch.testing.assert_close(scale.cpu(), expected_scale, rtol=0, atol=0, equal_nan=True)


@having("quantize")
@each_bits
@pytest.mark.parametrize("group_size", [32, -1])
def test_quantize_into_planes_that_are_there(kernel, op, device, bits, group_size):
    for dtype, scale_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        w = torch.randn(2, 5, 100).to(dtype).to(device)
        if reason := why_not(kernel, make_problem(op, dtype, 10, 100, w, w, bits, group_size)):
            pytest.skip(reason)
        expected = kernel.quantize(w, bits, group_size, "absmax", scale_dtype)
        planes = [torch.zeros(4, *plane.shape[1:], dtype=plane.dtype, device=device) for plane in expected]
        out = tuple(plane[1:3] for plane in planes)
        assert all(
            a is b
            for a, b in zip(
                kernel.quantize(w, bits, group_size, "absmax", scale_dtype, out), out, strict=True
            )
        )
        for plane, filled in zip(planes, expected, strict=True):
            assert torch.equal(plane[1:3], filled)
            assert not plane[[0, 3]].any()


# ----------------------------------------------------------------- the list and the choice


def counting(kernel):
    """The kernel, with its linear wrapped so that calls are counted."""
    calls = []

    def linear(x, *args):
        calls.append(x.shape[0])
        return kernel.linear(x, *args)

    return dataclasses.replace(kernel, linear=linear), calls


def small(problem):
    return None if problem.M <= 4 else f"It takes at most 4 rows, got {problem.M}."


SMALL = Kernel(name="small", why_not=small, rounds_weight=lambda p: False, linear=reference.linear)
OTHER_DEVICE = Kernel(
    name="gpu",
    why_not=lambda p: "It needs a GPU." if p.device == "cpu" else None,
    rounds_weight=lambda p: False,
    linear=print,
)


def problem(**changes):
    x, w = activations(3, 64, torch.bfloat16), random_planes(5, 64, dtype=torch.bfloat16)
    return make_problem("linear", x.dtype, 3, 64, w.qdata, w.scale, 4, 32)._replace(**changes)


def test_the_list():
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert KERNELS[-1] is REFERENCE
    ops_ = [f.name for f in dataclasses.fields(Kernel) if f.name not in ("name", "why_not", "rounds_weight")]
    for op in ops_:
        assert why_not(REFERENCE, problem(op=op)) is None
    for kernel in KERNELS:
        assert any(getattr(kernel, op) for op in ops_)
        for device in ("cpu", "cuda", "xpu"):
            for bits in FORMATS:
                reason = why_not(
                    kernel, problem(device=device, bits=bits, capability=(7, 0) if device == "cuda" else None)
                )
                assert reason is None or reason.endswith("."), "a reason is one sentence"


def test_problem():
    q = torch.zeros(4096 + 64, dtype=torch.uint8)
    scale = torch.ones(8, 4, dtype=torch.bfloat16)
    p = make_problem("linear", torch.float16, 5, 100, q[:512].view(8, 64), scale, 4, 32)
    assert p == ("linear", "cpu", None, torch.float16, torch.bfloat16, 4, 32, 8, 8, 100, None, 16)
    buckets = [
        make_problem("linear", torch.float16, m, 100, q[:64], scale, 4, 32).M
        for m in (0, 1, 2, 3, 4, 5, 17, 4096)
    ]
    assert buckets == [0, 1, 2, 4, 4, 8, 32, 4096]
    aligned = [
        make_problem("linear", torch.float16, 1, 100, q[at:], scale, 4, 32).alignment
        for at in (0, 16, 8, 24, 4, 2, 1)
    ]
    assert aligned == [16, 16, 8, 8, 4, 2, 1]
    assert make_problem("linear", torch.float16, 1, 100, q, scale.flatten()[4:], 4, 32).alignment == 16
    assert make_problem("grouped", torch.float16, 1, 100, q[:1024].view(2, 8, 64), scale, 4, 32)[8:11] == (
        8,
        100,
        2,
    )
    assert (
        make_problem("linear", torch.float16, 1, 100, q[:64].to("meta"), scale.to("meta"), 4, 32).device
        == "meta"
    )


def test_first_that_can_is_chosen(use):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    assert choose(problem(M=4)).name == "small"
    assert choose(problem(M=8)).name == "dense"
    assert choose(problem(M=1, device="cuda")).name == "gpu"
    assert choose(problem(op="embedding")).name == "reference"


def test_choice_is_made_once_for_a_bucket_of_rows(use):
    asked = []
    spy = dataclasses.replace(SMALL, why_not=lambda p: asked.append(p.M))
    use(spy, REFERENCE)
    w = random_planes(5, 64, dtype=torch.bfloat16)
    for m in (1, 5, 6, 7, 8, 5, 9, 1, 16):
        ops.linear(activations(m, 64, torch.bfloat16), w.qdata, w.scale, None, 4, 32)
    assert asked == [1, 8, 16]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_before_the_cpus_runs(compiled, monkeypatch):
    """Wherever a product comes from: eager products and compiled graphs go to C++ on their own, which asks no
    list."""
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    calls = []
    linear = reference.linear
    spy = Kernel(
        name="spy",
        why_not=lambda problem: None if problem.op == "linear" else "It has only linear.",
        rounds_weight=lambda problem: False,
        linear=lambda *args: calls.append(args[0].shape[0]) or linear(*args),
    )
    w = RTNQuantizedTensor.from_float(torch.randn(48, 64), 4, 32)
    x = torch.randn(3, 64)
    product = torch.compile(lambda x: F.linear(x, w)) if compiled else lambda x: F.linear(x, w)
    with torch.no_grad():
        expected = product(x)
        assert explain(w, x).kernel != "spy"
        registry.KERNELS.insert(0, spy)
        try:
            assert explain(w, x).kernel == "spy"
            for i, mode in enumerate((torch.no_grad, torch.inference_mode, torch.enable_grad), 1):
                with mode():
                    assert_close(product(x), expected)
                assert calls == [3] * i
        finally:
            registry.KERNELS.remove(spy)
        product(x)
        assert len(calls) == 3
        assert explain(w, x).kernel != "spy"


@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS])
def test_forced_kernel_is_the_one_that_runs(name, use, monkeypatch):
    counted = [counting(kernel) for kernel in KERNELS]
    use(*(kernel for kernel, _ in counted))
    monkeypatch.setenv("RTN_KERNEL", name)
    w, x = random_planes(5, 64, group_size=32, dtype=torch.bfloat16), activations(3, 64, torch.bfloat16)
    forced = next(kernel for kernel in KERNELS if kernel.name == name)
    if reason := why_not(forced, make_problem("linear", x.dtype, 3, 64, w.qdata, w.scale, 4, 32)):
        with pytest.raises(ValueError, match=f"RTN_KERNEL='{name}' cannot run") as error:
            ops.linear(x, w.qdata, w.scale, None, 4, 32)
        assert reason in str(error.value)
        return
    ops.linear(x, w.qdata, w.scale, None, 4, 32)
    torch.ops.rtn.linear(x, w.qdata, w.scale, None, 4, 32)
    assert {kernel.name: calls for kernel, calls in counted if calls} == {name: [3, 3]}


def test_forced_kernel_without_the_op_is_passed_over(use, monkeypatch):
    use(SMALL, dense.KERNEL, REFERENCE)
    monkeypatch.setenv("RTN_KERNEL", "small")
    assert choose(problem(op="linear_dx")).name == "dense"
    assert choose(problem(op="embedding")).name == "reference"


def test_forcing_changes_as_the_variable_does(use, monkeypatch):
    use(SMALL, dense.KERNEL, REFERENCE)
    assert choose(problem()).name == "small"
    monkeypatch.setenv("RTN_KERNEL", "reference")
    assert choose(problem()).name == "reference"
    monkeypatch.setenv("RTN_KERNEL", "")
    assert choose(problem()).name == "small"


def test_forcing_errors(use, monkeypatch):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    monkeypatch.setenv("RTN_KERNEL", "fast")
    with pytest.raises(ValueError, match="fast") as error:
        choose(problem())
    assert_expected_inline(
        str(error.value),
        """RTN_KERNEL='fast' names no kernel; use one of gpu, small, dense, reference, or unset it""",
    )
    monkeypatch.setenv("RTN_KERNEL", "small")
    with pytest.raises(ValueError, match="small") as error:
        choose(problem(M=8))
    assert_expected_inline(
        str(error.value).replace(str(problem(M=8)), "Problem(...)"),
        """RTN_KERNEL='small' cannot run Problem(...): It takes at most 4 rows, got 8. Unset RTN_KERNEL to let the library choose""",
    )


def test_explain_by_weight_and_x(use):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    w = RTNQuantizedTensor.from_float(torch.randn(96, 320).bfloat16(), 8, 64)
    found = explain(w, torch.zeros(2, 5, 320, dtype=torch.bfloat16))
    assert_expected_inline(
        str(found),
        """\
linear on cpu: torch.bfloat16 x [10, 320], int8 weight [96, 320] with group_size 64
kernel           why not
---------  ----  ---------------------------------
gpu              It needs a GPU.
small            It takes at most 4 rows, got 16.
dense      runs
reference        It could, but dense is preferred.""",
    )
    as_dict = found.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert_expected_inline(
        json.dumps(as_dict, indent=1),
        """\
{
 "problem": {
  "op": "linear",
  "device": "cpu",
  "capability": null,
  "dtype": "torch.bfloat16",
  "scale_dtype": "torch.bfloat16",
  "bits": 8,
  "group_size": 64,
  "M": 10,
  "N": 96,
  "K": 320,
  "experts": null,
  "alignment": 16
 },
 "kernel": "dense",
 "reasons": {
  "gpu": "It needs a GPU.",
  "small": "It takes at most 4 rows, got 16.",
  "reference": "It could, but dense is preferred."
 }
}""",
    )
    assert explain(w, torch.zeros(3, 320, dtype=torch.bfloat16)).kernel == "small"
    assert explain(w, M=4).kernel == "small"
    assert explain(w, M=5).kernel == "dense"
    assert explain(w, op="quantize").kernel == "reference"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device": "banana"}, ValueError, "device='banana' is no device; cpu and cuda are"),
        ({"device": 0.5}, TypeError, "device=0.5; give its name"),
        (
            {"dtype": torch.int8},
            ValueError,
            "dtype=torch.int8 is none that a product with a quantized weight has",
        ),
        ({"dtype": "bfloat16"}, ValueError, "dtype='bfloat16' is none"),
        ({"op": 3}, ValueError, "op=3 is not an op"),
        ({"M": "1"}, TypeError, "M='1': sizes are whole numbers"),
        ({"N": 2.5, "K": None}, TypeError, "N=2.5, K=None: sizes are whole numbers"),
        ({"x": torch.tensor(1.0)}, TypeError, "x is a scalar; give a tensor"),
        ({"x": 3}, TypeError, "x is an int; give a tensor"),
    ],
)
def test_explain_says_what_is_wrong(given, error, message):
    with pytest.raises(error, match=message):
        explain(**given)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda")])
def test_explain_of_a_gpu_that_is_not_there(device):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        ValueError,
        match="there is no CUDA device here, and which kernel runs depends on it; use device='cpu'",
    ):
        explain(device=device)


def test_explain_by_numbers(use):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    assert_expected_inline(
        str(explain(bits=4, group_size=32, M=3, N=100, K=1000, dtype=torch.float16)),
        """\
linear on cpu: torch.float16 x [3, 1000], int4 weight [100, 1000] with group_size 32
kernel           why not
---------  ----  ---------------------------------
gpu              It needs a GPU.
small      runs
dense            It could, but small is preferred.
reference        It could, but small is preferred.""",
    )
    assert_expected_inline(
        str(explain(op="linear_dx", M=0)),
        """\
linear_dx on cpu: torch.bfloat16 x [0, 4096], int4 weight [4096, 4096] with group_size 128
kernel           why not
---------  ----  ---------------------------------
gpu              It has no linear_dx.
small            It has no linear_dx.
dense      runs
reference        It could, but dense is preferred.""",
    )
    assert explain(x=torch.zeros(7, 64)).problem[3:10] == (torch.float32, torch.float32, 4, 128, 7, 4096, 64)


def test_explain_when_forced(use, monkeypatch):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    monkeypatch.setenv("RTN_KERNEL", "reference")
    assert_expected_inline(
        str(explain(M=3)),
        """\
linear on cpu: torch.bfloat16 x [3, 4096], int4 weight [4096, 4096] with group_size 128
kernel           why not
---------  ----  ------------------------------------------------
gpu              It needs a GPU.
small            It could, but reference is forced by RTN_KERNEL.
dense            It could, but reference is forced by RTN_KERNEL.
reference  runs""",
    )
    monkeypatch.setenv("RTN_KERNEL", "gpu")
    with pytest.raises(ValueError, match="It needs a GPU"):
        explain(M=3)


def test_explain_errors():
    with pytest.raises(ValueError, match="conv") as error:
        explain(op="conv")
    assert_expected_inline(
        str(error.value),
        """op='conv' is not an op; use linear, linear_dx, grouped, grouped_dx, routed, embedding, quantize or dequantize""",
    )
    with pytest.raises(ValueError, match="why_not"):
        explain(op="why_not")
    with pytest.raises(TypeError, match="Parameter") as error:
        explain(torch.nn.Linear(3, 4).weight)
    assert_expected_inline(
        str(error.value),
        """explain needs a quantized weight, got Parameter; quantize it, or describe it by numbers""",
    )


def test_explain_agrees_with_what_runs(use):
    """The whole table, without running anything: one kernel runs, and each other has a sentence."""
    counted = [counting(kernel) for kernel in KERNELS]
    use(*(kernel for kernel, _ in counted))
    w, x = RTNQuantizedTensor.from_float(torch.randn(5, 64), 4, 32), torch.randn(3, 64)
    found = explain(w, x)
    assert not any(calls for _, calls in counted)
    assert {found.kernel, *found.reasons} == {kernel.name for kernel in KERNELS}
    assert all(reason.endswith(".") for reason in found.reasons.values())
    ops.linear(x, w.qdata, w.scale, None, 4, 32)
    assert {kernel.name: calls for kernel, calls in counted if calls} == {found.kernel: [3]}
