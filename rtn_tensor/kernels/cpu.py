"""The C++ library of `csrc/` on CPU tensors: reads the packed planes as they lie, in whatever instruction set
the processor has."""

import ctypes
import platform
import struct
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import reference
from rtn_tensor.formats import ASYMMETRIC, SCALE8, SCALE_METHODS, embedding_dtype, new_planes
from rtn_tensor.kernels.problem import TAKE_ACTIVATIONS, Kernel, Problem

LIBRARY = Path(__file__).with_name("librtn.so")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALE_CODES = DTYPE_CODES | {SCALE8: 3}

# RTN_ABI, rtn_linear_args and rtn_planes_args of csrc/rtn.h. Packing a string of bytes costs 0.5 us, filling
# a ctypes.Structure 4.
ABI = 8
_LINEAR = struct.Struct("=36q")
_PLANES = struct.Struct("=23q")
_NO_MEMORY, _REFUSED = -1, -2
_NONE = (0, 0, 0)  # the strides and sizes of a plane that is not there

_FUNCTIONS = (
    *("rtn_abi", "rtn_isa", "rtn_set_isa", "rtn_has_threads"),
    *("rtn_linear", "rtn_quantize", "rtn_dequantize", "rtn_register", "rtn_direct", "rtn_rounds_weight"),
)
# e_machine of the processors that have instruction sets of their own here.
_MACHINES = {62: "x86_64", 183: "aarch64"}


def _flaw(file: Path) -> str | None:
    """What is wrong with an ELF file, in words that follow its name, or None.

    The loader of the C library looks at the first bytes only: it maps pages that a truncated file does not
    have, and the process then dies of SIGBUS."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = opened.read(64)
        if len(header) < 64 or header[:4] != b"\x7fELF":
            return "is empty" if not size else "is damaged: it is not a shared library"
        if header[4:6] != b"\x02\x01":
            return "was built for another processor: it is not a 64-bit little-endian library"
        (machine,) = struct.unpack_from("<H", header, 18)
        if platform.machine() in _MACHINES.values() and _MACHINES.get(machine) != platform.machine():
            return (
                f"was built for {_MACHINES.get(machine, f'another processor ({machine})')}, and this is "
                f"{platform.machine()}"
            )
        segments, sections = struct.unpack_from("<QQ", header, 32)
        segment_count, section_bytes, section_count, names = struct.unpack_from("<4H", header, 56)
        end = max(segments + 56 * segment_count, sections + section_bytes * section_count)
        if size >= end:
            opened.seek(segments)
            for kind, _, offset, _, _, in_file, _, _ in struct.iter_unpack(
                "<IIQQQQQQ", opened.read(56 * segment_count)
            ):
                end = max(end, (offset + in_file) * (kind == 1))  # PT_LOAD
        if size < end:
            return f"is damaged: it ends after {size} of {end} bytes"
        opened.seek(sections + section_bytes * names + 4)
        # SHT_STRTAB. The sections' table is the last thing in a file, and a disk that filled up or a crash
        # leaves zeros there.
        if section_count and opened.read(4) != b"\x03\0\0\0":
            return "is damaged: its end was never written"
    return None


@cache
def _load() -> tuple[Any, str]:
    """The library, or None and one sentence that says why there is none."""
    if not LIBRARY.exists():
        return None, "Its C++ library was not built; install g++ and reinstall rtn-tensor."
    try:
        if sys.platform == "linux" and (flaw := _flaw(LIBRARY)):
            return None, f"Its C++ library {LIBRARY} {flaw}; reinstall rtn-tensor."
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"Its C++ library cannot be loaded ({error}); reinstall rtn-tensor."
    if hasattr(lib, "rtn_abi"):
        lib.rtn_abi.restype = ctypes.c_int64
        if (abi := lib.rtn_abi()) != ABI:
            return None, (
                f"Its C++ library was built from other sources than this Python code (interface {abi}, and "
                f"not {ABI}), as after a pull "
                "without a rebuild; reinstall rtn-tensor (pip install -e .)."
            )
    if lacking := [name for name in _FUNCTIONS if not hasattr(lib, name)]:
        return None, (
            f"Its C++ library {LIBRARY} has no {', '.join(lacking)}: it is another library, or was built "
            "from other sources than this "
            "Python code; reinstall rtn-tensor (pip install -e .)."
        )
    lib.rtn_isa.restype = ctypes.c_char_p
    return lib, ""


@cache
def library() -> Any:
    """The library, or None (and one warning) where there is none that can be used."""
    lib, why_none = _load()
    if lib is None:
        warnings.warn(
            f"rtn_tensor runs quantized layers in plain torch on the CPU, many times slower. {why_none}",
            stacklevel=2,
        )
    return lib


def register() -> bool:
    """Gives torch's dispatcher the C++ function for `rtn::linear` on CPU tensors; whether there is a library,
    and a torch that takes it.

    The function runs what this kernel can where `direct` lets it, as long as `RTN_KERNEL` is unset."""
    lib, _ = _load()  # an import is no place to warn; a first use is
    return lib is not None and not lib.rtn_register()


def direct(on: bool) -> None:
    """Whether the registered function runs products itself; where not, Python chooses the kernel of each."""
    lib, _ = _load()
    if lib is not None:
        lib.rtn_direct(int(on))


def isa() -> str | None:
    """The instruction set in use, None without the library."""
    lib = library()
    return None if lib is None else lib.rtn_isa().decode()


def set_isa(name: str) -> None:
    """Forces one of "amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "neoni8mm", "neonbf16",
    "neondot" and "generic", for tests and benchmarks.

    Raises:
        ValueError: this build or processor lacks it.
    """
    lib = library()
    if lib is None or lib.rtn_set_isa(name.encode()):
        raise ValueError(f"the instruction set {name!r} is not available here; {isa()} is in use")


def _check(status: int, **arrays: Tensor | None) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("the CPU kernel could not get memory for its buffers")
    if status:
        if freed := [name for name, t in arrays.items() if t is not None and t.numel() and not t.data_ptr()]:
            raise ValueError(
                f"the memory of {' and '.join(freed)} was given back (its storage has no bytes), as FSDP "
                "does between uses; use it "
                "while it is there"
            )
        raise ValueError(
            "the CPU kernel refused its arguments, and computed nothing: the planes, x, bias "
            "and offs do not fit one another"
        )


def _dense_rows(x: Tensor) -> Tensor:
    if x.data_ptr() % x.itemsize:  # as a file may have it, whose numbers begin anywhere
        return x.clone(memory_format=torch.contiguous_format)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offs: Tensor | None,
    bits: int,
    group_size: int,
    zero: Tensor | None,
    int8_x: bool,
) -> Tensor:
    x, qdata, scale = _dense_rows(x), _dense_rows(qdata), _dense_rows(scale)
    if zero is not None:
        zero = _dense_rows(zero)
    if bias is not None:
        bias = _dense_rows(bias.to(x.dtype))
    if offs is not None:
        offs = _dense_rows(offs.to(torch.int32))
    m, k = x.shape
    n = qdata.size(-2)
    y = x.new_empty((m, n))
    experts, qdata_expert, scale_expert = (
        (1, 0, 0) if offs is None else (qdata.size(0), qdata.stride(0), scale.stride(0))
    )
    arguments = _LINEAR.pack(
        x.data_ptr(),
        qdata.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if offs is None else offs.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        m,
        n,
        k,
        experts,
        bits,
        group_size,
        int8_x,
        DTYPE_CODES[x.dtype],
        SCALE_CODES[scale.dtype],
        x.stride(0),
        n,
        qdata.stride(-2),
        qdata_expert,
        scale.stride(-2),
        scale_expert,
        *(_NONE[:2] if zero is None else (zero.stride(-2), 0 if offs is None else zero.stride(0))),
        torch.get_num_threads(),
        *((1, *qdata.shape) if offs is None else qdata.shape),
        *((1, *scale.shape) if offs is None else scale.shape),
        *(_NONE if zero is None else (1, *zero.shape) if offs is None else zero.shape),
        0 if bias is None else bias.numel(),
        0 if offs is None else offs.numel(),
    )
    if status := library().rtn_linear(arguments):
        _check(status, x=x, qdata=qdata, scale=scale, bias=bias, offs=offs, zero=zero)
    return y


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
    return _linear(x, qdata, scale, bias, None, bits, group_size, zero, int8_x)


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
    return _linear(x, qdata, scale, None, offs, bits, group_size, zero, int8_x)


def routed(*args: Any) -> Tensor:
    return reference.routed(*args, grouped=grouped)


def _planes(
    function: str,
    w: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    scale_method: int,
    indices: Tensor | None,
    zero: Tensor | None,
) -> int:
    """`w [R, K]` against `qdata [R, B]`, `scale` and `zero [R, G]`, or with `indices [R]` those rows of them;
    last dims are dense. The status."""
    arguments = _PLANES.pack(
        w.data_ptr(),
        qdata.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if indices is None else indices.data_ptr(),
        *w.shape,
        bits,
        group_size,
        DTYPE_CODES[w.dtype],
        SCALE_CODES[scale.dtype],
        w.stride(0),
        qdata.stride(0),
        scale.stride(0),
        0 if zero is None else zero.stride(0),
        scale_method,
        torch.get_num_threads(),
        *qdata.shape,
        *scale.shape,
        *(_NONE[:2] if zero is None else zero.shape),
    )
    return getattr(library(), function)(arguments)


def quantize(
    w: Tensor,
    bits: int,
    group_size: int,
    scale_method: str,
    scale_dtype: torch.dtype,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    k, zero = w.shape[-1], scale_method in ASYMMETRIC
    planes = out or tuple(new_planes(torch.empty, w.shape, bits, group_size, scale_dtype, zero).values())
    if any(plane.numel() for plane in planes):
        w2 = _dense_rows(w).reshape(-1, k)
        q2, s2, z2 = [*(plane.view(-1, plane.shape[-1]) for plane in planes), None][:3]
        status = _planes(
            "rtn_quantize", w2, q2, s2, bits, group_size, SCALE_METHODS.index(scale_method), None, z2
        )
        _check(status, w=w2, qdata=q2, scale=s2, zero=z2)
    return planes


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
    zero: Tensor | None = None,
) -> Tensor:
    w = torch.empty(*qdata.shape[:-1], k, dtype=dtype)
    if w.numel():
        q2, s2 = qdata.reshape(-1, qdata.shape[-1]), _dense_rows(scale).reshape(-1, scale.shape[-1])
        z2 = None if zero is None else _dense_rows(zero).reshape(s2.shape)
        status = _planes("rtn_dequantize", w.view(-1, k), q2, s2, bits, group_size, 0, None, z2)
        _check(status, qdata=q2, scale=s2, zero=z2)
    return w


def embedding(
    indices: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    zero: Tensor | None = None,
) -> Tensor:
    w = torch.empty(*indices.shape, k, dtype=embedding_dtype(scale.dtype))
    if w.numel():
        if not indices.data_ptr():
            _check(_REFUSED, indices=indices)
        flat = indices.reshape(-1).to(torch.int64).contiguous()
        qdata, scale = _dense_rows(qdata), _dense_rows(scale)
        zero = None if zero is None else _dense_rows(zero)
        status = _planes("rtn_dequantize", w.view(-1, k), qdata, scale, bits, group_size, 0, flat, zero)
        low, high = (0, 0) if status != _REFUSED else (int(i) for i in flat.aminmax())
        if low < 0 or high >= qdata.shape[0]:
            raise IndexError(
                f"embedding index {low if low < 0 else high} is out of range: the weight has "
                f"{qdata.shape[0]} rows"
            )
        _check(status, qdata=qdata, scale=scale, zero=zero)
    return w


def why_not(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return "It runs on the CPU only."
    if problem.dtype not in DTYPE_CODES or problem.scale_dtype not in SCALE_CODES:
        return (
            f"It takes float32, bfloat16 and float16, not {problem.dtype} with a scale of "
            f"{problem.scale_dtype}."
        )
    if problem.bits not in (4, 8):
        return f"It reads 4 and 8 bits, not {problem.bits}."
    return None if library() is not None else _load()[1]


def rounds_weight(problem: Problem) -> bool:
    """With AMX, from some tokens on."""
    lib = library()
    if lib is None or problem.op not in TAKE_ACTIVATIONS:
        return False
    sizes = (problem.M, problem.experts or 1, problem.group_size, DTYPE_CODES[problem.dtype], problem.int8_x)
    return bool(lib.rtn_rounds_weight(*map(ctypes.c_int64, sizes)))


KERNEL = Kernel(
    name="cpu",
    why_not=why_not,
    rounds_weight=rounds_weight,
    linear=linear,
    grouped=grouped,
    routed=routed,
    embedding=embedding,
    quantize=quantize,
    dequantize=dequantize,
)
