"""The contract of `RTNQuantizedTensor`: products, gradients, views, copies, conversions, files, and its
errors."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch._C import DisableTorchFunctionSubclass

from rtn_tensor import RTNQuantizedTensor, ops, quantize_, reference, rtn_int4
from rtn_tensor.formats import FORMATS, groups, pack
from rtn_tensor.kernels import registry
from rtn_tensor.kernels.problem import Kernel

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


OPS = ["linear", "linear_dx", "grouped", "grouped_dx", "embedding", "quantize", "dequantize"]


@pytest.fixture
def calls(monkeypatch):
    """(op, its tensors) of every kernel call, in order: a silent dequantize() would leave another trace."""
    made = []

    def counted(op):
        def run(*args):
            made.append((op, [a for a in args if isinstance(a, torch.Tensor)]))
            return getattr(reference, op)(*args)

        return run

    monkeypatch.delenv("RTN_KERNEL", raising=False)
    before = list(registry.KERNELS)
    ops_of = {op: counted(op) for op in OPS}
    registry.KERNELS[:] = [
        Kernel(name="counting", why_not=lambda problem: None, rounds_weight=lambda problem: False, **ops_of)
    ]
    yield made
    registry.KERNELS[:] = before


def names(calls):
    return [op for op, _ in calls]


# -------------------------------------------------------------------------------- products

# x [3, K], w [N, K], b [N], y [3, N]; and the op that has to run.
PRODUCTS = {
    "linear": ("linear", lambda x, w, b, y: F.linear(x, w)),
    "linear-bias": ("linear", lambda x, w, b, y: F.linear(x, w, b)),
    "linear-bias-keyword": ("linear", lambda x, w, b, y: F.linear(x, w, bias=b)),
    "linear-weight-keyword": ("linear", lambda x, w, b, y: F.linear(x, weight=w, bias=b)),
    "linear-keywords": ("linear", lambda x, w, b, y: F.linear(bias=b, weight=w, input=x)),
    "linear-1d": ("linear", lambda x, w, b, y: F.linear(x[0], w, b)),
    "linear-4d": ("linear", lambda x, w, b, y: F.linear(x.repeat(2, 4, 1, 1), w, b)),
    "linear-of-t": ("linear_dx", lambda x, w, b, y: F.linear(y, w.t())),
    "mm-t": ("linear", lambda x, w, b, y: torch.mm(x, w.t())),
    "mm-t-keyword": ("linear", lambda x, w, b, y: torch.mm(input=x, mat2=w.t())),
    "mm-method-T": ("linear", lambda x, w, b, y: x.mm(w.T)),
    "mm": ("linear_dx", lambda x, w, b, y: torch.mm(y, w)),
    "mm-weight-first": ("linear", lambda x, w, b, y: torch.mm(w, x.t())),
    "mm-weight-t-first": ("linear_dx", lambda x, w, b, y: torch.mm(w.t(), y.t())),
    "matmul-mT": ("linear", lambda x, w, b, y: torch.matmul(x, w.mT)),
    "matmul-keyword": ("linear", lambda x, w, b, y: torch.matmul(x, other=w.mT)),
    "matmul-transpose": ("linear", lambda x, w, b, y: x.matmul(w.transpose(0, 1))),
    "matmul-transpose-negative": ("linear", lambda x, w, b, y: x @ w.transpose(-1, -2)),
    "matmul-permute": ("linear", lambda x, w, b, y: x @ w.permute(1, 0)),
    "matmul-t-twice": ("linear_dx", lambda x, w, b, y: y @ w.t().t()),
    "matmul-1d": ("linear_dx", lambda x, w, b, y: y[0] @ w),
    "matmul-1d-t": ("linear", lambda x, w, b, y: x[0] @ w.t()),
    "matmul-nd": ("linear", lambda x, w, b, y: x.repeat(2, 4, 1, 1) @ w.t()),
    "matmul-weight-first-1d": ("linear", lambda x, w, b, y: w @ x[0]),
    "matmul-weight-t-first-1d": ("linear_dx", lambda x, w, b, y: w.t() @ y[0]),
    "matmul-weight-first-nd": ("linear", lambda x, w, b, y: w @ x.mT.expand(2, 4, K, 3)),
    "rmatmul": ("linear", lambda x, w, b, y: w.t().__rmatmul__(x)),
    "addmm": ("linear", lambda x, w, b, y: torch.addmm(b, x, w.t())),
    "addmm-keywords": ("linear", lambda x, w, b, y: torch.addmm(b, mat1=x, mat2=w.t(), beta=2, alpha=3)),
    "addmm-method": ("linear", lambda x, w, b, y: b.addmm(x, w.t(), beta=2)),
    "addmm-no-bias": ("linear", lambda x, w, b, y: torch.addmm(b, x, w.t(), beta=0, alpha=-2)),
    "addmm-full-bias": ("linear", lambda x, w, b, y: torch.addmm(y, x, w.t(), alpha=2)),
    "addmm-column-bias": ("linear", lambda x, w, b, y: torch.addmm(y[:, :1], x, w.t())),
    "addmm-weight-first": ("linear", lambda x, w, b, y: torch.addmm(y.t(), w, x.t())),
    "addmm-dx": ("linear_dx", lambda x, w, b, y: torch.addmm(x, y, w)),
}


@every_format
@pytest.mark.parametrize("product", PRODUCTS)
def test_product(calls, product, bits, group_size, dtype):
    op, fn = PRODUCTS[product]
    w = exact(N, K, bits=bits, group_size=group_size, dtype=dtype)
    x, y, b = sparse(3, K, dtype=dtype), sparse(3, N, dtype=dtype), torch.arange(N, dtype=dtype)
    out = fn(x, w, b, y)
    assert names(calls) == [op]
    assert_same(out, fn(x, w.dequantize(), b, y))


BELOW_FUNCTION = [
    "linear",
    "linear-bias",
    "linear-4d",
    "linear-1d",
    "mm-t",
    "mm",
    "matmul-nd",
    "matmul-1d-t",
    "addmm",
    "addmm-keywords",
]


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("product", BELOW_FUNCTION)
def test_product_below_torch_function(calls, product, mode):
    """As C++ callers and DTensor reach it: F.linear arrives as t + mm, so t() must stay lazy."""
    op, fn = PRODUCTS[product]
    grad = mode == "grad"
    w = exact(N, K)
    x, y, b = sparse(3, K).requires_grad_(grad), sparse(3, N).requires_grad_(grad), torch.arange(N).float()
    with torch.inference_mode(mode == "inference"), DisableTorchFunctionSubclass():
        out = fn(x, w, b, y)
        assert names(calls) == [op]
        if grad:
            dy = sparse(*out.shape)
            leaf = y if op == "linear_dx" else x
            (dx,) = torch.autograd.grad(out, leaf, dy)
            assert names(calls) == [op, "linear_dx" if op == "linear" else "linear"]
    dense = w.dequantize()
    expected = fn(x, dense, b, y)
    assert_same(out, expected)
    if grad:
        assert_same(dx, torch.autograd.grad(expected, leaf, dy)[0])


@every_format
@pytest.mark.parametrize(
    "product", [p for p in PRODUCTS if p not in ("linear-4d", "matmul-nd", "matmul-weight-first-nd")]
)
def test_gradients(calls, product, bits, group_size, dtype):
    """Of x, of y and of the bias, against a dense weight; the backward runs on the packed planes."""
    op, fn = PRODUCTS[product]
    w = exact(N, K, bits=bits, group_size=group_size, dtype=dtype)
    leaves = [
        t.requires_grad_()
        for t in (sparse(3, K, dtype=dtype), torch.arange(N, dtype=dtype), sparse(3, N, dtype=dtype))
    ]
    x, b, y = leaves
    out = fn(x, w, b, y)
    dy = sparse(*out.shape, dtype=dtype)
    got = torch.autograd.grad(out, leaves, dy, allow_unused=True)
    assert names(calls) == [op, "linear_dx" if op == "linear" else "linear"]
    expected = torch.autograd.grad(fn(x, w.dequantize(), b, y), leaves, dy, materialize_grads=True)
    for grad, grad_expected in zip(got, expected, strict=True):
        assert_same(torch.zeros_like(grad_expected) if grad is None else grad, grad_expected)


def test_nd_gradient(calls):
    w, x = exact(N, K), sparse(2, 4, 3, K).requires_grad_()
    out = F.linear(x, w)
    dy = sparse(*out.shape)
    (dx,) = torch.autograd.grad(out, x, dy)
    assert names(calls) == ["linear", "linear_dx"]
    assert_same(dx, torch.autograd.grad(F.linear(x, w.dequantize()), x, dy)[0])


def test_only_the_asked_gradients_are_computed(calls):
    w, b = exact(N, K), torch.zeros(N, requires_grad=True)
    F.linear(sparse(3, K), w, b).sum().backward()
    assert_same(b.grad, torch.full((N,), 3.0))
    assert names(calls) == ["linear"]


def test_saved_for_backward_are_the_planes_alone():
    w, x, b = exact(N, K), sparse(3, K).requires_grad_(), torch.zeros(N, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        F.linear(x, w, b)
        assert sorted(saved) == sorted([w.qdata.data_ptr(), w.scale.data_ptr()])
        saved.clear()
        x @ w.t()
        assert sorted(saved) == sorted([w.qdata.data_ptr(), w.scale.data_ptr()])


def test_double_backward(calls):
    w, x, dy, ddx = exact(N, K), sparse(3, K).requires_grad_(), sparse(3, N).requires_grad_(), sparse(3, K)
    (dx,) = torch.autograd.grad(F.linear(x, w), x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, ddx)
    assert names(calls) == ["linear", "linear_dx", "linear"]
    assert_same(ddy, ddx @ w.dequantize().t())


def test_gradients_flow_through_layers(calls):
    """LoRA's shape: frozen quantized layers, trained adapters."""
    first, second = exact(64, 96), exact(N, 64)
    a, b = torch.randn(4, 96, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    x = torch.randn(3, 96)

    def model(first, second):
        return F.linear(torch.relu(F.linear(x, first) + x @ a.t() @ b.t()), second).square().sum()

    got = torch.autograd.grad(model(first, second), (a, b))
    assert names(calls) == ["linear", "linear", "linear_dx"]
    for grad, expected in zip(
        got, torch.autograd.grad(model(first.dequantize(), second.dequantize()), (a, b)), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-3)


@every_width
def test_empty_batch(calls, bits):
    w, b = exact(N, K, bits=bits), torch.zeros(N)
    x = torch.zeros(2, 0, K, requires_grad=True)
    out = F.linear(x, w, b)
    assert_same(out.detach(), torch.zeros(2, 0, N))
    assert_same(torch.autograd.grad(out.sum(), x)[0], torch.zeros(2, 0, K))
    assert_same(torch.zeros(0, K) @ w.t(), torch.zeros(0, N))
    assert names(calls) == ["linear", "linear_dx", "linear"]


# --------------------------------------------------------------------------------- experts

BMM = {
    "bmm-mT": ("grouped", lambda x, w, y: torch.bmm(x, w.mT)),
    "bmm-keyword": ("grouped", lambda x, w, y: torch.bmm(x, mat2=w.transpose(1, 2))),
    "bmm-method": ("grouped_dx", lambda x, w, y: y.bmm(w)),
    "matmul": ("grouped", lambda x, w, y: x @ w.mT),
    "bmm-weight-first": ("grouped", lambda x, w, y: torch.bmm(w, x.mT)),
    "matmul-weight-first": ("grouped_dx", lambda x, w, y: w.mT @ y.mT),
}


@every_format
@pytest.mark.parametrize("product", BMM)
def test_bmm(calls, product, bits, group_size, dtype):
    check_bmm(calls, *BMM[product], exact(2, N, K, bits=bits, group_size=group_size, dtype=dtype))


@pytest.mark.parametrize("product", ["bmm-mT", "bmm-method", "bmm-weight-first"])
def test_bmm_below_torch_function(calls, product):
    op, fn = BMM[product]

    def below(*args):
        with DisableTorchFunctionSubclass():
            return fn(*args)

    check_bmm(calls, op, below, exact(2, N, K))


def check_bmm(calls, op, fn, w):
    x, y = sparse(2, 3, K, dtype=w.dtype), sparse(2, 3, N, dtype=w.dtype)
    leaf = (x if op == "grouped" else y).requires_grad_()
    out = fn(x, w, y)
    dy = sparse(*out.shape, dtype=w.dtype)
    (grad,) = torch.autograd.grad(out, leaf, dy)
    assert names(calls) == [op, "grouped_dx" if op == "grouped" else "grouped"]
    expected = fn(x, w.dequantize(), y)
    assert_same(out.detach(), expected.detach())
    assert_same(grad, torch.autograd.grad(expected, leaf, dy)[0])


@every_format
@pytest.mark.parametrize("grouped_mm", [torch._grouped_mm, F.grouped_mm])
@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_mm(calls, grouped_mm, transposed, bits, group_size, dtype):
    """Experts of 2, 0 and 3 rows; the last row belongs to none."""
    w = exact(3, N, K, bits=bits, group_size=group_size, dtype=dtype)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = sparse(6, K if transposed else N, dtype=dtype).requires_grad_()
    right = w.mT if transposed else w
    out = grouped_mm(x, right, offs=offs)
    dense = right.dequantize()
    expected = torch.cat([x[:2] @ dense[0], x[2:5] @ dense[2], torch.zeros(1, dense.shape[-1], dtype=dtype)])
    assert_same(out.detach(), expected.detach())
    dy = sparse(*out.shape, dtype=dtype)
    assert_same(torch.autograd.grad(out, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])
    assert names(calls)[0] == ("grouped" if transposed else "grouped_dx")
    assert names(calls)[-1] == ("grouped_dx" if transposed else "grouped")


def test_one_expert_is_a_linear_weight(calls):
    w, x = exact(2, N, K), sparse(3, K)
    assert_same(F.linear(x, w[1]), F.linear(x, w.dequantize()[1]))
    assert names(calls)[0] == "linear"


# ------------------------------------------------------------------------------- embedding


@every_format
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_embedding(calls, bits, group_size, dtype, index_dtype):
    w = exact(N, K, bits=bits, group_size=group_size, dtype=dtype)
    indices = torch.tensor([[4, 0, 4], [1, 2, 3]], dtype=index_dtype)
    out = F.embedding(indices, w, padding_idx=0)
    assert names(calls) == ["embedding"]
    assert_same(out, F.embedding(indices, w.dequantize()))
    assert_same(F.embedding(indices[:, :0], weight=w), torch.empty(2, 0, K, dtype=dtype))


def test_embedding_module(calls):
    m = nn.Embedding(N, K, padding_idx=1)
    m.weight = nn.Parameter(exact(N, K))
    indices = torch.tensor([1, 4])
    with DisableTorchFunctionSubclass():
        below = m(indices)
    assert_same(m(indices), m.weight.dequantize()[indices])
    assert_same(below, m.weight.dequantize()[indices])
    assert names(calls)[:2] == ["embedding", "embedding"]


# -------------------------------------------------------------------------------- autocast


AUTOCAST = {
    "linear": ("linear", lambda x, w, b, y: F.linear(x, w, b)),
    "mm": ("linear", lambda x, w, b, y: torch.mm(x, w.t())),
    "matmul": ("linear_dx", lambda x, w, b, y: y @ w),
    "addmm": ("linear", lambda x, w, b, y: torch.addmm(b, x, w.t(), alpha=2)),
    "bmm": ("grouped", lambda x, w, b, y: torch.bmm(x[None], w[None].mT)),
    "grouped_mm": (
        "grouped",
        lambda x, w, b, y: torch._grouped_mm(x, w[None].mT, offs=torch.tensor([3], dtype=torch.int32)),
    ),
}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("product", AUTOCAST)
def test_autocast(calls, product, to, weight_dtype):
    """x is cast, the result has autocast's dtype, and the kernel gets the scale as it is stored."""
    op, fn = AUTOCAST[product]
    w = exact(N, K, dtype=weight_dtype)
    x, b, y = (
        sparse(3, K).requires_grad_(),
        torch.arange(N).float().requires_grad_(),
        sparse(3, N).requires_grad_(),
    )
    with torch.autocast("cpu", dtype=to):
        out = fn(x, w, b, y)
    dy = sparse(*out.shape, dtype=to)
    grads = torch.autograd.grad(out, (x, b, y), dy, materialize_grads=True)
    assert names(calls)[0] == op
    assert len(calls) == 2
    for _, (activation, qdata, scale, *_) in calls:
        assert (activation.dtype, qdata.data_ptr(), scale.data_ptr()) == (
            to,
            w.qdata.data_ptr(),
            w.scale.data_ptr(),
        )
    dense = w.dequantize(torch.float32)
    if product == "grouped_mm":
        expected = x @ dense.t()
    else:
        expected = fn(x, dense, b, y)
    assert_same(out.detach(), expected.detach().to(to))
    for grad, grad_expected in zip(
        grads, torch.autograd.grad(expected, (x, b, y), dy.float(), materialize_grads=True), strict=True
    ):
        assert_same(grad, grad_expected)


def test_disabled_autocast_casts_nothing():
    w, x = exact(N, K), sparse(3, K)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_same(F.linear(x, w), x @ w.dequantize().t())


# -------------------------------------------------------------------------- wrong operands


def test_wrong_operands():
    w, experts = gaussian(6, 96), gaussian(2, 6, 96)
    x = torch.randn(3, 96)
    named = gaussian(6, 96)
    named.fqn = "layers.3.mlp.down_proj.weight"
    errors = {
        "half x": message(TypeError, lambda: F.linear(x.half(), w)),
        "double x": message(TypeError, lambda: torch.mm(x.double(), w.t())),
        "half bias": message(TypeError, lambda: F.linear(x, w, torch.zeros(6).half())),
        "x elsewhere": message(ValueError, lambda: F.linear(x.to("meta"), w)),
        "bias elsewhere": message(ValueError, lambda: F.linear(x, named, torch.zeros(6, device="meta"))),
        "short x": message(ValueError, lambda: F.linear(x[:, :95], w)),
        "named": message(ValueError, lambda: F.linear(x[:, :95], named)),
        "mm of untransposed": message(ValueError, lambda: x @ w),
        "experts in linear": message(ValueError, lambda: F.linear(x, experts)),
        "row in linear": message(ValueError, lambda: F.linear(x, w[0])),
        "quantized x": message(TypeError, lambda: F.linear(w, w)),
        "quantized input": message(TypeError, lambda: F.linear(w, x)),
        "bmm of 2-D x": message(ValueError, lambda: x @ experts.mT),
        "grouped of 3-D x": message(
            ValueError, lambda: F.grouped_mm(x[None], experts.mT, offs=torch.tensor([3], dtype=torch.int32))
        ),
        "grouped without offs": message(ValueError, lambda: torch._grouped_mm(x, experts.mT)),
        "embedding of transposed": message(ValueError, lambda: F.embedding(torch.tensor([0]), w.t())),
        "embedding with max_norm": message(
            ValueError, lambda: F.embedding(torch.tensor([0]), w, max_norm=1.0)
        ),
        "half x in grouped": message(TypeError, lambda: torch.bmm(x.half().expand(2, 3, 96), experts.mT)),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {error}" for name, error in errors.items()),
        """\
half x: x is torch.float16 but the weight is torch.float32; use x.to(torch.float32) or weight.to(torch.float16)
double x: x is torch.float64 but the weight is torch.float32; use x.to(torch.float32)
half bias: bias is torch.float16 but x is torch.float32; use bias.to(torch.float32)
x elsewhere: x is on meta, where tensors have no numbers, but the weight is on cpu; make x on cpu
bias elsewhere: layers.3.mlp.down_proj.weight: bias is on meta, where tensors have no numbers, but the weight is on cpu; make bias on cpu
short x: x of shape (3, 95) does not fit a weight of shape (6, 96): its last dim must be 96
named: layers.3.mlp.down_proj.weight: x of shape (3, 95) does not fit a weight of shape (6, 96): its last dim must be 96
mm of untransposed: x of shape (3, 96) does not fit a weight of shape (6, 96): its last dim must be 6
experts in linear: linear needs a 2-D weight, got shape (2, 6, 96); for experts use bmm or grouped_mm, or select one
row in linear: linear needs a 2-D weight, got shape (96,); for experts use bmm or grouped_mm, or select one
quantized x: a quantized tensor cannot multiply a quantized tensor; call .dequantize() on the activation
quantized input: only the weight of a linear can be quantized; got input RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, dtype=torch.float32, device='cpu'): call .dequantize() on it
bmm of 2-D x: bmm needs x [E, M, K] and a weight of E experts, got shapes (3, 96) and (2, 96, 6)
grouped of 3-D x: grouped_mm needs x [M, K], a quantized weight [E, K, N] and offs [E]; got shapes (1, 3, 96), (2, 96, 6)
grouped without offs: grouped_mm needs x [M, K], a quantized weight [E, K, N] and offs [E]; got shapes (3, 96), (2, 96, 6)
embedding of transposed: embedding needs a 2-D weight that is not transposed, got RTNQuantizedTensor(shape=(96, 6), bits=4, group_size=32, transposed=True, dtype=torch.float32, device='cpu')
embedding with max_norm: embedding with max_norm rewrites the weight, which a quantized one cannot; drop max_norm
half x in grouped: x is torch.float16 but the weight is torch.float32; use x.to(torch.float32) or weight.to(torch.float16)""",
    )


def test_a_bias_that_does_not_fit_raises():
    w, x = exact(N, K), sparse(3, K)
    with pytest.raises(RuntimeError):
        F.linear(x, w, torch.zeros(N + 1))


def test_unknown_op_names_itself_and_the_way_out():
    w = gaussian(6, 96)
    assert_expected_inline(
        message(NotImplementedError, lambda: w + 1),
        """RTNQuantizedTensor does not implement aten.add.Tensor; call it on .dequantize(), which gives a plain tensor""",
    )
    for fn in (torch.sum, torch.abs, torch.ones_like, torch.zero_, nn.init.normal_):
        with pytest.raises(NotImplementedError, match="dequantize"):
            fn(w)


# -------------------------------------------------------------------------- the eager door


def test_eager_linear_enters_neither_dispatch_nor_dispatcher(monkeypatch):
    def refuse(*args):
        raise AssertionError("the eager door is shut")

    w, x, b = exact(N, K), sparse(3, K), torch.zeros(N)
    expected = F.linear(x, w.dequantize(), b)
    monkeypatch.setattr(RTNQuantizedTensor, "__torch_dispatch__", refuse)
    monkeypatch.setattr(ops, "rtn_ops", None)
    with torch.no_grad():
        assert_same(F.linear(x, w, b), expected)
    with pytest.raises(AttributeError):
        F.linear(x.requires_grad_(), w, b)  # a gradient is asked for: autograd must see it
    monkeypatch.undo()
    for grad in (False, True):
        # Which is to see every product.
        with torch.profiler.profile() as profile, torch.set_grad_enabled(grad):
            F.linear(x, w, b)
        assert "rtn::linear" in {event.name for event in profile.events()}


# ----------------------------------------------------------------------------------- views

# The same function of the quantized tensor and of its dequantized one. [6, 300] with groups of 32; 300 = 9 *
# 32 + 12.
VIEWS = {
    "rows": lambda w: w[1:4],
    "rows-negative": lambda w: w[-2:],
    "rows-step": lambda w: w[1:6:2],
    "no-rows": lambda w: w[3:3],
    "rows-beyond": lambda w: w[4:99],
    "narrow-rows": lambda w: w.narrow(0, 2, 3),
    "narrow-columns": lambda w: w.narrow(1, 64, 96),
    "narrow-columns-negative-dim": lambda w: w.narrow(-1, 64, 96),
    "columns-start": lambda w: w[:, :64],
    "columns-end": lambda w: w[:, 256:],
    "columns-negative": lambda w: w[:, -12:],
    "columns-all": lambda w: w[:, 0:300],
    "no-columns": lambda w: w[:, 64:64],
    "block": lambda w: w[1:3, 32:96],
    "slice-of-slice": lambda w: w[1:, 32:][1:4, 32:][:, 64:],
    "select": lambda w: w[2],
    "select-negative": lambda w: w.select(0, -1),
    "slice-of-row": lambda w: w[2][32:],
    "split": lambda w: w.split(4),
    "split-columns": lambda w: w.split(128, dim=1),
    "split-sizes": lambda w: w.split([1, 2, 3]),
    "split-sizes-columns": lambda w: w.split_with_sizes([96, 204], dim=-1),
    "chunk": lambda w: w.chunk(4),
    "chunk-columns": lambda w: w[:, 32:288].chunk(2, dim=1),
    "tensor-split": lambda w: w.tensor_split(4),
    "unbind": lambda w: w.unbind(),
    "iterate": lambda w: tuple(w),
    "view": lambda w: w.view(2, 3, 300),
    "view-inferred": lambda w: w.view(-1, 2, 300),
    "view-same": lambda w: w.view(6, 300),
    "view-as": lambda w: w.view_as(w),
    "reshape": lambda w: w.reshape(3, -1, 300),
    "flatten": lambda w: w.view(2, 3, 300).flatten(0, 1),
    "unflatten": lambda w: w.unflatten(0, (3, 2)),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "unsqueeze-1": lambda w: w.unsqueeze(1),
    "unsqueeze-none": lambda w: w[None, :, None],
    "squeeze": lambda w: w[None, 1:2].squeeze(),
    "squeeze-dim": lambda w: w[None].squeeze(0),
    "squeeze-dims": lambda w: w[None, None].squeeze((0, 1)),
    "squeeze-nothing": lambda w: w.squeeze(0),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose-twice": lambda w: w.t().t(),
    "transpose-with-itself": lambda w: w.transpose(1, 1),
    "permute": lambda w: w.permute(1, 0),
    "permute-nothing": lambda w: w.permute(0, -1),
    "t-of-row": lambda w: w[0].t(),
    "t-rows": lambda w: w.t()[32:96],
    "t-columns": lambda w: w.t()[:, 1:5:2],
    "t-select": lambda w: w.t()[:, 2],
    "t-split": lambda w: w.t().split(128),
    "t-split-columns": lambda w: w.t().split(4, dim=1),
    "t-unbind": lambda w: w.t().unbind(1),
    "t-unsqueeze": lambda w: w.t().unsqueeze(0),
    "t-view-same": lambda w: w.t().view(300, 6),
    "detach": lambda w: w.detach(),
    "alias": lambda w: torch.ops.aten.alias(w),
    "data": lambda w: w.data,
}

# [3, 4, 100]
VIEWS_3D = {
    "expert": lambda w: w[1],
    "experts": lambda w: w[1:],
    "select-rows": lambda w: w[:, 2],
    "select-rows-dim": lambda w: w.select(-2, 1),
    "block": lambda w: w[1:, 1:3, 32:],
    "ellipsis": lambda w: w[..., 64:],
    "unbind": lambda w: w.unbind(0),
    "unbind-rows": lambda w: w.unbind(1),
    "chunk-rows": lambda w: w.chunk(2, dim=-2),
    "flatten": lambda w: w.flatten(0, 1),
    "reshape": lambda w: w.reshape(-1, 100),
    "view": lambda w: w.view(3, 2, 2, 100),
    "mT": lambda w: w.mT,
    "mT-twice": lambda w: w.mT.transpose(-2, -1),
    "mT-expert": lambda w: w.mT[2],
    "mT-expert-slice": lambda w: w.mT[2, 32:],
    "mT-narrow": lambda w: w.mT.narrow(1, 32, 32),
    "mT-columns": lambda w: w.mT[..., 1:],
    "mT-select": lambda w: w.mT.select(2, 3),
    "mT-chunk": lambda w: w.mT.chunk(2, dim=2),
    "mT-unsqueeze": lambda w: w.mT.unsqueeze(1),
    "mT-squeeze": lambda w: w.mT[:1].squeeze(0),
    "swap-leading": lambda w: w.transpose(0, 1),
    "movedim": lambda w: w.movedim(1, 0),
    "permute-both": lambda w: w.view(3, 2, 2, 100).permute(1, 0, 3, 2),
    "permute-leading": lambda w: w.permute(1, 0, 2),
    "permute-mT": lambda w: w.mT.permute(0, 2, 1),
}


def parts(result):
    return result if isinstance(result, tuple) else (result,)


def check_view(w, fn):
    dense = w.dequantize()
    for part, expected in zip(parts(fn(w)), parts(fn(dense)), strict=True):
        assert isinstance(part, RTNQuantizedTensor)
        assert_same(part.dequantize(), expected)
        part.qdata.zero_()
        expected.zero_()
    # Written through the parts, so they alias, and nothing else was touched.
    assert_same(w.dequantize(), dense)


@pytest.mark.parametrize("inference", [False, True])
@every_width
@pytest.mark.parametrize("view", VIEWS)
def test_view(view, bits, inference):
    w = gaussian(6, 300, bits=bits)
    with torch.inference_mode(inference):
        check_view(w, VIEWS[view])


@every_width
@pytest.mark.parametrize("view", [view for view in VIEWS if "column" not in view and "slice" not in view])
@pytest.mark.parametrize("group_size", [64, -1])
def test_view_of_larger_groups(view, bits, group_size):
    cuts = {
        "block": lambda w: w[1:3, 64:128],
        "t-rows": lambda w: w.t()[64:128],
        "t-split": lambda w: w.t().split(128),
    }
    check_view(gaussian(6, 300, bits=bits, group_size=group_size), cuts.get(view, VIEWS[view]))


@pytest.mark.parametrize("inference", [False, True])
@every_width
@pytest.mark.parametrize("view", VIEWS_3D)
def test_view_3d(view, bits, inference):
    w = gaussian(3, 4, 100, bits=bits, dtype=torch.bfloat16)
    with torch.inference_mode(inference):
        check_view(w, VIEWS_3D[view])


@every_width
@pytest.mark.parametrize("k", [32, 96, 100, 576])
def test_every_cut_of_the_columns_at_a_multiple(bits, k):
    for start in range(0, k, 32):
        for end in [*range(start + 32, k, 32), k]:
            check_view(gaussian(3, k, bits=bits), lambda w, start=start, end=end: w[:, start:end])


@every_width
def test_one_group_a_row_cuts_at_chunks_and_shares_the_scale(bits):
    w = gaussian(3, 100, bits=bits, group_size=-1)
    chunk = FORMATS[bits].chunk
    part = w[:, chunk : 3 * chunk]
    assert part.scale.data_ptr() == w.scale.data_ptr()
    check_view(w, lambda w: w[:, chunk : 3 * chunk])
    check_view(w, lambda w: w[:, chunk:])
    with pytest.raises(ValueError, match=f"must be multiples of {chunk},"):
        w[:, : chunk + 8]


@pytest.mark.parametrize("view", ["rows", "columns-end", "t", "select", "unsqueeze", "rows-step"])
def test_a_view_writes_and_reads_through(view):
    w = gaussian(6, 300)
    v = VIEWS[view](w)
    assert v.qdata.untyped_storage().data_ptr() == w.qdata.untyped_storage().data_ptr()
    assert v.scale.untyped_storage().data_ptr() == w.scale.untyped_storage().data_ptr()
    w.copy_(torch.randn(6, 300))
    assert_same(v.dequantize(), VIEWS[view](w.dequantize()))


@pytest.mark.parametrize(
    "flatten", [lambda w: w.view(-1), lambda w: w.reshape(-1), torch.flatten, torch.ravel], ids="vrfr"
)
@pytest.mark.parametrize("shape", [(6, 300), (2, 6, 64)])
def test_a_weight_cannot_be_flattened(shape, flatten):
    with pytest.raises(ValueError, match="a view keeps the packed last dim"):
        flatten(gaussian(*shape))
    assert flatten(gaussian(64)).shape == (64,)


@pytest.mark.parametrize("bits", [4, 8])
def test_misaligned_cuts_raise(bits):
    w = gaussian(6, 300, bits=bits, group_size=64)
    row = gaussian(6, 300, bits=bits, group_size=-1)
    named = gaussian(6, 300, bits=bits)
    named.fqn = "layers.3.mlp.down_proj.weight"
    errors = {
        "slice": message(ValueError, lambda: named[:, 16:144]),
        "slice to the middle": message(ValueError, lambda: w[:, :32]),
        "one past": message(ValueError, lambda: w[:, 65:]),
        "step": message(ValueError, lambda: w[:, ::2]),
        "narrow": message(ValueError, lambda: w.narrow(1, 0, 299)),
        "t": message(ValueError, lambda: w.t()[10:]),
        "split": message(ValueError, lambda: w.split(100, dim=1)),
        "split sizes": message(ValueError, lambda: w.split([64, 64], dim=1)),
        "chunk": message(ValueError, lambda: w.chunk(2, dim=1)),
        "one group": message(ValueError, lambda: row[:, 8:]),
        "select": message(ValueError, lambda: w[:, 0]),
        "unbind": message(ValueError, lambda: w.unbind(1)),
    }
    errors = "\n".join(f"{name}: {error}" for name, error in errors.items())
    if bits == 4:
        assert_expected_inline(
            errors,
            """\
slice: layers.3.mlp.down_proj.weight: cannot slice columns 16:144; with bits=4 and group_size=32 cuts must be multiples of 32, or at the end, 300
slice to the middle: cannot slice columns 0:32; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
one past: cannot slice columns 65:300; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
step: cannot slice columns 0:300:2; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
narrow: cannot slice columns 0:299; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
t: cannot slice columns 10:300; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
split: cannot slice columns 0:100; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
split sizes: split sizes [64, 64] do not add up to 300, the size of dim 1
chunk: cannot slice columns 0:150; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
one group: cannot slice columns 8:300; with bits=4 and group_size=-1 cuts must be multiples of 32, or at the end, 300
select: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()
unbind: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()""",
        )
    else:
        assert_expected_inline(
            errors,
            """\
slice: layers.3.mlp.down_proj.weight: cannot slice columns 16:144; with bits=8 and group_size=32 cuts must be multiples of 32, or at the end, 300
slice to the middle: cannot slice columns 0:32; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
one past: cannot slice columns 65:300; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
step: cannot slice columns 0:300:2; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
narrow: cannot slice columns 0:299; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
t: cannot slice columns 10:300; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
split: cannot slice columns 0:100; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
split sizes: split sizes [64, 64] do not add up to 300, the size of dim 1
chunk: cannot slice columns 0:150; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
one group: cannot slice columns 8:300; with bits=8 and group_size=-1 cuts must be multiples of 16, or at the end, 300
select: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()
unbind: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()""",
        )


def test_impossible_reshapes_raise():
    w, experts = gaussian(6, 300), gaussian(3, 4, 100)
    errors = {
        "view": message(ValueError, lambda: w.view(12, 150)),
        "view of another size": message(ValueError, lambda: w.view(7, 300)),
        "flatten": message(ValueError, lambda: w.flatten()),
        "view of t": message(ValueError, lambda: w.t().view(3, 100, 6)),
        "unsqueeze": message(ValueError, lambda: w.unsqueeze(-1)),
        "unsqueeze of t": message(ValueError, lambda: w.t().unsqueeze(1)),
        "squeeze": message(ValueError, lambda: gaussian(6, 1).squeeze()),
        "squeeze of t": message(ValueError, lambda: gaussian(1, 300).t().squeeze(1)),
        "permute": message(ValueError, lambda: experts.permute(2, 0, 1)),
        "transpose": message(ValueError, lambda: experts.transpose(0, 2)),
        "dim": message(IndexError, lambda: w.narrow(2, 0, 1)),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {error}" for name, error in errors.items()),
        """\
view: cannot view shape (6, 300) as (12, 150); a view keeps the packed last dim, in_features=300
view of another size: cannot view shape (6, 300) as (7, 300); a view keeps the packed last dim, in_features=300
flatten: cannot view shape (6, 300) as (1800,); a view keeps the packed last dim, in_features=300
view of t: cannot view shape (300, 6) as (3, 100, 6); a view keeps the packed last dim, in_features=300
unsqueeze: cannot unsqueeze at dim -1: the last 1 dim(s) of (6, 300) must stay last
unsqueeze of t: cannot unsqueeze at dim 1: the last 2 dim(s) of (300, 6) must stay last
squeeze: cannot squeeze dim(s) [1] of shape (6, 1): only the first 1 dim(s) may go
squeeze of t: cannot squeeze dim(s) [1] of shape (300, 1): only the first 0 dim(s) may go
permute: cannot permute (3, 4, 100) to (2, 0, 1): the last two dims may swap, and the others among themselves
transpose: cannot permute (3, 4, 100) to (2, 1, 0): the last two dims may swap, and the others among themselves
dim: Dimension out of range (expected to be in range of [-2, 1], but got 2)""",
    )


# ------------------------------------------------------------------------- copies of parts

GATHERS = {
    "index": lambda w: w[torch.tensor([4, 0, 4])],
    "index-list": lambda w: w[[5, 1]],
    "index-negative": lambda w: w[torch.tensor([-1])],
    "index-2d": lambda w: w[torch.tensor([[0, 1], [2, 3]])],
    "index-none": lambda w: w[torch.tensor([], dtype=torch.int64)],
    "index-then-t": lambda w: w.index_select(0, torch.tensor([1, 0])).t(),
    "mask": lambda w: w[torch.tensor([True, False, True, True, False, False])],
    "mask-none": lambda w: w[torch.zeros(6, dtype=torch.bool)],
    "index-select": lambda w: w.index_select(0, torch.tensor([3, 3, 1])),
    "index-select-t": lambda w: w.t().index_select(1, torch.tensor([3, 3, 1])),
    "cat": lambda w: torch.cat([w, w[1:3]]),
    "cat-negative": lambda w: torch.cat((w[1:3], w), dim=-2),
    "cat-columns": lambda w: torch.cat([w[:, :64], w], dim=1),
    "cat-columns-parts": lambda w: torch.cat([w[:, 64:128], w[:, 288:]], dim=-1),
    "cat-t": lambda w: torch.cat([w.t()[:64], w.t()], dim=0),
    "cat-t-columns": lambda w: torch.cat([w.t(), w.t()], dim=1),
    "concat-of-chunks": lambda w: torch.cat(w.chunk(3)),
    "concat-of-split-columns": lambda w: torch.cat(w.split(96, dim=1), dim=1),
    "vstack": lambda w: torch.vstack([w, w]),
    "stack": lambda w: torch.stack([w, w.clone()]),
    "stack-1": lambda w: torch.stack([w, w], dim=1),
    "stack-t": lambda w: torch.stack([w.t(), w.t()]),
    "clone": lambda w: w.clone(),
    "clone-t": lambda w: w.t().clone(),
    "clone-columns": lambda w: w[:, 32:].clone(),
    "contiguous-columns": lambda w: w[:, 32:64].contiguous(),
}


@every_width
@every_dtype
@pytest.mark.parametrize("gather", GATHERS)
def test_gather(gather, bits, dtype):
    w = gaussian(6, 300, bits=bits, dtype=dtype)
    out = GATHERS[gather](w)
    assert isinstance(out, RTNQuantizedTensor)
    assert_same(out.dequantize(), GATHERS[gather](w.dequantize()))
    before = w.dequantize()
    out.qdata.zero_()
    assert_same(w.dequantize(), before)  # a copy, not a view


@every_width
def test_gather_experts(bits):
    w = gaussian(3, 4, 100, bits=bits)
    dense = w.dequantize()
    picked = torch.tensor([2, 0])
    mask = torch.rand(3, 4) < 0.5
    for fn in (
        lambda w: w[picked],
        lambda w: w[:, picked],
        lambda w: w[picked, picked],
        lambda w: w[mask],
        lambda w: w.mT[picked],
        lambda w: w.index_select(1, picked),
        lambda w: torch.cat([w, w], dim=0),
        lambda w: torch.cat([w, w], dim=1),
        lambda w: torch.cat([w[..., :64], w], dim=2),
        lambda w: torch.cat([w.mT[:, :64], w.mT], dim=1),
        lambda w: torch.stack(w.unbind()),
    ):
        assert_same(fn(w).dequantize(), fn(dense))


def test_index_assignment():
    w, new = gaussian(6, 96), torch.randn(96)
    w[2] = new
    assert_same_planes(w[2], RTNQuantizedTensor.from_float(new, 4, 32))


def test_impossible_gathers_raise():
    w, row = gaussian(6, 300), gaussian(6, 320, group_size=-1)
    errors = {
        "index both": message(ValueError, lambda: w[torch.tensor([0]), torch.tensor([0])]),
        "index columns": message(ValueError, lambda: w[:, torch.tensor([0])]),
        "index t": message(ValueError, lambda: w.t()[torch.tensor([0])]),
        "mask": message(ValueError, lambda: w[torch.ones(6, 300, dtype=torch.bool)]),
        "index_select": message(ValueError, lambda: w.index_select(1, torch.tensor([0]))),
        "cat with float": message(TypeError, lambda: torch.cat([w, w.dequantize()])),
        "cat of bits": message(TypeError, lambda: torch.cat([w, gaussian(6, 300, bits=8)])),
        "cat of groups": message(TypeError, lambda: torch.cat([w, gaussian(6, 300, group_size=64)])),
        "cat of dtypes": message(TypeError, lambda: torch.cat([w, w.half()])),
        "cat of a transpose": message(TypeError, lambda: torch.cat([gaussian(32, 32), gaussian(32, 32).t()])),
        "cat of widths": message(ValueError, lambda: torch.cat([w, w[:, 32:]])),
        "cat after a part group": message(ValueError, lambda: torch.cat([w, w], dim=1)),
        "cat of single groups": message(ValueError, lambda: torch.cat([row, row], dim=-1)),
        "stack of widths": message(ValueError, lambda: torch.stack([w, w[:, 32:]])),
        "stack behind": message(ValueError, lambda: torch.stack([w, w], dim=2)),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {error}" for name, error in errors.items()),
        """\
index both: cannot index 2 dim(s) of shape (6, 300) by tensors: only the first 1 can be
index columns: cannot index 2 dim(s) of shape (6, 300) by tensors: only the first 1 can be
index t: cannot index 1 dim(s) of shape (300, 6) by tensors: only the first 0 can be
mask: cannot index 2 dim(s) of shape (6, 300) by tensors: only the first 1 can be
index_select: cannot index_select along dim 1 of (6, 300): it is packed; dequantize() first
cat with float: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, dtype=torch.float32, device='cpu') with a plain torch.float32 tensor of shape (6, 300): format and dtype must be the same
cat of bits: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(6, 300), bits=8, group_size=32, dtype=torch.float32, device='cpu'): format and dtype must be the same
cat of groups: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=64, dtype=torch.float32, device='cpu'): format and dtype must be the same
cat of dtypes: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, dtype=torch.float16, device='cpu'): format and dtype must be the same
cat of a transpose: cannot cat RTNQuantizedTensor(shape=(32, 32), bits=4, group_size=32, dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(32, 32), bits=4, group_size=32, transposed=True, dtype=torch.float32, device='cpu'): format and dtype must be the same
cat of widths: cannot cat weights of in_features [300, 268] along dim 0; they must be the same
cat after a part group: cannot cat parts of 300 columns; all but the last must be multiples of group_size=32
cat of single groups: cannot cat along in_features with group_size=-1: every part has a scale of its own; dequantize() first
stack of widths: cannot stack weights of in_features [300, 268] along dim 0; they must be the same
stack behind: cannot stack along dim 2: the packed dims of (6, 300) must stay last""",
    )


# ----------------------------------------------------------------------------------- copy_

# Where copy_ writes: the view of a [6, 300] or [3, 4, 100] tensor.
TARGETS = {
    "whole": ((6, 300), lambda w: w),
    "narrow": ((6, 300), lambda w: w.narrow(0, 1, 3)),
    "step": ((6, 300), lambda w: w[::2]),
    "row": ((6, 300), lambda w: w[4]),
    "columns": ((6, 300), lambda w: w[:, 128:256]),
    "columns-end": ((6, 300), lambda w: w[:, 128:]),
    "block": ((6, 300), lambda w: w[2:5, 128:256]),
    "slice-of-row": ((6, 300), lambda w: w[4, 128:]),
    "t": ((6, 300), lambda w: w.t()),
    "t-block": ((6, 300), lambda w: w.t()[128:, 1:3]),
    "view": ((6, 300), lambda w: w.view(2, 3, 300)),
    "unsqueezed": ((6, 300), lambda w: w[None]),
    "chunk": ((6, 300), lambda w: w.chunk(3)[1]),
    "expert": ((3, 4, 100), lambda w: w[1]),
    "expert-rows": ((3, 4, 100), lambda w: w[1, 1:3]),
    "rows-of-experts": ((3, 4, 100), lambda w: w[:, 2:]),
    "experts-mT": ((3, 4, 100), lambda w: w.mT),
    "expert-t": ((3, 4, 100), lambda w: w[2].t()),
}


def like(view, w):
    """What from_float makes of `w`, in the format of `view`."""
    fresh = RTNQuantizedTensor.from_float(
        w.mT if view.transposed else w, view.bits, view.group_size, view.scale_method, view.dtype
    )
    return fresh.mT if view.transposed else fresh


@every_format
@pytest.mark.parametrize("target", TARGETS)
def test_copy_from_float_quantizes_in_place(target, bits, group_size, dtype):
    shape, fn = TARGETS[target]
    w = gaussian(*shape, bits=bits, group_size=group_size, dtype=dtype)
    view, dense = fn(w), w.dequantize()
    new = torch.randn(view.shape)
    if group_size == -1 and view.in_features < w.in_features:
        with pytest.raises(ValueError, match="share the scale"):
            view.copy_(new)
        return
    at = [p.data_ptr() for p in (w.qdata, w.scale, view.qdata, view.scale)]
    assert view.copy_(new) is view
    assert at == [p.data_ptr() for p in (w.qdata, w.scale, view.qdata, view.scale)]
    assert_same_planes(view, like(view, new))
    fn(dense).copy_(like(view, new).dequantize())
    assert_same(w.dequantize(), dense)  # the rest is as it was


@every_width
@pytest.mark.parametrize("target", TARGETS)
def test_copy_of_quantized(target, bits):
    shape, fn = TARGETS[target]
    w = gaussian(*shape, bits=bits)
    view, dense = fn(w), w.dequantize()
    new = like(view, torch.randn(view.shape))
    view.copy_(new)
    assert_same_planes(view, new)
    fn(dense).copy_(new.dequantize())
    assert_same(w.dequantize(), dense)
    plain = torch.empty(view.shape, dtype=torch.bfloat16)
    plain.copy_(new)
    assert_same(plain, new.dequantize(torch.bfloat16))


@every_dtype
@pytest.mark.parametrize("from_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_method", ["absmax", "signed"])
def test_copy_converts_dtypes(dtype, from_dtype, scale_method):
    w = gaussian(6, 300, dtype=dtype, scale_method=scale_method)
    new = torch.randn(300, 6, dtype=from_dtype).t()
    w.copy_(new)
    assert_same_planes(w, RTNQuantizedTensor.from_float(new, 4, 32, scale_method, dtype))
    other = RTNQuantizedTensor.from_float(torch.randn(6, 300, dtype=from_dtype), 4, 32, scale_method)
    w.copy_(other)
    assert_same_planes(w, other.to(dtype))


def test_copy_into_a_parameter_that_layers_share():
    a, b = nn.Linear(96, 6, bias=False), nn.Linear(96, 6, bias=False)
    a.weight = b.weight = nn.Parameter(gaussian(6, 96))
    with torch.no_grad():
        a.weight.data[2:4].copy_(torch.zeros(2, 96))
    assert_same(b.weight.dequantize()[2:4], torch.zeros(2, 96))


@every_width
def test_copy_into_columns_that_share_a_scale_raises(bits):
    w = gaussian(6, 320, bits=bits, group_size=-1)
    before = w.dequantize()
    for part in (
        w[:, :64],
        w[:, 64:],
        w[2, 64:],
        w.t()[64:],
        w[2:3, 64:],
        w[:, 64:][1:][0],
        w[:, 64:].detach(),
        w.view(2, 3, 320)[1, 2, 64:],
    ):
        with pytest.raises(ValueError, match="share the scale"):
            part.copy_(torch.randn(part.shape))
    assert_same(w.dequantize(), before)
    w[:, :64].clone().copy_(new := torch.randn(6, 64))  # a copy has a scale of its own
    own = w[:, :64].to(torch.bfloat16)
    own.copy_(new)
    assert_same_planes(own, RTNQuantizedTensor.from_float(new, bits, -1, dtype=torch.bfloat16))
    w[1::2].copy_(torch.zeros(3, 320))
    w.view(2, 3, 320)[:, 0].copy_(torch.zeros(2, 320))
    assert not w.dequantize()[[0, 1, 3, 5]].any()


def test_copy_mismatches_raise():
    w = gaussian(6, 96)
    before = w.dequantize()
    errors = {
        "shape": message(ValueError, lambda: w.copy_(torch.randn(6, 64))),
        "broadcast": message(ValueError, lambda: w.copy_(torch.randn(96))),
        "quantized shape": message(ValueError, lambda: w.copy_(gaussian(5, 96))),
        "into a float shape": message(ValueError, lambda: torch.empty(6).copy_(w)),
        "bits": message(TypeError, lambda: w.copy_(gaussian(6, 96, bits=8))),
        "groups": message(TypeError, lambda: w.copy_(gaussian(6, 96, group_size=96))),
        "transposed": message(TypeError, lambda: gaussian(6, 6).copy_(gaussian(6, 6).t())),
        "double": message(TypeError, lambda: w.copy_(torch.randn(6, 96).double())),
        "integers": message(TypeError, lambda: w.copy_(torch.ones(6, 96, dtype=torch.int8))),
        "scale": message(
            ValueError, lambda: w.half().copy_(RTNQuantizedTensor.from_float(torch.full((6, 96), 1e9), 4, 32))
        ),
    }
    assert_same(w.dequantize(), before)
    assert_expected_inline(
        "\n".join(f"{name}: {error}" for name, error in errors.items()),
        """\
shape: cannot copy_ a tensor of shape (6, 64) into one of shape (6, 96)
broadcast: cannot copy_ a tensor of shape (96,) into one of shape (6, 96)
quantized shape: cannot copy_ a tensor of shape (5, 96) into one of shape (6, 96)
into a float shape: cannot copy_ a tensor of shape (6, 96) into one of shape (6,)
bits: cannot copy_ RTNQuantizedTensor(shape=(6, 96), bits=8, group_size=32, dtype=torch.float32, device='cpu') into RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, dtype=torch.float32, device='cpu'): the formats differ; copy_ from src.dequantize() to requantize
groups: cannot copy_ RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=96, dtype=torch.float32, device='cpu') into RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, dtype=torch.float32, device='cpu'): the formats differ; copy_ from src.dequantize() to requantize
transposed: cannot copy_ RTNQuantizedTensor(shape=(6, 6), bits=4, group_size=32, transposed=True, dtype=torch.float32, device='cpu') into RTNQuantizedTensor(shape=(6, 6), bits=4, group_size=32, dtype=torch.float32, device='cpu'): the formats differ; copy_ from src.dequantize() to requantize
double: dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
integers: dtype torch.int8 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
scale: a scale of 1.33e+08 overflows torch.float16; keep torch.float32, or use torch.bfloat16""",
    )


# ----------------------------------------------------------------------------- conversions


@every_width
@every_dtype
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_to_dtype_changes_scale_and_output_alone(bits, dtype, to):
    w = gaussian(6, 300, bits=bits, dtype=dtype)
    for out in (w.to(to), w.to("cpu", to), w.to(torch.zeros(1, dtype=to)), w.type(to), w.to(to, copy=True)):
        assert_same(out.qdata, w.qdata)
        assert_same(out.scale, w.scale.to(to))
        assert out.dtype == out.dequantize().dtype == to
        assert (out.bits, out.group_size, out.transposed, out.shape) == (
            w.bits,
            w.group_size,
            w.transposed,
            w.shape,
        )
    assert w.to(dtype) is w
    assert w.to(dtype, copy=True).qdata.data_ptr() != w.qdata.data_ptr()
    assert_same(
        w.t().to(to).dequantize(),
        w.dequantize(torch.float32).t() if to is torch.float32 else w.to(to).dequantize().t(),
    )


def test_to_dtype_by_method():
    w = gaussian(6, 300)
    assert [w.half().dtype, w.bfloat16().dtype, w.half().float().dtype] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    module = nn.Linear(300, 6)
    module.weight = parameter = nn.Parameter(gaussian(6, 300))
    for cast, dtype in (
        (module.half, torch.float16),
        (module.bfloat16, torch.bfloat16),
        (module.float, torch.float32),
    ):
        cast()
        assert module.weight.dtype == module.bias.dtype == dtype
        assert isinstance(module.weight, nn.Parameter)
        assert isinstance(module.weight, RTNQuantizedTensor)
        assert not module.weight.requires_grad
        assert module(torch.randn(2, 300, dtype=dtype)).dtype == dtype
    assert module.weight is parameter  # as for a dense one, optimizers and ties hold on to it


def test_subnormal_scale_survives_half():
    w = RTNQuantizedTensor.from_float(torch.full((1, 32), 1e-9), 4, 32)
    assert w.half().scale.item() > 0


def test_dtypes_that_cannot_be_raise_and_change_nothing():
    module = nn.Linear(32, 1)
    module.weight = nn.Parameter(RTNQuantizedTensor.from_float(torch.full((1, 32), 1e9), 4, 32))
    module.weight.fqn = "up_proj.weight"
    errors = [
        message(ValueError, module.half),
        message(TypeError, module.double),
        message(TypeError, lambda: module.weight.to(torch.int8)),
    ]
    assert module.weight.dtype == module.bias.dtype == torch.float32
    assert_same(module.weight.dequantize(), torch.full((1, 32), module.weight.scale.item() * 7))
    assert_expected_inline(
        "\n".join(errors),
        """\
up_proj.weight: a scale of 1.33e+08 overflows torch.float16; keep torch.float32, or use torch.bfloat16
up_proj.weight: dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
up_proj.weight: dtype torch.int8 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16""",
    )


def test_to_meta_and_back():
    w = gaussian(2, 6, 300).mT
    meta = w.to("meta")
    assert (meta.device.type, meta.qdata.device.type, meta.scale.device.type) == ("meta",) * 3
    assert (meta.shape, meta.dtype, meta.transposed) == (w.shape, w.dtype, True)
    assert meta.dequantize().shape == w.shape
    assert F.linear(torch.empty(3, 300, device="meta"), gaussian(6, 300).to("meta")).shape == (3, 6)

    module = nn.Linear(300, 6, bias=False)
    module.weight = nn.Parameter(gaussian(6, 300))
    module.to("meta").to_empty(device="cpu")
    assert module.weight.qdata.device.type == "cpu"
    module.weight.data.copy_(new := torch.randn(6, 300))
    assert_same_planes(module.weight, RTNQuantizedTensor.from_float(new, 4, 32))


def test_cpu_and_to_nothing_return_the_same():
    w = gaussian(6, 300)
    assert w.cpu() is w
    assert w.to("cpu") is w
    assert w.contiguous() is w
    assert w.is_contiguous()


@every_width
@pytest.mark.parametrize("w_shape", [(6, 300), (2, 6, 300)])
def test_factories(bits, w_shape):
    w = gaussian(*w_shape, bits=bits, scale_method="signed", dtype=torch.bfloat16)
    made = [
        (torch.empty_like(w), w.shape),
        (torch.empty_like(w, dtype=torch.float16), w.shape),
        (torch.zeros_like(w), w.shape),
        (torch.empty_like(w.mT), w.mT.shape),
        (w.new_empty(3, 100), (3, 100)),
        (w.new_zeros((3, 100)), (3, 100)),
        (w.new_zeros(100, dtype=torch.float16), (100,)),
        (w.mT.new_empty(100, 3), (100, 3)),
        (RTNQuantizedTensor.empty(3, 100, bits=bits, group_size=32, scale_method="signed"), (3, 100)),
    ]
    for t, shape in made:
        assert t.shape == shape
        assert (t.bits, t.group_size, t.scale_method) == (bits, 32, "signed")
        t.copy_(new := torch.randn(shape))  # the planes have room for the shape
        assert_same_planes(t, like(t, new))
    assert [t.dtype for t, _ in made].count(torch.float16) == 2
    assert [t.transposed for t, _ in made].count(True) == 2
    assert torch.empty_like(w, device="meta").qdata.device.type == "meta"
    assert not torch.zeros_like(w).dequantize().any()
    assert not w.new_zeros(3, 100).dequantize().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_pin_memory():
    w = gaussian(6, 300).pin_memory()
    assert w.is_pinned()
    assert w.qdata.is_pinned()
    assert torch.empty_like(w, pin_memory=True).is_pinned()


def test_is_pinned_is_false():
    assert not gaussian(6, 300).is_pinned()


def _fill_with_ones(w):
    w.copy_(torch.ones(w.shape))


def test_share_memory():
    w = gaussian(6, 300)
    assert not w.is_shared()
    assert w.share_memory_() is w
    assert w.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=_fill_with_ones, args=(w,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert_same_planes(w, RTNQuantizedTensor.from_float(torch.ones(6, 300), 4, 32))


def test_module_share_memory():
    module = nn.Linear(300, 6)
    module.weight = nn.Parameter(gaussian(6, 300))
    before = module.weight.dequantize()
    module.share_memory()
    assert module.weight.is_shared()
    assert_same(module.weight.dequantize(), before)


# ------------------------------------------------------------------------------ making one


@every_format
@pytest.mark.parametrize("shape", [(5, 300), (2, 5, 32), (300,), (0, 64), (1, 1)])
def test_from_float(bits, group_size, dtype, shape):
    w = torch.randn(shape).to(dtype)
    q = RTNQuantizedTensor.from_float(w, bits, group_size)
    assert (q.shape, q.dtype, q.device, q.is_floating_point()) == (w.shape, dtype, w.device, True)
    qdata, scale = reference.quantize(w, bits, group_size, "absmax", dtype)
    assert_same(q.qdata, qdata)
    assert_same(q.scale, scale)
    assert_same(q.dequantize(), reference.dequantize(qdata, scale, bits, group_size, shape[-1], dtype))
    assert_same(
        q.dequantize(torch.float32),
        reference.dequantize(qdata, scale, bits, group_size, shape[-1], torch.float32),
    )


def test_from_float_of_a_parameter_needs_no_gradient():
    q = RTNQuantizedTensor.from_float(nn.Parameter(torch.randn(6, 96)), 4, 32, dtype=torch.float16)
    assert not q.requires_grad
    assert not q.dequantize().requires_grad
    assert q.dtype == torch.float16


def test_from_float_errors():
    w = torch.randn(6, 96)
    errors = [
        message(TypeError, lambda: RTNQuantizedTensor.from_float(gaussian(6, 96))),
        message(TypeError, lambda: RTNQuantizedTensor.from_float(w.double())),
        message(TypeError, lambda: RTNQuantizedTensor.from_float(w, dtype=torch.float64)),
        message(TypeError, lambda: RTNQuantizedTensor.from_float(w.to(torch.int8))),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(w, bits=3)),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(w, group_size=48)),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(w, scale_method="mse")),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(torch.tensor(1.0))),
        message(TypeError, lambda: RTNQuantizedTensor.empty(6, 96, dtype=torch.float64)),
        message(ValueError, lambda: RTNQuantizedTensor.empty(6, 96, bits=5)),
    ]
    assert_expected_inline(
        "\n".join(errors),
        """\
already quantized: got a RTNQuantizedTensor; quantize the float weight, or call .dequantize() first
dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
dtype torch.int8 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
bits=3 is not supported; use 4 or 8
group_size=48 is not supported; use a multiple of 32 (32, 64 and 128 are usual), or -1 for one group a row
scale_method='mse' is not supported; use one of 'absmax', 'signed', 'search'
cannot quantize a tensor without dims; give a weight [..., N, K]
dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
bits=5 is not supported; use 4 or 8""",
    )


def test_repr():
    w = gaussian(6, 96)
    assert_expected_inline(
        "\n".join(
            repr(t)
            for t in (
                w,
                w.t(),
                gaussian(2, 5, 300, bits=8, group_size=-1, scale_method="signed", dtype=torch.bfloat16),
                w.to("meta"),
                nn.Parameter(w),
            )
        ),
        """\
RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, dtype=torch.float32, device='cpu')
RTNQuantizedTensor(shape=(96, 6), bits=4, group_size=32, transposed=True, dtype=torch.float32, device='cpu')
RTNQuantizedTensor(shape=(2, 5, 300), bits=8, group_size=-1, scale_method='signed', dtype=torch.bfloat16, device='cpu')
RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, dtype=torch.float32, device='meta')
RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, dtype=torch.float32, device='cpu')""",
    )


# --------------------------------------------------------------------------- requires_grad


def test_requires_grad_is_always_false():
    w = gaussian(6, 96)
    assert not w.requires_grad_(True).requires_grad
    assert not w.requires_grad_().requires_grad
    w.requires_grad = True
    assert not w.requires_grad
    p = nn.Parameter(w)
    assert not p.requires_grad
    p.requires_grad = True
    assert not p.requires_grad
    assert not nn.Parameter(w, requires_grad=True).requires_grad

    module = nn.Linear(96, 6)
    module.weight = nn.Parameter(w)
    module.requires_grad_(True)
    assert (module.weight.requires_grad, module.bias.requires_grad) == (False, True)
    trained = nn.Linear(96, 6)
    trained.load_state_dict(module.state_dict(), assign=True)
    assert isinstance(trained.weight, RTNQuantizedTensor)
    assert not trained.weight.requires_grad
    assert torch.optim.SGD([p for p in trained.parameters() if p.requires_grad]).param_groups[0][
        "params"
    ] == [trained.bias]


# ------------------------------------------------------------------------ copies and files


def saved_and_loaded(t, **kwargs):
    buffer = io.BytesIO()
    torch.save(t, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, **kwargs)


ROUND_TRIPS = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "save": saved_and_loaded,
    "clone": torch.clone,
    "detach": torch.Tensor.detach,
}


@every_format
@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_round_trip(trip, bits, group_size, dtype):
    w = gaussian(2, 5, 300, bits=bits, group_size=group_size, scale_method="signed", dtype=dtype)
    for t in (w, w.mT, w[1], w[:, 2:4]):
        t.note = ["kept"]
        out = ROUND_TRIPS[trip](t)
        assert type(out) is RTNQuantizedTensor
        assert_same_planes(out, t)
        assert out.__tensor_flatten__() == t.__tensor_flatten__()
        stride = t.dequantize().clone().stride() if trip in ("deepcopy", "clone") else t.stride()
        assert (out.shape, out.stride(), out.dtype, out.note) == (t.shape, stride, t.dtype, ["kept"])
        assert (out.qdata.data_ptr() == t.qdata.data_ptr()) == (trip in ("detach", "copy"))


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "save"])
def test_parameter_round_trip(trip):
    p = nn.Parameter(gaussian(6, 96))
    p.input_dim = 1
    out = ROUND_TRIPS[trip](p)
    assert isinstance(out, nn.Parameter)
    assert not out.requires_grad
    assert out.input_dim == 1


def test_deepcopy_keeps_ties():
    module = nn.ModuleList([nn.Linear(96, 6), nn.Linear(96, 6)])
    module[0].weight = module[1].weight = nn.Parameter(gaussian(6, 96))
    twin = copy.deepcopy(module)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight.qdata.data_ptr() != module[0].weight.qdata.data_ptr()


def test_load_with_map_location():
    w = gaussian(6, 96)
    meta = saved_and_loaded(w, map_location="meta")
    assert (meta.device.type, meta.qdata.device.type, meta.shape) == ("meta", "meta", w.shape)
    assert_same_planes(saved_and_loaded(w, map_location="cpu"), w)


def test_a_fresh_process_loads_with_weights_only(tmp_path):
    module = quantize(nn.Linear(96, 6))
    x = torch.randn(3, 96)
    torch.save({"state": module.state_dict(), "x": x, "y": module(x)}, tmp_path / "model.pt")
    code = """
import sys, torch, rtn_tensor
saved = torch.load(sys.argv[1], weights_only=True)
module = torch.nn.Linear(96, 6, device="meta")
module.load_state_dict(saved["state"], assign=True)
assert isinstance(module.weight, rtn_tensor.RTNQuantizedTensor)
assert torch.equal(module(saved["x"]), saved["y"])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=100)


def quantize(module, **kwargs):
    quantize_(module, rtn_int4(group_size=32, **kwargs))
    return module


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", ["float-to-quantized", "quantized-to-float", "quantized-to-quantized"])
def test_load_state_dict(case, assign, swap):
    source, target = nn.Linear(96, 6), nn.Linear(96, 6)
    if case.startswith("quantized"):
        quantize(source)
    if case.endswith("to-quantized"):
        quantize(target)
    target.weight.weight_loader = "kept"
    before = target.weight
    try:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        assert (
            str(target.load_state_dict(source.state_dict(), assign=assign))
            == "<All keys matched successfully>"
        )
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert isinstance(target.weight, nn.Parameter)
    if assign:
        assert isinstance(target.weight, RTNQuantizedTensor) == case.startswith("quantized")
        kept = source.weight
    else:
        # The target stays what it is: a float checkpoint is quantized as it is loaded, and a quantized one
        # dequantized.
        assert target.weight is before
        # A swapped dense parameter loses its attributes in torch too.
        if not swap or case.endswith("to-quantized"):
            assert target.weight.weight_loader == "kept"
        assert isinstance(target.weight, RTNQuantizedTensor) == case.endswith("to-quantized")
        kept = quantize(copy.deepcopy(source)).weight if case == "float-to-quantized" else source.weight
        kept = kept.dequantize() if case == "quantized-to-float" else kept
    if isinstance(kept, RTNQuantizedTensor):
        assert_same_planes(target.weight, kept)
    else:
        assert_same(target.weight.detach(), kept.detach())
    assert_same(target.bias, source.bias)


def test_load_state_dict_of_another_shape_reports_it():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        quantize(nn.Linear(96, 6)).load_state_dict(nn.Linear(64, 6).state_dict())


def test_state_dict_shares_the_planes():
    module = quantize(nn.Linear(96, 6))
    assert module.state_dict()["weight"].qdata.data_ptr() == module.weight.qdata.data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.to("cpu"),
        lambda m: m.to("meta"),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.share_memory(),
        lambda m: m._apply(torch.clone),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: (m.load_state_dict(saved_and_loaded(m.state_dict())), m)[1],
        lambda m: (m.load_state_dict(saved_and_loaded(m.state_dict()), assign=True), m)[1],
        lambda m: (m.load_state_dict(nn.Linear(96, 6).state_dict()), m)[1],
    ],
    ids=[
        "to",
        "half",
        "cpu",
        "meta",
        "to_empty",
        "share",
        "apply",
        "deepcopy",
        "pickle",
        "load",
        "assign",
        "load-float",
    ],
)
def test_attributes_on_the_parameter_stay(change):
    module = quantize(nn.Linear(96, 6))
    module.weight.input_dim, module.weight.output_dim = 1, 0
    module.weight.tags = {"shard": [1, 2]}
    module = change(module)
    assert isinstance(module.weight, nn.Parameter)
    assert isinstance(module.weight, RTNQuantizedTensor)
    assert (module.weight.input_dim, module.weight.output_dim, module.weight.tags) == (
        1,
        0,
        {"shard": [1, 2]},
    )


def test_functions_on_the_parameter_stay():
    """vLLM hangs its weight_loader on the parameter, and takes views of `.data`."""
    module = quantize(nn.Linear(96, 6))
    module.weight.weight_loader = loader = lambda parameter, loaded: parameter.copy_(loaded)
    module.half()
    module.weight.weight_loader(module.weight.data.narrow(0, 2, 2), torch.zeros(2, 96))
    assert module.weight.weight_loader is loader
    assert not module.weight.dequantize()[2:4].any()


def test_equal():
    w = gaussian(6, 96)
    assert torch.equal(w, w.clone())
    assert torch.equal(w.t(), w.clone().t())
    assert not torch.equal(w, gaussian(6, 96))
    assert not torch.equal(w, w[:5])
    assert not torch.equal(w, w.half())
    assert not torch.equal(w, w.dequantize())
    assert not torch.equal(w.dequantize(), w)


# ----------------------------------------------------------------------------------- .data


@pytest.mark.parametrize("turned", [False, True])
def test_data_takes_a_float_tensor(turned):
    p = nn.Parameter(gaussian(6, 96).mT if turned else gaussian(6, 96), requires_grad=False)
    kept, before = p.data, p.dequantize()
    p.data = torch.ones(p.shape, dtype=torch.bfloat16)
    assert (p.dtype, p.scale.dtype, p.transposed) == (torch.bfloat16, torch.bfloat16, turned)
    fresh = torch.ones(kept.shape, dtype=torch.bfloat16)
    assert_same(
        p.dequantize(),
        RTNQuantizedTensor.from_float(fresh, kept.bits, kept.group_size, kept.scale_method).dequantize(),
    )
    assert_same(kept.dequantize(), before)
    p.data = kept
    assert_same(p.dequantize(), before)


def test_data_takes_a_quantized_tensor_of_another_format():
    p, new = (
        nn.Parameter(gaussian(6, 96), requires_grad=False),
        gaussian(4, 64, bits=8, dtype=torch.float16).t(),
    )
    p.__tensor_flatten__()
    p.data = new
    assert isinstance(p, nn.Parameter)
    assert (p.shape, p.stride(), p.dtype, p.bits) == ((64, 4), new.stride(), torch.float16, 8)
    assert p.__tensor_flatten__() == new.__tensor_flatten__()
    assert p.qdata is new.qdata
    assert_same(p.dequantize(), new.dequantize())


def test_data_takes_a_cast_of_itself_and_a_vector():
    layer = nn.Linear(96, 6, bias=False)
    layer.weight = nn.Parameter(gaussian(6, 96, dtype=torch.bfloat16), requires_grad=False)
    layer.weight.data = layer.weight.data.to(torch.float32)
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), x @ layer.weight.dequantize().t(), rtol=1e-4, atol=1e-4)
    vector = torch.randn(6 * 96)
    nn.utils.vector_to_parameters(vector, layer.parameters())
    assert torch.equal(
        layer.weight,
        RTNQuantizedTensor.from_float(vector.view(6, 96), layer.weight.bits, layer.weight.group_size),
    )


@pytest.mark.parametrize(
    ("new", "error"),
    [(torch.ones(0), ValueError), (torch.ones(6, 96, dtype=torch.int8), TypeError)],
    ids=["shape", "dtype"],
)
def test_data_refuses(new, error):
    w = gaussian(6, 96)
    before = w.dequantize()
    with pytest.raises(error, match=r"cannot set \.data|not supported"):
        w.data = new
    assert_same(w.dequantize(), before)


@pytest.mark.parametrize(
    "options",
    [{"device": "cpu"}, {"dtype": torch.bfloat16}, {"device": "meta"}, {"device": "cpu", "copy": True}],
    ids=str,
)
def test_to_in_inference_mode(options):
    w = gaussian(6, 96)
    with torch.inference_mode():
        out = w.to(**options)
    assert (out.dtype, out.device.type) == (options.get("dtype", w.dtype), options.get("device", "cpu"))
    assert (out.qdata.data_ptr() != w.qdata.data_ptr()) or len(options) == 1
    layer = nn.Linear(96, 6, bias=False)
    layer.weight = nn.Parameter(w, requires_grad=False)
    with torch.inference_mode():
        layer.to(**{name: value for name, value in options.items() if name != "copy"})
    assert layer.weight.device.type == options.get("device", "cpu")


def test_flatten_follows_the_attributes():
    w = gaussian(6, 96)
    before = w.__tensor_flatten__()
    w.scale_method = "signed"
    assert w.__tensor_flatten__() != before
