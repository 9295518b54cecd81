"""How each kernel that `gpu.py` times is made from a float weight: cuBLAS, ours, and those of other
libraries, where they are installed.

A maker gets a bf16 weight `[N, K]` and returns a function of `x [M, K]`. Peers that take integers and scales
get those that ours has; the others quantize for themselves. Each is told apart by how far its result is from
the product with the float weight.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtn_tensor import RTNQuantizedTensor, ops, reference
from rtn_tensor.formats import unpack
from rtn_tensor.kernels import dense

Product = Callable[[Tensor], Tensor]
SOME = (1, 16, 64, 256, 1024)  # rows of x for kernels that are measured beside the main ones


class Kernel(NamedTuple):
    """`bits` and `group_size` are 16 and 0 for floats; `package` must be installed; `tokens` None: every
    number of rows."""

    make: Callable[[Tensor], Product]
    bits: int
    group_size: int = 128
    package: str | None = None
    tokens: tuple[int, ...] | None = None

    def bytes(self, n: int, k: int) -> int:
        """Of the weight, packed, and of 16-bit scales."""
        if self.bits == 16:
            return 2 * n * k
        return n * (k * self.bits // 8 + 2 * (1 if self.group_size == -1 else -(-k // self.group_size)))

    @property
    def tolerance(self) -> float:
        """Of ||y - x w^T|| / ||x w^T||, w the float weight: rounding Gaussian weights costs 0.11 with 4 bits
        and 0.01 with 8."""
        return {16: 0.01, 8: 0.03, 4: 0.2}[self.bits]


def integers(w: Tensor, bits: int, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Our q int8 `[N, K]` and S bf16 `[N, K / group_size]`."""
    qdata, scale = reference.quantize(w, bits, group_size, "absmax", torch.bfloat16)
    return unpack(qdata, bits, w.shape[1]), scale


# ------------------------------------------------------------------------- cuBLAS and ours


def cublas(w: Tensor) -> Product:
    return lambda x: F.linear(x, w)


def ours(bits: int, group_size: int, w: Tensor) -> Product:
    return partial(F.linear, weight=RTNQuantizedTensor.from_float(w, bits, group_size))


def dequantize_first(w: Tensor) -> Product:
    q = RTNQuantizedTensor.from_float(w, 4, 128)
    return lambda x: dense.KERNEL.linear(x, q.qdata, q.scale, None, 4, 128)


# --------------------------------------------------------------------------------- others'


def tinygemm(w: Tensor) -> Product:
    """torch's own: w = (q + 8 - 8) * scale + zero."""
    q, scale = integers(w, 4)
    field = (q + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(field[:, ::2] << 4 | field[:, 1::2], 8)
    scale_and_zero = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scale_and_zero)


def humming(bits: int, w: Tensor) -> Product:
    from humming.layer import HummingLayer

    config = {"dtype": f"int{bits}", "group_size": 128}
    layer = HummingLayer(
        shape_n=w.shape[0], shape_k=w.shape[1], weight_config=config, torch_dtype=w.dtype
    ).to(w.device)
    layer.load_from_unquantized(w)
    layer.transform()
    return layer


def gemlite_int4(w: Tensor) -> Product:
    from gemlite import DType, GemLiteLinear

    q, scale = integers(w, 4)
    layer = GemLiteLinear(4, 128, w.shape[1], w.shape[0], DType.BF16, DType.BF16)
    layer.pack((q + 8).to(torch.uint8), scale, 8)
    return layer


def gemlite_int8(w: Tensor) -> Product:
    from gemlite.helper import A16W8_INT8

    return A16W8_INT8(device=str(w.device), dtype=w.dtype).from_linear(linear_layer(w))


def mslk(w: Tensor) -> Product:
    import mslk.gemm  # noqa: F401  (registers its ops)
    from mslk.quantize.shuffle import pack_int4

    q, scale = integers(w, 4)
    packed, scale = torch.ops.mslk.preshuffle_i4(pack_int4(q), scale.t().contiguous())
    zero = torch.zeros_like(scale)
    return lambda x: torch.ops.mslk.bf16i4bf16_shuffled(x, packed, scale, zero)


def packed_rows(q: Tensor, bits: int) -> Tensor:
    """GPTQ's layout of int32: q + 2^(bits-1), the first of K in the lowest bits: `q [N, K]` -> `[K * bits /
    32, N]`."""
    fields = (q.t().int() + (1 << bits - 1)).reshape(-1, 32 // bits, q.shape[0])
    shifts = torch.arange(0, 32, bits, device=q.device, dtype=torch.int32)[:, None]
    # No field overlaps another, so that the sum is an "or".
    return (fields << shifts).sum(1, dtype=torch.int32)


def marlin(w: Tensor) -> Product:
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.scalar_type import scalar_types

    q, scale = integers(w, 4)
    n, k = w.shape
    none = utils.marlin_make_empty_g_idx(w.device)
    arguments = {
        "weight": _custom_ops.gptq_marlin_repack(packed_rows(q, 4), none, k, n, 4),
        "weight_scale": utils.marlin_permute_scales(scale.t().contiguous(), k, n, 128),
        "weight_zp": none,
        "g_idx": none,
        "g_idx_sort_indices": none,
        "workspace": utils.marlin_make_workspace_new(w.device),
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": n,
        "input_size_per_partition": k,
        "is_k_full": True,
    }
    return lambda x: utils.apply_gptq_marlin_linear(x, **arguments)


def machete(w: Tensor) -> Product:
    from vllm import _custom_ops
    from vllm.scalar_type import scalar_types

    q, scale = integers(w, 4)
    kind = scalar_types.uint4b8
    packed = packed_rows(q, 4).t().contiguous().t()  # column by column
    packed = _custom_ops.machete_prepack_B(packed, a_type=w.dtype, b_type=kind, group_scales_type=w.dtype)
    scale = scale.t().contiguous()
    return lambda x: _custom_ops.machete_mm(
        a=x, b_q=packed, b_type=kind, b_group_scales=scale, b_group_size=128
    )


def linear_layer(w: Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def of_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def torchao_int8(w: Tensor) -> Product:
    """Compiled, as torchao says to use it; once for all weights, which a layer that is compiled would not
    be."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = linear_layer(w)
    quantize_(layer, Int8WeightOnlyConfig())
    compiled = torch.compile(of_weight, dynamic=True)
    return lambda x: compiled(x, layer.weight)


CUBLAS = "cuBLAS bf16"
OURS = {
    "rtn int4 g128": Kernel(partial(ours, 4, 128), 4),
    "rtn int8 g128": Kernel(partial(ours, 8, 128), 8),
    "rtn int4 g32": Kernel(partial(ours, 4, 32), 4, 32, tokens=SOME),
    "rtn int8 g-1": Kernel(partial(ours, 8, -1), 8, -1, tokens=SOME),
}
KERNELS = {
    CUBLAS: Kernel(cublas, 16, 0),
    **OURS,
    "rtn dequantize + cuBLAS": Kernel(dequantize_first, 4),
    "tinygemm int4 g128": Kernel(tinygemm, 4),
    "humming int4 g128": Kernel(partial(humming, 4), 4, package="humming"),
    "humming int8 g128": Kernel(partial(humming, 8), 8, package="humming"),
    "mslk int4 g128": Kernel(mslk, 4, package="mslk"),
    "gemlite int4 g128": Kernel(gemlite_int4, 4, package="gemlite"),
    "gemlite int8 g-1": Kernel(gemlite_int8, 8, -1, package="gemlite"),
    "marlin int4 g128": Kernel(marlin, 4, package="vllm"),
    "machete int4 g128": Kernel(machete, 4, package="vllm"),
    "torchao int8 g-1": Kernel(torchao_int8, 8, -1),
}


def installed(kernel: Kernel) -> bool:
    return kernel.package is None or find_spec(kernel.package) is not None


# --------------------------------------------------------------------- mixtures of experts


class Experts(NamedTuple):
    """The shape of an MoE layer: experts, hidden size, size between, and experts per token."""

    experts: int
    hidden: int
    between: int
    top_k: int


class Routing(NamedTuple):
    """What a router gives, `ids [T, top_k]` and `weights [T, top_k]` fp32; and the routed pairs in the order
    of their experts, `[P]` int32, with the cumulative ends of the experts' rows, `[E]` int32."""

    ids: Tensor
    weights: Tensor
    order: Tensor
    offs: Tensor


# From `w13 [E, 2 I, H]` (gate's rows, then up's) and `w2 [E, H, I]` to a function of `x [T, H]` and a
# routing.
Layer = Callable[[Tensor, Routing], Tensor]


def route(ids: Tensor, weights: Tensor, experts: int) -> Routing:
    """With nothing that waits for the GPU, as bincount would."""
    of_pair = ids.flatten()
    counts = (of_pair[:, None] == torch.arange(experts, device=ids.device)).sum(0)
    return Routing(ids, weights, of_pair.argsort(stable=True).int(), counts.cumsum(0).int())


def grouped_mm(w13: Tensor, w2: Tensor) -> Layer:
    """torch's grouped product, and what is around it in torch's own kernels."""

    def run(x: Tensor, routing: Routing) -> Tensor:
        tokens, top_k = routing.ids.shape
        gate, up = F.grouped_mm(x[routing.order // top_k], w13.mT, offs=routing.offs).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, w2.mT, offs=routing.offs) * routing.weights.flatten()[
            routing.order, None
        ].to(x.dtype)
        pairs = torch.empty_like(y)
        pairs[routing.order] = y
        return pairs.view(tokens, top_k, -1).sum(1)

    return run


class OurExperts(NamedTuple):
    """`sorts`: by pairs in the order of their experts; else each pair is a program of its own."""

    w13: RTNQuantizedTensor
    w2: RTNQuantizedTensor
    sorts: bool

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        tokens, top_k = routing.ids.shape
        h = routed(ops.routed, self.w13, x, routing, self.sorts, activation="silu")
        return (
            routed(ops.routed, self.w2, h, routing, self.sorts, weighted=True).view(tokens, top_k, -1).sum(1)
        )


def routed(
    op: Callable[..., Tensor],
    w: Any,
    x: Tensor,
    routing: Routing,
    sorts: bool,
    activation: str = "",
    weighted: bool = False,
    bias: Any = None,
) -> Tensor:
    """One product of an MoE layer by `op`, of rtn::routed's signature: the first, gated, of tokens; or the
    second, weighted, of pairs."""
    pairs, offs = (routing.order, routing.offs) if sorts else (None, None)
    router, top_k = (routing.weights.flatten(), 1) if weighted else (None, routing.ids.shape[1])
    return op(
        x,
        w.qdata,
        w.scale,
        bias,
        routing.ids.flatten().int(),
        pairs,
        offs,
        router,
        top_k,
        activation,
        w.bits,
        w.group_size,
    )


def our_experts(bits: int, sorts: bool, w13: Tensor, w2: Tensor) -> Layer:
    return OurExperts(*(RTNQuantizedTensor.from_float(w, bits, 128) for w in (w13, w2)), sorts)


def marlin_moe(w13: Tensor, w2: Tensor) -> Layer:
    import inspect

    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.fused_marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.scalar_type import scalar_types

    def packed(w: Tensor) -> tuple[Tensor, Tensor]:
        planes = []
        for expert in w:
            q, scale = integers(expert, 4)
            none, (n, k) = utils.marlin_make_empty_g_idx(w.device), expert.shape
            planes.append(
                (
                    _custom_ops.gptq_marlin_repack(packed_rows(q, 4), none, k, n, 4),
                    utils.marlin_permute_scales(scale.t().contiguous(), k, n, 128),
                )
            )
        qs, scales = zip(*planes, strict=True)
        return torch.stack(qs), torch.stack(scales)

    (q1, s1), (q2, s2) = packed(w13), packed(w2)
    arguments = {"w1": q1, "w2": q2, "bias1": None, "bias2": None, "w1_scale": s1, "w2_scale": s2}
    arguments |= {"gating_output": None, "quant_type_id": scalar_types.uint4b8.id}
    known = inspect.signature(fused_marlin_moe).parameters  # some of them come and go with vLLM's versions
    arguments = {name: value for name, value in arguments.items() if name in known}
    return lambda x, routing: fused_marlin_moe(
        hidden_states=x, topk_weights=routing.weights, topk_ids=routing.ids.int(), **arguments
    )


class MoeKernel(NamedTuple):
    """`sorts`: whether it is given pairs in order, and could share one sorting with others; `tokens`: at most
    so many."""

    make: Callable[[Tensor, Tensor], Layer]
    bits: int
    sorts: bool = True
    tokens: int | None = None
    package: str | None = None

    @property
    def tolerance(self) -> float:
        """Two products one after the other, the first gated."""
        return {16: 0.03, 8: 0.06, 4: 0.35}[self.bits]


GROUPED_MM = "bf16 grouped_mm"
MOE_KERNELS = {
    GROUPED_MM: MoeKernel(grouped_mm, 16),
    "rtn int4 g128": MoeKernel(partial(our_experts, 4, True), 4),
    "rtn int4 g128, unsorted": MoeKernel(partial(our_experts, 4, False), 4, sorts=False, tokens=16),
    "rtn int8 g128": MoeKernel(partial(our_experts, 8, True), 8),
    "marlin int4 g128": MoeKernel(marlin_moe, 4, sorts=False, package="vllm"),
}
MODELS = {
    "Mixtral 8x7B": Experts(8, 4096, 14336, 2),
    "Qwen3 30B-A3B": Experts(128, 2048, 768, 8),
    "DeepSeek V3, TP 8": Experts(256, 7168, 256, 8),
}
