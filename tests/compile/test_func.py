"""torch.func and forward-mode AD over quantized weights: what they give over the dequantized ones, by our
kernel."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from rtn_tensor import RTNQuantizedTensor, dequantize_, quantize_, rtn
from rtn_tensor.kernels import cpu

every_width = pytest.mark.parametrize("bits", [4, 8])


def mlp(bits=4):
    """Quantized, and the same weights dequantized."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8)))
        quantize_(models[-1], rtn(bits, 32))
    dequantize_(models[1])
    return models


def biases(model):
    return {name: p for name, p in model.named_parameters() if "bias" in name}


def loss(model):
    return lambda x: model(x).square().sum()


def weight(*shape):
    return RTNQuantizedTensor.from_float(torch.randn(shape), 4, 32)


def close(a, b):
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


ONES = torch.ones(3, 96)
TRANSFORMS = {
    "functional_call": lambda m, x: functional_call(m, dict(m.named_parameters()), (x,)),
    "grad": lambda m, x: grad(loss(m))(x),
    "grad-bias": lambda m, x: grad(lambda b: functional_call(m, b, (x,)).square().sum())(biases(m)),
    "grad-weight": lambda m, x: grad(lambda p: functional_call(m, p, (x,)).square().sum())(
        dict(m.named_parameters())
    ),
    "vjp": lambda m, x: vjp(m, x)[1](torch.ones(3, 8)),
    "jvp": lambda m, x: jvp(m, (x,), (ONES,)),
    "jvp-bias": lambda m, x: jvp(
        lambda b: functional_call(m, {"0.bias": b}, (x,)), (torch.zeros(64),), (torch.ones(64),)
    ),
    "vmap": lambda m, x: vmap(m)(x),
    "vmap-in_dims": lambda m, x: vmap(m, in_dims=1)(x.expand(2, 3, 96)),
    "vmap-twice": lambda m, x: vmap(vmap(m))(x.expand(2, 3, 96)),
    "vmap-bias": lambda m, x: vmap(lambda b: functional_call(m, {"0.bias": b}, (x,)))(
        torch.arange(128.0).view(2, 64)
    ),
    "vmap-x-and-bias": lambda m, x: vmap(
        lambda x, b: functional_call(m, {"0.bias": b}, (x,)), in_dims=(0, 1)
    )(x, x.t()[:64]),
    "grad-of-vmap": lambda m, x: grad(lambda x: vmap(m)(x).square().sum())(x),
    "vmap-of-grad": lambda m, x: vmap(grad(loss(m)))(x),
    "bias-gradient-of-each-sample": lambda m, x: vmap(
        grad(lambda b, x: functional_call(m, b, (x,)).square().sum()), in_dims=(None, 0)
    )(biases(m), x),
    "jacrev": lambda m, x: jacrev(m)(x[0]),
    "jacfwd": lambda m, x: jacfwd(m)(x[0]),
    "hessian": lambda m, x: hessian(loss(m))(x[0]),
}


@every_width
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(transform, bits):
    model, dense = mlp(bits)
    x = torch.randn(3, 96)
    close(TRANSFORMS[transform](model, x), TRANSFORMS[transform](dense, x))


@every_width
def test_forward_mode(bits):
    model, dense = mlp(bits)
    x = torch.randn(3, 96)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, ONES)
        close(tuple(forward_ad.unpack_dual(model(dual))), tuple(forward_ad.unpack_dual(dense(dual))))


# fn(w, x): w [64, 96] and x [5, 96], or w [3, 64, 96] for experts.
OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)
OPS = {
    "matmul": lambda w, x: vmap(lambda x: x @ w.t())(x),
    "linear_dx": lambda w, x: vmap(grad(lambda y: (y @ w).square().sum()))(x[:, :64]),
    "embedding": lambda w, x: vmap(lambda i: F.embedding(i, w))(torch.tensor([[0, 3], [3, 1]])),
    "bmm": lambda w, x: vmap(lambda x: torch.bmm(x, w.mT))(x.expand(2, 3, 5, 96)),
    "grouped_mm": lambda w, x: vmap(lambda x: torch._grouped_mm(x, w.mT, offs=OFFS), in_dims=2)(
        x[:, :, None].expand(5, 96, 2)
    ),
    "bmm-jvp": lambda w, x: jvp(lambda x: torch.bmm(x, w.mT), (x.repeat(3, 1, 1),), (torch.ones(3, 5, 96),)),
    "grouped_mm-vjp": lambda w, x: vjp(lambda x: torch._grouped_mm(x, w.mT, offs=OFFS), x)[1](
        torch.ones(5, 64)
    ),
    "bmm-vmap-of-grad": lambda w, x: (
        lambda t: vmap(grad(lambda x: torch.bmm(x, t).square().sum()))(x.expand(2, 3, 5, 96))
    )(w.mT),
    "weights": lambda w, x: vmap(F.linear)(x.expand(3, 5, 96), w),
    "weights-one-x": lambda w, x: vmap(F.linear, in_dims=(None, 0))(x, w),
    "dequantize": lambda w, x: vmap(lambda w: w.dequantize())(w) if isinstance(w, RTNQuantizedTensor) else w,
}
EXPERTS = (
    "bmm",
    "grouped_mm",
    "bmm-jvp",
    "grouped_mm-vjp",
    "bmm-vmap-of-grad",
    "weights",
    "weights-one-x",
    "dequantize",
)


# torch's own batching of the dense grouped_mm.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("op", OPS)
def test_op(op):
    w = weight(*([3] if op in EXPERTS else []), 64, 96)
    dense, x = w.dequantize(), torch.randn(5, 96)
    close(OPS[op](w, x), OPS[op](dense, x))


def test_vmap_is_one_call_of_the_kernel(monkeypatch):
    if cpu.library() is None:
        pytest.skip("needs the C++ library")
    rows, linear = [], cpu.KERNEL.linear
    monkeypatch.setitem(vars(cpu.KERNEL), "linear", lambda *args: rows.append(len(args[0])) or linear(*args))
    cpu.direct(False)
    vmap(nn.Linear(96, 64).requires_grad_(False))(torch.randn(7, 3, 96))
    assert not rows
    w = weight(64, 96)
    vmap(lambda x: F.linear(x, w))(torch.randn(7, 3, 96))
    cpu.direct(True)
    assert rows == [21]


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap-of-grad"])
def test_compiled(transform):
    model, dense = mlp()
    x = torch.randn(3, 96)
    close(
        torch.compile(lambda x: TRANSFORMS[transform](model, x), fullgraph=True, backend="aot_eager")(x),
        TRANSFORMS[transform](dense, x),
    )


def test_quantizing_inside_vmap_is_refused():
    expected = (
        "from_float cannot run inside vmap; w may have leading dims [..., N, K]: quantize it whole, outside"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        vmap(lambda w: RTNQuantizedTensor.from_float(w).dequantize())(torch.randn(3, 64, 96))


def test_a_weight_expands_in_front_only():
    w = weight(64, 96)
    assert torch.equal(w.expand(3, 64, 96)[1], w)
    with pytest.raises(
        ValueError,
        match=re.escape("cannot expand (64, 96) to (128, 96): the last two dims must stay as they are"),
    ):
        weight(64, 96).expand(128, 96)
