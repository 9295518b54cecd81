"""Rounding that makes up for itself: each column's error is spread over the columns that are still to be
rounded, as the inputs' second moments say (GPTQ: Frantar et al., arXiv 2210.17323)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rtn_tensor import ops, reference
from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import FORMATS, Format, pack, scale_dtype_of, unpack, wide_method

DAMPING = 0.01  # of the moments' mean diagonal; ten times as much until the factorization succeeds
CHUNK = 1 << 22  # elements whose scales are searched at once: 16 MB in fp32, a dozen times
COLUMNS = 64  # that are rounded one by one, before the rest learns of their errors in one product


@dataclass(frozen=True)
class Spread:
    """How a column's rounding error is spread.

    Attributes:
        moments: H [K, K] fp32, the sum or mean of x x^T over the inputs x of the product.
        damping: d.
        order: [K], the columns by their falling mean square, so that what is left at the end matters least.
        upper: [K, K], in that order: upper triangular U with U^T U = (H + d I)^-1. Its row j, over its
            diagonal, is what the error of column j asks of the later columns.
    """

    moments: Tensor
    damping: float
    order: Tensor
    upper: Tensor


def spread(moments: Tensor) -> Spread:
    """Factors `moments`, finite, with the smallest of d = 0.01, 0.1, ... of their mean diagonal that lets
    it."""
    order = moments.diagonal().argsort(descending=True, stable=True)
    ordered = moments[order][:, order]
    damping = float(moments.diagonal().mean()) * DAMPING or 1.0
    while True:
        damped = ordered.clone()
        damped.diagonal().add_(damping)
        # With its columns from last to first, the lower factor is the inverse of U, turned around.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            unit = torch.eye(len(order), dtype=moments.dtype, device=moments.device)
            return Spread(
                moments, damping, order, torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1)
            )
        damping *= 10


def round_columns(
    w_NK: Tensor, scale_NK: Tensor, by: Spread, fmt: Format, zero_NK: Tensor | None = None
) -> Tensor:
    """The integers q - zero [N, K] of `w_NK` by the scales, and zero points, of its elements, all in fp32.

    Column j is rounded, q - zero = clamp(rint(w / S)), and every later column k takes -(w_j - w'_j) U_jk /
    U_jj. Where H is a multiple of the identity, that is plain rounding.
    """
    # Columns as rows: each then lies whole.
    w_KN, scale_KN = (t.T[by.order].contiguous() for t in (w_NK, scale_NK))
    shift_KN = None if zero_NK is None else zero_NK.T[by.order].contiguous()
    q_KN = torch.empty_like(w_KN)
    upper, k = by.upper, len(by.order)
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        errors = torch.empty_like(w_KN[start:end])
        for j in range(start, end):
            q = q_KN[j]
            torch.div(w_KN[j], scale_KN[j], out=q).round_()
            if shift_KN is None:
                q.clamp_(fmt.qmin, fmt.qmax)
            else:
                q.clamp_(fmt.qmin - shift_KN[j], fmt.qmax - shift_KN[j])
            error = torch.addcmul(w_KN[j], q, scale_KN[j], value=-1, out=errors[j - start]).div_(upper[j, j])
            w_KN[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        w_KN[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    q_NK = torch.empty_like(w_NK)
    q_NK[:, by.order] = q_KN.T
    return q_NK


def objective(error_NK: Tensor, moments_KK: Tensor) -> float:
    """The square error of the outputs that `error_NK` of the weights makes: tr(E H E^T)."""
    return float(((error_NK @ moments_KK) * error_NK).sum(dtype=torch.float64))


class Rounded(NamedTuple):
    """The planes of a weight [N, K], and the square error of its outputs by them and by plain rounding."""

    planes: Sequence[Tensor]
    error: float
    plain_error: float


def _searched(w_NK: Tensor, config: RTNConfig, importance_K: Tensor) -> Tensor:
    """The scales [N, G] of "search" or "search8", by errors that weigh as much as their
    columns."""
    rows = max(1, CHUNK // w_NK.shape[1])
    dtype = scale_dtype_of(config.scale_method, w_NK.dtype)
    parts = [
        reference.quantize(part, config.bits, config.group_size, "search", dtype, importance=importance_K)[1]
        for part in w_NK.split(rows)
    ]
    return torch.cat(parts)


def fit_scales(w_NK: Tensor, q_NK: Tensor, scale: Tensor, group_size: int, by: Spread) -> Tensor:
    """Scales [N, G] that suit the integers better, in the dtype of `scale`, which they begin from: one group
    after the other, where E (H + d I) E^T is least of each row's error E."""
    damped = by.moments.clone()
    damped.diagonal().add_(by.damping)
    k = w_NK.shape[1]
    fitted = scale.clone()
    error_NK = torch.addcmul(w_NK, q_NK, _of_columns(scale, group_size, k), value=-1)
    slope_NK = error_NK @ damped
    for i, part in enumerate(torch.arange(k).split(k if group_size == -1 else group_size)):
        columns = slice(int(part[0]), int(part[-1]) + 1)
        q, before = q_NK[:, columns], reference.widened(scale[:, i])
        curve = ((q @ damped[columns, columns]) * q).sum(1)
        step = torch.where(curve > 0, (slope_NK[:, columns] * q).sum(1) / curve, 0.0)
        now = reference.round_scale(before + step, scale.dtype)
        fitted[:, i] = torch.where(reference.widened(now) == 0, scale[:, i], now)
        slope_NK -= ((reference.widened(fitted[:, i]) - before)[:, None] * q) @ damped[columns]
    return fitted


def refine(w_NK: Tensor, config: RTNConfig, by: Spread) -> Rounded:
    """The planes of `w_NK`, whichever have the smaller error: those of `round_columns`, with "search" and
    "search8" by searched and then by fitted scales, or plain rounding's."""
    fmt, k = FORMATS[config.bits], w_NK.shape[1]
    wide_NK = w_NK.float()

    def error(steps_NK: Tensor, scale: Tensor) -> float:
        of_columns = _of_columns(scale, config.group_size, k)
        return objective(torch.addcmul(wide_NK, steps_NK, of_columns, value=-1), by.moments)

    qdata, scale, *zero = ops.quantize(w_NK, config.bits, config.group_size, config.scale_method, w_NK.dtype)
    zero_NK = _of_columns(zero[0], config.group_size, k) if zero else None
    q_NK = unpack(qdata, config.bits, k).float()
    plain = error(q_NK if zero_NK is None else q_NK - zero_NK, scale)
    best = Rounded((qdata, scale, *zero), plain, plain)
    searches = wide_method(config.scale_method) == "search"
    if searches:
        scale = _searched(w_NK, config, by.moments.diagonal())
    steps_NK = round_columns(wide_NK, _of_columns(scale, config.group_size, k), by, fmt, zero_NK)
    if searches:
        scale = fit_scales(wide_NK, steps_NK, scale, config.group_size, by)
    if (refined := error(steps_NK, scale)) < plain:
        q_NK = steps_NK if zero_NK is None else steps_NK + zero_NK
        best = Rounded((pack(q_NK.to(torch.int8), config.bits), scale, *zero), refined, plain)
    return best


def _of_columns(scale: Tensor, group_size: int, k: int) -> Tensor:
    """The scale, or zero point, of each element, [N, K] fp32."""
    wide = reference.widened(scale)
    if group_size == -1:
        return wide.expand(-1, k)
    return wide.repeat_interleave(group_size, 1)[:, :k]
