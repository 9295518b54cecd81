"""Whether every op of the Triton kernels is right on the device: fresh random data, outputs poisoned with
NaN, against the reference.

Products are held to the element-wise bound of tests/bounds.py, in fp64, and a second run to the bits of the
first; quantize, dequantize and embedding to the bits of the reference. The jobs run side by side, since
compiling is most of what they do, and what they compile the timings then find in Triton's cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from bounds import TOLERANCE, Planes, activations, assert_linear_close, random_planes
from torch import Tensor, nn

from benchmarks import gpu_peers as peers
from benchmarks.gpu_peers import MODELS, Experts
from benchmarks.gpu_workers import Budget, Job, described, lost
from rtn_tensor import quantize_, reference, rtn
from rtn_tensor.formats import FORMATS, groups
from rtn_tensor.kernels import triton
from rtn_tensor.kernels.problem import Kernel, make_problem

DTYPES = ("bfloat16", "float16", "float32")
GROUP_SIZES = (128, 32, 64, 96, -1)
PRODUCTS = ("linear", "linear_dx", "grouped", "grouped_dx")
# M, N, K: each number of rows that a tile has, and about; short last groups, chunks and steps.
SHAPES = (
    (1, 1, 32),
    (1, 5, 576),
    (3, 100, 1000),
    (17, 130, 100),
    (33, 200, 1000),
    (65, 257, 640),
    (130, 300, 1000),
    (300, 129, 160),
)
DX_SHAPES = ((1, 5, 576), (17, 130, 100), (65, 257, 640), (130, 300, 1000))
# weights; from so many on they are random bytes, checked some rows at a time, and N and K are those of a
# benchmark.
LARGE = 1 << 24
ROWS = 2048
# Of MoE layers: the shape, numbers of tokens, and what is between the products.
ROUTED = ((Experts(5, 160, 96, 2), (1, 7, 40), "silu"), (Experts(9, 256, 160, 3), (2, 150), "gpt_oss"))
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # which deterministic algorithms ask for

Report = Callable[[dict], None]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN: an element that a kernel forgets to write is seen. And where we
    leave a product to cuBLAS, it adds up in fp32, which is what the bound is for."""
    matmul = torch.backends.cuda.matmul
    settings = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = torch.are_deterministic_algorithms_enabled(), [getattr(matmul, name) for name in settings]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name in settings:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        for name, value in zip(settings, before[1], strict=True):
            setattr(matmul, name, value)


def attempt(report: Report, budget: Budget, name: str, check: Callable[[], Any]) -> None:
    if budget.left() < 0:
        report({"check": name, "skipped": "no time was left"})
        return
    error = None
    try:
        check()
    except Exception as raised:
        error = described(raised)
    report({"check": name, "error": error})
    if lost():
        raise RuntimeError(f"the GPU was lost in: {name}")


def label(op: str, w: Planes, dtype: torch.dtype, m: int) -> str:
    return (
        f"{op} int{w.bits} g{w.group_size} {str(dtype)[6:]}, x {m} rows, weight {[*w.qdata.shape[:-1], w.k]}"
    )


def some_planes(*shape: int, bits: int, group_size: int, dtype: torch.dtype, device: str) -> Planes:
    """As tests/bounds.py makes them; large ones of random bytes and scales, which takes a tenth of the
    memory."""
    if torch.Size(shape).numel() < LARGE:
        return random_planes(*shape, bits=bits, group_size=group_size, dtype=dtype, device=device)
    *rows, k = shape
    qdata = torch.randint(0, 256, (*rows, FORMATS[bits].row_bytes(k)), dtype=torch.uint8, device=device)
    scale = (torch.rand(*rows, groups(k, group_size), device=device) + 0.5) / FORMATS[bits].qmax
    return Planes(qdata, scale.to(dtype), bits, group_size, k)


def rows_of(w: Planes, rows: slice | int) -> Planes:
    return w._replace(qdata=w.qdata[rows], scale=w.scale[rows])


def row_slices(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]


# -------------------------------------------------------------------------------- products


def check_product(kernel: Kernel, op: str, x: Tensor, w: Planes, bias: Tensor | None = None) -> None:
    """For experts the rows are dealt as to one that is empty first, one in the middle, and nobody at the
    end."""
    m, over_k = x.shape[0], not op.endswith("dx")
    problem = make_problem(op, x.dtype, m, w.k, w.qdata, w.scale, w.bits, w.group_size)
    rounded_to = x.dtype if kernel.rounds_weight(problem) else None
    offs = (
        torch.tensor([0, m // 3, m // 3, m - m // 4], dtype=torch.int32, device=x.device)
        if op.startswith("grouped")
        else None
    )
    extra = [] if op == "linear_dx" else [bias] if offs is None else [offs]

    def run() -> Tensor:
        return getattr(kernel, op)(
            x, w.qdata, w.scale, *extra, w.bits, w.group_size, *([] if over_k else [w.k])
        )

    y = run()
    parts = [(slice(0, m), w)]
    if offs is not None:
        ends = [0, *offs.tolist()]
        parts = [(slice(ends[e], ends[e + 1]), rows_of(w, e)) for e in range(len(offs))]
        assert torch.equal(y[ends[-1] :], torch.zeros_like(y[ends[-1] :])), "rows of no expert are not zero"
    for rows, part in parts:
        if not over_k:
            assert_linear_close(y[rows], x[rows], part.exact(rounded_to).mT)
            continue
        for some in row_slices(part.qdata.shape[0]):
            exact = rows_of(part, some).exact(rounded_to)
            assert_linear_close(y[rows, some], x[rows], exact, None if bias is None else bias[some])
    assert torch.equal(y, run()), "a second run gave other bits"


def products(
    report: Report,
    budget: Budget,
    op: str,
    dtype: str,
    bits: int,
    group_size: int,
    shapes: Sequence[tuple[int, int, int]],
    device: str = "cuda",
    kernel: Kernel = triton.KERNEL,
) -> None:
    of = getattr(torch, dtype)
    planes: dict[tuple[int, int], Planes] = {}
    for m, n, k in shapes:
        experts = (4,) if op.startswith("grouped") else ()
        if (n, k) not in planes:
            planes = {
                (n, k): some_planes(*experts, n, k, bits=bits, group_size=group_size, dtype=of, device=device)
            }
        w = planes[n, k]
        x = activations(m, n if op.endswith("dx") else k, of, device)
        with poisoned():
            attempt(report, budget, label(op, w, of, m), partial(check_product, kernel, op, x, w))
            if op == "linear":
                bias = torch.randn(n, device=device).to(of)
                attempt(
                    report,
                    budget,
                    label("linear with bias", w, of, m),
                    partial(check_product, kernel, op, x, w, bias),
                )


# ------------------------------------------------------------------------ ops without sums


def check_quantize(
    kernel: Kernel, w: Tensor, bits: int, group_size: int, method: str, scale_dtype: torch.dtype
) -> None:
    got = kernel.quantize(w, bits, group_size, method, scale_dtype)
    for plane, expected in zip(
        got, reference.quantize(w, bits, group_size, method, scale_dtype), strict=True
    ):
        assert plane.dtype == expected.dtype
        torch.testing.assert_close(plane, expected, rtol=0, atol=0, equal_nan=True)


def check_dequantize(kernel: Kernel, w: Planes, dtype: torch.dtype) -> None:
    got = kernel.dequantize(w.qdata, w.scale, w.bits, w.group_size, w.k, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, w.exact().float().to(dtype), rtol=0, atol=0)


def check_embedding(kernel: Kernel, w: Planes, indices: Tensor) -> None:
    got = kernel.embedding(indices, w.qdata, w.scale, w.bits, w.group_size, w.k)
    torch.testing.assert_close(got, w.exact().float().to(w.scale.dtype)[indices], rtol=0, atol=0)


def planes(
    report: Report,
    budget: Budget,
    dtype: str,
    bits: int,
    group_size: int,
    shapes: Sequence[tuple[int, int]],
    device: str = "cuda",
    kernel: Kernel = triton.KERNEL,
) -> None:
    """quantize, dequantize and embedding; `dtype` is the weight's and the scale's, or one of the two."""
    of = getattr(torch, dtype)
    for n, k in shapes:
        w = torch.randn(n, k, device=device)
        if n > 3:
            w[0], w[1, k // 2], w[2] = 0, torch.nan, w[2] * torch.finfo(of).tiny
        kept = random_planes(n, k, bits=bits, group_size=group_size, dtype=of, device=device)
        indices = torch.randint(0, n, (3, 4), device=device)
        checks: dict[str, Callable[[], None]] = {"embedding": partial(check_embedding, kernel, kept, indices)}
        for method in ("absmax", "signed"):
            checks[f"quantize, {method},"] = partial(
                check_quantize, kernel, w.to(of), bits, group_size, method, of
            )
        for other in DTYPES:
            to = getattr(torch, other)
            checks[f"quantize, {other} scale,"] = partial(
                check_quantize, kernel, w.to(of), bits, group_size, "absmax", to
            )
            checks[f"dequantize to {other},"] = partial(check_dequantize, kernel, kept, to)
        with poisoned():
            for name, check in checks.items():
                attempt(report, budget, label(name, kept, of, n), check)


# ------------------------------------------ routed: what is around the products of experts


def swish(g: Tensor, times: float) -> Tensor:
    return g * torch.sigmoid(times * g)


def assert_within(y: Tensor, ref: Tensor, allowed: Tensor) -> None:
    wrong = ~((y.double() - ref).abs() <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are out of bound; the first, {at}, is "
            f"{y[at]:.6g}, "
            f"but {ref[at]:.6g} +- {allowed[at]:.2g} is allowed"
        )


def assert_gated_close(
    y: Tensor, x: Tensor, gate: Tensor, up: Tensor, activation: str, bias: tuple[Tensor, Tensor] | None = None
) -> None:
    """y is the activation of x @ gate^T and x @ up^T, as far as the bounds on the two, carried through it,
    allow."""
    u, c, a = TOLERANCE[x.dtype]
    x, size = x.double(), x.double().abs()
    g, v = x @ gate.mT, x @ up.mT
    off_g, off_v = c * (size @ gate.abs().mT), c * (size @ up.abs().mT)
    if bias is not None:
        g, v = g + bias[0].double(), v + bias[1].double()
    if activation == "silu":
        s = swish(g, 1.0)
    else:
        g = g.clamp(max=7.0)
        s, v = swish(g, 1.702), v.clamp(-7.0, 7.0) + 1
    ref = s * v
    exponential = 2**-22 * (8 + 2 * g.abs())  # relative: in fp32 it is as far off as its argument
    steepest = 1.1  # of g * sigmoid(t g), for any t
    allowed = (
        (u + exponential) * ref.abs() + steepest * off_g * (v.abs() + off_v) + s.abs() * off_v + a + 1e-30
    )
    assert_within(y, ref, allowed)


def assert_routed_close(y: Tensor, x: Tensor, w: Tensor, router: Tensor) -> None:
    """y = router * (x @ w^T): the bound of the product, times the router's weight."""
    u, c, a = TOLERANCE[x.dtype]
    times = router.double()[:, None]
    ref = x.double() @ w.mT * times
    assert_within(y, ref, u * ref.abs() + c * (x.double().abs() @ w.abs().mT) * times.abs() + a)


def check_routed(
    kernel: Kernel,
    w13: Planes,
    w2: Planes,
    tokens: int,
    top_k: int,
    sorts: bool,
    activation: str,
    dtype: torch.dtype,
) -> None:
    """The two products of an MoE layer: the gated one, in GPT-OSS's way with a bias, and the weighted one of
    its result."""
    (e, n2), device = w13.qdata.shape[:2], w13.qdata.device
    x = (activations(tokens, w13.k, torch.float32, str(device)) * 2 * w13.k**-0.5).to(dtype)
    weights, ids = torch.rand(tokens, e, device=device).topk(top_k)
    routing = peers.route(ids, weights, e)
    bias = None if activation == "silu" else torch.randn(e, n2, device=device).to(dtype)

    def run(x: Tensor, w: Planes, **more: Any) -> tuple[Tensor, torch.dtype | None]:
        y = peers.routed(kernel.routed, w, x, routing, sorts, **more)
        assert torch.equal(y, peers.routed(kernel.routed, w, x, routing, sorts, **more)), (
            "a second run gave other bits"
        )
        problem = make_problem(
            "routed", dtype, tokens * top_k if sorts else e, w.k, w.qdata, w.scale, w.bits, w.group_size
        )
        return y, dtype if kernel.rounds_weight(problem) else None

    h, rounded_13 = run(x, w13, activation=activation, bias=bias)
    y, rounded_2 = run(h, w2, weighted=True)
    assert (h.shape, y.shape) == ((tokens * top_k, n2 // 2), (tokens * top_k, w2.qdata.shape[1]))
    for expert in range(e):
        pair = (ids.flatten() == expert).nonzero()[:, 0]
        if not len(pair):
            continue
        for some in row_slices(n2 // 2):
            if activation == "silu":  # gate's rows, then up's
                halves = some, slice(some.start + n2 // 2, some.stop + n2 // 2)
            else:  # in turn
                halves = slice(2 * some.start, 2 * some.stop, 2), slice(2 * some.start + 1, 2 * some.stop, 2)
            gate, up = (rows_of(rows_of(w13, expert), half).exact(rounded_13) for half in halves)
            biases = None if bias is None else (bias[expert, halves[0]], bias[expert, halves[1]])
            assert_gated_close(h[pair, some], x[pair // top_k], gate, up, activation, biases)
        for some in row_slices(w2.qdata.shape[1]):
            exact = rows_of(rows_of(w2, expert), some).exact(rounded_2)
            assert_routed_close(y[pair, some], h[pair], exact, weights.flatten()[pair])


def routed(
    report: Report,
    budget: Budget,
    dtype: str,
    bits: int,
    group_size: int,
    shape: Experts,
    tokens: Sequence[int],
    activation: str = "silu",
    device: str = "cuda",
    kernel: Kernel = triton.KERNEL,
) -> None:
    """Sorted and, of a few pairs, unsorted."""
    of, shape = getattr(torch, dtype), Experts(*shape)
    make = partial(some_planes, bits=bits, group_size=group_size, dtype=of, device=device)
    w13 = make(shape.experts, 2 * shape.between, shape.hidden)
    w2 = make(shape.experts, shape.hidden, shape.between)
    for t in tokens:
        for sorts in (True, False):
            if sorts or t * shape.top_k <= 128:
                name = label(f"experts {'sorted' if sorts else 'unsorted'}, {activation},", w13, of, t)
                with poisoned():
                    attempt(
                        report,
                        budget,
                        name,
                        partial(check_routed, kernel, w13, w2, t, shape.top_k, sorts, activation, of),
                    )


# ----------------------------------------------------------- CUDA graphs and torch.compile


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `run`, and where its result comes to lie."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


def linear_of(w: Planes, x: Tensor) -> Tensor:
    return triton.KERNEL.linear(x, w.qdata, w.scale, None, w.bits, w.group_size)


def check_graph(w: Planes, m: int) -> None:
    """A replay, on other values than were there at its capture, gives what a call gives."""
    x = activations(m, w.k, torch.bfloat16, "cuda")
    graph, y = captured(partial(linear_of, w, x))
    for _ in range(3):
        x.copy_(activations(m, w.k, torch.bfloat16, "cuda"))
        graph.replay()
        assert torch.equal(y, linear_of(w, x))


def check_two_streams(w: Planes, m: int) -> None:
    """Two graphs at once do not count in each other's counters."""
    xs = [activations(m, w.k, torch.bfloat16, "cuda") for _ in range(2)]
    expected = [linear_of(w, x) for x in xs]
    graphs = [captured(partial(linear_of, w, x)) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, y), right in zip(graphs, expected, strict=True):
        assert torch.equal(y, right)


def check_after_many_graphs(w: Planes, m: int) -> None:
    """What a graph was captured with is still its own after a thousand other captures."""
    x = activations(m, w.k, torch.bfloat16, "cuda")
    graph, y = captured(partial(linear_of, w, x))
    others = []
    for _ in range(40):
        others.append(captured(lambda: [linear_of(w, x) for _ in range(100)][-1]))
    right = linear_of(w, x)
    # Over memory that was given back.
    filled = [torch.full((1 << 18,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, right)
    assert all(bool((block == -1).all()) for block in filled), "a replay wrote to memory of others"


def graphs(report: Report, budget: Budget) -> None:
    for bits, n, k in ((4, 4096, 4096), (8, 1000, 8192)):
        w = some_planes(n, k, bits=bits, group_size=128, dtype=torch.bfloat16, device="cuda")
        for m in (1, 16, 64, 300):
            attempt(
                report,
                budget,
                label("CUDA graph of linear", w, torch.bfloat16, m),
                partial(check_graph, w, m),
            )
        attempt(
            report,
            budget,
            label("two graphs on two streams", w, torch.bfloat16, 3),
            partial(check_two_streams, w, 3),
        )
        attempt(
            report,
            budget,
            label("a graph and many others", w, torch.bfloat16, 3),
            partial(check_after_many_graphs, w, 3),
        )


def check_compiled(mode: str, bits: int, device: str) -> None:
    """A compiled model gives what it gives eagerly, but for where the compiler rounds between layers."""
    torch.compiler.reset()  # it counts recompilations of what other models share with this one
    model = nn.Sequential(nn.Linear(512, 1024), nn.SiLU(), nn.Linear(1024, 512, bias=False)).to(
        device, torch.bfloat16
    )
    quantize_(model, rtn(bits, 128))
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for m in (1, 16, 40):
            for _ in range(3):  # capture is at the second
                x = torch.randn(m, 512, device=device).bfloat16()
                expected, got = model(x).float(), compiled(x).float()
                error = float((got - expected).norm() / expected.norm())
                assert error < 0.01, f"off by {error:.3g} of its norm with {m} rows"


def compiled(report: Report, budget: Budget, mode: str, device: str = "cuda") -> None:
    for bits in (4, 8):
        attempt(
            report, budget, f"torch.compile, {mode}, int{bits}", partial(check_compiled, mode, bits, device)
        )


# ------------------------------------------------------------------------------- all of it


def job(name: str, function: Callable[..., None], **arguments: Any) -> Job:
    return Job("correctness", name, f"benchmarks.gpu_check:{function.__name__}", arguments, least=5, most=150)


def jobs(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], moe_tokens: Sequence[int]) -> list[Job]:
    """First what is timed later, so that it is in Triton's cache by then, and what takes longest; then all
    formats and odd shapes."""
    found = [
        job(f"torch.compile, {mode}", compiled, mode=mode)
        for mode in ("max-autotune", "reduce-overhead", "default")
    ]
    found.append(job("CUDA graphs", graphs))
    for (n, k), bits in product(shapes, (4, 8)):
        timed = [(m, n, k) for m in tokens]
        found.append(
            job(
                f"linear int{bits} {n}x{k}",
                products,
                op="linear",
                dtype="bfloat16",
                bits=bits,
                group_size=128,
                shapes=timed,
            )
        )
    for (name, shape), bits in product(MODELS.items(), (4, 8)):
        found.append(
            job(
                f"{name} int{bits}",
                routed,
                dtype="bfloat16",
                bits=bits,
                group_size=128,
                shape=shape,
                tokens=moe_tokens,
            )
        )
    for n, k in shapes:
        for bits, group_size in ((4, 32), (8, -1)):
            timed = [(m, n, k) for m in tokens if m in peers.SOME]
            name = f"linear int{bits} g{group_size} {n}x{k}"
            found.append(
                job(
                    name,
                    products,
                    op="linear",
                    dtype="bfloat16",
                    bits=bits,
                    group_size=group_size,
                    shapes=timed,
                )
            )
    for dtype, group_size, bits in product(DTYPES, GROUP_SIZES, FORMATS):
        form: dict[str, Any] = {"dtype": dtype, "bits": bits, "group_size": group_size}
        name = f"int{bits} g{group_size} {dtype}"
        found += [
            job(f"{op} {name}", products, op=op, shapes=DX_SHAPES if op.endswith("dx") else SHAPES, **form)
            for op in PRODUCTS
        ]
        found.append(job(f"planes {name}", planes, shapes=((5, 1000), (64, 100), (4096, 4096)), **form))
        found += [
            job(f"experts {name}", routed, shape=shape, tokens=some, activation=how, **form)
            for shape, some, how in ROUTED
        ]
    return found
