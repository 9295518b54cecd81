"""int8 activations in the Triton kernels, against the reference: in the interpreter where TRITON_INTERPRET=1,
else on a GPU."""

from itertools import pairwise

import pytest
import torch
from bounds import TOLERANCE, activations, apart, random_planes

from rtn_tensor import kernels, ops, reference
from rtn_tensor.formats import FORMATS, SCALE8, pack
from rtn_tensor.kernels import registry
from rtn_tensor.kernels.problem import make_problem

if kernels.triton.interpreting():
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

pytest.importorskip("triton")

from rtn_tensor.kernels.triton import launch
from rtn_tensor.kernels.triton.config import Config

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_bits = pytest.mark.parametrize("bits", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kind = pytest.mark.parametrize("method", ["absmax", "minmax"])  # without a plane `zero`, and with it


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory from torch.empty holds NaN: an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def order(bits):
    """The column of a piece that each byte of its activations is: where `pack` puts that column's weight, of
    int4 the lower halves of bytes first."""
    of_column = pack(torch.eye(32, dtype=torch.int8), bits)
    return (of_column if bits == 8 else torch.cat([of_column & 15, of_column >> 4], 1)).argmax(0)


def assert_close(y, x, w, bias=None):
    """Holds `y` to the bound of every product, of x as it is once rounded."""
    rounded = reference.rounded_to_int8(x).to(torch.float64)
    assert y.dtype == x.dtype
    u, c, a = TOLERANCE[x.dtype]
    exact, terms = w.exact(), apart(w)
    due = rounded @ exact.mT + (0 if bias is None else bias.double())
    allowed = u * due.abs() + c * (rounded.abs() @ (exact.abs() if terms is None else terms).mT) + a
    assert y.shape == due.shape
    assert ((y.double() - due).abs() <= allowed).all()


def planes_of(*shape, bits, group_size, dtype, method="absmax"):
    return random_planes(*shape, bits=bits, group_size=group_size, dtype=dtype, device=DEVICE, method=method)


# ------------------------------------------------------------------------ rounding


@each_bits
@each_dtype
@pytest.mark.parametrize("k", [1, 32, 100, 576])
def test_rounded_activations_are_those_of_the_reference(bits, dtype, k):
    """Bit for bit, whatever they hold."""
    x = torch.randn(24, k) * torch.logspace(-44, 37, 24)[:, None]
    x[0], x[1, k // 2], x[2, -1], x[3, 0] = 0, torch.nan, torch.inf, -torch.inf
    x[4] = torch.tensor([127.0, 0.5, 1.5, -2.5, -127.0]).repeat(k)[:k]  # ties
    x = x.to(dtype).to(DEVICE)
    config, zero = Config(16, 64, 128, 1, True, 4, 2), torch.zeros(1)
    for view in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, k // 2 : k // 2 + k]):
        q, scale, sums = launch.activations(view, bits, zero, config, True)
        assert q.shape == (24, -(-k // 128) * 128)
        assert scale.shape == sums.shape == (q.shape[1] // 32, 32)
        pieces = torch.zeros(24, len(scale), 32, device=DEVICE)
        pieces[..., order(bits)] = q.view(24, -1, 32).float()
        assert torch.equal(pieces.sum(-1), sums[:, :24].t())
        rounded = (pieces * scale[:, :24].t()[..., None]).flatten(1)
        due = reference.rounded_to_int8(view)
        torch.testing.assert_close(rounded[:, :k], due, rtol=0, atol=0, equal_nan=True)
        assert not rounded[:, -(-k // 32) * 32 :].any()


# ------------------------------------------------------------------------ products


@each_bits
@each_dtype
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"),
    [
        *((1, 5, 576, 32), (1, 100, 100, -1), (3, 1, 32, 128), (3, 70, 1000, 64)),
        *((17, 5, 1000, 96), (17, 100, 144, -1), (40, 33, 576, 128), (40, 130, 100, 32)),
    ],
)
@each_kind
def test_linear(bits, dtype, m, n, k, group_size, method):
    w = planes_of(n, k, bits=bits, group_size=group_size, dtype=dtype, method=method)
    x = activations(m, k, dtype, DEVICE)
    bias = torch.randn(n, device=DEVICE).to(dtype) if m % 2 else None
    y = kernels.triton.linear(x, w.qdata, w.scale, bias, bits, group_size, w.zero, True)
    assert_close(y, x, w, bias)


@each_bits
@each_kind
def test_linear_in_parts(bits, method):
    """Programs that share a tile, the last of them with a step that is not full."""
    for group_size in (32, -1):
        w = planes_of(70, 700, bits=bits, group_size=group_size, dtype=torch.bfloat16, method=method)
        x = activations(20, 700, torch.bfloat16, DEVICE)
        y = torch.full((20, 70), torch.nan, dtype=x.dtype, device=DEVICE)
        config = Config(32, 64, 128, 3, True, 4, 2)
        launch.launch_linear(x, w.qdata, w.scale, None, bits, group_size, config, y, w.zero, True)
        assert_close(y, x, w)


@each_bits
@pytest.mark.parametrize("scale_dtype", [torch.float32, SCALE8], ids=str)
@pytest.mark.parametrize("group_size", [64, -1])
def test_linear_with_scales_of_another_dtype(bits, scale_dtype, group_size):
    w = planes_of(70, 200, bits=bits, group_size=group_size, dtype=scale_dtype)
    x = activations(5, 200, torch.bfloat16, DEVICE)
    assert_close(kernels.triton.linear(x, w.qdata, w.scale, None, bits, group_size, None, True), x, w)


@each_bits
@each_kind
def test_linear_of_parts_of_tensors(bits, method):
    w = planes_of(9, 256, bits=bits, group_size=32, dtype=torch.bfloat16, method=method)
    cut = w._replace(
        qdata=w.qdata[2:7, 8 * bits :],
        scale=w.scale[2:7, 2:],
        zero=None if w.zero is None else w.zero[2:7, 2:],
        k=192,
    )
    x = activations(3, 192, torch.bfloat16, DEVICE)
    wide = torch.full((6, 200), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[::2, 3:195] = x
    for view in (wide[::2, 3:195], x.t().contiguous().t(), x[:1].expand(3, -1)):
        y = kernels.triton.linear(view, cut.qdata, cut.scale, None, bits, 32, cut.zero, True)
        assert_close(y, view, cut)


@each_bits
@each_kind
def test_what_is_not_finite_shows_in_its_row_only(bits, method):
    w = planes_of(70, 200, bits=bits, group_size=64, dtype=torch.bfloat16, method=method)
    x = activations(6, 200, torch.bfloat16, DEVICE)
    x[0, 199], x[2, 3], x[3, 100], x[4] = torch.nan, torch.inf, -torch.inf, 0
    y = kernels.triton.linear(x, w.qdata, w.scale, None, bits, 64, w.zero, True)
    assert y[[0, 2, 3]].isnan().all()
    assert not y[4].any()
    assert_close(y[[1, 5]], x[[1, 5]], w)


@each_bits
@each_kind
@pytest.mark.parametrize("size", [1e-38, 1e30], ids=str)
@pytest.mark.parametrize("group_size", [64, -1])
def test_very_small_and_very_large_activations(bits, method, size, group_size):
    w = planes_of(70, 200, bits=bits, group_size=group_size, dtype=torch.float32, method=method)
    x = activations(3, 200, torch.float32, DEVICE) * size
    y = kernels.triton.linear(x, w.qdata, w.scale, None, bits, group_size, w.zero, True)
    due = reference.linear(x, w.qdata, w.scale, None, bits, group_size, w.zero, True)
    torch.testing.assert_close(y, due, rtol=1e-4, atol=1e-5 * due.abs().max().item())


@each_bits
@pytest.mark.parametrize("group_size", [32, -1])
@each_kind
def test_without_ptx_every_result_is_the_same(bits, group_size, method, monkeypatch):
    w = planes_of(70, 200, bits=bits, group_size=group_size, dtype=torch.bfloat16, method=method)
    x = activations(3, 200, torch.bfloat16, DEVICE)
    with_ptx = launch.linear(x, w.qdata, w.scale, None, bits, group_size, w.zero, True)
    monkeypatch.setattr(launch, "asm", lambda device: False)
    assert torch.equal(with_ptx, launch.linear(x, w.qdata, w.scale, None, bits, group_size, w.zero, True))


@each_bits
def test_no_columns_and_no_rows(bits):
    bias = torch.arange(5.0, device=DEVICE)
    for m, k in ((3, 0), (0, 64)):
        w = planes_of(5, k, bits=bits, group_size=32, dtype=torch.float32)
        x = torch.zeros(m, k, device=DEVICE)
        y = kernels.triton.linear(x, w.qdata, w.scale, bias, bits, 32, None, True)
        assert torch.equal(y, bias.expand(m, 5))


# ------------------------------------------------------------------------- experts


@each_bits
@each_dtype
@each_kind
@pytest.mark.parametrize("group_size", [32, -1])
def test_grouped(bits, dtype, method, group_size):
    """Rows of one expert, of none, of several tiles, and of nobody at the end."""
    w = planes_of(4, 70, 200, bits=bits, group_size=group_size, dtype=dtype, method=method)
    x, ends = activations(48, 200, dtype, DEVICE), [5, 5, 25, 44]
    offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    y = kernels.triton.grouped(x, w.qdata, w.scale, offs, bits, group_size, w.zero, True)
    for e, (start, end) in enumerate(pairwise([0, *ends])):
        of_expert = w._replace(qdata=w.qdata[e], scale=w.scale[e], zero=None if w.zero is None else w.zero[e])
        assert_close(y[start:end], x[start:end], of_expert)
    assert not y[44:].any()


@each_bits
@each_kind
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("activation", ["", "silu", "gpt_oss"])
def test_routed(bits, method, in_order, activation):
    e, top_k, tokens, n, dtype = 4, 2, 9, 72, torch.float32
    w = planes_of(e, n, 200, bits=bits, group_size=64, dtype=dtype, method=method)
    x, experts = activations(tokens, 200, dtype, DEVICE) / 8, torch.tensor([0, 2, 3] * 6, device=DEVICE)
    experts[4], experts[7] = -1, e  # another machine's
    pairs, offs = reference.sorted_pairs(experts, e) if in_order else (None, None)
    bias, router = torch.randn(e, n, device=DEVICE), torch.rand(len(experts), device=DEVICE)
    routing = bias, experts, pairs, offs, router, top_k, activation
    given = x, w.qdata, w.scale, *routing, bits, 64, w.zero, True
    y, due = kernels.triton.routed(*given), reference.routed(*given)
    torch.testing.assert_close(y, due, rtol=1e-5, atol=1e-5)
    assert not y[[4, 7]].any()


# ---------------------------------------------------------------------- the choice


def test_it_is_chosen_where_it_is_asked_for(monkeypatch):
    w = planes_of(70, 200, bits=4, group_size=64, dtype=torch.bfloat16)
    for op, m in (("linear", 3), ("linear", 8192), ("grouped", 3), ("routed", 3)):
        problem = make_problem(op, torch.bfloat16, m, 200, w.qdata, w.scale, 4, 64, None, True)
        assert kernels.triton.why_not(problem) is None
        assert not kernels.triton.rounds_weight(problem)
    monkeypatch.setenv("RTN_KERNEL", "triton")
    registry.forget()
    called = []
    run = launch.int8_rows_kernel
    monkeypatch.setattr(
        launch, "int8_rows_kernel", type("", (), {"__getitem__": lambda _, g: called.append(g) or run[g]})()
    )
    x = activations(3, 200, torch.bfloat16, DEVICE).requires_grad_()
    y = ops.linear(x, w.qdata, w.scale, None, 4, 64, None, True)
    y.sum().backward()
    assert len(called) == 1
    assert_close(y.detach(), x.detach(), w)
    assert x.grad is not None
    assert torch.equal(x.grad, ops.linear_dx(torch.ones_like(y), w.qdata, w.scale, 4, 64, 200))
    registry.forget()
