"""torchao's `Int8Tensor`, as transformers and torchao write it to safetensors.

Of a weight `a.b.weight` there are `a.b._weight_qdata [N, K]` int8 and `a.b._weight_scale`, one for each block
of `block_size` rows and columns, which the file's metadata gives; and `a.b._weight_zero_point`, all zero.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.foreign.words import (
    beside,
    check_plane,
    computed,
    ending,
    kept_format,
    put,
    rows_of,
)
from rtn_tensor.checkpoint.sources import Source
from rtn_tensor.formats import FLOAT_DTYPES, groups


def read(found: dict[str, Source]) -> bool:
    """Puts weights in the place of planes; whether there are any.

    Raises:
        ValueError: a plane is missing, or not as the others or the metadata say.
    """
    planes = [(prefix, source) for prefix, source in ending(found, "_qdata") if source.about is not None]
    for prefix, q in planes:
        module, _, last = prefix.rpartition(".")
        scale = beside(found, q, f"{prefix}_scale")
        zero = found.get(f"{prefix}_zero_point")
        name = f"{module}.{last.removeprefix('_')}" if module else last.removeprefix("_")
        put(found, (q, scale, zero), _weight(name, q, scale, zero))
    if any(source.about["act_quant_kwargs"] for _, source in planes if source.about):
        warnings.warn(
            f"{planes[0][1].file}: torchao quantized the activations, too, and load does not", stacklevel=6
        )
    return bool(planes)


def _weight(name: str, q: Source, scale: Source, zero: Source | None) -> Source:
    about: Any = q.about
    if q.dtype != torch.int8 or len(q.shape) != 2:
        raise q.error(f"is {q.dtype} {list(q.shape)}; torchao's Int8Tensor has int8 [N, K]")
    n, k = q.shape
    block = about.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int for size in block):
        raise q.error(f"has the block_size {str(block)[:100]} in the metadata; it must be two numbers")
    rows, columns = block
    if rows not in (1, n) or not 1 <= columns <= max(k, 1):
        raise q.error(f"has the block_size {block} in the metadata; a block must be one row, or all of them")
    group_size = -1 if columns == k else columns
    count = groups(k, group_size)
    check_plane(scale, (n if rows == 1 else 1, count), *FLOAT_DTYPES)
    if zero is not None:
        check_plane(zero, scale.shape, torch.int8, torch.int32, torch.int64)
        if zero.view().any():
            raise zero.error("is not zero everywhere, and torchao's Int8Tensor is symmetric")
    kept = kept_format(8, group_size, count, scale, asymmetric=False)

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        integers, scales = q.view()[start:stop], scale.view().expand(n, -1)[start:stop]
        return rows_of(integers, scales, None, kept, group_size)

    return computed(q, name, (n, k), compute, kept)
