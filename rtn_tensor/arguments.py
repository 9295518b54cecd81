"""What the arguments of each `torch.ops.rtn` op must be to one another, of real tensors and of fake ones: a
function an op, which raises RuntimeError (as `torch._check` does) and names the op, what was given, and what
is allowed.

A tensor that was checked when it was made may have got other planes since, and anyone may call an op; kernels
trust what comes here.
"""

from typing import Any

import torch
from torch import Tensor

from rtn_tensor.formats import (
    ASYMMETRIC,
    FLOAT_DTYPES,
    FORMATS,
    MAX_GROUP_SIZE,
    SCALE_DTYPES,
    check_format,
    groups,
)
from rtn_tensor.reference import ACTIVATIONS


def _weight(
    op: str,
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    zero: Tensor | None,
    dims: int | None = None,
) -> None:
    """Raises RuntimeError unless these are planes `[..., N, row_bytes(k)]` and `[..., N, groups(k,
    group_size)]`, of `dims` dims."""
    fmt = FORMATS.get(bits)
    torch._check(
        fmt is not None
        and (group_size == -1 or (0 < group_size <= MAX_GROUP_SIZE and group_size % 32 == 0))
        and k >= 0
        and qdata.dtype == torch.uint8
        and scale.dtype in SCALE_DTYPES
        and qdata.device == scale.device
        and (qdata.dim() >= 1 if dims is None else qdata.dim() == dims)
        and qdata.shape[:-1] == scale.shape[:-1]
        and qdata.shape[-1] == fmt.row_bytes(k)
        and scale.shape[-1] == groups(k, group_size),
        lambda: (
            f"rtn::{op}: qdata {qdata.dtype} {list(qdata.shape)} on {qdata.device} and scale {scale.dtype} "
            f"{list(scale.shape)} on "
            f"{scale.device} are not the planes of a weight of {k} columns with bits={bits} and "
            f"group_size={group_size}"
            f"{'' if dims is None else f', in {dims} dims'}; they must be uint8 [..., N, 16 * ceil({k} * "
            "bits / 128)] and float [..., N, "
            f"ceil({k} / group_size)], bits one of {', '.join(map(str, FORMATS))} and group_size a multiple "
            "of 32 or -1"
        ),
    )
    if zero is not None:
        torch._check(
            zero.dtype == torch.int8 and zero.shape == scale.shape and zero.device == scale.device,
            lambda: (
                f"rtn::{op}: zero is {zero.dtype} {list(zero.shape)} on {zero.device}; it must be int8, of "
                f"the shape of scale, {list(scale.shape)}, on {scale.device}"
            ),
        )


def _like(op: str, name: str, t: Tensor | None, shape: tuple, qdata: Tensor, integer: bool = False) -> None:
    """Raises RuntimeError unless `t` is None, or of `shape`, of floats or integers as asked, and where the
    planes are."""
    if t is None:
        return
    fits = t.dtype in (torch.int32, torch.int64) if integer else t.is_floating_point()
    torch._check(
        t.shape == shape and fits and t.device == qdata.device,
        lambda: (
            f"rtn::{op}: {name} is {t.dtype} {list(t.shape)} on {t.device}; it must be "
            f"{'int32 or int64' if integer else 'float'} "
            f"{list(shape)} on {qdata.device}"
        ),
    )


def _rows(op: str, name: str, x: Tensor, columns: Any, qdata: Tensor, dims: int | None = None) -> None:
    """Raises RuntimeError unless `x` is `[..., columns]` of floats, of `dims` dims, and where the planes
    are."""
    torch._check(
        (x.dim() >= 1 if dims is None else x.dim() == dims)
        and x.shape[-1] == columns
        and x.is_floating_point()
        and x.device == qdata.device,
        lambda: (
            f"rtn::{op}: {name} is {x.dtype} {list(x.shape)} on {x.device}; it must be float "
            f"[{'...' if dims is None else 'M'}, {columns}] "
            f"on {qdata.device}"
        ),
    )


def check_linear(x, qdata, scale, bias, bits, group_size, zero=None, int8_x=False):
    torch._check(x.dim() >= 1, lambda: "rtn::linear: x has no dims; it must be [..., K]")
    k = x.shape[-1]
    _weight("linear", qdata, scale, bits, group_size, k, zero, 2)
    _rows("linear", "x", x, k, qdata)
    _like("linear", "bias", bias, (qdata.shape[0],), qdata)


def check_linear_dx(dy, qdata, scale, bits, group_size, k, zero=None):
    _weight("linear_dx", qdata, scale, bits, group_size, k, zero, 2)
    _rows("linear_dx", "dy", dy, qdata.shape[0], qdata)


def check_grouped(x, qdata, scale, offs, bits, group_size, zero=None, int8_x=False):
    torch._check(x.dim() == 2, lambda: f"rtn::grouped: x is {list(x.shape)}; it must be [M, K]")
    k = x.shape[-1]
    _weight("grouped", qdata, scale, bits, group_size, k, zero, 3)
    _rows("grouped", "x", x, k, qdata)
    _like("grouped", "offs", offs, (qdata.shape[0],), qdata, integer=True)


def check_grouped_dx(dy, qdata, scale, offs, bits, group_size, k, zero=None):
    _weight("grouped_dx", qdata, scale, bits, group_size, k, zero, 3)
    _rows("grouped_dx", "dy", dy, qdata.shape[1], qdata, 2)
    _like("grouped_dx", "offs", offs, (qdata.shape[0],), qdata, integer=True)


def check_routed(
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
    torch._check(x.dim() == 2, lambda: f"rtn::routed: x is {list(x.shape)}; it must be [T, K]")
    k = x.shape[-1]
    _weight("routed", qdata, scale, bits, group_size, k, zero, 3)
    _rows("routed", "x", x, k, qdata)
    e, n = qdata.shape[:2]
    torch._check(top_k >= 1, lambda: f"rtn::routed: top_k={top_k}; a token has one expert at least")
    torch._check(
        not activation or (activation in ACTIVATIONS and n % 2 == 0),
        lambda: (
            f"rtn::routed: activation={activation!r} over {n} columns; use "
            f"{', '.join(map(repr, ACTIVATIONS))} over an even number, or ''"
        ),
    )
    torch._check((pairs is None) == (offs is None), lambda: "rtn::routed: give pairs and offs, or neither")
    count = x.shape[0] * top_k
    _like("routed", "bias", bias, (e, n), qdata)
    for name, t in (("experts", experts), ("pairs", pairs)):
        _like("routed", name, t, (count,), qdata, integer=True)
    _like("routed", "offs", offs, (e,), qdata, integer=True)
    _like("routed", "router", router, (count,), qdata)


def check_embedding(indices, qdata, scale, bits, group_size, k, zero=None):
    _weight("embedding", qdata, scale, bits, group_size, k, zero, 2)
    _like("embedding", "indices", indices, indices.shape, qdata, integer=True)


def check_quantize(w, bits, group_size, scale_method, scale_dtype, out=None):
    check_format(bits, group_size, scale_method)
    torch._check(
        w.dim() >= 1 and w.dtype in FLOAT_DTYPES and scale_dtype in SCALE_DTYPES,
        lambda: (
            f"rtn::quantize: w is {w.dtype} {list(w.shape)} for a scale of {scale_dtype}; it must be "
            f"[..., K] of {FLOAT_DTYPES}, and the scale one of {SCALE_DTYPES}"
        ),
    )
    if out is not None:
        qdata, scale, zero = [*out, None][:3]
        _weight("quantize", qdata, scale, bits, group_size, w.shape[-1], zero)
        torch._check(
            qdata.shape[:-1] == w.shape[:-1] and qdata.device == w.device,
            lambda: (
                f"rtn::quantize: w {list(w.shape)} on {w.device} does not fit planes of "
                f"{list(qdata.shape)} on {qdata.device}"
            ),
        )
        torch._check(
            (zero is not None) == (scale_method in ASYMMETRIC),
            lambda: f"rtn::quantize: {len(out)} planes do not fit scale_method={scale_method!r}",
        )


def check_dequantize(qdata, scale, bits, group_size, k, dtype, zero=None):
    _weight("dequantize", qdata, scale, bits, group_size, k, zero)
    torch._check(
        dtype.is_floating_point, lambda: f"rtn::dequantize: dtype is {dtype}; it must be one of floats"
    )
