"""The tensors of a model as its files have them."""

from typing import Any

from torch import Tensor

from rtn_tensor.integrations.transformers.description import (
    conversions_kept,
    conversions_to_write,
    set_for_now,
    state_to_write,
)
from rtn_tensor.tensor import RTNQuantizedTensor


def tensors_in_files(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that files of such a model hold, under their names there: experts and what else
    transformers puts together are apart, as views. And the model's name for each that is one of its own, or a
    part of a quantized one.

    Raises:
        ValueError: a weight is a rank's part; or transformers cannot take a quantized one apart.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = {name: t.detach() for name, t in state_to_write(model).items()}
    names = {id(t): name for name, t in own.items()}
    for name, t in own.items():
        if isinstance(t, RTNQuantizedTensor):
            t.fqn = name  # which each part of it has, too
    with set_for_now([(model, "_weight_conversions", _conversions(model))]):
        try:
            found = revert_weight_conversion(model, own)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"transformers cannot take the weights of {type(model).__name__} apart as its files have "
                "them "
                f"({error}); leave those float that it names"
            ) from error
    of = {
        name: t.fqn if isinstance(t, RTNQuantizedTensor) else names[id(t)]
        for name, t in found.items()
        if isinstance(t, RTNQuantizedTensor) or id(t) in names
    }
    return found, of


def _conversions(model: Any) -> list[Any]:
    """What is undone of `model`'s tensors: what transformers converted as it read them, and of what it did
    not convert then, as the files were of this library, what it puts together."""
    from transformers.core_model_loading import WeightConverter

    kept, table = conversions_kept(model), conversions_to_write(model, None)
    if kept is None:
        return table
    converted = {target for entry in kept for target in entry.target_patterns}
    return kept + [
        entry
        for entry in table
        if isinstance(entry, WeightConverter) and converted.isdisjoint(entry.target_patterns)
    ]
