"""Weights of compressed-tensors, which llm-compressor writes and vLLM, SGLang and transformers read.

Of a linear `P`, by the format of its config group:

- pack-quantized: `P.weight_packed [N, ceil(K * bits / 32)]` int32, numbers along K, the first in the lowest
  bits, each with 2^(bits - 1) added; `P.weight_scale [N, G]`; `P.weight_shape` (N, K); where it is
  asymmetric, `P.weight_zero_point`, packed along N; and where columns were sorted, `P.weight_g_idx [K]`.
- int-quantized: `P.weight` int8 `[N, K]`, `P.weight_scale [N, G]`, and `P.weight_zero_point` int8.
- float-quantized: `P.weight` fp8, `P.weight_scale`.
- nvfp4-pack-quantized: `P.weight_packed` uint8, `P.weight_scale` fp8, `P.weight_global_scale`, which divides.
- mxfp4-pack-quantized: `P.weight_packed` uint8, `P.weight_scale` uint8 exponents.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.foreign.config_groups import by_scheme, schemes_of
from rtn_tensor.checkpoint.foreign.fp4 import MX_BLOCK, nvfp4, powers
from rtn_tensor.checkpoint.foreign.fp8 import block_size, read_fp8
from rtn_tensor.checkpoint.foreign.words import (
    FP4,
    beside,
    check_plane,
    computed,
    ending,
    fields,
    kept_format,
    nibbles,
    option,
    put,
    rows_of,
    signed,
    sorted_groups,
    warn_of_activations,
)
from rtn_tensor.checkpoint.foreign.written import (
    Engine,
    Lazy,
    Weight,
    formats_of,
    layers_of_experts,
    notes,
    unlike_parts,
)
from rtn_tensor.checkpoint.sources import Source
from rtn_tensor.formats import FLOAT_DTYPES, FORMATS, MAX_GROUP_SIZE, groups, pack_gptq

EXPERT = r".*\.experts\.\d+\..*"


def refuses(weight: Weight) -> str | None:
    """Why a weight cannot be written, and the way out."""
    zero, fmt = weight.w.zero, FORMATS[weight.w.bits]
    if (
        zero is None
        or zero.is_meta
        or not zero.numel()
        or fmt.qmin <= int(zero.min()) <= int(zero.max()) <= fmt.qmax
    ):
        return None
    return (
        f"a zero point is {int(zero.max())} or {int(zero.min())}, and {fmt.bits} bits hold {fmt.qmin} to "
        f"{fmt.qmax}; "
        "load the checkpoint with a config, which quantizes it anew"
    )


def tensors(weight: Weight) -> dict[str, Lazy]:
    """The tensors of one weight, by their names in the file."""
    w, (n, k) = weight.w, weight.w.shape
    shapes = {
        "packed": (n, -(-k * w.bits // 32)),
        "scale": (n, w.scale.shape[-1] if weight.group_size == -1 else k // weight.group_size),
    }
    made = {
        "packed": Lazy(torch.int32, shapes["packed"], lambda: pack_gptq(weight.q(), w.bits)),
        "scale": Lazy(w.scale.dtype, shapes["scale"], weight.scale),
        "shape": Lazy.of(torch.tensor([n, k])),
    }
    if w.zero is not None:
        words = n * w.bits // 32, shapes["scale"][1]
        made["zero_point"] = Lazy(torch.int32, words, lambda: pack_gptq(weight.zero().t(), w.bits).t())
    return {f"{weight.module}.weight_{plane}": lazy for plane, lazy in made.items()}


def config(
    weights: Sequence[Weight], floats: Collection[str], output: str | None, names: Mapping[str, str]
) -> dict[str, Any]:
    """What config.json says of the weights, beside the float linears `floats`; `output` is the output layer,
    to which the name of a class does not reach in vLLM. `names` are the model's of what files have under
    others: vLLM asks by these, and transformers by the model's."""
    by_format: dict[tuple[int, int, bool], list[str]] = defaultdict(list)
    for weight in weights:
        by_format[weight.format].append(weight.module)
    everything = {weight.module for weight in weights} | set(floats)
    groups = {}
    for i, ((bits, group_size, symmetric), modules) in enumerate(sorted(by_format.items())):
        ends = _with_own(({output} if output else set()) & set(modules), names)
        targets = ["Linear", *ends] if len(by_format) == 1 else _names(modules, everything, names)
        groups[f"group_{i}"] = {
            "targets": targets,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group_size == -1 else "group",
                "group_size": None if group_size == -1 else group_size,
                "dynamic": False,
            },
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": _names(floats, everything, names),
    }


def _names(modules: Iterable[str], everything: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """`modules` in full, but the experts by one pattern where they are all of `everything`'s: transformers
    finds their format by it, and there may be tens of thousands."""
    experts = {module for module in everything if re.match(EXPERT, module)}
    together = experts and experts <= set(modules)
    others = [m for m in modules if not (together and m in experts)]
    return [*([f"re:{EXPERT}"] if together else []), *_with_own(others, names)]


def _with_own(modules: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """`modules`, and the names that the model itself has for them."""
    modules = list(modules)
    return list(dict.fromkeys([*modules, *(names[module] for module in modules if module in names)]))


def engines(weights: Sequence[Weight], floats: Collection[str]) -> list[Engine]:
    """Which programs read what is written of these weights."""
    formats = formats_of(weights, floats)
    apart = unlike_parts(formats)
    experts = layers_of_experts(formats)
    eight, four = (any(weight.w.bits == bits for weight in weights) for bits in (8, 4))
    on_cpu = " and ".join(
        [*(["of 8 bits"] if eight else []), *(["of experts of 4 bits"] if experts and four else [])]
    )
    dtypes = {(weight.w.scale.dtype, weight.w.dtype) for weight in weights}
    wide = {str(scale).removeprefix("torch.") for scale, w in dtypes if scale == torch.float32 or scale != w}
    rounds = (
        f"it rounds the {' and '.join(sorted(wide))} scales to the dtype of the activations" if wide else ""
    )
    no_kernel = f"on GPUs; it has no CPU kernel {on_cpu}" if on_cpu else ""
    return [
        Engine("vLLM 0.32", not apart, apart or notes(no_kernel, rounds)),
        Engine("SGLang 0.5.23", not apart, apart or notes("by its source, not tried", rounds)),
        _transformers(weights, experts),
    ]


def _transformers(weights: Sequence[Weight], experts: Mapping[str, set[Any]]) -> Engine:
    name = "transformers 5.23 with compressed-tensors 0.20"
    of_experts = {fmt for of_layer in experts.values() for fmt in of_layer}
    several = len({weight.format for weight in weights}) > 1
    asymmetric = any(weight.w.zero is not None for weight in weights)
    if len(of_experts) > 1 or None in of_experts or (of_experts and asymmetric):
        return Engine(name, False, "it takes experts that are all quantized, in one symmetric format")
    if asymmetric:  # of which compressed-tensors 0.20 makes room for zero points that are not packed
        note = "with CompressedTensorsConfig(dequantize=True), as there are zero points"
        return Engine(name, not several, "it takes zero points in one format only" if several else note)
    memory = "it dequantizes at the first forward, so that no memory is saved"
    one_only = "with dequantize=True it does not, as there are several formats" if several else ""
    return Engine(name, True, notes(memory, one_only))


# ----------------------------------------------------------------------------------- reading


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of compressed-tensors' planes.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others or the config say.
    """
    schemes = schemes_of(how, where)
    warn_of_activations(how, where)
    for module, packed in ending(found, ".weight_packed"):
        scale = beside(found, packed, f"{module}.weight_scale")
        name = f"{module}.weight"
        if packed.dtype != torch.uint8:
            source = by_scheme(schemes, module, packed, partial(_packed, found, module, packed, scale))
        elif scale.dtype == torch.uint8:
            source = _mxfp4(name, packed, scale)
        else:
            source = nvfp4(
                name, packed, scale, beside(found, packed, f"{module}.weight_global_scale"), divides=True
            )
        _take(found, module, source)
    for module, weight in ending(found, ".weight"):
        if weight.dtype == torch.int8 and weight.rows is None:
            scale = beside(found, weight, f"{module}.weight_scale")
            source = by_scheme(schemes, module, weight, partial(_integers, found, module, weight, scale))
            _take(found, module, source)
    blocks = {block_size(about.get("block_structure"), where) for _, about in schemes} - {None}
    read_fp8(found, blocks.pop() if blocks else None)
    for end in (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_global_scale"):
        for module, source in ending(found, end):
            beside(found, source, f"{module}.weight_packed")


PLANES = ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")


def _take(found: dict[str, Source], module: str, source: Source) -> None:
    parts = [found.get(f"{module}.weight_{end}") for end in PLANES]
    if parts[0] is None:  # then the weight itself is one
        parts.append(found[source.name])
    put(found, parts, source)


def _number(source: Source, about: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    return option(about, key, allowed, f"{source.file}: {source.name}, by its config group")


def _groups(
    source: Source, scale: Source, about: Mapping[str, Any], n: int, k: int
) -> tuple[int, tuple[int, int]]:
    """The group size of a weight, and the shape that its scale must have."""
    strategy = _number(source, about, "strategy", ("group", "channel", "tensor", None))
    size = about.get("group_size")
    if strategy is None:
        strategy = "group" if size not in (None, -1) else "channel"
    if strategy != "group":
        return -1, (n if strategy == "channel" else 1, 1)
    if type(size) is not int or not 0 < size <= MAX_GROUP_SIZE:
        raise source.error(
            f"has groups, and its config group the group_size {str(size)[:100]}; it must be a number"
        )
    return size, (n, groups(k, size))


def _check_by_group(plane: Source, shape: tuple[int, int], *dtypes: torch.dtype) -> None:
    """`check_plane` of scales or zero points, of which a single one for all of the weight may be a vector."""
    check_plane(plane, (1,) if shape == (1, 1) and plane.shape == (1,) else shape, *dtypes)


def _order(
    found: Mapping[str, Source],
    weight: Source,
    module: str,
    about: Mapping[str, Any],
    k: int,
    size: int,
    count: int,
) -> Tensor | None:
    """As `sorted_groups`, with groups of `size`."""
    index = found.get(name := f"{module}.weight_g_idx")
    if about.get("actorder") in ("group", "dynamic"):
        index = beside(found, weight, name)
    if index is not None and index.shape == (k,) and k and bool((index.view() == -1).all()):
        return None  # as a module has it before columns are sorted
    return sorted_groups(index, k, size, count)


def _packed(
    found: Mapping[str, Source], module: str, packed: Source, scale: Source, about: Mapping[str, Any]
) -> Source:
    bits = _number(packed, about, "num_bits", (4, 8))
    _number(packed, about, "type", ("int",))
    given = beside(found, packed, f"{module}.weight_shape")
    check_plane(given, (2,), torch.int64, torch.int32)
    n, k = map(int, given.view())
    if n < 0 or k < 0 or k > 1 << 40:
        raise given.error(f"says that the weight is {[n, k]}; download the checkpoint again")
    check_plane(packed, (n, -(-k * bits // 32)), torch.int32)
    group_size, shape = _groups(packed, scale, about, n, k)
    _check_by_group(scale, shape, *FLOAT_DTYPES)
    group_of = _order(found, packed, module, about, k, group_size, shape[1])
    zeros = found.get(f"{module}.weight_zero_point")
    if not about.get("symmetric", True):
        zeros = beside(found, packed, f"{module}.weight_zero_point")
    packed_zeros = zeros is not None and zeros.dtype == torch.int32
    if zeros is not None:
        rows = -(-n * bits // 32) if packed_zeros and shape[0] == n else shape[0]
        _check_by_group(zeros, (rows, shape[1]), torch.int32, torch.int8)

    def all_zeros() -> Tensor | None:
        if zeros is None:
            return None
        zero = zeros.view()
        return (signed(fields(zero.t(), bits), bits)[:, :n].t() if packed_zeros else zero.view(shape)).expand(
            n, -1
        )

    asymmetric = (zero_points := all_zeros()) is not None and bool(zero_points.any())
    kept = kept_format(bits, group_size, shape[1], scale, asymmetric) if group_of is None else None

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        q = signed(fields(packed.view()[start:stop], bits), bits)[:, :k]
        scales, zero = scale.view().view(shape).expand(n, -1)[start:stop], all_zeros()
        zero = zero if zero is None else zero[start:stop]
        return rows_of(q, scales, zero, kept, group_size, group_of)

    return computed(packed, f"{module}.weight", (n, k), compute, kept)


def _integers(
    found: Mapping[str, Source], module: str, weight: Source, scale: Source, about: Mapping[str, Any]
) -> Source:
    _number(weight, about, "num_bits", (4, 8))
    if len(weight.shape) != 2:
        raise weight.error(f"has shape {list(weight.shape)}; an int-quantized weight must be [N, K]")
    n, k = weight.shape
    group_size, shape = _groups(weight, scale, about, n, k)
    _check_by_group(scale, shape, *FLOAT_DTYPES)
    group_of = _order(found, weight, module, about, k, group_size, shape[1])
    zeros = found.get(f"{module}.weight_zero_point")
    if not about.get("symmetric", True):
        zeros = beside(found, weight, f"{module}.weight_zero_point")
    if zeros is not None:
        _check_by_group(zeros, shape, torch.int8)
    asymmetric = zeros is not None and bool(zeros.view().any())
    # In a byte each there may be any number.
    kept = kept_format(8, group_size, shape[1], scale, asymmetric) if group_of is None else None

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        q = weight.view()[start:stop]
        scales = scale.view().view(shape).expand(n, -1)[start:stop]
        zero = None if zeros is None else zeros.view().view(shape).expand(n, -1)[start:stop]
        return rows_of(q, scales, zero, kept, group_size, group_of)

    return computed(weight, f"{module}.weight", (n, k), compute, kept)


def _mxfp4(name: str, packed: Source, scale: Source) -> Source:
    if len(packed.shape) != 2:
        raise packed.error(f"has shape {list(packed.shape)}; it must be [N, K / 2]")
    n, k = packed.shape[0], 2 * packed.shape[1]
    check_plane(scale, (n, -(-k // MX_BLOCK)), torch.uint8)

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        scales = powers(scale.view()[start:stop]).repeat_interleave(MX_BLOCK, -1)[:, :k]
        return FP4[nibbles(packed.view()[start:stop]).int()] * scales

    return computed(packed, name, (n, k), compute)
