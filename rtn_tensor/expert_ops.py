"""The `torch.ops.rtn` ops of mixture-of-experts layers: schema, fake and autograd. `ops.py` has them, too, by
the same names."""

import math
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rtn_tensor._torch import tracing, transformed
from rtn_tensor.kernels.problem import make_problem
from rtn_tensor.kernels.registry import choose
from rtn_tensor.registration import (
    define,
    differentiable,
    fake,
    refuse_vmapped_planes,
    rtn_ops,
    save_planes,
    wants_grad,
)


@define(
    "grouped(Tensor x, Tensor qdata, Tensor scale, Tensor offs, int bits, int group_size, "
    "Tensor? zero=None, bool int8_x=False) -> Tensor"
)
def _grouped(x, qdata, scale, offs, bits, group_size, zero=None, int8_x=False):
    kernel = choose(
        make_problem("grouped", x.dtype, x.shape[0], x.shape[1], qdata, scale, bits, group_size, zero, int8_x)
    )
    return kernel.grouped(x, qdata, scale, offs, bits, group_size, zero, int8_x)


def grouped(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    offs: Tensor,
    bits: int,
    group_size: int,
    zero: Tensor | None = None,
    int8_x: bool = False,
) -> Tensor:
    """`linear` of each expert over its own rows: `x [M, K]` sorted by expert, `qdata [E, N, B]`, `scale [E,
    N, G]`, `offs [E]` int32 cumulative ends, as for torch's grouped_mm -> `[M, N]` in x's dtype; rows past
    the last end come out zero."""
    if tracing(x, qdata, scale, offs) or wants_grad(x):
        run = _grouped_function if transformed() else rtn_ops.grouped.default
        return run(x, qdata, scale, offs, bits, group_size, zero, int8_x)
    return _grouped(x, qdata, scale, offs, bits, group_size, zero, int8_x)


@fake("grouped")
def _grouped_fake(x, qdata, scale, offs, bits, group_size, zero=None, int8_x=False):
    return x.new_empty(x.shape[0], qdata.shape[-2])


def _grouped_forward(x, qdata, scale, offs, bits, group_size, zero=None, int8_x=False):
    return rtn_ops.grouped.default(x, qdata, scale, offs, bits, group_size, zero, int8_x)


def _grouped_setup(ctx, inputs, output):
    x, qdata, scale, offs, ctx.bits, ctx.group_size, zero, _ = inputs
    save_planes(ctx, qdata, scale, offs, zero)
    ctx.k = x.shape[-1]


def _grouped_backward(ctx, dy):
    qdata, scale, offs, zero = ctx.saved_tensors
    return grouped_dx(dy, qdata, scale, offs, ctx.bits, ctx.group_size, ctx.k, zero), *[None] * 7


def _grouped_jvp(ctx, dx, *_):
    qdata, scale, offs, zero = ctx.saved_tensors
    return grouped(dx, qdata, scale, offs, ctx.bits, ctx.group_size, zero)


def _sorted_vmap(name: str, run) -> Any:
    def vmap(info, in_dims, x, qdata, scale, offs, *others):
        refuse_vmapped_planes(name, (*in_dims[1:4], *in_dims[6:]))
        # The batch goes next to the rows, which so stay sorted by expert.
        rows = x.movedim(in_dims[0], 1)
        y = run(rows.flatten(0, 1), qdata, scale, offs * info.batch_size, *others)
        return y.view(*rows.shape[:2], y.shape[1]), 1

    return vmap


_grouped_function = differentiable(
    "grouped",
    _grouped_forward,
    _grouped_setup,
    _grouped_backward,
    _grouped_jvp,
    _sorted_vmap("grouped", grouped),
)


@define(
    "grouped_dx(Tensor dy, Tensor qdata, Tensor scale, Tensor offs, int bits, int group_size, SymInt k, "
    "Tensor? zero=None) -> Tensor"
)
def _grouped_dx(dy, qdata, scale, offs, bits, group_size, k, zero=None):
    kernel = choose(
        make_problem("grouped_dx", dy.dtype, dy.shape[0], k, qdata, scale, bits, group_size, zero)
    )
    return kernel.grouped_dx(dy, qdata, scale, offs, bits, group_size, k, zero)


def grouped_dx(
    dy: Tensor,
    qdata: Tensor,
    scale: Tensor,
    offs: Tensor,
    bits: int,
    group_size: int,
    k: int,
    zero: Tensor | None = None,
) -> Tensor:
    """`linear_dx` of each expert over its own rows: `dy [M, N]` -> `[M, K]` in dy's dtype; the rest as for
    `grouped`."""
    if tracing(dy, qdata, scale, offs) or wants_grad(dy):
        run = _grouped_dx_function if transformed() else rtn_ops.grouped_dx.default
        return run(dy, qdata, scale, offs, bits, group_size, k, zero)
    return _grouped_dx(dy, qdata, scale, offs, bits, group_size, k, zero)


@fake("grouped_dx")
def _grouped_dx_fake(dy, qdata, scale, offs, bits, group_size, k, zero=None):
    return dy.new_empty(dy.shape[0], k)


def _grouped_dx_forward(dy, qdata, scale, offs, bits, group_size, k, zero=None):
    return rtn_ops.grouped_dx.default(dy, qdata, scale, offs, bits, group_size, k, zero)


def _grouped_dx_setup(ctx, inputs, output):
    _, qdata, scale, offs, ctx.bits, ctx.group_size, ctx.k, zero = inputs
    save_planes(ctx, qdata, scale, offs, zero)


def _grouped_dx_backward(ctx, ddx):
    qdata, scale, offs, zero = ctx.saved_tensors
    return grouped(ddx, qdata, scale, offs, ctx.bits, ctx.group_size, zero), *[None] * 7


def _grouped_dx_jvp(ctx, ddy, *_):
    qdata, scale, offs, zero = ctx.saved_tensors
    return grouped_dx(ddy, qdata, scale, offs, ctx.bits, ctx.group_size, ctx.k, zero)


_grouped_dx_function = differentiable(
    "grouped_dx",
    _grouped_dx_forward,
    _grouped_dx_setup,
    _grouped_dx_backward,
    _grouped_dx_jvp,
    _sorted_vmap("grouped_dx", grouped_dx),
)


@define(
    "routed(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, Tensor experts, Tensor? pairs, Tensor? offs, "
    "Tensor? router, int top_k, "
    "str activation, int bits, int group_size, Tensor? zero=None, "
    "bool int8_x=False) -> Tensor"
)
def _routed(
    x,
    qdata,
    scale,
    bias,
    experts,
    pairs,
    offs,
    router,
    top_k,
    activation,
    bits,
    group_size,
    zero=None,
    int8_x=False,
):
    # Unsorted, each pair is a program of its own.
    rows = x.shape[0] * top_k if offs is not None else qdata.shape[0]
    kernel = choose(
        make_problem("routed", x.dtype, rows, x.shape[1], qdata, scale, bits, group_size, zero, int8_x)
    )
    return kernel.routed(
        x, qdata, scale, bias, experts, pairs, offs, router, top_k, activation, bits, group_size, zero, int8_x
    )


def routed(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    pairs: Tensor | None,
    offs: Tensor | None,
    router: Tensor | None,
    top_k: int,
    activation: str,
    bits: int,
    group_size: int,
    zero: Tensor | None = None,
    int8_x: bool = False,
) -> Tensor:
    """`grouped` of tokens that are routed to experts, gathering, bias, activation and router weights in the
    same launch; see `reference.routed`. It has no backward."""
    if tracing(x, qdata, scale):
        return rtn_ops.routed.default(
            x,
            qdata,
            scale,
            bias,
            experts,
            pairs,
            offs,
            router,
            top_k,
            activation,
            bits,
            group_size,
            zero,
            int8_x,
        )
    return _routed(
        x, qdata, scale, bias, experts, pairs, offs, router, top_k, activation, bits, group_size, zero, int8_x
    )


@fake("routed")
def _routed_fake(
    x,
    qdata,
    scale,
    bias,
    experts,
    pairs,
    offs,
    router,
    top_k,
    activation,
    bits,
    group_size,
    zero=None,
    int8_x=False,
):
    return x.new_empty(x.shape[0] * top_k, qdata.shape[-2] // 2 if activation else qdata.shape[-2])


# ------------------------------------------------------------- what FlopCounterMode counts


@register_flop_formula([rtn_ops.grouped])
def _grouped_flops(x, qdata, scale, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * qdata[1]  # of every row, as torch counts its own grouped product


@register_flop_formula([rtn_ops.grouped_dx])
def _grouped_dx_flops(dy, qdata, scale, offs, bits, group_size, k, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(dy) * k


@register_flop_formula([rtn_ops.routed])
def _routed_flops(x, qdata, scale, bias, experts, *args, out_shape=None, **kwargs) -> int:
    return 2 * experts[0] * x[1] * qdata[1]
