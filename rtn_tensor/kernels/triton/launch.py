"""Launches the Triton kernels on torch tensors; the signatures are those of `rtn_tensor.reference`."""

# pyright: reportArgumentType=false
# (a constexpr parameter of a kernel takes a plain number)

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rtn_tensor import reference
from rtn_tensor.formats import ASYMMETRIC, FORMATS, embedding_dtype, new_planes
from rtn_tensor.kernels.problem import bucket
from rtn_tensor.kernels.triton.config import Config, Gpu, Shape, configure
from rtn_tensor.kernels.triton.counters import ARRIVALS
from rtn_tensor.kernels.triton.grouped_kernel import grouped_dx_kernel, grouped_kernel
from rtn_tensor.kernels.triton.int8_kernel import int8_rows_kernel
from rtn_tensor.kernels.triton.linear_kernel import linear_dx_kernel, linear_kernel
from rtn_tensor.kernels.triton.operands import (
    aligned_rows,
    asm,
    dense_rows,
    on,
    options,
    per_row,
    strides,
    words,
    zero_rows,
)
from rtn_tensor.kernels.triton.planes_kernel import dequantize_kernel, quantize_kernel

# Where Triton runs on the CPU, in its interpreter, launches are made for this one.
INTERPRETED = Gpu("interpreter", processors=132, shared_memory=232448, triton="")


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return INTERPRETED
    properties = torch.get_device_module(device).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", None) or properties.max_compute_units
    shared = getattr(properties, "shared_memory_per_block_optin", 65536)
    return Gpu(properties.name, processors, shared, ".".join(triton.__version__.split(".")[:2]))


def config_of(
    op: str,
    m: int,
    e: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    itemsize: int,
    device: torch.device,
) -> Config | None:
    """For `m` rows dealt to `e` experts; as `shape_of` says it of a Problem."""
    return configure(Shape(op, bits, group_size, itemsize, bucket(-(-bucket(m) // e)), n, k), gpu_of(device))


def activations(
    x: Tensor, bits: int, zero: Tensor | None, config: Config, int8_x: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`x [M, K]` as the kernels of products take it, its scales and, where there are zero points, its sums:
    rounded to int8 for a weight of `bits`, or as it is, and then there are neither. All of them are made for
    whole steps and, but for x, for whole tiles."""
    if not int8_x:
        return aligned_rows(x), None, None
    (m, k), x = x.shape, dense_rows(x)
    pieces = triton.cdiv(k, config.block_k) * config.block_k // 32
    rows = triton.cdiv(m, config.block_m) * config.block_m
    q = torch.empty(m, 32 * pieces, dtype=torch.int8, device=x.device)
    scale = torch.empty(pieces, rows, dtype=torch.float32, device=x.device)
    sums = None if zero is None else torch.empty_like(scale)
    block_r = 64
    with on(x.device):
        int8_rows_kernel[(triton.cdiv(m * pieces, block_r),)](
            x,
            q,
            scale,
            sums,
            m,
            k,
            pieces,
            x.stride(0),
            rows,
            BITS=bits,
            BR=block_r,
            **options(4) | {"enable_fp_fusion": False},
        )
    return q, scale, sums


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
    (m, k), n = x.shape, qdata.shape[0]
    y = x.new_empty(m, n)
    if not y.numel():
        return y
    if not k:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    config = config_of("linear", m, 1, n, k, bits, group_size, 1 if int8_x else x.itemsize, x.device)
    if config is None:  # forced by RTN_KERNEL, where the dense kernel would be chosen
        return F.linear(x, dequantize(qdata, scale, bits, group_size, k, x.dtype, zero), bias)
    return launch_linear(x, qdata, scale, bias, bits, group_size, config, y, zero, int8_x)


def launch_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    config: Config,
    y: Tensor,
    zero: Tensor | None = None,
    int8_x: bool = False,
) -> Tensor:
    (m, n), k = y.shape, x.shape[1]
    x, x_scale, x_sums = activations(x, bits, zero, config, int8_x)
    k = k if int8_x else x.shape[1]
    w, scale, zero = words(qdata, int8_x), dense_rows(scale), zero_rows(zero)
    chunk = 16 // w.itemsize
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    partial = arrived = None
    with on(x.device):
        if config.split_k > 1:
            partial = torch.empty(config.split_k, m, n, dtype=torch.float32, device=x.device)
            arrived = ARRIVALS.get(x.device, tiles)
        linear_kernel[(tiles * config.split_k,)](
            x,
            w,
            scale,
            zero,
            None if bias is None else bias.contiguous(),
            y,
            partial,
            arrived,
            x_scale,
            x_sums,
            config.split_k,
            m,
            n,
            k,
            x.stride(0) // chunk,
            w.stride(0) // chunk,
            scale.stride(0),
            *strides(zero, 0),
            *strides(x_scale, 0),
            BITS=bits,
            G=per_row(group_size),
            BM=config.block_m,
            BN=config.block_n,
            BK=config.block_k,
            SCALE_AFTER=config.scale_after,
            EVEN_K=k % config.block_k == 0,
            ASM=asm(x.device),
            **options(config.num_warps, config.num_stages),
        )
    return y


def linear_dx(
    dy: Tensor, qdata: Tensor, scale: Tensor, bits: int, group_size: int, k: int, zero: Tensor | None = None
) -> Tensor:
    (m, n), device = dy.shape, dy.device
    dx = dy.new_empty(m, k)
    if not dx.numel():
        return dx
    if not n:
        return dx.zero_()
    dy, w, scale, zero = aligned_rows(dy), words(qdata), dense_rows(scale), zero_rows(zero)
    block_m, block_n, block_k, warps, stages = dx_blocks(m, dy.dtype)
    with on(device):
        linear_dx_kernel[(triton.cdiv(m, block_m) * triton.cdiv(k, block_k),)](
            dy,
            w,
            scale,
            zero,
            dx,
            m,
            n,
            k,
            dy.stride(0) // 8,
            w.stride(0) // 8,
            scale.stride(0),
            *strides(zero, 0),
            BITS=bits,
            G=per_row(group_size),
            BM=block_m,
            BN=block_n,
            BK=block_k,
            ASM=asm(device),
            **options(warps, stages),
        )
    return dx


def dx_blocks(m: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """block_m, block_n, block_k, num_warps, num_stages of the backward kernels, which sum along N."""
    if dtype == torch.float32:
        return 16, 32, 64, 4, 2
    return (16, 64, 64, 4, 3) if m <= 16 else (64, 64, 64, 4, 3) if m <= 64 else (128, 64, 128, 8, 3)


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
    return routed(x, qdata, scale, None, None, None, offs, None, 1, "", bits, group_size, zero, int8_x)


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
) -> Tensor:
    e, rows_of_w = qdata.shape[:2]
    n = rows_of_w // 2 if activation else rows_of_w
    pairs_in_all = x.shape[0] * top_k
    y = x.new_empty(pairs_in_all, n)
    if not y.numel():
        return y
    if not x.shape[1]:
        routing = experts, pairs, offs, router, top_k, activation
        return reference.routed(x, qdata, scale, bias, *routing, bits, group_size, zero, int8_x)
    rows, dealt = (1, 1) if offs is None else (pairs_in_all, e)  # unsorted, each pair is a program's only row
    k, device, itemsize = x.shape[1], x.device, 1 if int8_x else x.itemsize
    config = config_of("grouped", rows, dealt, rows_of_w, k, bits, group_size, itemsize, device)
    assert config is not None
    x, x_scale, x_sums = activations(x, bits, zero, config, int8_x)
    k = k if int8_x else x.shape[1]
    w, scale, zero = words(qdata, int8_x), dense_rows(scale), zero_rows(zero)
    chunk = 16 // w.itemsize
    blocks = (
        pairs_in_all if offs is None else min(pairs_in_all, triton.cdiv(pairs_in_all, config.block_m) + e)
    )
    with on(device):
        grouped_kernel[(blocks * triton.cdiv(n, config.block_n // 2 if activation else config.block_n),)](
            x,
            w,
            scale,
            zero,
            None if bias is None else bias.contiguous(),
            None if offs is None else offs.to(torch.int32).contiguous(),
            None if experts is None else experts.contiguous(),
            None if pairs is None else pairs.contiguous(),
            None if router is None else router.contiguous(),
            y,
            x_scale,
            x_sums,
            pairs_in_all,
            n,
            k,
            e,
            x.stride(0) // chunk,
            w.stride(0) // chunk,
            w.stride(1) // chunk,
            scale.stride(0),
            scale.stride(1),
            *strides(zero, 0, 1),
            *strides(x_scale, 0),
            TOP_K=top_k,
            ACTIVATION=activation,
            BITS=bits,
            G=per_row(group_size),
            EXPERTS=triton.next_power_of_2(e + 1),
            BM=config.block_m,
            BN=config.block_n,
            BK=config.block_k,
            SCALE_AFTER=config.scale_after,
            EVEN_K=k % config.block_k == 0,
            ASM=asm(device),
            **options(config.num_warps, config.num_stages),
        )
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
    (m, n), e, device = dy.shape, qdata.shape[0], dy.device
    dx = dy.new_empty(m, k)
    if not dx.numel():
        return dx
    if not n or not e:
        return dx.zero_()
    dy, w, scale, zero = aligned_rows(dy), words(qdata), dense_rows(scale), zero_rows(zero)
    block_m, block_n, block_k, warps, stages = dx_blocks(-(-m // e), dy.dtype)
    blocks = min(m, triton.cdiv(m, block_m) + e)
    with on(device):
        grouped_dx_kernel[(blocks * triton.cdiv(k, block_k),)](
            dy,
            w,
            scale,
            zero,
            offs.to(torch.int32).contiguous(),
            dx,
            m,
            n,
            k,
            e,
            dy.stride(0) // 8,
            w.stride(0) // 8,
            w.stride(1) // 8,
            scale.stride(0),
            scale.stride(1),
            *strides(zero, 0, 1),
            BITS=bits,
            G=per_row(group_size),
            EXPERTS=triton.next_power_of_2(e + 1),
            BM=block_m,
            BN=block_n,
            BK=block_k,
            ASM=asm(device),
            **options(warps, stages),
        )
    return dx


def quantize(
    w: Tensor,
    bits: int,
    group_size: int,
    scale_method: str,
    scale_dtype: torch.dtype,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    k, asymmetric = w.shape[-1], scale_method in ASYMMETRIC
    planes = out or tuple(
        new_planes(torch.empty, w.shape, bits, group_size, scale_dtype, asymmetric, device=w.device).values()
    )
    qdata, scale, *others = planes
    zero = others[0] if others else None
    if not qdata.numel():
        scale.copy_(reference.narrowed(torch.ones(()), scale.dtype))
        if zero is not None:
            zero.fill_(FORMATS[bits].qmin)
        return planes
    w_RK = dense_rows(w).reshape(-1, k)
    r = w_RK.shape[0]
    columns = -(-k // 32) * 32 if group_size == -1 else group_size
    block_k = min(triton.next_power_of_2(columns), 2048)
    block_r = max(1, 2048 // block_k)
    with on(w.device):
        quantize_kernel[(triton.cdiv(r, block_r) * scale.shape[-1],)](
            w_RK,
            qdata.view(torch.int16),
            scale,
            zero,
            r,
            k,
            columns,
            scale.shape[-1],
            w_RK.stride(0),
            qdata.shape[-1] // 16,
            BITS=bits,
            METHOD=scale_method,
            STEPS=triton.cdiv(columns, block_k),
            BR=block_r,
            BK=block_k,
            **options(4),
        )
    return planes


def rows_of(
    qdata: Tensor,
    scale: Tensor,
    index: Tensor | None,
    y: Tensor,
    bits: int,
    group_size: int,
    zero: Tensor | None,
) -> None:
    """Fills `y [R, K]` with (q - zero) * S of the rows of `qdata [N, B]` that `index [R]` names, of all where
    it is None."""
    (r, k), w, scale, zero = y.shape, words(qdata), dense_rows(scale), zero_rows(zero)
    block_r, block_k = 32, 128
    with on(y.device):
        dequantize_kernel[(triton.cdiv(r, block_r) * triton.cdiv(k, block_k),)](
            w,
            scale,
            zero,
            index,
            y,
            r,
            w.shape[0],
            k,
            w.stride(0) // 8,
            scale.stride(0),
            *strides(zero, 0),
            BITS=bits,
            G=per_row(group_size),
            BR=block_r,
            BK=block_k,
            ASM=asm(y.device),
            **options(4),
            # So that an index out of range stops the program, as torch's embedding does.
            **{"debug": index is not None},
        )


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
    zero: Tensor | None = None,
) -> Tensor:
    w = torch.empty(*qdata.shape[:-1], k, dtype=dtype, device=qdata.device)
    if w.numel():
        rows_of(
            qdata.reshape(-1, qdata.shape[-1]),
            scale.reshape(-1, scale.shape[-1]),
            None,
            w.view(-1, k),
            bits,
            group_size,
            None if zero is None else zero.reshape(-1, zero.shape[-1]),
        )
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
    w = torch.empty(*indices.shape, k, dtype=embedding_dtype(scale.dtype), device=qdata.device)
    if w.numel():
        rows_of(qdata, scale, indices.reshape(-1).contiguous(), w.view(-1, k), bits, group_size, zero)
    return w
