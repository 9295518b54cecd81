"""GPTQ's weights, which GPTQModel, AutoGPTQ, optimum and auto-round write.

Of a linear `P` there are `P.qweight [K * bits / 32, N]` int32, words of numbers along K, the first in the
lowest bits; `P.scales [G, N]`; `P.qzeros [G, N * bits / 32]`, in "gptq" less one, in "gptq_v2" as they are;
and `P.g_idx [K]`, the group of each column, which may be left out. w = S (u - zero).
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
    quantized_rows,
    rows_of,
    signed,
    sorted_groups,
    warn_of_activations,
)
from rtn_tensor.checkpoint.foreign.written import (
    FUSED,
    Engine,
    Lazy,
    Weight,
    formats_of,
    layers_of_experts,
    notes,
    unlike_parts,
)
from rtn_tensor.checkpoint.sources import Source
from rtn_tensor.formats import FLOAT_DTYPES, FORMATS, groups, pack_gptq


def refuses(weight: Weight) -> str | None:
    """Why a weight cannot be written, and the way out."""
    k, each = weight.w.in_features, 32 // weight.w.bits
    if k % each:
        return (
            f"K = {k} is no multiple of {each}, as its words are; leave it float, or use compressed-tensors"
        )
    return None


def tensors(weight: Weight) -> dict[str, Lazy]:
    """The tensors of one weight, by their names in the file, as version 1 has them."""
    w, (n, k) = weight.w, weight.w.shape
    count, words = groups(k, weight.group_size), n * w.bits // 32

    def zeros() -> Tensor:
        zero = torch.full((count, n), -1, dtype=torch.int8)  # which is 0 less one
        return pack_gptq(zero, w.bits)

    made = {
        "qweight": Lazy(torch.int32, (k * w.bits // 32, n), lambda: pack_gptq(weight.q(), w.bits).t()),
        "scales": Lazy(w.scale.dtype, (count, n), lambda: weight.scale().t()),
        "qzeros": Lazy(torch.int32, (count, words), zeros),
        "g_idx": Lazy(
            torch.int32,
            (k,),
            lambda: (
                torch.arange(k, dtype=torch.int32) // (k if weight.group_size == -1 else weight.group_size)
            ),
        ),
    }
    return {f"{weight.module}.{end}": lazy for end, lazy in made.items()}


def config(
    weights: Sequence[Weight], floats: Collection[str], output: str | None, names: Mapping[str, str]
) -> dict[str, Any]:
    """What config.json says of the weights, beside the float linears `floats`; the output layer `output` is
    float unless it says otherwise. `names` are the model's of what files have under others: GPTQModel asks by
    these."""
    formats = formats_of(weights, floats)
    formats |= {names[module]: fmt for module, fmt in formats.items() if module in names}
    (bits, group_size, _), _ = Counter(sorted(weight.format for weight in weights)).most_common(1)[0]
    others = {module: fmt for module, fmt in formats.items() if fmt is None or fmt[:2] != (bits, group_size)}
    if output is not None and others.get(output, output) is None:
        del others[output]
        others.pop(names.get(output, output), None)
    dynamic = {}
    for pattern, fmt in _patterns(others, formats).items():
        if fmt is None:
            dynamic[f"-:{pattern}"] = {}
        else:
            dynamic[f"+:{pattern}"] = {"bits": fmt[0], "group_size": fmt[1]}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": formats.get(output or "") is not None,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _patterns(others: dict[str, Any], formats: dict[str, Any]) -> dict[str, Any]:
    """Regular expressions for modules and their formats: of the experts of a layer by one, where they have
    one format; and by the names of what vLLM makes of several modules, too, as it asks by these."""
    patterns: dict[str, Any] = {}
    together = {layer: found for layer, found in layers_of_experts(formats).items() if len(found) == 1}
    for module, fmt in others.items():
        layer = re.match(r"(.*\.experts)(\.\d+\.|$)", module)
        if layer and layer[1] in together:
            patterns[rf"^{re.escape(layer[1])}(\.\d+\..+)?$"] = fmt
            continue
        patterns[f"^{re.escape(module)}$"] = fmt
        parent, _, last = module.rpartition(".")
        for whole, parts in FUSED.items():
            siblings = [sibling for part in parts if (sibling := f"{parent}.{part}") in formats]
            if last in parts and {formats[sibling] for sibling in siblings} == {fmt}:
                patterns[f"^{re.escape(f'{parent}.{whole}')}$"] = fmt
    return patterns


def engines(weights: Sequence[Weight], floats: Collection[str]) -> list[Engine]:
    """Which programs read what is written of these weights."""
    formats = formats_of(weights, floats)
    apart = unlike_parts(formats)
    some_float = [m for m in floats if re.search(r"\.\d+\.", m) and not m.endswith((".gate", ".router"))]
    by_layer = len({weight.format for weight in weights}) > 1 or bool(some_float)
    eight = any(weight.w.bits == 8 for weight in weights)
    whole_rows = any(weight.format[:2] == (4, -1) for weight in weights)
    wide = any(weight.w.scale.dtype != torch.float16 for weight in weights)
    read = "by its source, not tried"
    experts = bool(layers_of_experts(formats))
    on_cpu = " and ".join([*(["of 8 bits"] if eight else []), *(["of experts"] if experts else [])])
    return [
        Engine(
            "vLLM 0.32", not apart, apart or (f"on GPUs; it has no CPU kernel {on_cpu}" if on_cpu else "")
        ),
        Engine("SGLang 0.5.23", not apart, apart or read),
        Engine(
            "transformers 5.23 with optimum 2.3 and GPTQModel 7.7",
            not by_layer,
            "it takes one format for all layers; compressed-tensors has several"
            if by_layer
            else notes(
                "it was not tried with experts" if experts else "",
                "its CPU kernel of 4 bits has no groups of whole rows" if whole_rows else "",
                "it rounds the scales to float16" if wide and eight else "",
            ),
        ),
    ]


# ----------------------------------------------------------------------------------- reading


BITS = (4, 8)
OPTIONS = (
    *("quant_method", "bits", "group_size", "desc_act", "act_order", "sym", "data_type", "checkpoint_format"),
    *("format", "method", "dynamic", "lm_head", "is_marlin_format", "pack_dtype", "version"),
    *ABOUT_THE_SEARCH,
)


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of GPTQ's planes.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others say; a group that is
            not there.
    """
    check_options(how, OPTIONS, where)
    warn_of_activations(how, where)
    option(how, "is_marlin_format", (False, None), where)
    option(how, "pack_dtype", ("int32", None), where)
    option(how, "method", ("gptq", None), where)
    option(how, "data_type", ("int", None), where)
    said = {
        option(how, key, ("gptq", "gptq_v2", "v2", None), where) for key in ("checkpoint_format", "format")
    } - {None}
    less_one = said <= {"gptq"}
    if "gptq" in said and not less_one:
        raise ValueError(
            f"{where}: checkpoint_format is {how['checkpoint_format']!r} and format is {how['format']!r}, by "
            "which zeros are others; leave the one out that is wrong"
        )
    rules = how.get("dynamic") or {}
    if not isinstance(rules, dict) or not all(isinstance(rule, dict | type(None)) for rule in rules.values()):
        raise ValueError(f"{where}: dynamic is {str(rules)[:100]}; it must be an object of objects")
    for pattern, changes in rules.items():
        if not pattern.startswith("-:"):
            check_options(changes or {}, OPTIONS, f"{where}: dynamic {pattern!r}")
        try:
            re.compile(_pattern(pattern))
        except re.error as error:
            raise ValueError(
                f"{where}: dynamic has {pattern!r}, which is no regular expression: {error}"
            ) from None

    def of(module: str) -> Mapping[str, Any]:
        for pattern, changes in rules.items():
            if re.match(_pattern(pattern), module):
                return {**how, **(changes or {})}
        return how

    read_planes(found, of, less_one, where)


def _pattern(key: str) -> str:
    return key[2:] if key.startswith(("+:", "-:")) else key


def read_planes(found: dict[str, Source], of: Any, less_one: bool, where: str) -> None:
    """Puts weights in the place of planes; `of` gives the options of a module by its name."""
    for module, words in ending(found, ".qweight"):
        about, of_module = of(module), f"{where}, of {module}"
        bits = option(about, "bits", BITS, of_module)
        group_size = check_group_size(about.get("group_size"), of_module)
        planes = {end: found.get(f"{module}.{end}") for end in ("scales", "qzeros", "g_idx")}
        is_sorted = any(about.get(key) for key in ("desc_act", "act_order"))
        for end in ("scales", "qzeros", *(("g_idx",) if is_sorted else ())):
            planes[end] = beside(found, words, f"{module}.{end}")
        source = _weight(f"{module}.weight", words, planes, bits, group_size, less_one)
        put(found, (words, *planes.values()), source)
    for end in (".qzeros", ".g_idx"):
        for module, source in ending(found, end):
            beside(found, source, f"{module}.qweight")


def _weight(
    name: str, words: Source, planes: Mapping[str, Any], bits: int, group_size: int, less_one: bool
) -> Source:
    scales, zeros, index = planes["scales"], planes["qzeros"], planes["g_idx"]
    if words.dtype != torch.int32 or len(words.shape) != 2:
        raise words.error(f"is {words.dtype} {list(words.shape)}; it must be int32 [K * {bits} / 32, N]")
    k, n = words.shape[0] * 32 // bits, words.shape[1]
    count = groups(k, group_size)
    check_plane(scales, (count, n), *FLOAT_DTYPES)
    check_plane(zeros, (count, -(-n * bits // 32)), torch.int32)
    group_of = sorted_groups(index, k, group_size, count)
    middle = -FORMATS[bits].qmin
    numbers = fields(zeros.view(), bits)[:, :n]
    asymmetric = bool((numbers != middle - less_one).any())
    kept = None
    if group_of is None:
        largest = int(numbers.max()) + less_one - middle if numbers.numel() else 0
        kept = kept_format(bits, group_size, count, scales, asymmetric, largest)

    def compute(_: tuple[int, ...], start: int, stop: int) -> Tensor:
        q = signed(fields(words.view()[:, start:stop].t(), bits), bits)
        scale = scales.view()[:, start:stop].t()
        if kept is not None and not kept.asymmetric:
            return quantized_rows(q, scale, kept)
        first = start * bits // 32
        some = fields(zeros.view()[:, first : -(-stop * bits // 32)], bits)[:, start - first * 32 // bits :]
        zero = some[:, : stop - start].t().int() + (less_one - middle)
        return rows_of(q, scale, zero, kept, group_size, group_of)

    return computed(words, name, (n, k), compute, kept)
