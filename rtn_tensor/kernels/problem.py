"""`Problem`, what an op is asked to do, and `Kernel`, what may do it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """All that the choice of a kernel may depend on. A tuple, since one is made and hashed at every eager
    call (0.5 us, against 2.5 us as a frozen dataclass)."""

    op: str  # the name of one of Kernel's functions
    device: str  # a device type: "cpu", "cuda", ...
    capability: tuple[int, int] | None  # CUDA compute capability; None elsewhere
    dtype: torch.dtype  # of the activations, or of the float weight for "quantize" and "dequantize"
    scale_dtype: torch.dtype
    bits: int
    group_size: int
    M: int  # rows of activations, rounded up to a power of two
    N: int
    K: int
    experts: int | None = None
    # Bytes that the address of qdata (for "quantize", of the float weight) is a multiple of, at most 16.
    alignment: int = 16
    zero: bool = False  # whether the weight has a plane `zero`
    int8_x: bool = False  # whether the activations are rounded to int8 first


def bucket(m: int) -> int:
    """`m` rounded up to a power of two."""
    return 1 << (m - 1).bit_length() if m else 0


def device_of(device: str | torch.device) -> torch.device:
    """The device that a user names.

    Raises:
        TypeError: it is neither a name nor a torch.device.
        ValueError: torch knows no such device, or it is a GPU that is not there: which kernel runs depends on
            it.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device={device!r}; give its name, as 'cpu' or 'cuda', or a torch.device")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is no device; cpu and cuda are") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(
                f"device={str(found)!r}: there is no CUDA device here, and which kernel runs "
                "depends on it; use device='cpu'"
            )
        if found.index is not None and found.index >= count:
            raise ValueError(
                f"device={str(found)!r}: there are {count} CUDA devices here; use cuda:0 to cuda:{count - 1}"
            )
    return found


@lru_cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def make_problem(
    op: str,
    dtype: torch.dtype,
    m: int,
    k: int,
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    zero: Tensor | None = None,
    int8_x: bool = False,
) -> Problem:
    """The `Problem` of running `op` over `m` rows with the weight in these planes. M is rounded up to a power
    of two, so that few choices are ever made."""
    # Called for every eager product: `size` costs a third of `shape`, `is_cpu` a third of `device`.
    dims = qdata.dim()
    address = 0 if qdata.is_meta else qdata.data_ptr()
    return Problem(
        op,
        "cpu" if qdata.is_cpu else qdata.device.type,
        capability(qdata.device.index) if qdata.is_cuda else None,
        dtype,
        scale.dtype,
        bits,
        group_size,
        bucket(m),
        qdata.size(-2) if dims > 1 else 1,
        k,
        qdata.size(0) if dims > 2 else None,
        (address & -address & 15) or 16,
        zero is not None,
        int8_x,
    )


_LACKING: Any = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to run the ops, with the signatures of `rtn_tensor.reference`; an op it does not have stays
    None.

    Attributes:
        name: unique; what `RTN_KERNEL` and `explain` call it.
        why_not: given a `Problem`, None where the kernel can run it, else one sentence that says why it
            cannot.
        rounds_weight: given a `Problem`, whether q * S, and that of int8 activations, is rounded to the
            activation dtype before the product (as a dequantized weight would be); otherwise integers stay
            exact and fp32 partial sums are scaled.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    rounds_weight: Callable[[Problem], bool]
    linear: Callable[..., Tensor] = _LACKING
    linear_dx: Callable[..., Tensor] = _LACKING
    grouped: Callable[..., Tensor] = _LACKING
    grouped_dx: Callable[..., Tensor] = _LACKING
    routed: Callable[..., Tensor] = _LACKING
    embedding: Callable[..., Tensor] = _LACKING
    quantize: Callable[..., tuple[Tensor, ...]] = _LACKING
    dequantize: Callable[..., Tensor] = _LACKING


# Each op that a kernel may have, in the order in which messages name them.
OPS = [field.name for field in fields(Kernel) if field.default is _LACKING]
# Those of them that may round their activations.
TAKE_ACTIVATIONS = ("linear", "grouped", "routed")
