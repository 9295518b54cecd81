"""Converting a module whose weight something else holds, and writing through views of a weight that a
compiled graph has several of."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn_int4

# Which modes and which shapes go together makes no difference, and each case takes a compilation.
MODES = [(torch.enable_grad, None), (torch.inference_mode, None), (torch.no_grad, True)]
IDS = ["grad", "inference", "no_grad-dynamic"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    quantize_(made, rtn_int4(32))
    return made


X = torch.ones(2, 64)


# ----------------------------------------------------------------- converting what is held

HOLDERS = {
    "view": lambda m: m[0].weight.view(64, 64),
    "slice": lambda m: m[0].weight[8:],
    "columns": lambda m: m[0].weight[:, 32:],
    "t": lambda m: m[0].weight.t(),
    "slice-of-the-second": lambda m: m[1].weight[8:],
    "weakref": lambda m: weakref.ref(m[0].weight),
    "weak-dict": lambda m: weakref.WeakValueDictionary({"w": m[0].weight}),
    "export": lambda m: torch.export.export(m, (X.bfloat16(),)),
    "trace": lambda m: torch.jit.trace(m, X.bfloat16()),
}
CONVERSIONS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "to": lambda m: m.to(torch.float32),
    "meta": lambda m: m.to("meta"),
    "empty": lambda m: m.to_empty(device="cpu"),
}
holders = pytest.mark.parametrize("holder", HOLDERS)
quiet = pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")


@quiet
@holders
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_held_weight_is_named(holder, conversion):
    m = model()
    twin = copy.deepcopy(m)
    held = HOLDERS[holder](m)
    name = "1.weight" if holder == "slice-of-the-second" else "0.weight"
    kind = (
        r"a weak reference \(torch.export leaves one for good\)"
        if "weak" in holder or holder == "export"
        else "a view or a trace"
    )
    with pytest.raises(
        RuntimeError,
        match=rf"^{name}: torch cannot convert or move .* while {kind} holds it; let go of "
        r"that first, or convert a copy",
    ):
        CONVERSIONS[conversion](m)
    # The first way out: another call goes on where this one stopped.
    if conversion in ("half", "float", "to") and holder != "export":
        del held
        gc.collect()
        CONVERSIONS[conversion](m)
        CONVERSIONS[conversion](twin)
        x = X.to(m[0].weight.dtype)
        assert torch.equal(m(x), twin(x))


@quiet
@holders
def test_a_copy_converts(holder):
    m = model()
    held = HOLDERS[holder](m)
    converted = copy.deepcopy(m).to(torch.float32)
    assert held is not None
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert torch.equal(converted(X), model().float()(X))


@quiet
@holders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_data_converts_a_held_weight(holder, dtype):
    m = model()
    held = HOLDERS[holder](m)
    before = held.dequantize() if isinstance(held, torch.Tensor) else None
    for p in m.parameters():
        p.data = p.data.to(dtype)
    assert {p.dtype for p in m.parameters()} == {dtype}
    assert torch.equal(m(X.to(dtype)), model().to(dtype)(X.to(dtype)))
    if before is not None:
        assert torch.equal(held.dequantize(), before)
    if isinstance(held, weakref.ref):
        assert held() is m[0].weight


def test_what_holds_no_tensor_is_in_nobodys_way():
    m = model()
    kept = [
        m.state_dict(),
        m[0].weight,
        m[0].weight.data,
        m[0].weight.detach(),
        m[0].weight.data[8:],
        m(X.bfloat16().requires_grad_()),
    ]
    kept.append(torch.optim.SGD(m.parameters()))
    assert torch.equal(m.float()(X), model().float()(X))
    assert len(kept) == 7


def test_double_names_the_weight():
    with pytest.raises(
        TypeError,
        match=r"^0.weight: dtype torch.float64 is not supported for a quantized "
        r"weight; use torch.float32, ",
    ):
        model().double()


# -------------------------------------------------------------- frames that Dynamo gave up


def in_a_loop(body, w, x):
    for _ in range(2):
        print(end="")
        y = body(w, x)
    return y


def in_a_try_block(body, w, x):
    try:
        print(end="")
        y = body(w, x)
        print(end="")
        return y
    finally:
        x.sum()


def sets_data(w, x):
    w.data = w.data
    return F.linear(x, w)


def sets_float_data(w, x):
    w.data = w.dequantize()
    return F.linear(x, w)


BODIES = {
    "data": lambda w, x: F.linear(x, w.data),
    "rows-of-data": lambda w, x: F.linear(x, w.data[2:]),
    "mT-of-data": lambda w, x: x @ w.data.mT,
    "sets-data": sets_data,
    "sets-float-data": sets_float_data,
    "mT-of-expand": lambda w, x: torch.bmm(x.expand(3, -1, -1), w.expand(3, -1, -1).mT),
    "matmul-of-expand": lambda w, x: x.expand(3, -1, -1) @ w.expand(3, -1, -1).mT,
    "transpose-of-expand": lambda w, x: torch.bmm(x.expand(3, -1, -1), w.expand(3, -1, -1).transpose(1, 2)),
    "mT-of-unsqueeze": lambda w, x: torch.bmm(x[None], w[None].mT),
}


@pytest.mark.parametrize(
    ("frame", "mode", "dynamic"),
    [(in_a_try_block, *MODES[0]), (in_a_loop, *MODES[1]), (in_a_loop, *MODES[2])],
    ids=["try-grad", "loop-inference", "loop-no_grad-dynamic"],
)
@pytest.mark.parametrize("body", BODIES)
def test_frames_that_dynamo_gave_up(body, frame, mode, dynamic):
    w, x = RTNQuantizedTensor.from_float(torch.randn(6, 128), 4, 32), torch.randn(2, 128)
    with mode():
        expected = frame(BODIES[body], w.clone(), x)
        y = torch.compile(frame, backend="aot_eager", dynamic=dynamic)(BODIES[body], w, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------- writes after a graph break


def writes_and_reads_both(w, new):
    part = w[2:]
    torch._dynamo.graph_break()
    part.copy_(new[2:])
    return F.linear(new, part), F.linear(new, w)


def writes_one_of_a_chunk(w, new):
    q, k, v = w.chunk(3)
    torch._dynamo.graph_break()
    k.copy_(new[2:4])
    return F.linear(new, q), F.linear(new, k), F.linear(new, v)


def adds_to_one(w, new):
    part = w[2:]
    torch._dynamo.graph_break()
    part.add_(new[2:])
    return F.linear(new, part), F.linear(new, w)


def copies_one_into_the_other(w, new):
    part, other = w[2:4], w[1:3]
    torch._dynamo.graph_break()
    part.copy_(other)
    return F.linear(new, part), F.linear(new, w)


def takes_it_again(w, new):
    part = w[2:]
    torch._dynamo.graph_break()
    part = w[2:]
    part.copy_(new[2:])
    return F.linear(new, part), F.linear(new, w)


def writes_alone(w, new):
    part = w[2:]
    torch._dynamo.graph_break()
    part.copy_(new[2:])
    torch._dynamo.graph_break()
    return F.linear(new, part), F.linear(new, w)


def writes_uncompiled(w, new):
    part = w[2:]
    torch._dynamo.graph_break()
    torch.compiler.disable(lambda: part.copy_(new[2:]))()
    return F.linear(new, part), F.linear(new, w)


FUNCTIONS = [
    writes_and_reads_both,
    writes_one_of_a_chunk,
    adds_to_one,
    copies_one_into_the_other,
    takes_it_again,
    writes_alone,
    writes_uncompiled,
]


@pytest.mark.parametrize(("mode", "dynamic"), MODES, ids=IDS)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_a_write_through_a_slice_after_a_graph_break(fn, mode, dynamic):
    """Right, or an error that says what to do, and the weight as it was: a graph would have two copies of the
    part that is written."""
    w, new = RTNQuantizedTensor.from_float(torch.randn(6, 128), 4, 32), torch.randn(6, 128)
    twin = w.clone()
    refused = fn in (writes_and_reads_both, adds_to_one, copies_one_into_the_other)
    message = "several views of one quantized weight as arguments .* take the slices in the graph itself"
    with mode(), pytest.raises(RuntimeError, match=message) if refused else contextlib.nullcontext():
        out = torch.compile(fn, backend="aot_eager", dynamic=dynamic)(w, new)
    if not refused:
        with mode():
            for a, b in zip(out, fn(twin, new), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(w, twin)
