"""Makes Triton's interpreter right for what our kernels do: bf16 arithmetic, which it does on bit patterns,
and PTX, which it refuses.

`import interpreter` before kernels run with TRITON_INTERPRET=1. PTX is emulated instruction by instruction
from the kernels' own text.
"""

import re

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
_binary, _unary, _dot = (
    InterpreterBuilder.binary_op,
    InterpreterBuilder.unary_op,
    InterpreterBuilder.create_dot,
)


def _is_bf16(handle):
    return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def bf16_to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(values):
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _as_float(handle):
    return TensorHandle(bf16_to_float(handle.data), tl.float32) if _is_bf16(handle) else handle


def cast_impl(self, src, dst):
    if dst.scalar == tl.bfloat16 and not _is_bf16(src):
        return TensorHandle(float_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
    return _cast(self, _as_float(src), dst) if dst.scalar != tl.bfloat16 else _cast(self, src, dst)


def create_fp_to_fp(self, src, dst, rounding):
    return (
        cast_impl(self, src, dst)
        if tl.bfloat16 in (src.dtype.scalar, dst.scalar)
        else _to_fp(self, src, dst, rounding)
    )


def binary_op(self, left, right, op):
    if not (_is_bf16(left) or _is_bf16(right)):
        return _binary(self, left, right, op)
    result = _binary(self, _as_float(left), _as_float(right), op)
    return result if result.data.dtype == np.bool_ else TensorHandle(float_to_bf16(result.data), tl.bfloat16)


def unary_op(self, argument, op):
    return (
        TensorHandle(float_to_bf16(op(bf16_to_float(argument.data))), tl.bfloat16)
        if _is_bf16(argument)
        else _unary(self, argument, op)
    )


def create_dot(self, a, b, d, precision, max_imprecise):
    return _dot(self, _as_float(a), _as_float(b), d, precision, max_imprecise)


# ------------------------------------------------------------------------------------- PTX


def _halves(registers, bf16):
    """fp32 `[..., 2]` of the two 16-bit floats in each 32-bit register."""
    halves = np.stack([registers & 0xFFFF, registers >> 16], -1).astype(np.uint16)
    return bf16_to_float(halves) if bf16 else halves.view(np.float16).astype(np.float32)


def _registers(values, bf16):
    halves = float_to_bf16(values) if bf16 else values.astype(np.float16).view(np.uint16)
    halves = halves.astype(np.uint32)
    return halves[..., 0] | halves[..., 1] << 16


def _lop3(a, b, c, table):
    """Bit i of the result is the bit of `table` that the three operands' bits i number."""
    result = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _mad(a, b, c, bf16):
    # One rounding, as in hardware: fp64 holds the products of two 16-bit floats and their sums with a third.
    return _registers(
        (_halves(a, bf16).astype(np.float64) * _halves(b, bf16) + _halves(c, bf16)).astype(np.float32), bf16
    )


def run_ptx(code, outputs, operand):
    """The registers $0 .. of `code`, whose one input is the uint32 array `operand`."""
    registers = {f"${outputs}": operand}

    def value(name):
        return (
            np.uint32(int(name, 16))
            if name.startswith("0x")
            else np.uint32(int(name))
            if name.isdigit()
            else registers[name]
        )

    for statement in code.strip().strip("{}").split(";"):
        if not (words := re.split(r"[\s,]+", statement.strip())) or words[0] in ("", ".reg"):
            continue
        name, target, *sources = words
        arguments = [value(source) for source in sources]
        if name == "mov.b32":
            registers[target] = arguments[0]
        elif name == "shr.u32":
            registers[target] = arguments[0] >> arguments[1]
        elif name == "shl.b32":
            registers[target] = arguments[0] << arguments[1]
        elif name == "and.b32":
            registers[target] = arguments[0] & arguments[1]
        elif name == "lop3.b32":
            registers[target] = _lop3(*arguments)
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            registers[target] = _mad(*arguments, bf16="bf16" in name)
        elif name == "sub.rn.f16x2":
            registers[target] = _registers(_halves(arguments[0], False) - _halves(arguments[1], False), False)
        else:
            raise NotImplementedError(f"PTX instruction {name}")
    return [registers[f"${i}"] for i in range(outputs)]


def create_inline_asm(self, asm, constraints, values, types, pure, pack):
    (operand,), stored = values, {tl.bfloat16: np.uint16, tl.float16: np.float16, tl.int8: np.int8}
    assert pack * operand.data.itemsize == 4, "the elements of one operand in a register"
    results = run_ptx(asm, len(types), np.ascontiguousarray(operand.data).view(np.uint32).ravel())
    scalars = [t.scalar for t in types]
    return _Results(
        [
            TensorHandle(r.view(stored[s]).reshape(operand.data.shape), s)
            for r, s in zip(results, scalars, strict=True)
        ]
    )


class _Results:
    def __init__(self, handles):
        self.handles = handles

    def get_result(self, i):
        return self.handles[i]


for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_dot, create_inline_asm):
    setattr(InterpreterBuilder, function.__name__, function)


# ------------------------------------------------------------------------------ Triton 3.6

_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    """The bounds of a loop are tensors of one element, of which Triton 3.6 makes an int in a way that numpy
    gave up in 2.4."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
