"""diffusers: its folders are read, it is told what of a model is quantized, and rules choose of a diffusion
model what holds up in few bits."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtn_tensor.config import RTNConfig
from rtn_tensor.integrations import LISTENERS
from rtn_tensor.integrations.quantization_config import how_quantized, in_config, is_ours
from rtn_tensor.quantize.kinds import products
from rtn_tensor.quantize.selection import check_module, weights

# Of a part of a block: it makes shifts, scales and gates of the time step and the prompt (SD3's norm1.linear,
# Qwen-Image's img_mod, AuraFlow's and Flux's norm1, a UNet's time_emb_proj).
_MODULATES = re.compile(r"norm|ada_?ln|modulation|(^|_)mod(_|$)|emb", re.IGNORECASE)


def is_diffusers(model: object) -> bool:
    """Whether `model` is diffusers'."""
    modeling = sys.modules.get("diffusers.models.modeling_utils")  # not imported: no model is its own
    return modeling is not None and isinstance(model, modeling.ModelMixin)


def class_of(path: Path, about: Mapping[str, Any]) -> Any:
    """diffusers' class of the model that a folder's config.json describes.

    Raises:
        ValueError: it has none of that name.
    """
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    name = about["_class_name"]
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ValueError(
            f"{path / 'config.json'}: diffusers {diffusers.__version__} has no model {str(name)[:100]!r}, "
            "which _class_name says; install the version that has it, or give the model to fill"
        )
    return kind


def keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Gives those parameters fp32 that diffusers keeps so in a model of `dtype`."""
    kept = set(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        for name, parameter in model.named_parameters():
            if not kept.isdisjoint(name.split(".")):
                parameter.data = parameter.data.float()


def _describe(model: Any) -> None:
    from diffusers.quantizers.quantization_config import TorchAoConfig
    from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer

    quant_type, _ = how_quantized(model)
    if quant_type is not None:
        # Without the names of what is float: diffusers would take them for parts of other names.
        config = TorchAoConfig(quant_type)
        model.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
        model.hf_quantizer.validate_environment()  # sets what it is asked for later
        model.register_to_config(quantization_config=in_config(config))
    elif is_ours(model.config.get("quantization_config")):
        model.hf_quantizer = None
        left = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(left)


def describe(model: nn.Module) -> None:
    """Tells diffusers how `model`, or what in it is its own, is quantized, so that `save_pretrained` takes
    it."""
    for module in model.modules():
        if is_diffusers(module):
            _describe(module)


LISTENERS.append(describe)


def _around(model: nn.Module, names: list[str]) -> Iterator[str]:
    """Patterns for those weights of `model`, among `names`, that stand outside of its blocks, or modulate
    them."""
    blocks = {
        name
        for name, child in model.named_children()
        if name == "mid_block" or isinstance(child, nn.ModuleList)
    }
    for name in names:
        first, *rest = name.split(".")
        if first not in blocks:
            yield f"{first}.*" if rest else first
        elif any(map(_MODULATES.search, rest)):
            yield ".".join([first, *("*" if part.isdecimal() else part for part in rest)])


def diffusion_blocks_only(model: nn.Module) -> list[tuple[str, RTNConfig | None]]:
    """Rules that keep float what of a diffusion model stands outside of its blocks (embeddings of patches,
    time step and prompt, the last projection), and in them what modulates them (the linears of adaptive
    norms, a UNet's projections of the time step). Put them before the others:

        quantize_(pipe.transformer, diffusion_blocks_only(pipe.transformer) + [("*", rtn_int4())])

    Args:
        model: a transformer or UNet of diffusers, or another module that holds its blocks in a ModuleList.

    Raises:
        ValueError: the model has no such blocks.
    """
    check_module(model)
    found = [weight.fqn for weight in weights(model, products(model))]
    patterns = dict.fromkeys(_around(model, found))
    whole = tuple(pattern[:-1] for pattern in patterns if pattern.endswith(".*"))
    if not found or all(name.startswith(whole) for name in found):
        raise ValueError(
            f"{type(model).__name__} has no linears in blocks, that is in a ModuleList; keep parts float by "
            "rules over their names, as in ('proj_out.*', None)"
        )
    return [(pattern, None) for pattern in patterns]
