"""Weights of 4-bit floats: MXFP4 as GPT-OSS has it, and NVFP4 as NVIDIA's ModelOpt writes it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.foreign.fp8 import read_fp8
from rtn_tensor.checkpoint.foreign.words import (
    FP4,
    beside,
    check_options,
    check_plane,
    computed,
    ending,
    nibbles,
    option,
    put,
)
from rtn_tensor.checkpoint.sources import Source

MX_BLOCK, NV_BLOCK = 32, 16  # numbers that share a scale
MX_OPTIONS = ("quant_method", "modules_to_not_convert", "dequantize")
MODELOPT = ("FP8", "NVFP4", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES")
MODELOPT_OPTIONS = (
    *("quant_method", "quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules", "ignore"),
    *("config_groups", "producer", "kv_cache_scheme", "weight_block_size"),
)


def powers(scales: Tensor) -> Tensor:
    """2^(e - 127) for each uint8 e, and NaN for 255."""
    return scales.contiguous().view(torch.float8_e8m0fnu).float()


def read_mxfp4(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of GPT-OSS's `X_blocks [E, N, K / 32, 16]` and `X_scales [E, N, K / 32]`;
    transformers has the weight as `X [E, K, N]`.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the other says.
    """
    check_options(how, MX_OPTIONS, where)
    for name, blocks in ending(found, "_blocks"):
        scales = beside(found, blocks, f"{name}_scales")
        if (
            len(blocks.shape) not in (3, 4)
            or blocks.shape[-1] != MX_BLOCK // 2
            or blocks.dtype != torch.uint8
        ):
            raise blocks.error(f"is {blocks.dtype} {list(blocks.shape)}; it must be uint8 [E, N, K / 32, 16]")
        check_plane(scales, blocks.shape[:-1], torch.uint8)

        def compute(
            expert: tuple[int, ...], start: int, stop: int, blocks: Source = blocks, scales: Source = scales
        ) -> Tensor:
            codes = nibbles(blocks.view()[expert][start:stop]).int()
            return (FP4[codes] * powers(scales.view()[expert][start:stop])[..., None]).flatten(-2)

        shape = (*blocks.shape[:-2], MX_BLOCK * blocks.shape[-2])
        put(found, (blocks, scales), computed(blocks, name, shape, compute, transposed=True))


def nvfp4(name: str, packed: Source, scale: Source, whole: Source, divides: bool) -> Source:
    """A weight `[N, K]` of two numbers in each byte, an fp8 scale for each 16 of them, and one fp32 scale for
    all, which `divides` or multiplies."""
    if len(packed.shape) != 2 or packed.dtype != torch.uint8:
        raise packed.error(f"is {packed.dtype} {list(packed.shape)}; it must be uint8 [N, K / 2]")
    n, k = packed.shape[0], 2 * packed.shape[1]
    check_plane(scale, (n, -(-k // NV_BLOCK)), torch.float8_e4m3fn)
    if whole.shape not in ((), (1,)) or whole.dtype != torch.float32:
        raise whole.error(f"is {whole.dtype} {list(whole.shape)}; it must be one float32")

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        of_all = whole.view().reshape(())
        scales = scale.view()[start:stop].float()
        scales = scales / of_all if divides else scales * of_all
        return FP4[nibbles(packed.view()[start:stop]).int()] * scales.repeat_interleave(NV_BLOCK, -1)[:, :k]

    return computed(packed, name, (n, k), compute)


def read_modelopt(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of ModelOpt's fp8 and NVFP4 tensors and their scales: `P.weight`,
    `P.weight_scale` and `P.weight_scale_2`.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others say.
    """
    check_options(how, MODELOPT_OPTIONS, where)
    option(how, "quant_algo", MODELOPT, where)
    for name, whole in ending(found, "_scale_2"):
        packed, scale = (beside(found, whole, other) for other in (name, f"{name}_scale"))
        put(found, (packed, scale, whole), nvfp4(name, packed, scale, whole, divides=False))
    read_fp8(found, (128, 128))
