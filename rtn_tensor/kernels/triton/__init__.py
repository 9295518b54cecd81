"""Triton kernels on NVIDIA GPUs, Hopper first, reading the packed planes as they lie; on other makers' GPUs
the same ones, without PTX.

`words.py` is the loop they share, `launch.py` what starts them. Nothing here imports triton before a kernel
is asked for.
"""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.formats import SCALE_DTYPES
from rtn_tensor.kernels.problem import Kernel, Problem
from rtn_tensor.kernels.triton.config import configure, shape_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton."
    return None


def _launch() -> Any:
    from rtn_tensor.kernels.triton import launch

    return launch


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
    return _launch().linear(x, qdata, scale, bias, bits, group_size, zero, int8_x)


def linear_dx(
    dy: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int, zero: Tensor | None = None
) -> Tensor:
    return _launch().linear_dx(dy, qdata, scale, bits, group_size, k, zero)


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
    return _launch().grouped(x, qdata, scale, offs, bits, group_size, zero, int8_x)


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
    return _launch().grouped_dx(dy, qdata, scale, offs, bits, group_size, k, zero)


def routed(*args: Any) -> Tensor:
    return _launch().routed(*args)


def embedding(
    indices: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    zero: Tensor | None = None,
) -> Tensor:
    return _launch().embedding(indices, qdata, scale, bits, group_size, k, zero)


def quantize(
    w: Tensor,
    bits: int,
    group_size: int,
    scale_method: str,
    scale_dtype: torch.dtype,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    return _launch().quantize(w, bits, group_size, scale_method, scale_dtype, out)


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
    zero: Tensor | None = None,
) -> Tensor:
    return _launch().dequantize(qdata, scale, bits, group_size, k, dtype, zero)


def why_not(problem: Problem) -> str | None:
    if problem.device not in ("cuda", "xpu") and not (problem.device == "cpu" and interpreting()):
        return "It runs on GPUs only."
    if reason := missing():
        return reason
    if problem.device != "cpu" and not torch.get_device_module(problem.device).is_available():
        return f"There is no {problem.device} device here."
    if problem.device == "cuda" and torch.version.hip is None and (problem.capability or (0, 0)) < (8, 0):
        major, minor = problem.capability or (0, 0)
        return f"It needs compute capability 8.0 (Ampere) or later, and this GPU has {major}.{minor}."
    if problem.dtype not in DTYPES or problem.scale_dtype not in SCALE_DTYPES:
        return (
            f"It takes float32, bfloat16 and float16, not {problem.dtype} with a scale of "
            f"{problem.scale_dtype}."
        )
    if problem.bits not in (4, 8):
        return f"It reads 4 and 8 bits, not {problem.bits}."
    if problem.op != "quantize" and problem.alignment < 16:
        return (
            f"It reads qdata 16 bytes at a time, and this one's address is a multiple of "
            f"{problem.alignment} only; clone the weight."
        )
    if problem.op == "linear" and configure(shape_of(problem), _launch().gpu_of(_device(problem))) is None:
        return f"From M = {problem.M} on it is faster to dequantize the weight and multiply it densely."
    return None


def rounds_weight(problem: Problem) -> bool:
    if problem.op.endswith("_dx"):
        return True
    if problem.int8_x:
        return False
    if problem.op == "routed":
        problem = problem._replace(op="grouped")
    config = configure(shape_of(problem), _launch().gpu_of(_device(problem)))
    return config is None or not config.scale_after


def _device(problem: Problem) -> torch.device:
    return torch.device(
        problem.device,
        0 if problem.device == "cpu" else torch.get_device_module(problem.device).current_device(),
    )


KERNEL = Kernel(
    name="triton",
    why_not=why_not,
    rounds_weight=rounds_weight,
    linear=linear,
    linear_dx=linear_dx,
    grouped=grouped,
    grouped_dx=grouped_dx,
    routed=routed,
    embedding=embedding,
    quantize=quantize,
    dequantize=dequantize,
)
