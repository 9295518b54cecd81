"""What every launch gives a kernel beside its sizes: tensors laid out as the kernels read them, options."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def options(num_warps: int, num_stages: int = 3) -> dict[str, Any]:
    # Fusion is stated, as Triton 3.9 warns where it is not. debug is for the kernels that assert; arithmetic
    # is not to be checked for it.
    return {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
        "sanitize_overflow": False,
    }


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, as Triton launches there."""
    if device.type == "cpu" or torch.get_device_module(device).current_device() == device.index:
        return nullcontext()
    return torch.get_device_module(device).device(device)


def asm(device: torch.device) -> bool:
    """Whether the kernels' PTX can be used."""
    return device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)


def aligned_rows(x: Tensor) -> Tensor:
    """`x [M, K]`, or a copy, whose rows are dense, begin at multiples of 16 bytes, and are multiples of 8
    long, by zeros at the end."""
    if x.shape[1] % 8:
        return F.pad(x, (0, -x.shape[1] % 8))
    if x.stride(1) != 1 or (x.stride(0) % 8 and x.shape[0] > 1) or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def words(qdata: Tensor, as_bytes: bool = False) -> Tensor:
    return (qdata if qdata.stride(-1) == 1 else qdata.contiguous()).view(
        torch.int8 if as_bytes else torch.int16
    )


def dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def zero_rows(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else dense_rows(zero)


def strides(plane: Tensor | None, *dims: int) -> list[int | None]:
    """Of a plane that there may be; None is a constant to a kernel, as the plane then is."""
    return [None if plane is None else plane.stride(dim) for dim in dims]


def per_row(group_size: int) -> int:
    return 0 if group_size == -1 else group_size
