"""`routed`, what an MoE layer does around the products of its experts, by every kernel that has it."""

import pytest
import torch
from bounds import TOLERANCE, activations, random_planes
from test_kernels import each_bits, each_dtype, having

from rtn_tensor import ops, reference
from rtn_tensor.kernels.problem import make_problem
from rtn_tensor.kernels.registry import why_not

GROUP_SIZE, K = 64, 192

# The number of tokens, of experts per token, of experts, of rows of the weight.
SIZES = [(1, 2, 4, 200), (7, 2, 5, 64), (40, 3, 8, 10), (3, 1, 1, 64), (0, 2, 4, 64)]


def choice(tokens, top_k, e):
    """Each pair's expert; one expert gets nobody, where there are others."""
    return torch.stack(
        [torch.randperm(max(e - 1, 1))[:top_k] for _ in range(tokens)] or [torch.zeros(0, dtype=torch.int64)]
    ).flatten()


def run(kernel, x, w, bias, experts, offs_too, router, top_k, activation):
    problem = make_problem(
        "routed", x.dtype, len(experts), w.k, w.qdata, w.scale, w.bits, w.group_size, w.zero
    )
    if reason := why_not(kernel, problem):
        pytest.skip(reason)
    pairs, offs = reference.sorted_pairs(experts, len(w.qdata)) if offs_too else (None, None)
    y = kernel.routed(
        *(x, w.qdata, w.scale, bias, experts, pairs, offs, router, top_k, activation),
        *(w.bits, w.group_size, w.zero),
    )
    return y, kernel.rounds_weight(problem if offs_too else problem._replace(M=len(w.qdata)))


def products(x, w, experts, top_k):
    """Row p of x @ w'^T of pair p's expert in fp64, and the sums of its terms' sizes, which the error of a
    sum is measured by."""
    rows = x.double()[torch.arange(len(experts), device=x.device) // top_k]
    of_pair = w.exact()[experts]
    return torch.einsum("pk,pnk->pn", rows, of_pair), torch.einsum("pk,pnk->pn", rows.abs(), of_pair.abs())


@having("routed")
@each_bits
@each_dtype
@pytest.mark.parametrize(("tokens", "top_k", "e", "n"), SIZES)
@pytest.mark.parametrize("offs_too", [True, False])
@pytest.mark.parametrize(("with_bias", "method"), [(True, "absmax"), (False, "absmax"), (True, "minmax")])
def test_down_projection(kernel, op, device, bits, dtype, tokens, top_k, e, n, offs_too, with_bias, method):
    w = random_planes(e, n, K, bits=bits, group_size=GROUP_SIZE, dtype=dtype, device=device, method=method)
    experts = choice(tokens, top_k, e).to(device)
    x, router = (
        activations(tokens * top_k, K, dtype, device),
        torch.rand(tokens * top_k, device=device).to(dtype),
    )
    bias = torch.randn(e, n, device=device).to(dtype) if with_bias else None
    y, rounds = run(kernel, x, w, bias, experts, offs_too, router, 1, "")
    sums, size = products(x, w, experts, 1)
    plain = sums if bias is None else sums + bias[experts].double()
    expected = plain * router.double()[:, None]
    u, c, a = TOLERANCE[dtype]
    # Up to four roundings: of the weights, the product, with its bias, with its router's weight.
    allowed = (
        (u * (rounds and dtype != torch.float32) + c) * size * router.double()[:, None]
        + 2 * u * expected.abs()
        + 2 * a
    )
    allowed += 2 * u * torch.maximum(plain.abs(), sums.abs()) * router.double()[:, None]
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= allowed).all()


@having("routed")
@each_bits
@each_dtype
@pytest.mark.parametrize(("tokens", "top_k", "e", "n"), SIZES)
@pytest.mark.parametrize("offs_too", [True, False])
@pytest.mark.parametrize(
    ("activation", "with_bias", "method"),
    [("silu", False, "absmax"), ("gpt_oss", True, "absmax"), ("silu", False, "minmax")],
)
def test_gate_and_up_projection(
    kernel, op, device, bits, dtype, tokens, top_k, e, n, offs_too, activation, with_bias, method
):
    w = random_planes(e, n, K, bits=bits, group_size=GROUP_SIZE, dtype=dtype, device=device, method=method)
    experts = choice(tokens, top_k, e).to(device)
    x = activations(tokens, K, dtype, device) / 4
    bias = torch.randn(e, n, device=device).to(dtype) if with_bias else None
    y, rounds = run(kernel, x, w, bias, experts, offs_too, None, top_k, activation)
    sums, size = products(x, w, experts, top_k)
    plain = sums if bias is None else sums + bias[experts].double()
    u, c, a = TOLERANCE[dtype]
    error = (
        (u * (rounds and dtype != torch.float32) + c) * size
        + 2 * u * torch.maximum(plain.abs(), sums.abs())
        + a
    )
    if activation == "silu":
        gate, up = plain.chunk(2, 1)
        gate_error, up_error = error.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    else:
        gate, up = plain[:, ::2].clamp(max=7), plain[:, 1::2].clamp(-7, 7) + 1
        gate_error, up_error = error[:, ::2], error[:, 1::2]
        expected = gate * torch.sigmoid(1.702 * gate) * up
    # Both activations of a gate are at most as large as it, and their slope is at most 1.1.
    allowed = (
        u * expected.abs()
        + 1.1 * gate_error * (up.abs() + up_error)
        + gate.abs() * up_error
        + 2**-18 * gate.abs() * up.abs()
        + a
    )
    assert y.shape == (tokens * top_k, n // 2)
    assert ((y.double() - expected).abs() <= allowed).all()


@having("routed")
def test_pairs_of_no_expert_come_out_zero(kernel, op, device):
    """As where the expert is another machine's; with a bias, too."""
    w = random_planes(3, 64, K, group_size=GROUP_SIZE, dtype=torch.bfloat16, device=device)
    x, bias = activations(4, K, torch.bfloat16, device), torch.randn(3, 64, device=device).bfloat16()
    for offs_too in (True, False):
        y, _ = run(kernel, x, w, bias, torch.tensor([0, -1, 3, 2], device=device), offs_too, None, 1, "")
        assert not y[1:3].any()
        assert y[0].any()
        assert y[3].any()


def test_sorted_pairs():
    pairs, offs = reference.sorted_pairs(torch.tensor([3, 0, 4, 0, -1, 1]), 4)
    assert (pairs.tolist(), offs.tolist()) == ([1, 3, 5, 0, 2, 4], [2, 3, 3, 4])
    assert pairs.dtype == offs.dtype == torch.int32


def test_op():
    w = random_planes(4, 64, K, group_size=GROUP_SIZE)
    experts = choice(5, 2, 4)
    args = (
        w.qdata,
        w.scale,
        None,
        experts,
        *reference.sorted_pairs(experts, 4),
        torch.rand(10),
        2,
        "silu",
        4,
        GROUP_SIZE,
    )
    torch.library.opcheck(torch.ops.rtn.routed.default, (activations(5, K, torch.float32), *args))
    torch.library.opcheck(
        torch.ops.rtn.routed.default,
        (activations(5, K, torch.float32), *args[:4], None, None, None, *args[7:]),
    )
    assert ops.routed(activations(5, K, torch.float32), *args).shape == (10, 32)
