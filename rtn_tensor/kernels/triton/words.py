"""What every Triton kernel does with packed words: integers from words, scales beside them, and the loop
along K.

The plane is read as int16 words `[N, K * bits / 16]`; formats.py says which field of which word is which k. A
plain 2-D tile of it becomes 16-byte cp.async, ldmatrix and, as the left-hand side of `tl.dot`, wgmma with the
weights in registers: after the inline assembly everything is a renaming of registers.
tests/kernels/test_triton_sass.py holds the compiler to that.
"""

import triton
import triton.language as tl

# Two words at a time (pack=2), a field of both in each output. (w & 0xF) ^ 0x4308 is the bf16 136 + q of a
# two's complement nibble. fma, as bf16 subtraction needs compute capability 9.0; both are one instruction
# there.
_INT4_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 t, magic, one, less;
    mov.b32 magic, 0x43084308; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308;
    lop3.b32 $0, $4, 0x000F000F, magic, 0x6A;
    shr.u32 t, $4, 4;
    lop3.b32 $1, t, 0x000F000F, magic, 0x6A;
    shr.u32 t, $4, 8;
    lop3.b32 $2, t, 0x000F000F, magic, 0x6A;
    shr.u32 t, $4, 12;
    lop3.b32 $3, t, 0x000F000F, magic, 0x6A;
    fma.rn.bf16x2 $0, $0, one, less;
    fma.rn.bf16x2 $1, $1, one, less;
    fma.rn.bf16x2 $2, $2, one, less;
    fma.rn.bf16x2 $3, $3, one, less;
}""")
# (w & 0xF) ^ 0x6408 is the fp16 1032 + q; (w & 0xF0) ^ 0x6480 is 1024 + 16 (q + 8), so every second field
# needs no shift.
_INT4_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 t, low, high, sixteenth, less;
    mov.b32 low, 0x64086408; mov.b32 high, 0x64806480;
    mov.b32 sixteenth, 0x2C002C00; mov.b32 less, 0xD480D480;
    shr.u32 t, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, low, 0x6A;
    lop3.b32 $1, $4, 0x00F000F0, high, 0x6A;
    lop3.b32 $2, t, 0x000F000F, low, 0x6A;
    lop3.b32 $3, t, 0x00F000F0, high, 0x6A;
    sub.rn.f16x2 $0, $0, low;
    fma.rn.f16x2 $1, $1, sixteenth, less;
    sub.rn.f16x2 $2, $2, low;
    fma.rn.f16x2 $3, $3, sixteenth, less;
}""")
# 128 + its low 7 bits, less 128 + its sign bit: both are bf16, which has no room for 128 + q.
_INT8_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 t, a, b, minus;
    mov.b32 minus, 0xBF80BF80;
    lop3.b32 a, $2, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 b, $2, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, b, minus, a;
    shr.u32 t, $2, 8;
    lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $1, b, minus, a;
}""")
# (w & 0xFF) ^ 0x6480 is the fp16 1152 + q.
_INT8_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 t, magic;
    mov.b32 magic, 0x64806480;
    shr.u32 t, $2, 8;
    lop3.b32 $0, $2, 0x00FF00FF, magic, 0x6A;
    lop3.b32 $1, t, 0x00FF00FF, magic, 0x6A;
    sub.rn.f16x2 $0, $0, magic;
    sub.rn.f16x2 $1, $1, magic;
}""")


@triton.jit
def _field(w, i: tl.constexpr, BITS: tl.constexpr):
    return ((w << (16 - BITS * (i + 1))).to(tl.int16) >> (16 - BITS)).to(tl.float32)


@triton.jit
def integers(w, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The integers q `[N, K]` in DTYPE of the words `w [N, K * BITS / 16]` int16. ASM: by PTX; else by plain
    shifts, for other makers' GPUs. float32 goes through bfloat16, which holds every q."""
    F: tl.constexpr = 16 // BITS
    FP16: tl.constexpr = DTYPE == tl.float16
    # join(join(f0, f2), join(f1, f3)) has field i at [i >> 1, i & 1].
    if BITS == 4:
        if not ASM:
            f0, f1, f2, f3 = _field(w, 0, BITS), _field(w, 1, BITS), _field(w, 2, BITS), _field(w, 3, BITS)
        elif FP16:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _INT4_FP16, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.float16,) * 4, is_pure=True, pack=2
            )
        else:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _INT4_BF16, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
            )
        fields = tl.join(tl.join(f0, f2), tl.join(f1, f3))
    else:
        if not ASM:
            f0, f1 = _field(w, 0, BITS), _field(w, 1, BITS)
        elif FP16:
            f0, f1 = tl.inline_asm_elementwise(
                _INT8_FP16, "=&r,=&r,r", [w], dtype=(tl.float16,) * 2, is_pure=True, pack=2
            )
        else:
            f0, f1 = tl.inline_asm_elementwise(
                _INT8_BF16, "=&r,=&r,r", [w], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2
            )
        fields = tl.join(f0, f1)
    N: tl.constexpr = w.shape[0]
    W: tl.constexpr = w.shape[1]
    chunks = tl.permute(tl.reshape(fields, (N, W // 8, 8, F)), (0, 1, 3, 2))  # row, chunk, field, word
    q = tl.reshape(chunks, (N, W * F))
    return q.to(DTYPE)


@triton.jit
def scale_of_8_bits(code):
    """S in fp32 of the bits of a float8_e4m3fn, uint8: `reference.widened`. As an fp16 of the same bits it is
    2^-8 times as large; compute capability 8.0 has no instruction for it."""
    wide = code.to(tl.int16)
    half = ((wide & 0x7F) << 7 | (wide & 0x80) << 8).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 2.0)


@triton.jit
def scale_at(pointers):
    """What lies there, or fp32 where that is 8 bits."""
    scale = tl.load(pointers)
    if scale.dtype == tl.uint8:
        return scale_of_8_bits(scale)
    else:
        return scale


@triton.jit
def _scale(rows, k, last, G: tl.constexpr):
    return scale_at(rows + tl.minimum(k // G, last))  # past the end of the row, the last


@triton.jit
def loaded_scales(rows, k, last, G: tl.constexpr, COLUMNS: tl.constexpr):
    """The scales, or zero points, of columns [k, k + COLUMNS), four tensors `[N]`, of which `joined_scales`
    takes what there are. G > 0."""
    UNIT: tl.constexpr = COLUMNS if G % COLUMNS == 0 else (G if COLUMNS % G == 0 else 32)
    tl.static_assert(COLUMNS <= 4 * UNIT, "a step is four groups, or four times 32 columns, at most")
    s0 = _scale(rows, k, last, G)
    s1 = _scale(rows, k + UNIT, last, G) if COLUMNS > UNIT else s0
    s2 = _scale(rows, k + 2 * UNIT, last, G) if COLUMNS > 2 * UNIT else s0
    s3 = _scale(rows, k + 3 * UNIT, last, G) if COLUMNS > 2 * UNIT else s0
    return s0, s1, s2, s3


@triton.jit
def joined_scales(s0, s1, s2, s3, G: tl.constexpr, COLUMNS: tl.constexpr):
    """`[N, 2 or 4]`, each for as many of the columns. Two at least: one scale per row that a loop carries,
    put straight on the weights, costs a trip through shared memory, as loading them as one `[N, 4]` does."""
    UNIT: tl.constexpr = COLUMNS if G % COLUMNS == 0 else (G if COLUMNS % G == 0 else 32)
    if COLUMNS <= 2 * UNIT:
        return tl.join(s0, s1)
    else:
        return tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (s0.shape[0], 4))


@triton.jit
def scales(rows, k, last, G: tl.constexpr, COLUMNS: tl.constexpr):
    """The scales, or zero points, of columns [k, k + COLUMNS): `[N, 2 or 4]`. G = 0: one per row."""
    if G == 0:
        s0 = scale_at(rows)
        return tl.join(s0, s0)
    else:
        s0, s1, s2, s3 = loaded_scales(rows, k, last, G, COLUMNS)
        return joined_scales(s0, s1, s2, s3, G, COLUMNS)


@triton.jit
def less_zero(q, zero):
    """q - zero, which every dtype holds: `q [N, K]`, `zero [N, PARTS]` int8, each for K / PARTS columns."""
    N: tl.constexpr = q.shape[0]
    K: tl.constexpr = q.shape[1]
    PARTS: tl.constexpr = zero.shape[1]
    parts = tl.reshape(q, (N, PARTS, K // PARTS))
    return tl.reshape(parts - zero.to(tl.float32).to(q.dtype)[:, :, None], (N, K))


@triton.jit
def rounded(q, scale, DTYPE: tl.constexpr):
    """q * S rounded to DTYPE: `q [N, K]` in DTYPE, `scale [N, PARTS]`, each for K / PARTS columns."""
    N: tl.constexpr = q.shape[0]
    K: tl.constexpr = q.shape[1]
    PARTS: tl.constexpr = scale.shape[1]
    # The weights are what is reshaped: a scale reshaped to [N, K] would go through shared memory.
    parts = tl.reshape(q, (N, PARTS, K // PARTS))
    if scale.dtype == DTYPE:
        return tl.reshape(parts * scale[:, :, None], (N, K))
    else:
        return tl.reshape((parts.to(tl.float32) * scale[:, :, None].to(tl.float32)).to(DTYPE), (N, K))


@triton.jit
def product(
    x_rows,
    x_valid,
    w_rows,
    s_rows,
    z_rows,
    first,
    end,
    K,
    BITS: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """w' @ x^T over columns [first, end): fp32 `[BN, BM]`, tokens along the columns.

    The weights are the left-hand side, which wgmma takes from registers; on the right they would be written
    back to shared memory.

    Args:
        x_rows, x_valid: `[BM]` addresses of the rows of x, and which of them are there.
        w_rows: `[BN]` addresses of the rows of the plane, as int16, 16-byte aligned.
        s_rows, z_rows: `[BN]` addresses of the rows of scales and of zero points; None: there are none of the
            latter.
        first, end: `first` is a multiple of BK.
        K: a multiple of 8.
        G: columns a scale is for; 0: one scale per row, which the caller applies to the result.
        SCALE_AFTER: scale the fp32 sums of each step, of which G must hold a whole number, and keep the
            integers exact; else round q * S to the dtype of x first, which costs less where there are many
            tokens.
        EVEN_K: every step is full.
    """
    BN: tl.constexpr = w_rows.shape[0]
    BM: tl.constexpr = x_rows.shape[0]
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if DTYPE == tl.float32 else "tf32"
    WORDS: tl.constexpr = BK * BITS // 16
    CHUNK: tl.constexpr = 128 // BITS
    ok = tl.arange(0, BK)
    ow = tl.arange(0, WORDS)
    x_ptrs = x_rows[None, :] + (first + ok)[:, None]
    w_ptrs = w_rows[:, None] + (first * BITS // 16 + ow)[None, :]
    words = (K + CHUNK - 1) // CHUNK * 8
    last = (K - 1) // (G if G > 0 else 1)
    # The loop carries the scales of the next step: a load of two bytes is not made asynchronous.
    if G > 0:
        s0, s1, s2, s3 = loaded_scales(s_rows, first, last, G, BK)
        if z_rows is not None:
            z0, z1, z2, z3 = loaded_scales(z_rows, first, last, G, BK)
    elif z_rows is not None:
        zero = scales(z_rows, first, last, G, BK)
    tl.assume(end > first)  # a loop that might not run makes ptxas wait after every wgmma
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(first, end, BK):
        if EVEN_K:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs, mask=x_valid[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=ow[None, :] < tl.multiple_of(words - k * BITS // 16, 8), other=0)
            x = tl.load(x_ptrs, mask=x_valid[None, :] & (ok[:, None] < tl.multiple_of(K - k, 8)), other=0.0)
        q = integers(w, BITS, DTYPE, ASM)
        if z_rows is not None:
            if G > 0:
                zero = joined_scales(z0, z1, z2, z3, G, BK)
            q = less_zero(q, zero)
        if G == 0:
            acc = tl.dot(q, x, acc=acc, input_precision=PRECISION)
        elif SCALE_AFTER:
            tl.static_assert(G % BK == 0, "a group is a whole number of steps")
            acc += tl.dot(q, x, input_precision=PRECISION) * s0[:, None].to(tl.float32)
        else:
            scale = joined_scales(s0, s1, s2, s3, G, BK)
            acc = tl.dot(rounded(q, scale, DTYPE), x, acc=acc, input_precision=PRECISION)
        if G > 0:
            s0, s1, s2, s3 = loaded_scales(s_rows, k + BK, last, G, BK)
            if z_rows is not None:
                z0, z1, z2, z3 = loaded_scales(z_rows, k + BK, last, G, BK)
        w_ptrs += WORDS
        x_ptrs += BK
    return acc


@triton.jit
def product_dx(
    dy_rows,
    dy_valid,
    w_ptr,
    s_ptr,
    z_ptr,
    first,
    N,
    K,
    sw,
    ss,
    sz,
    BITS: tl.constexpr,
    G: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """dy @ w' for columns [first, first + BK) of w: fp32 `[BM, BK]`.

    `dy_rows`, `dy_valid` `[BM]` are as in `product`; `w_ptr`, `s_ptr` and `z_ptr`, or None, have row strides
    of sw 16-byte chunks, ss scales and sz zero points. The scale changes along the sum, so the weights are
    rounded to dy's dtype.
    """
    BM: tl.constexpr = dy_rows.shape[0]
    DTYPE: tl.constexpr = dy_rows.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if DTYPE == tl.float32 else "tf32"
    CHUNK: tl.constexpr = 128 // BITS
    word = first * BITS // 16 + tl.arange(0, BK * BITS // 16)
    words = (K + CHUNK - 1) // CHUNK * 8
    last = (K - 1) // (G if G > 0 else 1)
    tl.assume(N > 0)
    acc = tl.zeros((BM, BK), tl.float32)
    for n in range(0, N, BN):
        on = n + tl.arange(0, BN)
        rows = tl.minimum(on, N - 1).to(tl.int64)
        w = tl.load(
            w_ptr + rows[:, None] * (sw.to(tl.int64) * 8) + word[None, :], mask=word[None, :] < words, other=0
        )
        dy = tl.load(dy_rows[:, None] + on[None, :], mask=dy_valid[:, None] & (on < N)[None, :], other=0.0)
        scale = scales(s_ptr + rows * ss, first, last, G, BK)
        q = integers(w, BITS, DTYPE, ASM)
        if z_ptr is not None:
            q = less_zero(q, scales(z_ptr + rows * sz, first, last, G, BK))
        acc = tl.dot(dy, rounded(q, scale, DTYPE), acc=acc, input_precision=PRECISION)
    return acc
