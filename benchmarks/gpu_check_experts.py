"""Whether the Triton kernels' experts are right on the device, and what is around their products."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from bounds import TOLERANCE, Planes, activations
from torch import Tensor

from benchmarks import gpu_peers as peers
from benchmarks.gpu_check import Report, attempt, label, poisoned, row_slices, rows_of, some_planes
from benchmarks.gpu_peers import Experts
from benchmarks.gpu_workers import Budget
from rtn_tensor.kernels import triton
from rtn_tensor.kernels.problem import Kernel, make_problem


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
