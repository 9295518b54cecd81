"""Every `torch.ops.rtn` op: schema, fake and autograd; those of experts are in `expert_ops.py`, and nothing
else registers ops.

Each function here is the one entry point to its op. Where nothing traces and no gradient is asked for it
calls the kernel straight away, which saves torch.library's Python layer (3 to 6 us per call); a linear on the
CPU goes there in C++. Otherwise it goes through the dispatcher. K is passed where it cannot be read off an
argument, because `qdata` is padded.
"""

import functools
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rtn_tensor._torch import CPU_KEYS, tracing, transformed
from rtn_tensor.expert_ops import grouped, grouped_dx, routed  # noqa: F401  (called as ops.grouped)
from rtn_tensor.formats import FORMATS, computing, groups
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


@define("linear(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, int bits, int group_size) -> Tensor")
def _linear(x, qdata, scale, bias, bits, group_size):
    x_MK = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    m, k = x_MK.shape
    kernel = choose(make_problem("linear", x.dtype, m, k, qdata, scale, bits, group_size))
    y_MN = kernel.linear(x_MK, qdata, scale, bias, bits, group_size)
    return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], qdata.shape[-2])


# csrc/torch_op.cpp takes rtn::linear on CPU tensors; what it does not run itself it calls here. Of another
# namespace, as no graph has it.
_python = torch.library.Library("rtn_python", "DEF")
_python.define(
    "linear(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, int bits, int group_size) -> Tensor"
)
_python.impl("linear", dispatched("linear", _linear), "CompositeExplicitAutograd")
# The same without that call: None instead. An error that Python raises below C++ comes out as a RuntimeError,
# Ctrl-C too.
_python.define(
    "linear_in_cpp(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, int bits, int group_size) -> Tensor?"
)
_cpu_linear = (
    functools.partial(torch.ops.rtn_python.linear_in_cpp.default.redispatch, CPU_KEYS)
    if cpu.register()
    else None
)
forget()  # what is registered runs by itself where its kernel comes first


def linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """y = x @ w'^T + bias: `x [..., K]`, `qdata [N, B]`, `scale [N, G]`, `bias [N]` -> `[..., N]` in x's
    dtype."""
    given = (x,) if bias is None else (x, bias)
    # Both planes are of one kind.
    if tracing(*given) or type(qdata) is not Tensor or wants_grad(*given):
        run = _linear_function if transformed() else rtn_ops.linear.default
        return run(x, qdata, scale, bias, bits, group_size)
    # Past autograd and torch.library, the call takes 3 us around the product; through Python it takes 9.
    if x.is_cpu and _cpu_linear and (y := _cpu_linear(x, qdata, scale, bias, bits, group_size)) is not None:
        return y
    return _linear(x, qdata, scale, bias, bits, group_size)


@fake("linear")
def _linear_fake(x, qdata, scale, bias, bits, group_size):
    return x.new_empty(*x.shape[:-1], qdata.shape[-2])


def _linear_forward(x, qdata, scale, bias, bits, group_size):
    return rtn_ops.linear.default(x, qdata, scale, bias, bits, group_size)


def _linear_setup(ctx, inputs, output):
    x, qdata, scale, bias, ctx.bits, ctx.group_size = inputs
    save_planes(ctx, qdata, scale)
    ctx.k = x.shape[-1]


def _linear_backward(ctx, dy):
    qdata, scale = ctx.saved_tensors
    dx = linear_dx(dy, qdata, scale, ctx.bits, ctx.group_size, ctx.k) if ctx.needs_input_grad[0] else None
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None


def _linear_jvp(ctx, dx, dqdata, dscale, dbias, *_):
    qdata, scale = ctx.saved_tensors
    return linear(dx, qdata, scale, dbias, ctx.bits, ctx.group_size)


def _linear_vmap(info, in_dims, x, qdata, scale, bias, bits, group_size):
    refuse_vmapped_planes("linear", in_dims[1:3])
    x = batch_first(info, in_dims[0], x)
    if in_dims[3] is None:
        return linear(x, qdata, scale, bias, bits, group_size), 0
    bias = bias.movedim(in_dims[3], 0)
    return linear(x, qdata, scale, None, bits, group_size) + bias.view(len(bias), *[1] * (x.dim() - 2), -1), 0


_linear_function = differentiable(
    "linear", _linear_forward, _linear_setup, _linear_backward, _linear_jvp, _linear_vmap
)


@define("linear_dx(Tensor dy, Tensor qdata, Tensor scale, int bits, int group_size, SymInt k) -> Tensor")
def _linear_dx(dy, qdata, scale, bits, group_size, k):
    dy_MN = dy if dy.dim() == 2 else dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    kernel = choose(make_problem("linear_dx", dy.dtype, dy_MN.shape[0], k, qdata, scale, bits, group_size))
    dx_MK = kernel.linear_dx(dy_MN, qdata, scale, bits, group_size, k)
    return dx_MK if dy.dim() == 2 else dx_MK.view(*dy.shape[:-1], k)


def linear_dx(dy: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int) -> Tensor:
    """dx = dy @ w': `dy [..., N]`, `qdata [N, B]`, `scale [N, G]` -> `[..., K]` in dy's dtype."""
    if tracing(dy, qdata, scale) or wants_grad(dy):
        run = _linear_dx_function if transformed() else rtn_ops.linear_dx.default
        return run(dy, qdata, scale, bits, group_size, k)
    return _linear_dx(dy, qdata, scale, bits, group_size, k)


@fake("linear_dx")
def _linear_dx_fake(dy, qdata, scale, bits, group_size, k):
    return dy.new_empty(*dy.shape[:-1], k)


def _linear_dx_forward(dy, qdata, scale, bits, group_size, k):
    return rtn_ops.linear_dx.default(dy, qdata, scale, bits, group_size, k)


def _linear_dx_setup(ctx, inputs, output):
    _, qdata, scale, ctx.bits, ctx.group_size, ctx.k = inputs
    save_planes(ctx, qdata, scale)


def _linear_dx_backward(ctx, ddx):
    qdata, scale = ctx.saved_tensors
    return linear(ddx, qdata, scale, None, ctx.bits, ctx.group_size), None, None, None, None, None


def _linear_dx_jvp(ctx, ddy, *_):
    qdata, scale = ctx.saved_tensors
    return linear_dx(ddy, qdata, scale, ctx.bits, ctx.group_size, ctx.k)


def _linear_dx_vmap(info, in_dims, dy, qdata, scale, bits, group_size, k):
    refuse_vmapped_planes("linear_dx", in_dims[1:3])
    return linear_dx(batch_first(info, in_dims[0], dy), qdata, scale, bits, group_size, k), 0


_linear_dx_function = differentiable(
    "linear_dx", _linear_dx_forward, _linear_dx_setup, _linear_dx_backward, _linear_dx_jvp, _linear_dx_vmap
)


# --------------------------------------------------------- embedding, quantize, dequantize


@define("embedding(Tensor indices, Tensor qdata, Tensor scale, int bits, int group_size, SymInt k) -> Tensor")
def _embedding(indices, qdata, scale, bits, group_size, k):
    kernel = choose(
        make_problem("embedding", scale.dtype, indices.numel(), k, qdata, scale, bits, group_size)
    )
    return kernel.embedding(indices, qdata, scale, bits, group_size, k)


def embedding(indices: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int) -> Tensor:
    """Dequantized rows: `indices [...]` int32 or int64, `qdata [N, B]`, `scale [N, G]` -> `[..., K]` in the
    scale's dtype."""
    if tracing(indices, qdata, scale):
        return rtn_ops.embedding.default(indices, qdata, scale, bits, group_size, k)
    return _embedding(indices, qdata, scale, bits, group_size, k)


@fake("embedding")
def _embedding_fake(indices, qdata, scale, bits, group_size, k):
    return scale.new_empty(*indices.shape, k)


def _embedding_vmap(info, in_dims, indices, qdata, scale, bits, group_size, k):
    refuse_vmapped_planes("embedding", in_dims[1:3])
    return embedding(batch_first(info, in_dims[0], indices), qdata, scale, bits, group_size, k), 0


torch.library.register_vmap("rtn::embedding", _embedding_vmap, lib=OPS)


@define(
    "quantize(Tensor w, int bits, int group_size, str scale_method, ScalarType scale_dtype) -> (Tensor "
    "qdata, Tensor scale)"
)
def _quantize(w, bits, group_size, scale_method, scale_dtype, out=None):
    rows, k = w.shape[:-1].numel(), w.shape[-1]
    problem = make_problem("quantize", w.dtype, rows, k, w, w, bits, group_size)._replace(
        scale_dtype=scale_dtype
    )
    return choose(problem).quantize(w, bits, group_size, computing(bits, scale_method), scale_dtype, out)


def quantize(
    w: Tensor, bits: int, group_size: int, scale_method: str, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rounds `w [..., N, K]` to `qdata [..., N, B]` uint8 and `scale [..., N, G]` in `scale_dtype`; see
    `reference.quantize`."""
    w = w.detach()
    if tracing(w):
        return rtn_ops.quantize.default(w, bits, group_size, scale_method, scale_dtype)
    return _quantize(w, bits, group_size, scale_method, scale_dtype)


def quantize_(w: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, scale_method: str) -> None:
    """`quantize` into planes that are there."""
    w = w.detach()
    # Kernels write planes only where they lie whole, and where their numbers do not begin inside a number.
    if (
        tracing(w, qdata, scale)
        or not (qdata.is_contiguous() and scale.is_contiguous())
        or scale.data_ptr() % scale.itemsize
    ):
        new_qdata, new_scale = quantize(w, bits, group_size, scale_method, scale.dtype)
        qdata.copy_(new_qdata)
        scale.copy_(new_scale)
        return
    _quantize(w, bits, group_size, scale_method, scale.dtype, (qdata, scale))
    if not qdata.is_inference():
        # A backward that saved them is to see the change.
        torch.autograd.graph.increment_version((qdata, scale))


@fake("quantize")
def _quantize_fake(w, bits, group_size, scale_method, scale_dtype):
    *rows, k = w.shape
    qdata = w.new_empty(*rows, FORMATS[bits].row_bytes(k), dtype=torch.uint8)
    return qdata, w.new_empty(*rows, groups(k, group_size), dtype=scale_dtype)


@define(
    "dequantize(Tensor qdata, Tensor scale, int bits, int group_size, SymInt k, ScalarType dtype) -> Tensor"
)
def _dequantize(qdata, scale, bits, group_size, k, dtype):
    rows = qdata.shape[:-1].numel()
    kernel = choose(make_problem("dequantize", dtype, rows, k, qdata, scale, bits, group_size))
    return kernel.dequantize(qdata, scale, bits, group_size, k, dtype)


def dequantize(
    qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int, dtype: torch.dtype
) -> Tensor:
    """w' = q * S in fp32, rounded once to `dtype`: `qdata [..., N, B]`, `scale [..., N, G]` -> `[..., N,
    K]`."""
    if tracing(qdata, scale):
        return rtn_ops.dequantize.default(qdata, scale, bits, group_size, k, dtype)
    return _dequantize(qdata, scale, bits, group_size, k, dtype)


@fake("dequantize")
def _dequantize_fake(qdata, scale, bits, group_size, k, dtype):
    return qdata.new_empty(*qdata.shape[:-1], k, dtype=dtype)


def _dequantize_vmap(info, in_dims, qdata, scale, bits, group_size, k, dtype):
    qdata, scale = batch_first(info, in_dims[0], qdata), batch_first(info, in_dims[1], scale)
    return dequantize(qdata, scale, bits, group_size, k, dtype), 0


torch.library.register_vmap("rtn::dequantize", _dequantize_vmap, lib=OPS)


# ------------------------------------------------------------- what FlopCounterMode counts


@register_flop_formula(rtn_ops.linear)
def _linear_flops(x, qdata, scale, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * qdata[0]


@register_flop_formula([rtn_ops.linear_dx])
def _linear_dx_flops(dy, qdata, scale, bits, group_size, k, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(dy) * k
