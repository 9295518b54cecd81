"""Products with a quantized weight, and with experts."""

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import K, N, assert_same, every_format, every_width, exact, names, sparse
from torch._C import DisableTorchFunctionSubclass

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
