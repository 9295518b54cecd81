"""The C++ library of `csrc/` on CPU tensors: reads the packed planes as they lie, in whatever instruction set the processor has."""

import ctypes
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import reference
from rtn_tensor.formats import FORMATS, SCALE_METHODS, groups
from rtn_tensor.kernels.problem import Kernel, Problem

LIBRARY = Path(__file__).with_name("librtn.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# rtn_linear_args and rtn_planes_args of csrc/rtn.h. Packing a string of bytes costs 0.5 us, filling a ctypes.Structure 4.
_LINEAR = struct.Struct("=21q")
_PLANES = struct.Struct("=15q")


@cache
def library() -> Any:
    """The library, or None (and one warning) where it was not built."""
    if not LIBRARY.exists():
        warnings.warn(
            "rtn_tensor was installed without its C++ library: quantized layers run in plain torch on the CPU, many times slower. "
            "Install a C++ compiler (g++) and reinstall rtn-tensor.",
            stacklevel=2,
        )
        return None
    lib = ctypes.CDLL(str(LIBRARY))
    lib.rtn_isa.restype = ctypes.c_char_p
    return lib


def register() -> bool:
    """Gives torch's dispatcher the C++ function for `rtn::linear` on CPU tensors; whether there is a library, and a torch that takes it.

    The function runs what this kernel can, as long as `RTN_KERNEL` is unset; see `direct`."""
    try:
        if not LIBRARY.exists() or library().rtn_register():
            return False
    except (OSError, AttributeError):  # of another machine, or an older build: an import is no place to fail, its use will
        return False
    direct(True)
    return True


def direct(on: bool) -> None:
    """Whether the registered function runs products itself; where not, Python chooses the kernel of each. For tests, and for whoever puts
    another CPU kernel before this one."""
    if library() is not None:
        library().rtn_direct(int(on))


def isa() -> str | None:
    """The instruction set in use, None without the library."""
    lib = library()
    return None if lib is None else lib.rtn_isa().decode()


def set_isa(name: str) -> None:
    """Forces one of "avx512bf16", "avx512", "avx2", "neonbf16", "generic", for tests and benchmarks.

    Raises:
        ValueError: this build or processor lacks it.
    """
    lib = library()
    if lib is None or lib.rtn_set_isa(name.encode()):
        raise ValueError(f"the instruction set {name!r} is not available here; {isa()} is in use")


def _check(status: int) -> None:
    if status:
        raise MemoryError("the CPU kernel could not get memory for its buffers")


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, offs: Tensor | None, bits: int, group_size: int) -> Tensor:
    x, qdata, scale = _dense_rows(x), _dense_rows(qdata), _dense_rows(scale)
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    if offs is not None:
        offs = offs.to(torch.int32).contiguous()
    m, k = x.shape
    n = qdata.size(-2)
    y = x.new_empty((m, n))
    experts, qdata_expert, scale_expert = (1, 0, 0) if offs is None else (qdata.size(0), qdata.stride(0), scale.stride(0))
    arguments = _LINEAR.pack(
        x.data_ptr(),
        qdata.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if offs is None else offs.data_ptr(),
        m,
        n,
        k,
        experts,
        bits,
        group_size,
        DTYPES[x.dtype],
        DTYPES[scale.dtype],
        x.stride(0),
        n,
        qdata.stride(-2),
        qdata_expert,
        scale.stride(-2),
        scale_expert,
        torch.get_num_threads(),
    )
    _check(library().rtn_linear(arguments))
    return y


def linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    return _linear(x, qdata, scale, bias, None, bits, group_size)


def grouped(x: Tensor, qdata: Tensor, scale: Tensor, offs: Tensor, bits: int, group_size: int) -> Tensor:
    return _linear(x, qdata, scale, None, offs, bits, group_size)


def routed(*args: Any) -> Tensor:
    return reference.routed(*args, grouped=grouped)


def _planes(
    function: str, w: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, scale_method: int, indices: Tensor | None
) -> None:
    """`w [R, K]` against `qdata [R or more, B]` and `scale [R or more, G]`, whose last dims are dense."""
    arguments = _PLANES.pack(
        w.data_ptr(),
        qdata.data_ptr(),
        scale.data_ptr(),
        0 if indices is None else indices.data_ptr(),
        *w.shape,
        bits,
        group_size,
        DTYPES[w.dtype],
        DTYPES[scale.dtype],
        w.stride(0),
        qdata.stride(0),
        scale.stride(0),
        scale_method,
        torch.get_num_threads(),
    )
    _check(getattr(library(), function)(arguments))


def quantize(
    w: Tensor, bits: int, group_size: int, scale_method: str, scale_dtype: torch.dtype, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    *rows, k = w.shape
    qdata, scale = out or (
        torch.empty(*rows, FORMATS[bits].row_bytes(k), dtype=torch.uint8),
        torch.empty(*rows, groups(k, group_size), dtype=scale_dtype),
    )
    if qdata.numel() or scale.numel():
        w2, q2, s2 = _dense_rows(w).reshape(-1, k), qdata.view(-1, qdata.shape[-1]), scale.view(-1, scale.shape[-1])
        _planes("rtn_quantize", w2, q2, s2, bits, group_size, SCALE_METHODS.index(scale_method), None)
    return qdata, scale


def dequantize(qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int, dtype: torch.dtype) -> Tensor:
    w = torch.empty(*qdata.shape[:-1], k, dtype=dtype)
    if w.numel():
        q2, s2 = qdata.reshape(-1, qdata.shape[-1]), _dense_rows(scale).reshape(-1, scale.shape[-1])
        _planes("rtn_dequantize", w.view(-1, k), q2, s2, bits, group_size, 0, None)
    return w


def embedding(indices: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int) -> Tensor:
    w = torch.empty(*indices.shape, k, dtype=scale.dtype)
    if w.numel():
        low, high = (int(i) for i in indices.aminmax())
        if low < 0 or high >= qdata.shape[0]:
            raise IndexError(f"embedding index {low if low < 0 else high} is out of range: the weight has {qdata.shape[0]} rows")
        flat = indices.reshape(-1).to(torch.int64).contiguous()
        _planes("rtn_dequantize", w.view(-1, k), qdata, _dense_rows(scale), bits, group_size, 0, flat)
    return w


def why_not(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return "It runs on the CPU only."
    if problem.dtype not in DTYPES or problem.scale_dtype not in DTYPES:
        return f"It takes float32, bfloat16 and float16, not {problem.dtype} with a scale of {problem.scale_dtype}."
    if library() is None:
        return "Its C++ library was not built; install g++ and reinstall rtn-tensor."
    return None


KERNEL = Kernel(
    name="cpu",
    why_not=why_not,
    rounds_weight=lambda problem: False,
    linear=linear,
    grouped=grouped,
    routed=routed,
    embedding=embedding,
    quantize=quantize,
    dequantize=dequantize,
)
