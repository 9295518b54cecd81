"""The specification: every operation in plain fp32 torch, against which kernels are tested.

Names: `w [..., N, K]` float weight, `qdata [..., N, B]` uint8, `scale [..., N, G]`, `zero [..., N, G]` int8
    or None, which is 0 everywhere; G = groups(K, group_size); b = bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rtn_tensor.formats import FORMATS, SCALE8, SCALE8_UNIT, embedding_dtype, groups, pack, unpack

PIECE = 32  # columns of int8 activations that share a scale


def widened(scale: Tensor) -> Tensor:
    """S in fp32, of a plane `scale`: of 8 bits, 2^-7 times what they are as float8_e4m3fn."""
    return scale.view(torch.float8_e4m3fn).float() * SCALE8_UNIT if scale.dtype == SCALE8 else scale.float()


def narrowed(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The plane in `dtype` of which `widened` gives `scale` in fp32, to nearest."""
    if dtype == SCALE8:
        return (scale / SCALE8_UNIT).to(torch.float8_e4m3fn).view(SCALE8)
    return scale.to(dtype)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds an fp32 `scale` to a plane's `dtype` so that no group is lost: to nearest, but away from zero
    where the result is subnormal (never to 0), and to the largest finite value where it would overflow. NaN
    stays NaN; 0 stays 0."""
    as_float8 = dtype == SCALE8
    limits = torch.finfo(torch.float8_e4m3fn if as_float8 else dtype)
    unit = SCALE8_UNIT if as_float8 else 1.0
    rounded = widened(narrowed(scale, dtype))
    rounded = torch.where(rounded.isinf() & scale.isfinite(), scale.sign() * (limits.max * unit), rounded)
    # The smallest subnormal, and the step between subnormals.
    ulp = limits.tiny * limits.eps * unit
    short = (scale.abs() < limits.tiny * unit) & (rounded.abs() < scale.abs())
    return narrowed(torch.where(short, rounded + scale.sign() * ulp, rounded), dtype)


# What "search" tries, in twentieths of S as "signed" has it; of equals, the first. More, finer steps have
# less loss, and more perplexity.
SEARCHED = (20, 19, 18, 17, 16, 21)


def _loss(share: Tensor, levels: Tensor, q: Tensor, twentieths: int) -> Tensor:
    """The sum over each group of |w| (w - q S)^2, but for a factor of the group: of integers, so that it
    depends on no order."""
    error = levels - q
    parts = (error * error * share * 65536).clamp(max=2.0**24).nan_to_num()
    return parts.long().sum(-1) * twentieths**2


def quantize(
    w: Tensor,
    bits: int,
    group_size: int,
    scale_method: str,
    scale_dtype: torch.dtype,
    out: tuple[Tensor, ...] | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Rounds `w [..., N, K]` to (qdata, scale), or (qdata, scale, zero) with "minmax", in fp32 whatever its
    dtype, so bit-exact on every device.

        absmax: S = 2 max|w| / (2^b - 1)        (arXiv 2505.15909)
        signed: S = w_ext / -2^(b-1), w_ext the element of largest magnitude with its sign (of a tie, the
            negative one)
        search: S = c w_ext / -2^(b-1), c of 0.8, 0.85, ..., 1.05 where sum |w| (w - q S)^2 over the group is
            least
        q = clamp(rint(w / S), -2^(b-1), 2^(b-1) - 1), with the S that `scale_dtype` holds

        minmax: S = hi / (2^b - 1) - lo / (2^b - 1), lo and hi the least and the largest of the group and 0
        zero = clamp(-2^(b-1) - rint(lo / S)), q = clamp(rint(w / S) + zero), both to the limits above

    An all-zero group gets S = 1 and q = zero; one that holds a NaN or inf gets S = NaN and q = zero = 0.
    `out`: planes, contiguous, that are filled and given back in the place of new ones. `importance [K]`: what
    "search" multiplies the squared error of each column by; equal numbers change nothing.
    """
    fmt = FORMATS[bits]
    k = w.shape[-1]
    g = max(k, 1) if group_size == -1 else group_size
    n_groups = groups(k, group_size)
    w_groups = F.pad(w.float(), (0, n_groups * g - k)).unflatten(-1, (n_groups, g))
    low, high = w_groups.aminmax(dim=-1)
    extreme = torch.where(-low >= high, low, high)

    def rounded(exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S, w / S and q."""
        # A weight that is tiny even for fp32 must not lose its group in the division.
        lost = (exact == 0) & (extreme != 0)
        exact = torch.where(lost, torch.finfo(torch.float32).tiny * torch.finfo(torch.float32).eps, exact)
        exact = torch.where(extreme == 0, 1.0, torch.where(exact.isinf(), torch.nan, exact))
        scale = round_scale(exact, scale_dtype)
        levels = w_groups / widened(scale).unsqueeze(-1)
        return scale, levels, levels.round().clamp(fmt.qmin, fmt.qmax)

    zero = None
    if scale_method == "minmax":
        low, high = low.clamp(max=0), high.clamp(min=0)
        steps = torch.full((), fmt.qmax - fmt.qmin, dtype=torch.float32, device=w.device)
        scale, levels, _ = rounded(high / steps - low / steps)
        shift = (fmt.qmin - (low / widened(scale)).round()).clamp(fmt.qmin, fmt.qmax)
        q = (levels.round() + shift.unsqueeze(-1)).clamp(fmt.qmin, fmt.qmax)
        zero = shift.nan_to_num(nan=0.0).to(torch.int8)
    elif scale_method == "absmax":
        # The formula's number, and it cannot overflow: 2 max|w| / (2^b - 1) = max|w| / (2^(b-1) - 1/2).
        # By a tensor: torch's CUDA division by a number multiplies with its inverse.
        scale, _, q = rounded(extreme.abs() / torch.full((), fmt.qmax + 0.5, device=w.device))
    else:
        scale, levels, q = rounded(extreme / fmt.qmin)
        if scale_method == "search":
            share = (w_groups / extreme.unsqueeze(-1)).abs()
            if importance is not None:
                of_group = F.pad(importance.float(), (0, n_groups * g - k)).unflatten(-1, (n_groups, g))
                most = of_group.amax(-1, keepdim=True)
                share = share * torch.where(most > 0, of_group / most, 1.0)
            least = _loss(share, levels, q, SEARCHED[0])
            for twentieths in SEARCHED[1:]:
                other, levels, other_q = rounded(extreme / fmt.qmin * (twentieths / 20))
                loss = _loss(share, levels, other_q, twentieths)
                less = loss < least
                least, scale = torch.where(less, loss, least), torch.where(less, other, scale)
                q = torch.where(less.unsqueeze(-1), other_q, q)
    qdata = pack(q.nan_to_num(nan=0.0).to(torch.int8).flatten(-2)[..., :k], bits)
    planes = (qdata, scale.contiguous(), *(() if zero is None else (zero.contiguous(),)))
    return planes if out is None else tuple(to.copy_(t) for to, t in zip(out, planes, strict=True))


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
    zero: Tensor | None = None,
) -> Tensor:
    """w' = (q - zero) * S in fp32, rounded once to `dtype`: `[..., N, K]`."""
    q = unpack(qdata, bits, k).float()
    if group_size == -1:
        return ((q if zero is None else q - zero) * widened(scale)).to(dtype)
    padded = F.pad(q, (0, scale.shape[-1] * group_size - k)).unflatten(-1, (scale.shape[-1], group_size))
    if zero is not None:
        padded = padded - zero.unsqueeze(-1)
    return (padded * widened(scale).unsqueeze(-1)).flatten(-2)[..., :k].to(dtype).contiguous()


def rounded_to_int8(x: Tensor) -> Tensor:
    """`x [..., K]` as int8 activations have it, in fp32: of each 32 columns q * S, with S = max|x| / 127 and
    q = rint(x * (127 / max|x|)), in fp32. All are NaN where one of them is NaN or inf.

    Kernels multiply the integers q, exactly, and scale the sums in fp32; or, where their `rounds_weight` says
    so, round q * S to the dtype of x. Pieces of 64 columns are less exact
    (on SmolLM2-135M a divergence of 0.0050 from float activations, and of 32 one of 0.0028)."""
    k = x.shape[-1]
    pieces = F.pad(x.float(), (0, -k % PIECE)).unflatten(-1, (-(-k // PIECE), PIECE))
    most = pieces.abs().amax(-1, keepdim=True) if k else pieces.new_zeros(*pieces.shape[:-1], 1)
    # The inverse of what is very small would overflow.
    lift = torch.where(most < 2.0**-60, 2.0**60, 1.0)
    steps = torch.full((), 127, dtype=torch.float32, device=x.device)  # as in `quantize`, by a tensor
    inverse = torch.where(most > 0, steps / (most * lift), 0.0)
    scale = torch.where(most.isfinite(), most / steps, torch.nan)
    return ((pieces * lift * inverse).round() * scale).flatten(-2)[..., :k]


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
    """y = x @ w'^T + bias: `x [M, K]` -> `[M, N]` in x's dtype, the bias added before the one rounding; with
    `int8_x` of x as `rounded_to_int8` has it."""
    w = dequantize(qdata, scale, bits, group_size, x.shape[-1], torch.float32, zero)
    y = (rounded_to_int8(x) if int8_x else x.float()) @ w.mT
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_dx(
    dy: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int, zero: Tensor | None = None
) -> Tensor:
    """dx = dy @ w': `dy [M, N]` -> `[M, K]` in dy's dtype."""
    return (dy.float() @ dequantize(qdata, scale, bits, group_size, k, torch.float32, zero)).to(dy.dtype)


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
    """`linear` of each expert over its own rows: `x [M, K]` sorted by expert, weights `[E, N, K]` -> `[M,
    N]`.

    `offs [E]` int32 holds cumulative ends, as for torch's grouped_mm; rows past the last end come out zero.
    """
    y = x.new_zeros(x.shape[0], qdata.shape[-2])
    start = 0
    for e, end in enumerate(offs.tolist()):
        of_expert = None if zero is None else zero[e]
        y[start:end] = linear(x[start:end], qdata[e], scale[e], None, bits, group_size, of_expert, int8_x)
        start = end
    return y


def grouped_dx(
    dy: Tensor,
    qdata: Tensor,
    scale: Tensor,
    offs: Tensor,
    bits: int,
    group_size: int,
    k: int,
    zero: Tensor | None = None,
) -> Tensor:
    """`linear_dx` of each expert over its own rows: `dy [M, N]` -> `[M, K]`."""
    dx = dy.new_zeros(dy.shape[0], k)
    start = 0
    for e, end in enumerate(offs.tolist()):
        of_expert = None if zero is None else zero[e]
        dx[start:end] = linear_dx(dy[start:end], qdata[e], scale[e], bits, group_size, k, of_expert)
        start = end
    return dx


@dataclass(frozen=True)
class SwiGLU:
    """What experts do between their two products, `[..., 2 I]` -> `[..., I]`, in fp32: gate * sigmoid(alpha *
    gate) * (up + beta), of gate clamped to at most `limit`, and up to -limit .. limit.

    `interleaved` says whether the columns are those of gate and up in turn, and not gate's and then up's.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    interleaved: bool = False

    def __call__(self, h: Tensor) -> Tensor:
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        gate, up = gate.float(), up.float()
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        gate = F.silu(gate) if self.alpha == 1 else gate * torch.sigmoid(self.alpha * gate)
        return ((up + self.beta if self.beta else up) * gate).to(h.dtype)


# Those that kernels compute between the products: the usual one, and GPT-OSS's.
ACTIVATIONS: dict[str, SwiGLU] = {
    "silu": SwiGLU(),
    "gpt_oss": SwiGLU(alpha=1.702, beta=1.0, limit=7.0, interleaved=True),
}


def routed(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    experts: Tensor | None,
    pairs: Tensor | None,
    offs: Tensor | None,
    router: Tensor | None,
    top_k: int,
    activation: str,
    bits: int,
    group_size: int,
    zero: Tensor | None = None,
    int8_x: bool = False,
    *,
    grouped: Callable[..., Tensor] = grouped,
) -> Tensor:
    """`grouped` of tokens that are routed to experts, with what comes before and after: gathered rows, bias,
    activation, router weights.

    A pair is a token and one of its top_k experts: pair p is row p // top_k of `x [T, K]`, and row p of the
    result `[T * top_k, N]`, or `[T * top_k, N / 2]` with one of `ACTIVATIONS`.

    Args:
        bias: `[E, N]`.
        experts: `[T * top_k]`, each pair's expert; E or more, or less than 0: none of these, and its row
            comes out zero.
        pairs, offs: the pairs sorted by expert, `[T * top_k]` int32, and the cumulative ends of the experts'
            pairs, `[E]` int32; where they are None, they are found here.
        router: `[T * top_k]`, what each row of the result is multiplied by.
    """
    e = qdata.shape[0]
    if pairs is None or offs is None:
        assert experts is not None
        pairs, offs = sorted_pairs(experts, e)
    y = grouped(x[pairs // top_k], qdata, scale, offs, bits, group_size, zero, int8_x)
    if bias is not None:
        ends = torch.arange(len(pairs), device=x.device)
        of_row = torch.searchsorted(offs, ends, right=True)  # the expert of each row
        y = y + bias[of_row.clamp(max=e - 1)] * (of_row < e)[:, None]
    if activation:
        y = ACTIVATIONS[activation](y.float()).to(x.dtype)
    if router is not None:
        y = y * router[pairs][:, None].to(y.dtype)
    return torch.empty_like(y).index_copy_(0, pairs.long(), y)


def sorted_pairs(experts: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their `experts [P]`, and the cumulative ends of those of experts 0 .. e - 1,
    `[E]`; both int32."""
    experts = torch.where(experts < 0, e, experts)
    in_order, pairs = experts.sort(stable=True)
    offs = torch.searchsorted(
        in_order, torch.arange(e, dtype=in_order.dtype, device=experts.device), right=True
    )
    return pairs.to(torch.int32), offs.to(torch.int32)


def embedding(
    indices: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    zero: Tensor | None = None,
) -> Tensor:
    """Rows of w' `[N, K]` in the scale's dtype, fp32 where that has 8 bits: `indices [...]` -> `[..., K]`."""
    # index_select refuses the negative indices that plain indexing takes from the end.
    rows = indices.reshape(-1)
    qdata, scale = qdata.index_select(0, rows), scale.index_select(0, rows)
    zero = None if zero is None else zero.index_select(0, rows)
    w = dequantize(qdata, scale, bits, group_size, k, embedding_dtype(scale.dtype), zero)
    return w.view(*indices.shape, k)
