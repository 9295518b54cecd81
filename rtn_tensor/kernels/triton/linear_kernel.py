"""`linear` (y = x @ w'^T + bias) and `linear_dx` (dx = dy @ w') on packed weights."""

import triton
import triton.language as tl

from rtn_tensor.kernels.triton.int8_kernel import int8_product
from rtn_tensor.kernels.triton.words import product, product_dx, scale_at


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number -> (tile along M, tile along N), down GROUP tiles of M before the next of N, so that those
    in flight together share rows of x and of w in L2."""
    wide = GROUP * tiles_n
    start = tile // wide * GROUP
    height = tl.minimum(tiles_m - start, GROUP)
    return start + tile % wide % height, tile % wide // height


@triton.jit(do_not_specialize=["split_k", "M", "sx", "sw", "ss", "sz"])
def linear_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    xs_ptr,
    xsum_ptr,
    split_k,
    M,
    N,
    K,
    sx,
    sw,
    ss,
    sz,
    sxs,
    BITS: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """`x [M, K]`, plane `w [N, B / 2]` int16, `s [N, G]`, `z [N, G]` int8 or None, `bias [N]` or None -> `y
    [M, N]`.

    sx and sw are row strides in 16 bytes of a 2-byte type (8 elements), so that the compiler sees that rows
    are aligned; ss and sz are in elements. Where there is a `partial [split_k, M, N]`, that many programs
    share a tile: each writes its fp32 sums there, and the last to arrive adds them up in order, so the result
    does not depend on who came last. It leaves its tile's `arrived` at 0, as it was found.

    Where there is an `xs`, x is int8, as `int8_rows_kernel` writes it with xs and xsum, whose rows are sxs
    apart, and w is int8, too; sx and sw are in 16 bytes.
    """
    tile, part, first, end = tl.program_id(0), 0, 0, K
    if partial_ptr is not None:
        tile, part = tl.program_id(0) // split_k, tl.program_id(0) % split_k
        steps = tl.cdiv(tl.cdiv(K, BK), split_k)
        first = tl.multiple_of(part * steps * BK, BK)
        end = tl.minimum(first + steps * BK, K)
    tile_m, tile_n = tile_of(tile, tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    om = tile_m * BM + tl.arange(0, BM)
    on = tile_n * BN + tl.arange(0, BN)
    rows = tl.minimum(on, N - 1).to(tl.int64)  # clamped, not masked: loads stay 16 bytes
    CHUNK: tl.constexpr = 8 if xs_ptr is None else 16  # elements
    x_rows = x_ptr + om.to(tl.int64) * (sx.to(tl.int64) * CHUNK)
    valid = om < M
    w_rows = w_ptr + rows * (sw.to(tl.int64) * CHUNK)
    s_rows = s_ptr + rows * ss
    z_rows = None if z_ptr is None else z_ptr + rows * sz
    if xs_ptr is None:
        acc = product(
            x_rows,
            valid,
            w_rows,
            s_rows,
            z_rows,
            first,
            end,
            K,
            BITS,
            G,
            BK,
            SCALE_AFTER,
            EVEN_K,
            ASM,
        )
    else:
        acc = int8_product(
            x_rows,
            valid,
            xs_ptr,
            xsum_ptr,
            sxs,
            om,
            w_rows,
            s_rows,
            z_rows,
            first,
            end,
            K,
            BITS,
            G,
            BK,
            EVEN_K,
            ASM,
        )
    mask = (om[None, :] < M) & (on[:, None] < N)
    offsets = om.to(tl.int64)[None, :] * N + on[:, None]
    if partial_ptr is not None:
        plane = M.to(tl.int64) * N
        tl.store(partial_ptr + part * plane + offsets, acc, mask=mask)
        tl.debug_barrier()  # every thread's sums are written before one thread says so
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == split_k - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for i in range(split_k):
                acc += tl.load(partial_ptr + i * plane + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            _finish(acc, s_ptr + rows * ss, bias_ptr, y_ptr, on, N, offsets, mask, G)
    else:
        _finish(acc, s_ptr + rows * ss, bias_ptr, y_ptr, on, N, offsets, mask, G)


@triton.jit
def _finish(acc, s_rows, bias_ptr, y_ptr, on, N, offsets, mask, G: tl.constexpr):
    if G == 0:
        acc *= scale_at(s_rows)[:, None].to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + on, mask=on < N, other=0.0)[:, None].to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "sdy", "sw", "ss", "sz"])
def linear_dx_kernel(
    dy_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    dx_ptr,
    M,
    N,
    K,
    sdy,
    sw,
    ss,
    sz,
    BITS: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """`dy [M, N]`, plane `w [N, B / 2]` int16, `s [N, G]`, `z [N, G]` int8 or None -> `dx [M, K]`. The
    weights of a tile are rounded to dy's dtype, in registers; strides as for `linear_kernel`."""
    tile_m, tile_k = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BK), 8)
    om = tile_m * BM + tl.arange(0, BM)
    ok = tile_k * BK + tl.arange(0, BK)
    acc = product_dx(
        dy_ptr + om.to(tl.int64) * (sdy.to(tl.int64) * 8),
        om < M,
        w_ptr,
        s_ptr,
        z_ptr,
        tile_k * BK,
        N,
        K,
        sw,
        ss,
        sz,
        BITS,
        G,
        BN,
        BK,
        ASM,
    )
    mask = (om[:, None] < M) & (ok[None, :] < K)
    tl.store(dx_ptr + om.to(tl.int64)[:, None] * K + ok[None, :], acc.to(dx_ptr.dtype.element_ty), mask=mask)
