"""Weights of compressed-tensors, which llm-compressor writes and vLLM, SGLang and transformers read.

Of a linear `P` there are, in the format pack-quantized, `P.weight_packed [N, ceil(K * bits / 32)]` int32,
numbers along K, the first in the lowest bits, each with 2^(bits - 1) added; `P.weight_scale [N, G]`; and
`P.weight_shape` (N, K).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from rtn_tensor.checkpoint.foreign.written import (
    Engine,
    Lazy,
    Weight,
    formats_of,
    layers_of_experts,
    notes,
    unlike_parts,
)
from rtn_tensor.formats import pack_gptq

EXPERT = r".*\.experts\.\d+\..*"


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
    return {f"{weight.module}.weight_{plane}": lazy for plane, lazy in made.items()}


def config(weights: Sequence[Weight], floats: Collection[str], output: str | None) -> dict[str, Any]:
    """What config.json says of the weights, beside the float linears `floats`; `output` is the output layer,
    to which the name of a class does not reach in vLLM."""
    by_format: dict[tuple[int, int], list[str]] = defaultdict(list)
    for weight in weights:
        by_format[weight.format].append(weight.module)
    everything = {weight.module for weight in weights} | set(floats)
    groups = {}
    for i, ((bits, group_size), modules) in enumerate(sorted(by_format.items())):
        targets = (
            ["Linear", *({output} & set(modules))] if len(by_format) == 1 else _names(modules, everything)
        )
        groups[f"group_{i}"] = {
            "targets": targets,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
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
        "ignore": _names(floats, everything),
    }


def _names(modules: Iterable[str], everything: Iterable[str]) -> list[str]:
    """`modules` in full, but the experts by one pattern where they are all of `everything`'s: transformers
    finds their format by it, and there may be tens of thousands."""
    experts = {module for module in everything if re.match(EXPERT, module)}
    together = experts and experts <= set(modules)
    return [*([f"re:{EXPERT}"] if together else []), *(m for m in modules if not (together and m in experts))]


def engines(weights: Sequence[Weight], floats: Collection[str]) -> list[Engine]:
    """Which programs read what is written of these weights."""
    formats = formats_of(weights, floats)
    apart = unlike_parts(formats)
    experts = layers_of_experts(formats)
    of_experts = {fmt for of_layer in experts.values() for fmt in of_layer}
    mixed = len(of_experts) > 1 or None in of_experts
    several = len({weight.format for weight in weights}) > 1
    eight, four = (any(weight.w.bits == bits for weight in weights) for bits in (8, 4))
    on_cpu = " and ".join(
        [*(["of 8 bits"] if eight else []), *(["of experts of 4 bits"] if experts and four else [])]
    )
    wide = any(weight.w.scale.dtype == torch.float32 for weight in weights)
    rounds = "it rounds the float32 scales to the dtype of the activations" if wide else ""
    no_kernel = f"on GPUs; it has no CPU kernel {on_cpu}" if on_cpu else ""
    memory = "it dequantizes at the first forward, so that no memory is saved"
    one_only = "with dequantize=True it does not, as there are several formats" if several else ""
    all_experts = "it takes experts that are all quantized, in one format"
    return [
        Engine("vLLM 0.32", not apart, apart or notes(no_kernel, rounds)),
        Engine("SGLang 0.5.23", not apart, apart or notes("by its source, not tried", rounds)),
        Engine(
            "transformers 5.23 with compressed-tensors 0.20",
            not mixed,
            all_experts if mixed else notes(memory, one_only),
        ),
    ]
