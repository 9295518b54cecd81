"""`quantize`, `dequantize` and `embedding`: between float rows and packed planes, in one pass over memory.
Bit-exact with reference.py."""

import triton
import triton.language as tl

from rtn_tensor.kernels.triton.words import integers, less_zero, rounded, scale_of_8_bits, scales


@triton.jit
def code_of(exact):
    """The bits, uint8, of the float8_e4m3fn that is 2^7 times finite fp32, rounded as `rounded_scale` has
    it."""
    magnitude = tl.abs(exact)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = tl.minimum(((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (113 << 3), 0x7E)
    steps = magnitude * 65536.0
    # Added to 1.5 * 2^23, a number is rounded to the integer that the low bits then hold.
    small = (steps + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    small += (small.to(tl.float32) < steps).to(tl.int32)
    code = tl.where(magnitude < 2.0**-13, small, normal) | tl.where(exact < 0, 0x80, 0)
    return code.to(tl.uint8)


@triton.jit
def rounded_scale(exact, DTYPE: tl.constexpr):
    """`reference.round_scale` of finite fp32: to nearest, but away from zero where that is subnormal and
    smaller, and never to inf."""
    scale = exact.to(tl.float32 if DTYPE == tl.uint8 else DTYPE)
    if DTYPE == tl.float32:
        return scale
    elif DTYPE == tl.uint8:
        return scale_of_8_bits(code_of(exact))
    else:
        TINY: tl.constexpr = 2.0**-14 if DTYPE == tl.float16 else 2.0**-126
        INF: tl.constexpr = 0x7C00 if DTYPE == tl.float16 else 0x7F80
        bits = scale.to(tl.int16, bitcast=True)
        short = (tl.abs(exact) < TINY) & (tl.abs(scale.to(tl.float32)) < tl.abs(exact))
        # One more in the bits of a float is the next one away from zero, one less the one before: of inf, the
        # largest finite.
        bits = tl.where(short, bits + 1, tl.where((bits & 0x7FFF) == INF, bits - 1, bits)).to(tl.int16)
        return bits.to(DTYPE, bitcast=True)


@triton.jit
def divisor_of(exact, extreme, bad, DTYPE: tl.constexpr):
    """The rounded scale, in fp32: 1 for a group of zeros or one that holds a NaN or inf."""
    smallest = tl.full(exact.shape, 1, tl.int32).to(tl.float32, bitcast=True)
    exact = tl.where(extreme == 0, 1.0, tl.where(exact == 0, smallest, exact))
    return rounded_scale(tl.where(bad, 1.0, exact), DTYPE).to(tl.float32)


@triton.jit
def searched(
    exact,
    extreme,
    bad,
    w,
    w_rows,
    inside,
    first,
    end,
    STEPS: tl.constexpr,
    BK: tl.constexpr,
    HALF: tl.constexpr,
    TWENTIETHS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One of the scales that "search" tries, and its `reference._loss`. `w [BR, BK]` is the group where one
    step holds it."""
    divisor = divisor_of(exact * (TWENTIETHS / 20), extreme, bad, DTYPE)
    whole = tl.where(bad | (extreme == 0), 1.0, extreme)
    loss = tl.zeros(exact.shape, tl.int64)
    for step in tl.static_range(STEPS):
        column = step * BK + tl.arange(0, BK)
        if STEPS > 1:
            w = tl.load(
                w_rows + (first + column)[None, :], mask=inside[:, None] & (column < end)[None, :], other=0.0
            ).to(tl.float32)
        level = tl.div_rn(w, tl.broadcast_to(divisor[:, None], w.shape))
        error = level - ((tl.minimum(tl.maximum(level, -HALF), HALF - 1) + 12582912.0) - 12582912.0)
        part = error * error * tl.abs(tl.div_rn(w, tl.broadcast_to(whole[:, None], w.shape))) * 65536.0
        loss += tl.sum(tl.where(bad[:, None], 0.0, tl.minimum(part, 16777216.0)).to(tl.int64), 1)
    return divisor, loss * (TWENTIETHS * TWENTIETHS)


@triton.jit(do_not_specialize=["R", "groups", "chunks"])
def quantize_kernel(
    w_ptr,
    q_ptr,
    s_ptr,
    z_ptr,
    R,
    K,
    G,
    groups,
    sw,
    chunks,
    BITS: tl.constexpr,
    METHOD: tl.constexpr,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """`w [R, K]` of row stride sw -> plane `q [R, 8 * chunks]` int16, `s [R, groups]` and with "minmax" `z
    [R, groups]` int8, as `reference.quantize`.

    A program has BR rows of one group of G columns, in steps of BK; a group of several steps is read a second
    time, from L2.
    """
    F: tl.constexpr = 16 // BITS
    HALF: tl.constexpr = 2 ** (BITS - 1)
    SCALE: tl.constexpr = s_ptr.dtype.element_ty
    group = tl.program_id(0) % groups
    row = tl.program_id(0) // groups * BR + tl.arange(0, BR)
    w_rows = w_ptr + row.to(tl.int64)[:, None] * sw
    k = tl.arange(0, BK)
    end = tl.minimum(G, K - group * G)
    low = tl.zeros((BR,), tl.float32)
    high = tl.zeros((BR,), tl.float32)
    for step in tl.static_range(STEPS):
        column = step * BK + k
        w = tl.load(
            w_rows + (group * G + column)[None, :],
            mask=(row < R)[:, None] & (column < end)[None, :],
            other=0.0,
        ).to(tl.float32)
        w_or_inf = tl.where(w == w, w, float("inf"))
        low = tl.minimum(low, tl.min(w_or_inf, 1))
        high = tl.maximum(high, tl.max(w_or_inf, 1))
    extreme = tl.where(-low >= high, low, high)
    bad = (low == -float("inf")) | (high == float("inf"))
    if METHOD == "minmax":
        levels = tl.full((BR,), 2 * HALF - 1, tl.float32)
        exact = tl.div_rn(high, levels) - tl.div_rn(low, levels)
    elif METHOD == "absmax":
        exact = tl.div_rn(tl.maximum(-low, high), tl.full((BR,), HALF - 0.5, tl.float32))
    else:
        exact = extreme * (-1.0 / HALF)
    divisor = divisor_of(exact, extreme, bad, SCALE)
    if METHOD == "search":
        least = searched(exact, extreme, bad, w, w_rows, row < R, group * G, end, STEPS, BK, HALF, 20, SCALE)[
            1
        ]
        for i in tl.static_range(1, 6):
            other, loss = searched(
                exact,
                extreme,
                bad,
                w,
                w_rows,
                row < R,
                group * G,
                end,
                STEPS,
                BK,
                HALF,
                20 - i if i < 5 else 21,
                SCALE,
            )
            divisor = tl.where(loss < least, other, divisor)
            least = tl.minimum(loss, least)
    if SCALE == tl.uint8:
        scale = tl.where(bad, 0x7F, code_of(divisor)).to(tl.uint8)
    else:
        scale = tl.where(bad, float("nan"), divisor).to(SCALE)
    tl.store(s_ptr + row.to(tl.int64) * groups + group, scale, mask=row < R)
    if METHOD == "minmax":
        from_low = tl.minimum(tl.maximum(tl.div_rn(low, divisor), 1 - 2 * HALF), 0.0)
        zero = tl.where(bad, 0.0, -HALF - ((from_low + 12582912.0) - 12582912.0))
        tl.store(z_ptr + row.to(tl.int64) * groups + group, zero.to(tl.int8), mask=row < R)
    for step in tl.static_range(STEPS):
        column = step * BK + k
        if STEPS > 1:
            w = tl.load(
                w_rows + (group * G + column)[None, :],
                mask=(row < R)[:, None] & (column < end)[None, :],
                other=0.0,
            ).to(tl.float32)
        v = tl.div_rn(w, tl.broadcast_to(divisor[:, None], (BR, BK)))
        if METHOD == "minmax":
            v = tl.minimum(tl.maximum(v, (-HALF - zero)[:, None]), (HALF - 1 - zero)[:, None])
            q = (tl.where(bad[:, None], 0.0, v) + 12582912.0).to(tl.int32, bitcast=True)
            q = tl.where((column < end)[None, :], q + zero.to(tl.int32)[:, None], 0) & (2 * HALF - 1)
        else:
            v = tl.where(bad[:, None], 0.0, tl.minimum(tl.maximum(v, -HALF), HALF - 1))
            # v + 1.5 * 2^23 has the nearest integer, ties to even, in its low bits.
            q = (v + 12582912.0).to(tl.int32, bitcast=True) & (2 * HALF - 1)
        fields = (
            tl.permute(tl.reshape(q, (BR, BK // (8 * F), F, 8)), (0, 1, 3, 2))
            << (tl.arange(0, F) * BITS)[None, None, None, :]
        )
        packed = tl.reshape(tl.sum(fields, 3), (BR, BK // F)).to(tl.int16)
        word = step * (BK // F) + tl.arange(0, BK // F)
        kept = (group * (G // F) + word < chunks * 8) & (word < G // F)
        q_rows = q_ptr + row.to(tl.int64) * (chunks * 8) + group * (G // F)
        tl.store(q_rows[:, None] + word[None, :], packed, mask=(row < R)[:, None] & kept[None, :])


@triton.jit(do_not_specialize=["R", "N", "sw", "ss", "sz"])
def dequantize_kernel(
    w_ptr,
    s_ptr,
    z_ptr,
    index_ptr,
    y_ptr,
    R,
    N,
    K,
    sw,
    ss,
    sz,
    BITS: tl.constexpr,
    G: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """Plane `w [N, B / 2]` int16 of row stride 8 sw, `s [N, G]`, `z [N, G]` int8 or None -> `y [R, K]` = (q -
    zero) * S: row i is row index[i], or where that is None row i. G = 0: one scale per row."""
    tiles_k = tl.cdiv(K, BK)
    first = tl.program_id(0) % tiles_k * BK
    r = tl.program_id(0) // tiles_k * BR + tl.arange(0, BR)
    row = tl.minimum(r, R - 1).to(tl.int64)
    if index_ptr is not None:
        row = tl.load(index_ptr + row).to(tl.int64)
        tl.device_assert((row >= 0) & (row < N), "embedding index is out of range")
    word = first * BITS // 16 + tl.arange(0, BK * BITS // 16)
    CHUNK: tl.constexpr = 128 // BITS
    w = tl.load(
        w_ptr + row[:, None] * (sw.to(tl.int64) * 8) + word[None, :],
        mask=word[None, :] < (K + CHUNK - 1) // CHUNK * 8,
        other=0,
    )
    last = (K - 1) // (G if G > 0 else 1)
    scale = scales(s_ptr + row * ss, first, last, G, BK)
    q = integers(w, BITS, tl.float32, ASM)
    if z_ptr is not None:
        q = less_zero(q, scales(z_ptr + row * sz, first, last, G, BK))
    y = rounded(q, scale, tl.float32).to(y_ptr.dtype.element_ty)
    k = first + tl.arange(0, BK)
    tl.store(y_ptr + r.to(tl.int64)[:, None] * K + k[None, :], y, mask=(r < R)[:, None] & (k < K)[None, :])
