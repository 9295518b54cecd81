"""bitsandbytes' weights: int8 with a scale for each row, and 4-bit numbers that stand for 16 values, with a
scale for each block of the flattened weight.

An int8 `P.weight [N, K]` lies beside `P.SCB [N]`: w = weight * SCB / 127. A 4-bit `P.weight`, two numbers in
each byte, the first in the high bits, lies beside `P.weight.absmax`, `P.weight.quant_map` and a JSON text;
where that says so, absmax is quantized itself, by `nested_absmax` and `nested_quant_map`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.files import parse_json
from rtn_tensor.checkpoint.foreign.words import (
    beside,
    check_options,
    check_plane,
    computed,
    ending,
    option,
    put,
    quantized_rows,
)
from rtn_tensor.checkpoint.rows import Kept
from rtn_tensor.checkpoint.sources import Source

OPTIONS = (
    *("quant_method", "_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules"),
    "llm_int8_threshold",
)
STATE = r".quant_state.bitsandbytes__"
ROW_MAJOR = 0  # of `weight_format`


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of bitsandbytes' planes.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others say.
    """
    check_options(how, OPTIONS, where)
    for kind in ("nf4", "fp4"):
        for name, state in ending(found, f"{STATE}{kind}"):
            put(found, *_four_bits(found, name, state))
    for prefix, scale in ending(found, ".SCB"):
        name = f"{prefix}.weight"
        put(found, *_eight_bits(found, name, scale))
    for end in (".weight.absmax", ".weight.quant_map"):
        for name, source in ending(found, end):
            beside(found, source, f"{name}.weight{STATE}nf4")


def _eight_bits(found: dict[str, Source], name: str, scale: Source) -> tuple[list[Source | None], Source]:
    weight = beside(found, scale, name)
    if weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise weight.error(
            f"is {weight.dtype} {list(weight.shape)}; beside {scale.name} it must be int8 [N, K]"
        )
    check_plane(scale, weight.shape[:1], torch.float32)
    if (order := found.get(f"{name}_format")) is not None and order.view().sum() != ROW_MAJOR:
        raise order.error("says that the rows of the weight are laid out for a GPU; load reads plain rows")
    kept = Kept(8, -1, torch.float32)

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        return quantized_rows(weight.view()[start:stop], scale.view()[start:stop, None] / 127, kept)

    return [weight, scale, order], computed(weight, name, weight.shape, compute, kept)


def _four_bits(found: dict[str, Source], name: str, state: Source) -> tuple[list[Source], Source]:
    packed, absmax, values = (beside(found, state, n) for n in (name, f"{name}.absmax", f"{name}.quant_map"))
    about, where = _state(state), f"{state.file}: {state.name}"
    option(about, "quant_type", ("nf4", "fp4"), where)
    shape, block = about.get("shape"), about.get("blocksize")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    ):
        raise state.error(f"says that the shape is {str(shape)[:100]}; it must be [N, K]")
    if type(block) is not int or not 0 < block < 1 << 31:
        raise state.error(f"says that the blocksize is {str(block)[:100]}; it must be a number of weights")
    n, k = shape
    if packed.dtype != torch.uint8 or math.prod(packed.shape) != -(-n * k // 2):
        raise packed.error(
            f"is {packed.dtype} {list(packed.shape)}; for {shape} numbers of 4 bits it must be uint8, "
            f"{-(-n * k // 2)} of them"
        )
    count = -(-n * k // block)
    check_plane(values, (16,), torch.float32)
    parts = [packed, state, absmax, values]
    nested: tuple[Source, Source, int, float] | None = None
    if absmax.dtype == torch.uint8:
        size, offset = about.get("nested_blocksize"), about.get("nested_offset")
        if type(size) is not int or not 0 < size < 1 << 31 or not isinstance(offset, float | int):
            raise state.error("lacks nested_blocksize or nested_offset, and absmax is quantized itself")
        ends = [beside(found, absmax, f"{name}.nested_{end}") for end in ("absmax", "quant_map")]
        check_plane(ends[0], (-(-count // size),), torch.float32)
        check_plane(ends[1], (256,), torch.float32)
        parts += ends
        nested = ends[0], ends[1], size, float(offset)
    check_plane(absmax, (count,), torch.uint8 if nested else torch.float32)

    def scales(first: int, last: int) -> Tensor:
        """Of the blocks from one up to another."""
        some = absmax.view()[first:last]
        if nested is None:
            return some
        of_blocks, table, size, offset = nested
        outer = of_blocks.view()[torch.arange(first, last) // size]
        return table.view()[some.int()] * outer + offset

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        first, last = start * k, stop * k
        data = packed.view().flatten()[first // 2 : -(-last // 2)]
        codes = torch.stack([data >> 4, data & 15], -1).flatten()[first % 2 :][: last - first].int()
        blocks = torch.arange(first, last) // block
        some = scales(first // block, -(-last // block))
        return (values.view()[codes] * some[blocks - first // block]).view(stop - start, k)

    return parts, computed(packed, name, (n, k), compute)


def _state(state: Source) -> dict[str, Any]:
    """The JSON text that lies in a tensor of its bytes."""
    if state.dtype != torch.uint8 or len(state.shape) != 1 or state.shape[0] > 1 << 16:
        raise state.error(f"is {state.dtype} {list(state.shape)}; it must hold the bytes of a JSON text")
    try:
        about = parse_json(bytes(state.view().tolist()))
    except ValueError as error:
        raise state.error(f"holds no JSON ({error}); download the checkpoint again") from None
    if not isinstance(about, dict):
        raise state.error("holds JSON that is no object; download the checkpoint again")
    return about
