"""`Problem`, what an op is asked to do, and `Kernel`, what may do it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """All that the choice of a kernel may depend on. A tuple, since one is made and hashed at every eager call (0.5 us, against
    2.5 us as a frozen dataclass)."""

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
    alignment: int = 16  # bytes that the planes' addresses are multiples of, at most 16


_LACKING: Any = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to run the ops, with the signatures of `rtn_tensor.reference`; an op it does not have stays None.

    Attributes:
        name: unique; what `RTN_KERNEL` and `explain` call it.
        why_not: given a `Problem`, None where the kernel can run it, else one sentence that says why it cannot.
        rounds_weight: whether q * S is rounded to the activation dtype before the product (as a dequantized weight would be);
            otherwise integer weights stay exact and fp32 partial sums are scaled.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    rounds_weight: bool
    linear: Callable[..., Tensor] = _LACKING
    linear_dx: Callable[..., Tensor] = _LACKING
    grouped: Callable[..., Tensor] = _LACKING
    grouped_dx: Callable[..., Tensor] = _LACKING
    embedding: Callable[..., Tensor] = _LACKING
    quantize: Callable[..., tuple[Tensor, Tensor]] = _LACKING
    dequantize: Callable[..., Tensor] = _LACKING
