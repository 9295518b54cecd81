"""Every `torch.ops.rtn` op: schema, fake and autograd; those of experts are in `expert_ops.py`, and nothing
else registers ops.

Each function here is the one entry point to its op. Where nothing traces and no gradient is asked for it
calls the kernel straight away, which saves torch.library's Python layer (3 to 6 us per call); a linear on the
CPU goes there in C++. Otherwise it goes through the dispatcher. K is passed where it cannot be read off an
argument, because `qdata` is padded.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rtn_tensor._torch import CPU_KEYS, tracing, transformed
from rtn_tensor.expert_ops import grouped, grouped_dx, routed  # noqa: F401  (called as ops.grouped)
from rtn_tensor.formats import (
    ASYMMETRIC,
    computing,
    embedding_dtype,
    new_planes,
    scale_dtype_of,
    wide_method,
)
from rtn_tensor.kernels import cpu
from rtn_tensor.kernels.problem import make_problem
from rtn_tensor.kernels.registry import choose, forget
from rtn_tensor.registration import (
    OPS,
    batch_first,
    define,
    differentiable,
    dispatched,
    fake,
    refuse_vmapped_planes,
    rtn_ops,
    save_planes,
    wants_grad,
)

# ------------------------------------------------------------------ linear and its backward


_LINEAR = (
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, int bits, int group_size, Tensor? zero=None, "
    "bool int8_x=False)"
)


@define(f"linear{_LINEAR} -> Tensor")
def _linear(x, qdata, scale, bias, bits, group_size, zero=None, int8_x=False):
    x_MK = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    m, k = x_MK.shape
    kernel = choose(make_problem("linear", x.dtype, m, k, qdata, scale, bits, group_size, zero, int8_x))
    y_MN = kernel.linear(x_MK, qdata, scale, bias, bits, group_size, zero, int8_x)
    return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], qdata.shape[-2])


# csrc/torch_op.cpp takes rtn::linear on CPU tensors; what it does not run itself it calls here. Of another
# namespace, as no graph has it.
_python = torch.library.Library("rtn_python", "DEF")
_python.define(f"linear{_LINEAR} -> Tensor")
_python.impl("linear", dispatched("linear", _linear), "CompositeExplicitAutograd")
# The same without that call: None instead. An error that Python raises below C++ comes out as a RuntimeError,
# Ctrl-C too.
_python.define(f"linear_in_cpp{_LINEAR} -> Tensor?")
_cpu_linear = (
    functools.partial(torch.ops.rtn_python.linear_in_cpp.default.redispatch, CPU_KEYS)
    if cpu.register()
    else None
)
forget()  # what is registered runs by itself where its kernel comes first


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    zero: Tensor | None = None,
    int8_x: bool = False,
) -> Tensor:
    """y = x @ w'^T + bias: `x [..., K]`, `qdata [N, B]`, `scale [N, G]`, `bias [N]` -> `[..., N]` in x's
    dtype. Here and below w' = (q - zero) S, where there is a `zero [N, G]`; `int8_x` says whether x is
    rounded to int8 first, which its gradient passes straight through."""
    given = (x,) if bias is None else (x, bias)
    # The planes are of one kind.
    if tracing(*given) or type(qdata) is not Tensor or wants_grad(*given):
        run = _linear_function if transformed() else rtn_ops.linear.default
        return run(x, qdata, scale, bias, bits, group_size, zero, int8_x)
    # Past autograd and torch.library, the call takes 3 us around the product; through Python it takes 9.
    if x.is_cpu and _cpu_linear:
        y = _cpu_linear(x, qdata, scale, bias, bits, group_size, zero, int8_x)
        if y is not None:
            return y
    return _linear(x, qdata, scale, bias, bits, group_size, zero, int8_x)


@fake("linear")
def _linear_fake(x, qdata, scale, bias, bits, group_size, zero=None, int8_x=False):
    return x.new_empty(*x.shape[:-1], qdata.shape[-2])


def _linear_forward(x, qdata, scale, bias, bits, group_size, zero=None, int8_x=False):
    return rtn_ops.linear.default(x, qdata, scale, bias, bits, group_size, zero, int8_x)


def _linear_setup(ctx, inputs, output):
    x, qdata, scale, bias, ctx.bits, ctx.group_size, zero, _ = inputs
    save_planes(ctx, qdata, scale, zero)
    ctx.k = x.shape[-1]


def _linear_backward(ctx, dy):
    qdata, scale, zero = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = linear_dx(dy, qdata, scale, ctx.bits, ctx.group_size, ctx.k, zero)
    if ctx.needs_input_grad[3]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, None, None, dbias, None, None, None, None


def _linear_jvp(ctx, dx, dqdata, dscale, dbias, *_):
    qdata, scale, zero = ctx.saved_tensors
    return linear(dx, qdata, scale, dbias, ctx.bits, ctx.group_size, zero)


def _linear_vmap(info, in_dims, x, qdata, scale, bias, bits, group_size, zero=None, int8_x=False):
    refuse_vmapped_planes("linear", (*in_dims[1:3], *in_dims[6:]))
    x = batch_first(info, in_dims[0], x)
    if in_dims[3] is None:
        return linear(x, qdata, scale, bias, bits, group_size, zero, int8_x), 0
    bias = bias.movedim(in_dims[3], 0)
    y = linear(x, qdata, scale, None, bits, group_size, zero, int8_x)
    return y + bias.view(len(bias), *[1] * (x.dim() - 2), -1), 0


_linear_function = differentiable(
    "linear", _linear_forward, _linear_setup, _linear_backward, _linear_jvp, _linear_vmap
)


@define(
    "linear_dx(Tensor dy, Tensor qdata, Tensor scale, int bits, int group_size, SymInt k, "
    "Tensor? zero=None) -> Tensor"
)
def _linear_dx(dy, qdata, scale, bits, group_size, k, zero=None):
    dy_MN = dy if dy.dim() == 2 else dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    kernel = choose(
        make_problem("linear_dx", dy.dtype, dy_MN.shape[0], k, qdata, scale, bits, group_size, zero)
    )
    dx_MK = kernel.linear_dx(dy_MN, qdata, scale, bits, group_size, k, zero)
    return dx_MK if dy.dim() == 2 else dx_MK.view(*dy.shape[:-1], k)


def linear_dx(
    dy: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int, zero: Tensor | None = None
) -> Tensor:
    """dx = dy @ w': `dy [..., N]`, `qdata [N, B]`, `scale [N, G]` -> `[..., K]` in dy's dtype."""
    if tracing(dy, qdata, scale) or wants_grad(dy):
        run = _linear_dx_function if transformed() else rtn_ops.linear_dx.default
        return run(dy, qdata, scale, bits, group_size, k, zero)
    return _linear_dx(dy, qdata, scale, bits, group_size, k, zero)


@fake("linear_dx")
def _linear_dx_fake(dy, qdata, scale, bits, group_size, k, zero=None):
    return dy.new_empty(*dy.shape[:-1], k)


def _linear_dx_forward(dy, qdata, scale, bits, group_size, k, zero=None):
    return rtn_ops.linear_dx.default(dy, qdata, scale, bits, group_size, k, zero)


def _linear_dx_setup(ctx, inputs, output):
    _, qdata, scale, ctx.bits, ctx.group_size, ctx.k, zero = inputs
    save_planes(ctx, qdata, scale, zero)


def _linear_dx_backward(ctx, ddx):
    qdata, scale, zero = ctx.saved_tensors
    return linear(ddx, qdata, scale, None, ctx.bits, ctx.group_size, zero), *[None] * 6


def _linear_dx_jvp(ctx, ddy, *_):
    qdata, scale, zero = ctx.saved_tensors
    return linear_dx(ddy, qdata, scale, ctx.bits, ctx.group_size, ctx.k, zero)


def _linear_dx_vmap(info, in_dims, dy, qdata, scale, bits, group_size, k, zero=None):
    refuse_vmapped_planes("linear_dx", (*in_dims[1:3], *in_dims[6:]))
    return linear_dx(batch_first(info, in_dims[0], dy), qdata, scale, bits, group_size, k, zero), 0


_linear_dx_function = differentiable(
    "linear_dx", _linear_dx_forward, _linear_dx_setup, _linear_dx_backward, _linear_dx_jvp, _linear_dx_vmap
)


# --------------------------------------------------------- embedding, quantize, dequantize


@define(
    "embedding(Tensor indices, Tensor qdata, Tensor scale, int bits, int group_size, SymInt k, "
    "Tensor? zero=None) -> Tensor"
)
def _embedding(indices, qdata, scale, bits, group_size, k, zero=None):
    kernel = choose(
        make_problem(
            "embedding",
            embedding_dtype(scale.dtype),
            indices.numel(),
            k,
            qdata,
            scale,
            bits,
            group_size,
            zero,
        )
    )
    return kernel.embedding(indices, qdata, scale, bits, group_size, k, zero)


def embedding(
    indices: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    zero: Tensor | None = None,
) -> Tensor:
    """Dequantized rows: `indices [...]` int32 or int64, `qdata [N, B]`, `scale [N, G]` -> `[..., K]` in the
    scale's dtype, or in fp32 where that has 8 bits."""
    if tracing(indices, qdata, scale):
        return rtn_ops.embedding.default(indices, qdata, scale, bits, group_size, k, zero)
    return _embedding(indices, qdata, scale, bits, group_size, k, zero)


@fake("embedding")
def _embedding_fake(indices, qdata, scale, bits, group_size, k, zero=None):
    return scale.new_empty(*indices.shape, k, dtype=embedding_dtype(scale.dtype))


def _embedding_vmap(info, in_dims, indices, qdata, scale, bits, group_size, k, zero=None):
    refuse_vmapped_planes("embedding", (*in_dims[1:3], *in_dims[6:]))
    return embedding(batch_first(info, in_dims[0], indices), qdata, scale, bits, group_size, k, zero), 0


torch.library.register_vmap("rtn::embedding", _embedding_vmap, lib=OPS)


@define("quantize(Tensor w, int bits, int group_size, str scale_method, ScalarType scale_dtype) -> Tensor[]")
def _quantize(w, bits, group_size, scale_method, scale_dtype, out=None):
    rows, k = w.shape[:-1].numel(), w.shape[-1]
    problem = make_problem("quantize", w.dtype, rows, k, w, w, bits, group_size)._replace(
        scale_dtype=scale_dtype, zero=scale_method in ASYMMETRIC
    )
    method = wide_method(computing(bits, scale_method))
    return choose(problem).quantize(w, bits, group_size, method, scale_dtype, out)


def quantize(
    w: Tensor, bits: int, group_size: int, scale_method: str, dtype: torch.dtype
) -> Sequence[Tensor]:
    """Rounds `w [..., N, K]` to `qdata [..., N, B]` uint8, `scale [..., N, G]` in `dtype`, or of 8 bits with
    "search8", and with "minmax" `zero [..., N, G]` int8; see `reference.quantize`."""
    w, scale_dtype = w.detach(), scale_dtype_of(scale_method, dtype)
    if tracing(w):
        return rtn_ops.quantize.default(w, bits, group_size, scale_method, scale_dtype)
    return _quantize(w, bits, group_size, scale_method, scale_dtype)


def quantize_(w: Tensor, planes: Sequence[Tensor], bits: int, group_size: int, scale_method: str) -> None:
    """`quantize` into planes that are there."""
    w = w.detach()
    scale = planes[1]
    # Kernels write planes only where they lie whole, and where their numbers do not begin inside a number.
    if (
        tracing(w, *planes)
        or not all(plane.is_contiguous() for plane in planes)
        or scale.data_ptr() % scale.itemsize
    ):
        for plane, new in zip(planes, quantize(w, bits, group_size, scale_method, scale.dtype), strict=True):
            plane.copy_(new)
        return
    _quantize(w, bits, group_size, scale_method, scale.dtype, tuple(planes))
    if not scale.is_inference():
        # A backward that saved them is to see the change.
        torch.autograd.graph.increment_version(tuple(planes))


@fake("quantize")
def _quantize_fake(w, bits, group_size, scale_method, scale_dtype):
    zero = scale_method in ASYMMETRIC
    return [*new_planes(w.new_empty, w.shape, bits, group_size, scale_dtype, zero).values()]


@define(
    "dequantize(Tensor qdata, Tensor scale, int bits, int group_size, SymInt k, ScalarType dtype, "
    "Tensor? zero=None) -> Tensor"
)
def _dequantize(qdata, scale, bits, group_size, k, dtype, zero=None):
    rows = qdata.shape[:-1].numel()
    kernel = choose(make_problem("dequantize", dtype, rows, k, qdata, scale, bits, group_size, zero))
    return kernel.dequantize(qdata, scale, bits, group_size, k, dtype, zero)


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
    zero: Tensor | None = None,
) -> Tensor:
    """w' = (q - zero) * S in fp32, rounded once to `dtype`: `qdata [..., N, B]`, `scale [..., N, G]`, `zero`
    likewise -> `[..., N, K]`."""
    if tracing(qdata, scale):
        return rtn_ops.dequantize.default(qdata, scale, bits, group_size, k, dtype, zero)
    return _dequantize(qdata, scale, bits, group_size, k, dtype, zero)


@fake("dequantize")
def _dequantize_fake(qdata, scale, bits, group_size, k, dtype, zero=None):
    return qdata.new_empty(*qdata.shape[:-1], k, dtype=dtype)


def _dequantize_vmap(info, in_dims, qdata, scale, bits, group_size, k, dtype, zero=None):
    qdata, scale = batch_first(info, in_dims[0], qdata), batch_first(info, in_dims[1], scale)
    zero = None if zero is None else batch_first(info, in_dims[6], zero)
    return dequantize(qdata, scale, bits, group_size, k, dtype, zero), 0


torch.library.register_vmap("rtn::dequantize", _dequantize_vmap, lib=OPS)


# ------------------------------------------------------------- what FlopCounterMode counts


@register_flop_formula(rtn_ops.linear)
def _linear_flops(x, qdata, scale, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * qdata[0]


@register_flop_formula([rtn_ops.linear_dx])
def _linear_dx_flops(dy, qdata, scale, bits, group_size, k, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(dy) * k
