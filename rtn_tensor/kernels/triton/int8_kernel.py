"""Activations that are rounded to int8, 32 columns at a time, as `reference.rounded_to_int8` has it: the
kernel that rounds them, once per call, and the loop along K that multiplies them with the plane.

The plane is read as bytes. Where one holds two int4 weights, each is a byte of its own by a mask, the lower
after a shift, and sixteen times what it stands for; one instruction does that for four bytes. So the columns
of a piece come in the order of the plane's bytes, in which the activations are written.
"""

import triton
import triton.language as tl

from rtn_tensor.kernels.triton.words import loaded_scales

_INT4: tl.constexpr = tl.constexpr("""{
    shl.b32 $0, $2, 4;
    and.b32 $0, $0, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0;
}""")


@triton.jit(do_not_specialize=["M", "pieces", "sx", "ss"])
def int8_rows_kernel(
    x_ptr, q_ptr, s_ptr, sum_ptr, M, K, pieces, sx, ss, BITS: tl.constexpr, BR: tl.constexpr
):
    """`x [M, K]` of row stride sx -> `q [M, 32 * pieces]` int8, in the order of the bytes of a plane of BITS
    bits, `s [pieces, M]` and, where that is not None, `sum [pieces, M]` of each piece's q, both fp32 of row
    stride ss. A program has BR pieces. It is to be launched without fusion, as a product is rounded before it
    is added to."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    row = (r // pieces).to(tl.int64)
    piece = r % pieces
    i = tl.arange(0, 32)
    # A chunk's word has fields that are 8 columns apart, and a byte of int4 two of these.
    if BITS == 4:
        k = i % 2 * 16 + i // 16 * 8 + i // 2 % 8
    else:
        k = i // 16 * 16 + i % 2 * 8 + i // 2 % 8
    k = piece[:, None] * 32 + k[None, :]
    x = tl.load(x_ptr + row[:, None] * sx + k, mask=(row < M)[:, None] & (k < K), other=0.0).to(tl.float32)
    most = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    finite = most < float("inf")
    most = tl.where(finite, most, 0.0)
    lift = tl.where(most < 2.0**-60, 2.0**60, 1.0)
    steps = tl.full((BR,), 127.0, tl.float32)
    inverse = tl.div_rn(steps, tl.where(most > 0, most * lift, 1.0))
    q = tl.where(finite[:, None], x, 0.0) * lift[:, None] * inverse[:, None]
    q = (q + 12582912.0) - 12582912.0  # 1.5 * 2^23, beside which there are integers only
    tl.store(q_ptr + r.to(tl.int64)[:, None] * 32 + i[None, :], q.to(tl.int8), mask=(row < M)[:, None])
    at = piece.to(tl.int64) * ss + row
    tl.store(s_ptr + at, tl.where(finite, tl.div_rn(most, steps), float("nan")), mask=row < M)
    if sum_ptr is not None:
        tl.store(sum_ptr + at, tl.sum(q, 1), mask=row < M)


@triton.jit
def _bytes(w, BITS: tl.constexpr, ASM: tl.constexpr):
    """The weights of a piece, `[N, 32]` int8, of its bytes `w [N, 4 * BITS]`; of int4 sixteen times them."""
    if BITS == 8:
        return w
    else:
        if ASM:
            low, high = tl.inline_asm_elementwise(
                _INT4, "=&r,=r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
        else:
            low, high = (w << 4).to(tl.int8), w & -16
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (w.shape[0], 32))


@triton.jit
def _pieces(w, BITS: tl.constexpr, ASM: tl.constexpr):
    """`_bytes` of each of the four pieces `w [N, 16 * BITS]`. They are parted first: what is parted lies side
    by side for the compiler, which would put bytes of all four in a register for the assembly."""
    even, odd = tl.split(tl.permute(tl.reshape(w, (w.shape[0], 2, 2, 4 * BITS)), (0, 3, 1, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return _bytes(w0, BITS, ASM), _bytes(w1, BITS, ASM), _bytes(w2, BITS, ASM), _bytes(w3, BITS, ASM)


@triton.jit
def int8_product(
    x_rows,
    x_valid,
    xs_ptr,
    xsum_ptr,
    sxs,
    x_row,
    w_rows,
    s_rows,
    z_rows,
    first,
    end,
    K,
    BITS: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """`words.product` with int8 activations: fp32 `[BN, BM]`. A piece's sum is exact, and is scaled in fp32.

    Args:
        x_rows, x_valid: `[BM]` addresses of the rows of q as `int8_rows_kernel` writes them, full to a
            multiple of BK, and which of them are there.
        xs_ptr, xsum_ptr, sxs: the scales and sums of their pieces, as it writes them, the latter only where
            there are zero points.
        x_row: `[BM]` their numbers in these; for rows that are not there, of any, or of what is allocated.
        w_rows: `[BN]` addresses of the rows of the plane, as int8, 16-byte aligned.
        BK: 128, four pieces.
        s_rows, z_rows, first, end, K, G, EVEN_K: as for `words.product`.
    """
    BN: tl.constexpr = w_rows.shape[0]
    BM: tl.constexpr = x_rows.shape[0]
    tl.static_assert(BK == 128, "a step is four pieces")
    BYTES: tl.constexpr = BK * BITS // 8
    CHUNK: tl.constexpr = 128 // BITS
    UNIT: tl.constexpr = BK if G % BK == 0 else (G if BK % G == 0 else 32)
    TIMES: tl.constexpr = 16.0 if BITS == 4 else 1.0  # how large the weights are
    byte = tl.arange(0, BYTES)
    column = tl.arange(0, 32)
    last = (K - 1) // (G if G > 0 else 1)
    if z_rows is not None and G == 0:
        zeros = (tl.load(z_rows).to(tl.float32) * TIMES,)
    tl.assume(end > first)
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(first, end, BK):
        w_ptrs = w_rows[:, None] + (k * BITS // 8 + byte)[None, :]
        if EVEN_K:
            w = tl.load(w_ptrs)
        else:
            left = tl.multiple_of((K + CHUNK - 1) // CHUNK * 16 - k * BITS // 8, 16)
            w = tl.load(w_ptrs, mask=(byte < left)[None, :], other=0)
        weights = _pieces(w, BITS, ASM)
        if G > 0:
            scales = loaded_scales(s_rows, k, last, G, BK)
            if z_rows is not None:
                zeros = loaded_scales(z_rows, k, last, G, BK)
        for j in tl.static_range(4):
            x = tl.load(x_rows[None, :] + (k + j * 32 + column)[:, None], mask=x_valid[None, :], other=0)
            at = (k // 32 + j) * sxs.to(tl.int64)
            sums = tl.dot(weights[j], x, out_dtype=tl.int32).to(tl.float32)
            if z_rows is not None:
                zero = zeros[j * 32 // UNIT].to(tl.float32) * TIMES if G > 0 else zeros[0]
                sums -= zero[:, None] * tl.load(xsum_ptr + at + x_row)[None, :]
            sums *= tl.load(xs_ptr + at + x_row)[None, :]
            if G > 0:
                sums *= (scales[j * 32 // UNIT].to(tl.float32) * (1 / TIMES))[:, None]
            acc += sums
    return acc if G > 0 else acc * (1 / TIMES)
