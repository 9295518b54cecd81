"""Rules that leave everything of a model float but its language model."""

import os
from collections.abc import Iterator

from torch import nn

from rtn_tensor.checkpoint.hub import local
from rtn_tensor.config import RTNConfig
from rtn_tensor.integrations.transformers.folders import empty_model
from rtn_tensor.integrations.transformers.models import ends, is_pretrained
from rtn_tensor.quantize.kinds import products
from rtn_tensor.quantize.selection import check_module, weights


def _language_model(model: nn.Module) -> nn.Module | None:
    """The part of `model` that is its language model: by what its config says of text, or by the name
    `language_model`, or by its `get_decoder()`; None where nothing tells, or it is the whole."""
    if is_pretrained(model):
        about = model.config.get_text_config()  # type: ignore[operator,union-attr]
        if about is not model.config:
            for _, module in model.named_modules():
                if is_pretrained(module) and module.config is about:
                    return module
    named = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "language_model"]
    if named:
        return model.get_submodule(min(named, key=lambda name: name.count(".")))
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else None


def _beside(prefix: str, module: nn.Module, kept: set[nn.Module]) -> Iterator[str]:
    """Patterns for all weights in `module` that are in none of `kept`."""
    if module in kept:
        return
    if not kept.intersection(module.modules()):
        yield f"{prefix}.*"
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}.{name}" if prefix else name
    for name, child in module.named_children():
        yield from _beside(f"{prefix}.{name}" if prefix else name, child, kept)


def language_model_only(model: nn.Module | str | os.PathLike) -> list[tuple[str, RTNConfig | None]]:
    """Rules that keep float what is no part of a model's language model: the vision or audio tower and the
    projector of a vision-language model, say. Put them before the others:

        quantize_(model, language_model_only(model) + [("*", rtn_int4())])
        load(folder, language_model_only(folder) + [("*", rtn_int4())])

    What the language model is, the model says itself: by its config's `get_text_config()`, by a part named
    `language_model`, or by `get_decoder()`. The output layer is a part of it.

    Args:
        model: a module, or a transformers folder or its name on the hub, as for `load`.

    Raises:
        ValueError: the model does not tell its language model from the rest, or has nothing beside it.
    """
    module = empty_model(local(model)) if isinstance(model, str | os.PathLike) else model
    check_module(module, "give a module, or a transformers folder")
    language = _language_model(module)
    kept = {part for part in (language, ends(module)[1]) if part is not None}
    names = [w.fqn for w in weights(module, products(module))]
    patterns = [
        pattern
        for pattern in (_beside("", module, kept) if language is not None else ())
        if any(name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for name in names)
    ]
    if not patterns:
        raise ValueError(
            f"{type(module).__name__} does not tell its language model from the rest, or has nothing beside "
            "it; keep parts float by rules over their names, as in ('model.vision_tower.*', None)"
        )
    return [(pattern, None) for pattern in patterns]
