"""`KERNELS` in order of preference, and the choice among them.

To add a kernel: write a module with one `Kernel` and put it in `KERNELS`; the tests, the benchmark, `explain`
and the C++ entry of eager products follow that list.
"""

import functools
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import reference
from rtn_tensor.formats import FLOAT_DTYPES, check_activations, check_format, or_default
from rtn_tensor.kernels import cpu, dense, triton
from rtn_tensor.kernels.problem import (
    OPS,
    TAKE_ACTIVATIONS,
    Kernel,
    Problem,
    bucket,
    capability,
    device_of,
    make_problem,
)
from rtn_tensor.text_table import table
from rtn_tensor.wording import with_article

REFERENCE = Kernel(
    name="reference",
    why_not=lambda problem: None,
    rounds_weight=lambda problem: False,
    linear=reference.linear,
    linear_dx=reference.linear_dx,
    grouped=reference.grouped,
    grouped_dx=reference.grouped_dx,
    routed=reference.routed,
    embedding=reference.embedding,
    quantize=reference.quantize,
    dequantize=reference.dequantize,
)


class _Kernels(list[Kernel]):
    """A list that, whenever it changes, has the choices that were made by it forgotten."""


def _and_forget(change):
    @functools.wraps(change)
    def changed(self, *args, **kwargs):
        result = change(self, *args, **kwargs)
        forget()
        return result

    return changed


for _name in (
    "__setitem__",
    "__delitem__",
    "__iadd__",
    "append",
    "extend",
    "insert",
    "pop",
    "remove",
    "clear",
    "reverse",
    "sort",
):
    setattr(_Kernels, _name, _and_forget(getattr(list, _name)))

KERNELS = _Kernels([cpu.KERNEL, triton.KERNEL, dense.KERNEL, REFERENCE])


def why_not(kernel: Kernel, problem: Problem) -> str | None:
    """None where `kernel` can run `problem`, else one sentence that says why it cannot."""
    if getattr(kernel, problem.op) is None:
        return f"It has no {problem.op}."
    return kernel.why_not(problem)


@lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None) -> Kernel:
    if forced:
        kernel = next((k for k in KERNELS if k.name == forced), None)
        if kernel is None:
            raise ValueError(
                f"RTN_KERNEL={forced!r} names no kernel; use one of "
                f"{', '.join(k.name for k in KERNELS)}, or unset it"
            )
        if getattr(kernel, problem.op) is not None:
            if reason := kernel.why_not(problem):
                raise ValueError(
                    f"RTN_KERNEL={forced!r} cannot run {problem}: {reason} Unset RTN_KERNEL to "
                    "let the library choose"
                )
            return kernel
    return next(kernel for kernel in KERNELS if why_not(kernel, problem) is None)


def choose(problem: Problem) -> Kernel:
    """The first of `KERNELS` that can run `problem`, or the one that the environment variable `RTN_KERNEL`
    names, for the ops it has.

    Raises:
        ValueError: `RTN_KERNEL` names no kernel, or one that cannot run `problem`.
    """
    return _choose(problem, os.environ.get("RTN_KERNEL"))


def forget() -> None:
    """Forgets the choices made, where what they depend on has changed; and has C++ run eager products on CPU
    tensors by itself only where no kernel goes before its own."""
    _choose.cache_clear()
    cpu.direct(KERNELS[:1] == [cpu.KERNEL])


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `kernel` is the name of the kernel that runs; `reasons` maps every other kernel
    to one sentence."""

    problem: Problem
    kernel: str
    reasons: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        problem = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in self.problem._asdict().items()}
        return {"problem": problem, "kernel": self.kernel, "reasons": self.reasons}

    def __str__(self) -> str:
        p = self.problem
        what = (
            f"{p.op} on {p.device}: {p.dtype} x [{p.M}, {p.K}], int{p.bits} weight [{p.N}, {p.K}] "
            f"with group_size {p.group_size}{', int8 activations' if p.int8_x else ''}"
        )
        rows = [
            [k.name, "runs" if k.name == self.kernel else "", self.reasons.get(k.name, "")] for k in KERNELS
        ]
        return what + "\n" + table(["kernel", "", "why not"], rows)


def explain(
    weight: Any = None,
    x: Tensor | None = None,
    *,
    op: str = "linear",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    bits: int = 4,
    group_size: int | None = None,
    activations: str | None = None,
    M: int = 1,
    N: int = 4096,
    K: int = 4096,
) -> Explanation:
    """Says which kernel runs for a weight and an input, and in one sentence why each other kernel does not.

    Args:
        weight: an `RTNQuantizedTensor`; where it is None, the plain numbers below describe one instead.
        x: an input `[..., K]`; where it is None, `dtype` (the weight's, if one is given) and `M` describe one
            instead.
        op: "linear", "linear_dx" (its backward), "grouped" and "routed" (experts), "embedding", "quantize" or
            "dequantize".
        device, dtype, bits, group_size, activations, M, N, K: the problem in plain numbers; M is the number
            of input rows.

    Raises:
        TypeError: `weight` is not quantized, or an argument is of another type.
        ValueError: there is no such op, format or device, or `RTN_KERNEL` names a kernel that cannot run
            this.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r} is not an op; use {', '.join(OPS[:-1])} or {OPS[-1]}")
    if x is not None and not (isinstance(x, Tensor) and x.dim()):
        raise TypeError(
            f"x is {'a scalar' if isinstance(x, Tensor) else with_article(type(x).__name__)}; give a "
            "tensor [..., K], or none"
        )
    m = M if x is None else x.numel() // max(x.shape[-1], 1)
    if weight is not None:
        if not hasattr(weight, "qdata"):
            raise TypeError(
                f"explain needs a quantized weight, got {type(weight).__name__}; quantize it, or "
                "describe it by numbers"
            )
        problem = make_problem(
            op,
            weight.dtype if x is None else x.dtype,
            m,
            weight.in_features,
            weight.qdata,
            weight.scale,
            weight.bits,
            weight.group_size,
            weight.zero,
            weight.activations is not None and op in TAKE_ACTIVATIONS,
        )
    else:
        device = device_of(device)
        if x is not None:
            device, dtype, K = x.device, x.dtype, x.shape[-1]
        group_size, scale_method = or_default(bits, group_size, None)
        check_format(bits, group_size, scale_method)
        check_activations(activations)
        if dtype not in FLOAT_DTYPES:
            allowed = ", ".join(map(str, FLOAT_DTYPES))
            raise ValueError(
                f"dtype={dtype!r} is none that a product with a quantized weight has; use one of {allowed}"
            )
        if wrong := [
            f"{name}={size!r}" for name, size in (("M", m), ("N", N), ("K", K)) if type(size) is not int
        ]:
            raise TypeError(f"{', '.join(wrong)}: sizes are whole numbers")
        if min(m, N, K) < 0:
            raise ValueError(f"M={m}, N={N}, K={K}: sizes cannot be negative")
        compute = capability(device.index) if device.type == "cuda" else None
        problem = Problem(op, device.type, compute, dtype, dtype, bits, group_size, bucket(m), N, K)
        problem = problem._replace(int8_x=activations is not None and op in TAKE_ACTIVATIONS)
    chosen = choose(problem)
    preferred = "forced by RTN_KERNEL" if os.environ.get("RTN_KERNEL") == chosen.name else "preferred"
    reasons = {}
    for kernel in KERNELS:
        if kernel is not chosen:
            reasons[kernel.name] = why_not(kernel, problem) or f"It could, but {chosen.name} is {preferred}."
    return Explanation(problem._replace(M=m), chosen.name, reasons)
