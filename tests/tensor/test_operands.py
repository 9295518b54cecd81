"""Embeddings, autocast, operands that do not fit, and the way past the dispatcher."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from quantized_weights import K, N, assert_same, every_format, exact, gaussian, message, names, sparse
from torch import nn
from torch._C import DisableTorchFunctionSubclass

from rtn_tensor import RTNQuantizedTensor, ops

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
        "quantized bias": message(TypeError, lambda: F.linear(x, x, named[0])),
        "quantized sum": message(TypeError, lambda: torch.addmm(named, x, x.mT)),
        "quantized indices": message(TypeError, lambda: F.embedding(named, x)),
        "sparse bias": message(TypeError, lambda: F.linear(x, named, torch.zeros(6).to_sparse())),
        "experts times a row": message(ValueError, lambda: experts @ x[0]),
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
quantized input: linear takes a quantized tensor as its weight only, and here it is the input; call .dequantize() on that
quantized bias: layers.3.mlp.down_proj.weight: linear takes a quantized tensor as its weight only, and here it is the bias; call .dequantize() on that
quantized sum: layers.3.mlp.down_proj.weight: addmm takes a quantized tensor as its weight only, and here it is the input; call .dequantize() on that
quantized indices: layers.3.mlp.down_proj.weight: embedding takes a quantized tensor as its weight only, and here it is the input; call .dequantize() on that
sparse bias: layers.3.mlp.down_proj.weight: bias is of torch.sparse_coo, where a dense tensor is needed; use .to_dense()
experts times a row: bmm needs x [E, M, K] and a weight of E experts, or the weight first, got shapes (2, 6, 96) and (96,); give x a row of experts, or select one expert
bmm of 2-D x: bmm needs x [E, M, K] and a weight of E experts, or the weight first, got shapes (3, 96) and (2, 96, 6); give x a row of experts, or select one expert
grouped of 3-D x: grouped_mm needs x [M, K], a quantized weight [E, K, N] and offs [E]; got shapes (1, 3, 96), (2, 96, 6)
grouped without offs: grouped_mm needs x [M, K], a quantized weight [E, K, N] and offs [E]; got shapes (3, 96), (2, 96, 6)
embedding of transposed: embedding needs a 2-D weight that is not transposed, got RTNQuantizedTensor(shape=(96, 6), bits=4, group_size=32, scale_method='search', transposed=True, dtype=torch.float32, device='cpu')
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
    for fn in (torch.sum, torch.abs, torch.ones_like):
        with pytest.raises(NotImplementedError, match=r"call it on .dequantize\(\)"):
            fn(w)
    for fn in (torch.exp_, nn.init.normal_, lambda w: torch.add(w.dequantize(), 1, out=w)):
        with pytest.raises(NotImplementedError, match=r"on .dequantize\(\), and copy_ them into the weight"):
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
