"""Whether the Triton kernels are right in CUDA graphs and under torch.compile."""

from collections.abc import Callable
from functools import partial

import torch
from bounds import Planes, activations
from torch import Tensor, nn

from benchmarks.gpu_check import Report, attempt, label, some_planes
from benchmarks.gpu_workers import Budget
from rtn_tensor import quantize_, rtn
from rtn_tensor.kernels import triton


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
