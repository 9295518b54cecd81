"""GPTQ's weights, which GPTQModel, AutoGPTQ, optimum and auto-round write.

Of a linear `P` there are `P.qweight [K * bits / 32, N]` int32, words of numbers along K, the first in the
lowest bits; `P.scales [G, N]`; `P.qzeros [G, N * bits / 32]`, in "gptq" less one, in "gptq_v2" as they are;
and `P.g_idx [K]`, the group of each column, which may be left out. w = S (u - zero).
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

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
from rtn_tensor.formats import groups, pack_gptq


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


def config(weights: Sequence[Weight], floats: Collection[str], output: str | None) -> dict[str, Any]:
    """What config.json says of the weights, beside the float linears `floats`; the output layer `output` is
    float unless it says otherwise."""
    formats = formats_of(weights, floats)
    (bits, group_size), _ = Counter(sorted(weight.format for weight in weights)).most_common(1)[0]
    others = {module: fmt for module, fmt in formats.items() if fmt != (bits, group_size)}
    if output is not None and others.get(output, output) is None:
        del others[output]
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
    whole_rows = any(weight.format == (4, -1) for weight in weights)
    wide = any(weight.w.scale.dtype != torch.float16 for weight in weights)
    read = "by its source, not tried"
    return [
        Engine("vLLM 0.32", not apart, apart or ("on GPUs; it has no CPU kernel of 8 bits" if eight else "")),
        Engine("SGLang 0.5.23", not apart, apart or read),
        Engine(
            "transformers 5.23 with optimum 2.3 and GPTQModel 7.7",
            not by_layer,
            "it takes one format for all layers; compressed-tensors has several"
            if by_layer
            else notes(
                "it was not tried with experts" if layers_of_experts(formats) else "",
                "its CPU kernel of 4 bits has no groups of whole rows" if whole_rows else "",
                "it rounds the scales to float16" if wide and eight else "",
            ),
        ),
    ]
