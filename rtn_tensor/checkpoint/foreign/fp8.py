"""Weights of 8-bit floats with a scale for each tensor, row or block: DeepSeek's, FBGEMM's, ModelOpt's,
compressed-tensors'.

An fp8 tensor `X [..., N, K]` lies beside its scale, `X_scale_inv` or `X_scale`, by which it is multiplied.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.foreign.words import (
    ABOUT_THE_SEARCH,
    check_options,
    computed,
    ending,
    option,
    put,
)
from rtn_tensor.checkpoint.sources import Source

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
OPTIONS = (
    *("quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert", "scale_fmt"),
    *("ignored_layers", "kv_cache_scheme", "activation_scale_ub", "dequantize", "weight_per_tensor"),
    *("bits", "group_size", "sym", "data_type"),  # of auto-round, as the others
    *ABOUT_THE_SEARCH,
)


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of fp8 tensors and their scales, of a checkpoint in transformers' fp8 or
    FBGEMM's.

    Raises:
        ValueError: an option that is not read; or as `read_fp8`.
    """
    check_options(how, OPTIONS, where)
    option(how, "fmt", ("e4m3", "e5m2", "float8_e4m3fn", None), where)
    block = block_size(how.get("weight_block_size"), where)
    read_fp8(found, block, blocks_only=block is not None)


def block_size(given: Any, where: str) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int and n > 0 for n in given):
        raise ValueError(
            f"{where}: the size of blocks is {str(given)[:100]}; it must be two numbers, as [128, 128]"
        )
    return given[0], given[1]


def read_fp8(found: dict[str, Source], block: tuple[int, int] | None, blocks_only: bool = False) -> None:
    """Puts weights in the place of fp8 tensors and their scales; `block` are the rows and columns that
    share a scale, where it is neither a row nor all, which it may not be where there are `blocks_only`.

    Raises:
        ValueError: an fp8 tensor lacks its scale; or a scale is not that of its tensor.
    """
    for end in ("_scale_inv", "_scale"):
        for name, scale in ending(found, end):
            weight = found.get(name)
            if weight is not None and weight.rows is None and weight.dtype in FP8:
                put(found, (weight, scale), _weight(name, weight, scale, block, blocks_only))
            elif weight is not None and name.endswith(".weight"):
                raise scale.error(f"is the scale of {name}, which is {weight.dtype} and not fp8")
    for name, source in found.items():
        if source.dtype in FP8 and source.rows is None:
            raise source.error(
                f"is fp8 and has no {name}_scale_inv and no {name}_scale beside it, without which it means "
                "nothing; download the checkpoint again"
            )


def _weight(
    name: str, weight: Source, scale: Source, block: tuple[int, int] | None, blocks_only: bool
) -> Source:
    if len(weight.shape) not in (2, 3):
        raise weight.error(f"has shape {list(weight.shape)}; a weight in fp8 must be [N, K] or [E, N, K]")
    *lead, n, k = weight.shape
    if scale.dtype not in SCALES:
        raise scale.error(f"is {scale.dtype}; a scale must be float")
    shape = scale.shape
    if shape == (n,) and not lead:
        shape = (n, 1)
    elif scale.shape in ((), (1,)):
        shape = (1,) * len(weight.shape)
    elif lead and shape in (tuple(lead), (*lead, 1)):
        shape = (*lead, 1, 1)
    allowed = [block] if block else []
    if not blocks_only:
        allowed += [(n, k), (1, k), (n, 1)]
    counts = [(-(-n // max(rows, 1)), -(-k // max(columns, 1))) for rows, columns in allowed]
    steps = next((step for step, count in zip(allowed, counts, strict=True) if shape[-2:] == count), None)
    if steps is None or shape[:-2] not in (tuple(lead), (1,) * len(lead)):
        size = list(block) if block else "the size that weight_block_size gives"
        raise scale.error(
            f"has shape {list(scale.shape)}; for a weight of {list(weight.shape)} it must hold one number "
            f"for all, for each row, or for each block of {size}"
        )
    rows_a_scale, columns_a_scale = steps

    def compute(expert: tuple[int, ...], start: int, stop: int) -> Tensor:
        scales = scale.view().view(shape)
        some = scales[tuple(e if size > 1 else 0 for e, size in zip(expert, shape[:-2], strict=False))]
        some = some[torch.arange(start, stop) // rows_a_scale].float()
        w = weight.view()[expert][start:stop].float()
        return w * (some if some.shape[-1] == 1 else some.repeat_interleave(columns_a_scale, -1)[:, :k])

    return computed(weight, name, weight.shape, compute)
