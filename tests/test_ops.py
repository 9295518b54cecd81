from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from bounds import activations, random_planes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rtn_tensor import RTNQuantizedTensor, _torch, ops
from rtn_tensor.formats import FORMATS

rtn = torch.ops.rtn
OPS = sorted(
    name.removeprefix("rtn::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("rtn::")
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def samples(op, dtype=torch.float32, requires_grad=False):
    """Arguments of `op`: both widths, odd shapes, empty batches, every rank of x."""

    def grad(*shape):
        return torch.randn(shape).to(dtype).requires_grad_(requires_grad)

    for bits, group_size, n, k, method in [
        (4, 32, 5, 100, "absmax"),
        (8, 64, 1, 100, "absmax"),
        (4, -1, 5, 33, "absmax"),
        (8, -1, 7, 32, "absmax"),
        (4, 32, 5, 100, "minmax"),
        (8, -1, 7, 33, "minmax"),
    ]:
        w = random_planes(n, k, bits=bits, group_size=group_size, dtype=dtype, method=method)
        experts = random_planes(3, n, k, bits=bits, group_size=group_size, dtype=dtype, method=method)
        zero, zeros = (() if t.zero is None else (t.zero,) for t in (w, experts))
        offs = torch.tensor([0, 2, 4], dtype=torch.int32)
        tail = (bits, group_size)
        yield from {
            "linear": [
                (grad(*rows, k), w.qdata, w.scale, grad(n) if bias else None, *tail, *zero)
                for rows in [(), (3,), (1,), (0,), (2, 3), (2, 0), (2, 1, 3)]
                for bias in (True, False)
            ],
            "linear_dx": [
                (grad(*rows, n), w.qdata, w.scale, *tail, k, *zero) for rows in [(), (3,), (1,), (0,), (2, 3)]
            ],
            "grouped": [
                (grad(m, k), experts.qdata, experts.scale, offs.clamp(max=m), *tail, *zeros)
                for m in (5, 4, 0)
            ],
            "grouped_dx": [
                (grad(m, n), experts.qdata, experts.scale, offs.clamp(max=m), *tail, k, *zeros)
                for m in (5, 4, 0)
            ],
            "routed": [
                (
                    torch.randn(m, k).to(dtype),
                    *experts[:2],
                    bias,
                    torch.randint(3, (2 * m,)),
                    *by_expert,
                    torch.rand(2 * m),
                    2,
                    "",
                    *tail,
                    *zeros,
                )
                for m in (3, 1, 0)
                for bias in (None, torch.randn(3, n).to(dtype))
                for by_expert in (
                    (None, None),
                    (torch.arange(2 * m, dtype=torch.int32), offs.clamp(max=2 * m)),
                )
            ],
            "embedding": [
                (torch.zeros(shape, dtype=index), w.qdata, w.scale, *tail, k, *zero)
                for shape, index in [
                    ((3,), torch.int64),
                    ((2, 3), torch.int32),
                    ((), torch.int64),
                    ((0,), torch.int32),
                ]
            ],
            "quantize": [
                (torch.randn(*rows, k).to(dtype), *tail, method, torch.bfloat16)
                for rows in [(n,), (), (0,), (2, 3)]
                for method in ("absmax", "signed", "minmax")
            ],
            "dequantize": [
                (q, s, *tail, k, out, *z)
                for q, s, *z in [
                    (w.qdata, w.scale, *zero),
                    (experts.qdata, experts.scale, *zeros),
                    *(tuple(t[at] for t in (w.qdata, w.scale, *zero)) for at in (0, slice(0))),
                ]
                for out in DTYPES
            ],
        }[op]


each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
differentiable = pytest.mark.parametrize("op", ["linear", "linear_dx", "grouped", "grouped_dx"])


def test_ops_are_all_here():
    assert OPS == [
        "dequantize",
        "embedding",
        "grouped",
        "grouped_dx",
        "linear",
        "linear_dx",
        "quantize",
        "routed",
    ]


# Tracing is most of opcheck's time.
EVERY_SAMPLE = ("test_schema", "test_autograd_registration", "test_faketensor")
A_FEW = "test_aot_dispatch_dynamic"


def opcheck(op, requires_grad):
    for i, args in enumerate(samples(op, requires_grad=requires_grad)):
        tests = EVERY_SAMPLE if i % 11 else (*EVERY_SAMPLE, A_FEW)
        torch.library.opcheck(getattr(rtn, op).default, args, test_utils=tests)


@each_op
def test_opcheck(op):
    opcheck(op, requires_grad=False)


# torch 2.14's opcheck asks for it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@differentiable
def test_opcheck_with_gradients(op):
    opcheck(op, requires_grad=True)


@each_op
@each_dtype
def test_dispatcher_gives_what_the_fast_path_gives(op, dtype):
    for args in samples(op, dtype):
        fast, dispatched = getattr(ops, op)(*args), getattr(rtn, op)(*args)
        for a, b in zip(tree_leaves(fast), tree_leaves(dispatched), strict=True):
            assert torch.equal(a, b)


def strides(t):
    """Those that say something: a dim of size 1 may have any."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1] if t.numel() else []


@each_op
@each_dtype
def test_meta_agrees_with_real(op, dtype):
    for args in samples(op, dtype):
        real = tree_leaves(getattr(ops, op)(*args))
        meta = tree_leaves(getattr(ops, op)(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)))
        for r, m in zip(real, meta, strict=True):
            assert m.is_meta
            assert (m.shape, m.dtype, strides(m)) == (r.shape, r.dtype, strides(r))


@each_op
def test_fake_tensor_mode(op):
    with FakeTensorMode() as mode:
        for args in samples(op):
            fake = getattr(ops, op)(*tree_map_only(torch.Tensor, mode.from_tensor, args))
            assert all(type(t).__name__ == "FakeTensor" for t in tree_leaves(fake))


@each_op
def test_make_fx_sees_one_op(op):
    args = next(samples(op))
    graph = make_fx(lambda *args: getattr(ops, op)(*args))(*args).graph
    called = [node.target for node in graph.nodes if node.op == "call_function" and "rtn" in str(node.target)]
    assert called == [getattr(rtn, op).default]


@each_op
def test_dispatch_modes_see_the_op(op):
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    args = next(samples(op))
    with Spy():
        getattr(ops, op)(*args)
    assert seen.count(getattr(rtn, op).default) == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap():
    w = random_planes(5, 100)
    x = torch.randn(4, 3, 100)
    got = torch.vmap(lambda x: ops.linear(x, w.qdata, w.scale, None, 4, 32))(x)
    torch.testing.assert_close(got, ops.linear(x, w.qdata, w.scale, None, 4, 32))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_sees_the_op():
    w = random_planes(5, 100)
    traced = torch.jit.trace(lambda x: ops.linear(x, w.qdata, w.scale, None, 4, 32), torch.randn(3, 100))
    assert "rtn::linear" in str(traced.graph)


def test_tracing():
    x = torch.randn(3)
    assert not _torch.tracing(x, torch.nn.Parameter(x))
    assert _torch.tracing(x.to("meta"))
    assert _torch.tracing(x, FakeTensorMode().from_tensor(x))
    with FakeTensorMode():
        assert _torch.tracing(x)
    seen = []
    torch.func.grad(lambda t: (seen.append(_torch.tracing(t)), t.sum())[1])(x)
    make_fx(lambda t: (seen.append(_torch.tracing(t)), t.sum())[1])(x)
    assert seen == [True, True]
    assert not _torch.tracing(x)


def test_fast_path_leaves_the_dispatcher_out(monkeypatch):
    """It is only faster if it is taken: for plain tensors, also under no_grad with an x that requires a
    gradient."""
    w = random_planes(5, 100)
    monkeypatch.setattr(ops, "rtn_ops", None)
    for op in OPS:
        getattr(ops, op)(*next(samples(op)))
    x = torch.randn(3, 100, requires_grad=True)
    with torch.no_grad():
        ops.linear(x, w.qdata, w.scale, None, 4, 32)
    with torch.inference_mode():
        ops.linear(x, w.qdata, w.scale, None, 4, 32)
    with pytest.raises(AttributeError):
        ops.linear(x, w.qdata, w.scale, None, 4, 32)


# -------------------------------------------------------------------------------- autocast


@each_op
@pytest.mark.parametrize("door", [ops, rtn], ids=["fast", "dispatched"])
def test_autocast_does_not_reach_into_a_kernel(op, door, monkeypatch):
    """The reference's fp32 products would silently be bf16 ones."""
    monkeypatch.setenv("RTN_KERNEL", "reference")
    for args in samples(op, torch.bfloat16 if op == "quantize" else torch.float32):
        plain = getattr(door, op)(*args)
        with torch.autocast("cpu", torch.bfloat16):
            cast = getattr(door, op)(*args)
        for a, b in zip(tree_leaves(plain), tree_leaves(cast), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------- gradients


def dense(op, x, w, bias, offs):
    """The op as plain autograd sees it, on the dequantized weight."""
    w = w.mT if op.endswith("dx") else w
    if op.startswith("linear"):
        return F.linear(x, w, bias)
    ends = [0, *offs.tolist()]
    rows = [x[start:end] @ w_NK.mT for (start, end), w_NK in zip(pairwise(ends), w, strict=True)]
    return torch.cat([*rows, x.new_zeros(x.shape[0] - ends[-1], w.shape[-2])])


@differentiable
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("rows", [(5,), (2, 3), (), (0,)])
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_gradients_are_those_of_the_dense_weight(op, bits, rows, method):
    """First and second derivatives, of x and of the bias."""
    experts = (3,) if op.startswith("grouped") else ()
    if experts and len(rows) != 1:
        rows = (7,)
    w = random_planes(*experts, 6, 100, bits=bits, group_size=32, method=method)
    offs = torch.tensor([2, 2, 4], dtype=torch.int32).clamp(max=rows[0] if rows else 1)
    x = torch.randn(*rows, 6 if op.endswith("dx") else 100, requires_grad=True)
    bias = torch.randn(6, requires_grad=True) if op == "linear" else None
    args = {
        "linear": (bias, bits, 32),
        "linear_dx": (bits, 32, 100),
        "grouped": (offs, bits, 32),
        "grouped_dx": (offs, bits, 32, 100),
    }[op]
    inputs = [x] if bias is None else [x, bias]
    y = getattr(ops, op)(x, w.qdata, w.scale, *args, w.zero)
    expected = dense(op, x, w.exact().float(), bias, offs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    dy = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    expected_first = torch.autograd.grad(expected, inputs, dy, create_graph=True)
    torch.testing.assert_close(first, expected_first, rtol=1e-4, atol=1e-4)

    ddx = [torch.randn_like(g) for g in first]
    second = torch.autograd.grad(first, [dy], ddx)
    torch.testing.assert_close(second, torch.autograd.grad(expected_first, [dy], ddx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_asked_gradients_are_computed(needs, monkeypatch):
    w = random_planes(5, 100)
    x, bias = (torch.randn(n, requires_grad=need) for n, need in zip((100, 5), needs, strict=True))
    calls = []
    monkeypatch.setattr(ops, "linear_dx", lambda *args: (calls.append(1), torch.zeros(100))[1])
    y = ops.linear(x, w.qdata, w.scale, bias, 4, 32)
    assert y.requires_grad == any(needs)
    if y.requires_grad:
        y.sum().backward()
    assert [t.grad is not None for t in (x, bias)] == list(needs)
    assert len(calls) == needs[0]


@differentiable
@each_dtype
def test_backward_keeps_the_packed_planes_only(op, dtype):
    saved = []
    for args in list(samples(op, dtype, requires_grad=True))[::2]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            getattr(ops, op)(*args)
        zero = args[-1] if isinstance(args[-1], torch.Tensor) else None
        expected = [args[1], args[2], *([args[3]] if op.startswith("grouped") else []), zero]
        expected = [t for t in expected if t is not None]
        assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in expected)
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in expected}


@differentiable
def test_output_may_be_changed_in_place(op):
    """As nn.ReLU(inplace=True) does, which autograd refuses on a view made inside an op."""
    for args in samples(op, requires_grad=True):
        getattr(ops, op)(*args).relu_().sum().backward()
        assert args[0].grad.isfinite().all()


def test_gradient_has_the_dtype_of_x():
    w = random_planes(5, 100)  # an fp32 weight under autocast: x is bf16
    x = activations(3, 100, torch.bfloat16).requires_grad_()
    y = ops.linear(x, w.qdata, w.scale, None, 4, 32)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


def test_a_backward_sees_weights_that_were_quantized_anew():
    w = RTNQuantizedTensor.from_float(torch.randn(32, 64), group_size=32)
    x = torch.randn(3, 64, requires_grad=True)
    y = F.linear(x, w)
    w.copy_(torch.randn(32, 64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
