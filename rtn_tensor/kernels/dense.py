"""Dequantize the weight, then the platform's own dense matmul: any device and shape, at the price of a float
copy of the weight per call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rtn_tensor import reference
from rtn_tensor.kernels import cpu, triton
from rtn_tensor.kernels.problem import Kernel, Problem, make_problem


def _weight(
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
    zero: Tensor | None,
) -> Tensor:
    problem = make_problem("dequantize", dtype, qdata.shape[0], k, qdata, scale, bits, group_size, zero)
    for kernel in (cpu.KERNEL, triton.KERNEL):
        if kernel.why_not(problem) is None:
            return kernel.dequantize(qdata, scale, bits, group_size, k, dtype, zero)
    return reference.dequantize(qdata, scale, bits, group_size, k, dtype, zero)


def _multiply(x_MK: Tensor, w_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias.

    On AMX, oneDNN 3.12 reads 16-bit rows in pieces of 32 columns, up to 31 beyond the last one, and relies on
    zeros of the weight to undo them: an inf or NaN that lies there comes out as NaN in rows that have none
    (oneDNN's issue 5717). Columns of zeros to a multiple of 32 leave nothing to read there.
    """
    if x_MK.device.type == "cpu" and x_MK.element_size() == 2 and (missing := -x_MK.shape[-1] % 32):
        x_MK, w_NK = F.pad(x_MK, (0, missing)), F.pad(w_NK, (0, missing))
    return F.linear(x_MK, w_NK, bias)


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
    return _multiply(x, _weight(qdata, scale, bits, group_size, x.shape[-1], x.dtype, zero), bias)


def linear_dx(
    dy: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int, zero: Tensor | None = None
) -> Tensor:
    return _multiply(dy, _weight(qdata, scale, bits, group_size, k, dy.dtype, zero).mT)


def why_not(problem: Problem) -> str | None:
    return "It multiplies activations as they are, not as int8." if problem.int8_x else None


KERNEL = Kernel(
    name="dense", why_not=why_not, rounds_weight=lambda problem: True, linear=linear, linear_dx=linear_dx
)
