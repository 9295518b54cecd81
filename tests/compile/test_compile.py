"""torch.compile, torch.export and AOTInductor on quantized weights: one graph, no break, the eager result."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn, rtn_int4

# torch.export copies what it deprecated itself.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is " r"deprecated:FutureWarning"
)

every_width = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.softmax(q @ k.mT, dim=-1) @ v)


def mlp(dim=96, bits=4):
    model = nn.Sequential(
        nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8, bias=False)
    )
    quantize_(model, rtn(bits, 32))
    return model


def weight(*shape, bits=4):
    return RTNQuantizedTensor.from_float(torch.randn(shape), bits, 32)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- whole models


@every_width
@pytest.mark.parametrize("grad", ["grad", "no_grad", "inference_mode"])
def test_mlp_and_new_batch_sizes(bits, grad):
    """One graph for the first batch, one with a symbolic batch, and no more (1 is a size of its own to
    torch)."""
    model = mlp(bits=bits)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[
        grad
    ]():
        for batch in (7, 33, 12, 50):
            x = torch.randn(batch, 96)
            close(compiled(x), model(x))
        assert counter.frame_count == 2
        x = torch.randn(1, 96)
        close(compiled(x), model(x))
        assert counter.frame_count <= 3


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic(dynamic):
    model = mlp()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (7, 33):
        x = torch.randn(batch, 96)
        close(compiled(x), model(x))
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype):
    model = Attention(64).to(dtype)
    quantize_(model, rtn_int4(32))
    x = torch.randn(2, 5, 64, dtype=dtype)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=2e-2, atol=2e-2)


def test_identical_layers_share_one_graph():
    layers = nn.ModuleList([nn.Linear(96, 96) for _ in range(3)])
    quantize_(layers, rtn_int4(32))
    counter = CompileCounter()
    run = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    x = torch.randn(3, 96)
    for layer in layers:
        close(run(layer, x), layer(x))
    assert counter.frame_count == 1
    weights = [weight(96, 96) for _ in range(3)]
    direct = torch.compile(lambda w: F.linear(x, w), backend=counter, fullgraph=True)
    for w in weights:
        close(direct(w), F.linear(x, w))
    assert counter.frame_count == 2


# --------------------------------------------------------------------------------- each op


def op_names(fn, *args):
    """The rtn ops in the graph that a backend gets, and whether compiling changed the result."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes if "rtn" in str(n.target))
        return graph

    out = torch.compile(
        fn, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend), fullgraph=True
    )(*args)
    close(out, fn(*args))
    return seen


OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)

# fn(w, x): w [64, 96] and x [5, 96], or w [3, 64, 96] for experts.
CASES = {
    "linear-bias": ("rtn.linear.default", lambda w, x: F.linear(x, w, torch.ones(64))),
    "linear-nd": ("rtn.linear.default", lambda w, x: F.linear(x.expand(2, 3, 5, 96), w)),
    "mm-t": ("rtn.linear.default", lambda w, x: x.mm(w.t())),
    "matmul-T": ("rtn.linear.default", lambda w, x: x @ w.T),
    "matmul-mT-1d": ("rtn.linear.default", lambda w, x: x[0] @ w.mT),
    "matmul-weight-first": ("rtn.linear.default", lambda w, x: w @ x.t()),
    "matmul-dx": ("rtn.linear_dx.default", lambda w, x: x[:, :64] @ w),
    "addmm": ("rtn.linear.default", lambda w, x: torch.addmm(torch.ones(64), x, w.t(), beta=2)),
    "rows": ("rtn.linear.default", lambda w, x: F.linear(x, w[8:40])),
    "columns": ("rtn.linear.default", lambda w, x: F.linear(x[:, 32:], w[:, 32:])),
    "chunk": ("rtn.linear.default", lambda w, x: F.linear(x, w.chunk(2)[1])),
    "cat": ("rtn.linear.default", lambda w, x: F.linear(x, torch.cat([w, w]))),
    "clone": ("rtn.linear.default", lambda w, x: F.linear(x, w.clone().contiguous())),
    "to": ("rtn.linear.default", lambda w, x: F.linear(x.bfloat16(), w.to(torch.bfloat16)).float()),
    "embedding": ("rtn.embedding.default", lambda w, x: F.embedding(torch.tensor([[0, 3], [3, 1]]), w)),
    "dequantize": ("rtn.dequantize.default", lambda w, x: w.dequantize()),
    "bmm": ("rtn.grouped.default", lambda w, x: torch.bmm(x.expand(3, 5, 96), w.mT)),
    "matmul-3d": ("rtn.grouped.default", lambda w, x: x.expand(3, 5, 96) @ w.mT),
    "grouped_mm": ("rtn.grouped.default", lambda w, x: torch._grouped_mm(x, w.mT, offs=OFFS)),
    "grouped_mm-functional": (
        "rtn.grouped.default",
        lambda w, x: F.grouped_mm(x, w.transpose(-2, -1), offs=OFFS),
    ),
    "one-expert": ("rtn.linear.default", lambda w, x: F.linear(x, w[1])),
}
EXPERTS = ("bmm", "matmul-3d", "grouped_mm", "grouped_mm-functional", "one-expert")


@every_width
@pytest.mark.parametrize("case", CASES)
def test_op(case, bits):
    op, fn = CASES[case]
    w = weight(*([3] if case in EXPERTS else []), 64, 96, bits=bits)
    assert op_names(fn, w, torch.randn(5, 96)) == [op]


def test_ops_under_inductor():
    w, experts, x = weight(64, 96), weight(3, 64, 96), torch.randn(5, 96)

    def fn(w, experts, x):
        y = F.linear(x, w, torch.ones(64)) + x @ w.t() + F.embedding(torch.tensor([0, 3, 3, 1, 2]), w)[:, :64]
        return y + torch._grouped_mm(x, experts.mT, offs=OFFS) + torch.bmm(x.expand(3, 5, 96), experts.mT)[1]

    close(torch.compile(fn, fullgraph=True)(w, experts, x), fn(w, experts, x))


def test_autocast_inside():
    model = mlp()

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    x = torch.randn(5, 96)
    out = torch.compile(fn, fullgraph=True)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, fn(x), rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------- gradients


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(96, 64)
        self.head = nn.Linear(64, 8, bias=False)
        self.a, self.b = nn.Linear(96, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.head(torch.relu(self.base(x) + self.b(self.a(x))))


@every_width
def test_backward(bits):
    model = LoRA()
    quantize_(model, rtn(bits, 32), filter_fn=lambda module, fqn: fqn in ("base", "head"))
    x = torch.randn(5, 96, requires_grad=True)
    counter = CompileCounterWithBackend("inductor")
    leaves = [x, model.base.bias, model.a.weight, model.b.weight]
    got = torch.autograd.grad(torch.compile(model, backend=counter, fullgraph=True)(x).square().sum(), leaves)
    for grad, expected in zip(got, torch.autograd.grad(model(x).square().sum(), leaves), strict=True):
        close(grad, expected)
    assert counter.frame_count == 1


# --------------------------------------------------------------------------- fresh weights


@every_width
def test_copy_into_a_live_compiled_model(bits):
    model = mlp(bits=bits)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, 96)
    before = compiled(x)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(torch.randn(layer.weight.shape))
    after = compiled(x)
    assert not torch.allclose(after, before)
    close(after, model(x))
    fresh = mlp(bits=bits)
    model.load_state_dict(fresh.state_dict())
    close(compiled(x), fresh(x))
    assert counter.frame_count == 1


@every_width
def test_copy_inside_compile(bits):
    def update(w, new):
        w.copy_(new)
        return F.linear(new, w)

    new = torch.randn(64, 96)
    w = weight(64, 96, bits=bits)
    out = torch.compile(update, fullgraph=True)(w, new)
    expected = RTNQuantizedTensor.from_float(new, bits, 32)
    assert torch.equal(w, expected)
    close(out, F.linear(new, expected))


@every_width
@pytest.mark.parametrize("scale_method", ["absmax", "signed"])
def test_from_float_inside_compile(bits, scale_method):
    def fn(w):
        return RTNQuantizedTensor.from_float(w, bits, 32, scale_method)

    w = torch.randn(64, 100, dtype=torch.bfloat16)
    out = torch.compile(fn, fullgraph=True)(w)
    assert isinstance(out, RTNQuantizedTensor)
    assert torch.equal(out, fn(w))


def test_a_graph_with_symbols_gives_tensors_without():
    """A new width must not come out with the in_features of the trace, nor bits and group_size as symbols."""
    wide = torch.compile(
        lambda w: (RTNQuantizedTensor.from_float(w, 4, 32), RTNQuantizedTensor.from_float(w, 4, 32).t()),
        dynamic=True,
    )
    for k in (128, 100):
        w = torch.randn(64, k)
        expected = RTNQuantizedTensor.from_float(w, 4, 32)
        for out in wide(w):
            assert (type(out.in_features), out.in_features) == (int, k)
            assert torch.equal(out, expected.t() if out.transposed else expected)
    any_format = torch.compile(RTNQuantizedTensor.from_float, backend="aot_eager")
    for bits, group_size in ((4, 32), (8, 64), (4, 96)):
        out = any_format(w, bits, group_size)
        assert (type(out.bits), type(out.group_size)) == (int, int)
        assert torch.equal(out, RTNQuantizedTensor.from_float(w, bits, group_size))


# ---------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def exportable():
    torch.manual_seed(0)
    model = mlp().eval().requires_grad_(False)
    return model, torch.randn(5, 96)


DYNAMIC = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=1024)},)}


@pytest.mark.parametrize("strict", [False, True])
def test_export(exportable, strict):
    model, x = exportable
    program = torch.export.export(copy.deepcopy(model), (x,), strict=strict, **DYNAMIC)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for p in (program, loaded):
        for batch in (5, 1, 17):
            x = torch.randn(batch, 96)
            close(p.module()(x), model(x))
    targets = [str(n.target) for n in program.run_decompositions().graph.nodes]
    assert targets.count("rtn.linear.default") == 3


def test_aotinductor(exportable, tmp_path):
    model, x = exportable
    program = torch.export.export(copy.deepcopy(model), (x,), **DYNAMIC)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for batch in (5, 17):
        x = torch.randn(batch, 96)
        close(run(x), model(x))
