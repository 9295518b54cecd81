"""Times products with one weight and with experts, by two clocks: replays of a CUDA graph, and
`triton.testing.do_bench`.

A graph goes through copies of the weight that together are four times the L2 cache (of twice its size, a
fifth could still be found there), as the layers of a model would; it has no gaps between launches to speak
of. do_bench empties the L2 cache before each call, and counts the launch. Both are device events, of random
values, after the result of each kernel was looked at once.
"""

import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_peers as peers
from benchmarks.gpu_peers import CUBLAS, GROUPED_MM, KERNELS, MODELS, MOE_KERNELS, OURS
from benchmarks.gpu_workers import Budget, described, lost
from rtn_tensor import RTNQuantizedTensor
from rtn_tensor.kernels.problem import make_problem
from rtn_tensor.kernels.registry import choose

Calls = Sequence[Callable[[], Any]]
# From calls that do the same on different memory, to what each clock says: {"graph": {"seconds": ...,
# "spread": ...}, "do_bench": ...}, or {"error": ...} in the place of one.
Measure = Callable[[Calls], dict[str, dict[str, Any]]]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "torchao", "rtn-tensor", "humming-kernels", "gemlite", "mslk-cuda", "vllm")
REPLAYS = 7
GRAPH_SECONDS = 1e-3  # of a graph, so that starting it is not what is measured,
GRAPH_CALLS = 128  # with no more calls than this


# ---------------------------------------------------------------------------------- clocks


def summed_up(seconds: Sequence[float]) -> dict[str, float]:
    """The median, and by how much of it the middle 60 % differ."""
    ordered, median = sorted(seconds), statistics.median(seconds)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return {"seconds": median, "spread": (high - low) / median}


def by_graph(calls: Calls) -> list[float]:
    """Seconds a call, by replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def graph_of(rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in rounds * list(calls):
                call()
        graph.replay()
        return graph

    def replayed(graph: torch.cuda.CUDAGraph) -> float:
        start.record(stream)
        graph.replay()
        end.record(stream)
        stream.synchronize()
        return start.elapsed_time(end) / 1e3

    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles, and allocates what it will keep
        graph, rounds = graph_of(1), 1
        if (more := min(round(GRAPH_SECONDS / replayed(graph)), GRAPH_CALLS // len(calls))) > 1:
            graph, rounds = graph_of(more), more
        return [replayed(graph) / (rounds * len(calls)) for _ in range(REPLAYS)]


def by_do_bench(calls: Calls) -> list[float]:
    from triton.testing import do_bench

    milliseconds: Any = do_bench(calls[0], warmup=5, rep=40, return_mode="all")
    return [t / 1e3 for t in milliseconds]


def measure(calls: Calls) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, clock in {"graph": by_graph, "do_bench": by_do_bench}.items():
        try:
            found[name] = summed_up(clock(calls))
        except Exception as error:  # one that cannot be captured can still be timed the other way
            torch.cuda.synchronize()
            found[name] = {"error": described(error)}
    return found


# ----------------------------------------------------------------------------- the machine


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "rtn-tensor":
            return None
        found = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        return found and found[1]  # it runs from its folder


def about(report: Callable[[dict], None], budget: Budget) -> None:
    """The GPU, and the versions that a number depends on."""
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    report(
        {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": driver or None,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "versions": {name: package_version(name) for name in PACKAGES},
        }
    )


def ceilings(report: Callable[[dict], None], budget: Budget) -> None:
    """What this GPU does at most: a copy, counting bytes read and bytes written, and a large dense
    product."""
    source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = measure([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = measure([lambda: F.linear(a, b)])
    report(
        {
            "copy_bytes_per_s": 2 * source.nbytes / copied["graph"]["seconds"],
            "matmul_flop_per_s": 2 * 8192**3 / multiplied["graph"]["seconds"],
            "copy": copied,
            "matmul": multiplied,
        }
    )


# ---------------------------------------------------------------------------------- linear


def relative_error(y: Tensor, ref: Tensor) -> float:
    """||y - ref|| / ||ref||; NaN where y holds one."""
    return float((y.double() - ref.double()).norm() / ref.double().norm())


def looked_at(y: Tensor, ref: Tensor, tolerance: float) -> float:
    error = relative_error(y, ref) if y.shape == ref.shape else float("nan")
    if not error <= tolerance:
        raise ValueError(
            f"wrong result: of shape {list(y.shape)}, off by {error:.3g} of its norm, and "
            f"{tolerance} is allowed"
        )
    return error


def how(op: str, m: int, w: RTNQuantizedTensor) -> dict[str, Any]:
    """Which of our kernels runs for `m` rows, and its launch configuration."""
    problem = make_problem(op, w.dtype, m, w.in_features, w.qdata, w.scale, w.bits, w.group_size)
    kernel = choose(problem)
    if kernel.name != "triton":
        return {"runs": kernel.name, "config": None}
    from rtn_tensor.kernels.triton import launch
    from rtn_tensor.kernels.triton.config import configure, shape_of

    shape = shape_of(problem)._replace(op="linear" if op == "linear" else "grouped")
    config = configure(shape, launch.gpu_of(w.device))
    return {"runs": kernel.name, "config": config and config._asdict()}


@torch.no_grad()
def linear(
    report: Callable[[dict], None],
    budget: Budget,
    shape: tuple[int, int],
    tokens: Sequence[int],
    kernels: Sequence[str],
    device: str = "cuda",
    l2_bytes: int | None = None,
    measure: Measure = measure,
) -> None:
    """A row for each of `kernels` and number of tokens, in turn after cuBLAS, which `kernels` begins with and
    is measured anew for every job; its own rows are those beside ours."""
    n, k = shape
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if l2_bytes is None else l2_bytes
    first = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    made: dict[str, list[peers.Product]] = {}
    for name in kernels:
        kernel = KERNELS[name]
        copies = max(2, min(64, -(-4 * l2_bytes // kernel.bytes(n, k))))
        try:
            made[name] = [kernel.make(torch.randn_like(first) if i else first) for i in range(copies)]
        except Exception as error:
            report({"N": n, "K": k, "kernel": name, "error": described(error)})
    for m in tokens:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        ref = x.float() @ first.float().mT
        cublas: dict[str, dict[str, Any]] = {}
        for name, products in made.items():
            kernel = KERNELS[name]
            if kernel.tokens is not None and m not in kernel.tokens:
                continue
            row: dict[str, Any] = {"N": n, "K": k, "M": m, "kernel": name}
            if budget.left() < 0:
                report(row | {"skipped": "no time was left"})
                continue
            try:
                row["relative_error"] = looked_at(products[0](x), ref, kernel.tolerance)
                if name in OURS:
                    row |= how("linear", m, products[0].keywords["weight"])  # type: ignore[attr-defined]
                times = measure([partial(product, x) for product in products])
            except Exception as error:
                report(row | {"error": described(error)})
                if lost():
                    raise
                continue
            if name == CUBLAS:
                cublas = times
            for clock, time in times.items():
                if seconds := time.get("seconds"):
                    time |= {
                        "bytes_per_s": kernel.bytes(n, k) / seconds,
                        "flop_per_s": 2 * m * n * k / seconds,
                    }
                    if dense := cublas.get(clock, {}).get("seconds"):
                        time |= {"cublas_seconds": dense, "over_cublas": dense / seconds}
            if name != CUBLAS or OURS.keys() & made.keys():
                report(row | times)


# --------------------------------------------------------------------------------- experts


def moe_reference(x: Tensor, w13: Tensor, w2: Tensor, routing: peers.Routing) -> Tensor:
    """The layer in fp32, expert by expert."""
    y = torch.zeros(x.shape, device=x.device)
    top_k = routing.ids.shape[1]
    for e, (start, end) in enumerate(pairwise([0, *routing.offs.tolist()])):
        pair = routing.order[start:end].long()
        if len(pair):
            gate, up = (x[pair // top_k].float() @ w13[e].float().mT).chunk(2, -1)
            h = (F.silu(gate) * up).to(x.dtype).float()
            y.index_add_(0, pair // top_k, h @ w2[e].float().mT * routing.weights.flatten()[pair, None])
    return y


def random_routing(tokens: int, shape: peers.Experts, device: str) -> peers.Routing:
    weights, ids = torch.rand(tokens, shape.experts, device=device).topk(shape.top_k)
    return peers.route(ids, weights / weights.sum(-1, keepdim=True), shape.experts)


def sorting(experts: int, layer: partial) -> Tensor:
    """A call of a layer, with the pairs of its routing sorted anew."""
    x, routing = layer.args
    return layer.func(x, peers.route(routing.ids, routing.weights, experts))


def experts_touched(tokens: int, shape: peers.Experts) -> float:
    """How many experts so many tokens need, on average."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


@torch.no_grad()
def moe(
    report: Callable[[dict], None],
    budget: Budget,
    model: str,
    tokens: Sequence[int],
    kernels: Sequence[str],
    device: str = "cuda",
    l2_bytes: int | None = None,
    shape: peers.Experts | None = None,
    measure: Measure = measure,
) -> None:
    """A row for each of `kernels` and number of tokens: the layer from what the router gives on, and where
    pairs are sorted by expert, also without that sorting. Every copy of the weights has tokens and a routing
    of its own."""
    shape = shape or MODELS[model]
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if l2_bytes is None else l2_bytes
    per_expert = 3 * shape.between * shape.hidden
    names = {"model": model, **shape._asdict()}

    def random_weights() -> tuple[Tensor, Tensor]:
        w13 = torch.randn(shape.experts, 2 * shape.between, shape.hidden, device=device, dtype=torch.bfloat16)
        return w13.mul_(shape.hidden**-0.5), torch.randn(
            shape.experts, shape.hidden, shape.between, device=device, dtype=torch.bfloat16
        )

    w13, w2 = random_weights()
    made: dict[str, list[peers.Layer]] = {}
    for name in kernels:
        kernel = MOE_KERNELS[name]
        touched = experts_touched(min(tokens), shape) * per_expert * kernel.bits / 8
        try:
            made[name] = [kernel.make(w13, w2)]
            made[name] += [
                kernel.make(*random_weights()) for _ in range(int(-(-4 * l2_bytes // touched)) - 1)
            ]
        except Exception as error:
            report(names | {"kernel": name, "error": described(error)})
    for t in tokens:
        inputs = [
            (
                torch.randn(t, shape.hidden, device=device, dtype=torch.bfloat16),
                random_routing(t, shape, device),
            )
            for _ in range(max((len(layers) for layers in made.values()), default=0))
        ]
        ref = moe_reference(inputs[0][0], w13, w2, inputs[0][1]) if inputs else w13
        dense: dict[tuple[str, str], float] = {}
        for name, layers in made.items():
            kernel = MOE_KERNELS[name]
            if kernel.tokens is not None and t > kernel.tokens:
                continue
            given = [partial(layer, *each) for layer, each in zip(layers, inputs, strict=False)]
            calls: dict[str, Calls] = {"layer": given}
            if kernel.sorts:
                calls = {
                    "layer": [partial(sorting, shape.experts, call) for call in given],
                    "layer, sorted before": given,
                }
            for what, some in calls.items():
                row: dict[str, Any] = names | {"tokens": t, "kernel": name, "what": what}
                if isinstance(layers[0], peers.OurExperts):
                    rows = t * shape.top_k if kernel.sorts else shape.experts
                    row |= {
                        f"w{i}": how("routed", rows, w) for i, w in ((13, layers[0].w13), (2, layers[0].w2))
                    }
                if budget.left() < 0:
                    report(row | {"skipped": "no time was left"})
                    continue
                try:
                    row["relative_error"] = looked_at(some[0](), ref, kernel.tolerance)
                    times = measure(some)
                except Exception as error:
                    report(row | {"error": described(error)})
                    if lost():
                        raise
                    continue
                used = min(t * shape.top_k, experts_touched(t, shape))
                for clock, time in times.items():
                    if seconds := time.get("seconds"):
                        time |= {
                            "bytes_per_s": used
                            * per_expert
                            * (kernel.bits / 8 + (kernel.bits < 16) / 64)
                            / seconds
                        }
                        time |= {"flop_per_s": 2 * t * shape.top_k * per_expert / seconds}
                        if name == GROUPED_MM:
                            dense[what, clock] = seconds
                        # One that does not sort is compared with what the other does all in all.
                        if other := dense.get((what, clock)):
                            time |= {"grouped_mm_seconds": other, "over_grouped_mm": other / seconds}
                report(row | times)
