"""Models of transformers, whoever made them."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from rtn_tensor.quantize.kinds import FilterFn, products
from rtn_tensor.quantize.selection import Rules


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is transformers'."""
    transformers = sys.modules.get("transformers")  # where it was not imported, no model is its own
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def ends(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output layer of a transformers model; a vision model, and one that is not
    transformers', has neither."""
    if not is_pretrained(model):
        return None, None
    try:
        first = model.get_input_embeddings()
    # A tracker asks its vision tower, which it may have been made without.
    except (NotImplementedError, AttributeError):
        first = None
    return first, model.get_output_embeddings()


def but_the_output(model: nn.Module) -> FilterFn:
    """transformers' choice of weights, and experts: every linear but the output layer, and but what it keeps
    in fp32."""
    outer = ends(model)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    by_default = products(model)

    def selects(module: nn.Module, fqn: str) -> bool:
        return by_default(module, fqn) and module not in outer and kept.isdisjoint(fqn.split("."))

    return selects


def ignored(model: nn.Module) -> Sequence[str]:
    """Patterns of names that a checkpoint of such a model may hold in vain."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # Buffers that older checkpoints hold, and newer models compute (transformers' from_pretrained has the
    # same two).
    held = {"position_ids": r"(^|\.)position_ids$", "rotary_emb.inv_freq": r"rotary_emb\.inv_freq"}
    names = [name for name, _ in model.named_buffers()]
    return sorted(
        patterns | {pattern for end, pattern in held.items() if any(name.endswith(end) for name in names)}
    )


def default_filter(
    model: nn.Module, config: AOBaseConfig | Rules, filter_fn: FilterFn | None
) -> FilterFn | None:
    return filter_fn if filter_fn or isinstance(config, FqnToConfig) else but_the_output(model)
