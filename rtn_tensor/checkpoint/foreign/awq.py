"""AWQ's weights, as AutoAWQ writes them ("gemm").

Of a linear `P` there are `P.qweight [K, N / 8]`, `P.qzeros [G, N / 8]` and `P.scales [G, N]`. A word holds
eight numbers along N, in the order `ORDER` from its lowest bits up. w = S (u - zero).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.foreign.words import (
    ABOUT_THE_SEARCH,
    beside,
    check_group_size,
    check_options,
    check_plane,
    computed,
    ending,
    fields,
    kept_format,
    option,
    put,
    rows_of,
    signed,
    warn_of_activations,
)
from rtn_tensor.checkpoint.sources import Source
from rtn_tensor.formats import FLOAT_DTYPES, groups

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
OPTIONS = (
    *("quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "sym", "data_type"),
    *("version", "format", "checkpoint_format", "method", "desc_act", "lm_head", "pack_dtype", "dynamic"),
    *ABOUT_THE_SEARCH,
)


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of AWQ's planes.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others say.
    """
    check_options(how, OPTIONS, where)
    warn_of_activations(how, where)
    for key in ("version", "format", "checkpoint_format"):
        option(how, key, ("gemm", "GEMM", None), where)
    option(how, "method", ("awq", None), where)
    option(how, "data_type", ("int", None), where)
    option(how, "dynamic", (None, {}), where)
    names = {"w_bit": "bits", "q_group_size": "group_size"}  # of old
    options = {names.get(key, key): value for key, value in how.items()}
    read_planes(found, lambda module: options, where)


def read_planes(found: dict[str, Source], of: Any, where: str) -> None:
    """Puts weights in the place of planes; `of` gives the options of a module by its name."""
    for module, words in ending(found, ".qweight"):
        about, of_module = of(module), f"{where}, of {module}"
        option(about, "bits", (4,), of_module)
        group_size = check_group_size(about.get("group_size"), of_module)
        scales, zeros = (beside(found, words, f"{module}.{end}") for end in ("scales", "qzeros"))
        weight = _weight(f"{module}.weight", words, scales, zeros, group_size)
        put(found, (words, scales, zeros), weight)
    for module, source in ending(found, ".qzeros"):
        beside(found, source, f"{module}.qweight")


def _numbers(words: Tensor, start: int, stop: int) -> Tensor:
    """The columns from one up to another of the numbers in `[..., W]` int32."""
    some = fields(words[:, start // 8 : -(-stop // 8)], 4).unflatten(-1, (-1, 8))
    place = [ORDER.index(column) for column in range(8)]
    return some[..., place].flatten(-2)[:, start % 8 :][:, : stop - start]


def _weight(name: str, words: Source, scales: Source, zeros: Source, group_size: int) -> Source:
    if words.dtype != torch.int32 or len(words.shape) != 2:
        raise words.error(f"is {words.dtype} {list(words.shape)}; it must be int32 [K, N / 8]")
    k, n = words.shape[0], 8 * words.shape[1]
    count = groups(k, group_size)
    check_plane(scales, (count, n), *FLOAT_DTYPES)
    check_plane(zeros, (count, n // 8), torch.int32)
    asymmetric = bool((zeros.view() != 0x88888888 - (1 << 32)).any())
    kept = kept_format(4, group_size, count, scales, asymmetric)

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        q = signed(_numbers(words.view(), start, stop).t().contiguous(), 4)
        scale = scales.view()[:, start:stop].t()
        zero = signed(_numbers(zeros.view(), start, stop).t().contiguous(), 4)
        return rows_of(q, scale, zero, kept, group_size)

    return computed(words, name, (n, k), compute, kept)
