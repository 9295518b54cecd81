"""`grouped` (y = x @ w'^T of each expert over its own rows) and `grouped_dx` (dx = dy @ w') on packed
weights.

Which expert a block of rows belongs to is found from `offs` in every program, so nothing is sorted, padded or
launched before.
"""

import triton
import triton.language as tl

from rtn_tensor.kernels.triton.int8_kernel import int8_product
from rtn_tensor.kernels.triton.words import product, product_dx, scale_at


@triton.jit
def block_of(block, offs_ptr, M, E, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Number of a block of at most BM rows -> (expert, its first row, the end of the expert's rows). Each
    expert's rows make blocks of their own; rows past the last end are those of expert E; numbers past the
    last block give E + 1 or more. EXPERTS: a power of two > E."""
    e = tl.arange(0, EXPERTS)
    # Ends that are no ends of M rows must not lead out of them.
    ends = tl.where(e < E, tl.minimum(tl.maximum(tl.load(offs_ptr + e, mask=e < E, other=0), 0), M), M)
    starts = tl.where(
        e > 0, tl.minimum(tl.maximum(tl.load(offs_ptr + e - 1, mask=(e > 0) & (e <= E), other=0), 0), M), 0
    )
    starts = tl.where(e <= E, starts, M)
    blocks = (ends - starts + BM - 1) // BM
    until = tl.cumsum(blocks)
    expert = tl.sum((until <= block).to(tl.int32))
    mine = e == expert
    start = tl.sum(tl.where(mine, starts + (block - until + blocks) * BM, 0))
    return expert, tl.maximum(start, 0), tl.sum(tl.where(mine, ends, 0))


@triton.jit(do_not_specialize=["M", "E", "sx", "swe", "sw", "sse", "ss", "sze", "sz"])
def grouped_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    bias_ptr,
    offs_ptr,
    expert_ptr,
    pair_ptr,
    router_ptr,
    y_ptr,
    xs_ptr,
    xsum_ptr,
    M,
    N,
    K,
    E,
    sx,
    swe,
    sw,
    sse,
    ss,
    sze,
    sz,
    sxs,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """Routed rows through experts `w [E, N, B / 2]` int16, `s [E, N, G]`, `z [E, N, G]` int8 or None -> `y
    [M, N]`.

    offs [E]: the cumulative ends of the experts' rows; or, where it is None, expert [M]: the expert of each
    row, and a program per row. pair [M] or None: the routed pair of each row, which is row pair // TOP_K of x
    and row pair of y; None: row i is pair i, and x has a row for each unless TOP_K says otherwise. router [M]
    or None: by which row pair of y is multiplied. bias [E, rows of w] or None. ACTIVATION: one of
    `reference.ACTIVATIONS`; with one, w has 2 N rows, gate's and up's. Strides, xs and xsum as for
    `linear_kernel`, swe, sse and sze between experts. Rows past the last end come out zero.
    """
    TILE: tl.constexpr = BN if ACTIVATION == "" else BN // 2  # columns of y
    tiles_n = tl.cdiv(N, TILE)
    tile_n = tl.program_id(0) % tiles_n
    block = tl.program_id(0) // tiles_n
    if offs_ptr is None:
        expert, start, end = tl.load(expert_ptr + block).to(tl.int32), block, block + 1
    else:
        expert, start, end = block_of(block, offs_ptr, M, E, BM, EXPERTS)
    row = start + tl.arange(0, BM)
    valid = row < end
    pair = row if pair_ptr is None else tl.load(pair_ptr + row, mask=valid, other=0).to(tl.int32)
    if (expert >= E) | (expert < 0):  # nobody's rows; or none at all, and then nothing is valid
        _store(tl.zeros((TILE, BM), tl.float32), y_ptr, pair, tile_n * TILE + tl.arange(0, TILE), N, valid)
        return
    r = tl.arange(0, BN)
    if ACTIVATION == "":
        w_row = tl.minimum(tile_n * BN + r, N - 1)
    else:
        # Eight rows of gate, then the same eight of up: a thread that holds one in its sums holds the other.
        on = tl.minimum(tile_n * TILE + r // 16 * 8 + r % 8, N - 1)
        is_up = r // 8 % 2
        w_row = on + is_up * N if ACTIVATION == "silu" else on * 2 + is_up
    w_row = w_row.to(tl.int64)
    e = expert.to(tl.int64)
    s_rows = s_ptr + e * sse + w_row * ss
    z_rows = None if z_ptr is None else z_ptr + e * sze + w_row * sz
    CHUNK: tl.constexpr = 8 if xs_ptr is None else 16
    x_rows = x_ptr + (pair // TOP_K).to(tl.int64) * (sx.to(tl.int64) * CHUNK)
    w_rows = w_ptr + e * (swe.to(tl.int64) * CHUNK) + w_row * (sw.to(tl.int64) * CHUNK)
    if xs_ptr is None:
        acc = product(x_rows, valid, w_rows, s_rows, z_rows, 0, K, K, BITS, G, BK, SCALE_AFTER, EVEN_K, ASM)
    else:
        acc = int8_product(
            x_rows,
            valid,
            xs_ptr,
            xsum_ptr,
            sxs,
            tl.where(valid, pair // TOP_K, 0),
            w_rows,
            s_rows,
            z_rows,
            0,
            K,
            K,
            BITS,
            G,
            BK,
            EVEN_K,
            ASM,
        )
    if G == 0:
        acc *= scale_at(s_rows)[:, None].to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + e * (N * BN // TILE) + w_row)[:, None].to(tl.float32)
    if ACTIVATION != "":
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
        if ACTIVATION == "silu":
            h = gate / (1 + tl.exp(-gate)) * up
        else:
            gate, up = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
            h = (up + 1) * gate / (1 + tl.exp(-1.702 * gate))
        acc = tl.reshape(h, (TILE, BM))
    if router_ptr is not None:
        acc *= tl.load(router_ptr + pair, mask=valid, other=0.0)[None, :].to(tl.float32)
    _store(acc, y_ptr, pair, tile_n * TILE + tl.arange(0, TILE), N, valid)


@triton.jit
def _store(acc, y_ptr, pair, on, N, valid):
    y_ptrs = y_ptr + pair.to(tl.int64)[None, :] * N + on[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=valid[None, :] & (on < N)[:, None])


@triton.jit(do_not_specialize=["M", "E", "sdy", "swe", "sw", "sse", "ss", "sze", "sz"])
def grouped_dx_kernel(
    dy_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    offs_ptr,
    dx_ptr,
    M,
    N,
    K,
    E,
    sdy,
    swe,
    sw,
    sse,
    ss,
    sze,
    sz,
    BITS: tl.constexpr,
    G: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """`dy [M, N]` sorted by expert -> `dx [M, K]`; the rest as for `grouped_kernel`."""
    tiles_k = tl.cdiv(K, BK)
    tile_k = tl.program_id(0) % tiles_k
    expert, start, end = block_of(tl.program_id(0) // tiles_k, offs_ptr, M, E, BM, EXPERTS)
    row = start + tl.arange(0, BM)
    valid = row < end
    ok = tile_k * BK + tl.arange(0, BK)
    dx_ptrs = dx_ptr + row.to(tl.int64)[:, None] * K + ok[None, :]
    mask = valid[:, None] & (ok < K)[None, :]
    if expert >= E:
        tl.store(dx_ptrs, tl.zeros((BM, BK), dx_ptr.dtype.element_ty), mask=mask)
        return
    e = expert.to(tl.int64)
    dy_rows = dy_ptr + row.to(tl.int64) * (sdy.to(tl.int64) * 8)
    acc = product_dx(
        dy_rows,
        valid,
        w_ptr + e * (swe.to(tl.int64) * 8),
        s_ptr + e * sse,
        None if z_ptr is None else z_ptr + e * sze,
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
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)
