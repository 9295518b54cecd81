"""What transformers is told of a quantized model: a quantization config, a quantizer that writes it, and
which ties hold no more."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor.checkpoint.sources import flattened
from rtn_tensor.distributed import held
from rtn_tensor.integrations.quantization_config import how_quantized, in_config, is_ours
from rtn_tensor.integrations.transformers.experts import register_experts
from rtn_tensor.integrations.transformers.models import ends, is_pretrained
from rtn_tensor.integrations.transformers.names import conversions_of, renaming
from rtn_tensor.quantize.api import dequantize_
from rtn_tensor.tensor import RTNQuantizedTensor

# -------------------------------------------------------------------------- the empty model


# --------------------------------------------------------------- what transformers is told


class _Ties(dict):
    """`_tied_weights_keys` of a model of which some ties are undone: those that hold; `all` is what its class
    ties."""

    all: Any


def _submodels(model: Any) -> Iterator[tuple[str, Any]]:
    """`model` and the models of transformers in it, and their names."""
    for prefix, module in model.named_modules():
        if is_pretrained(module):
            yield prefix, module


def _ties(model: Any) -> dict[str, str]:
    """What transformers ties to what in a new model of this class and config, without the models in it."""
    kept = model._tied_weights_keys
    if not isinstance(kept, _Ties):
        return model.get_expanded_tied_weights_keys()
    try:
        model._tied_weights_keys = kept.all
        return model.get_expanded_tied_weights_keys()
    finally:
        model._tied_weights_keys = kept


def all_ties(model: Any) -> dict[str, str]:
    """What transformers ties to what in a new model of this class and config, by names."""
    found = {}
    for prefix, submodel in _submodels(model):
        dot = f"{prefix}." if prefix else ""
        found |= {f"{dot}{name}": f"{dot}{source}" for name, source in _ties(submodel).items()}
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: t
        for named in (model.named_parameters, model.named_buffers)
        for name, t in named(remove_duplicate=False)
    }


def undone_ties(model: Any) -> set[str]:
    """The names that a new model ties, and that are not, or not all, one tensor in `model`."""
    tensors, ties = _tensors(model), all_ties(model)

    def root(name: str) -> str:
        return root(ties[name]) if ties.get(name, name) != name else name

    groups: dict[str, set[str]] = defaultdict(set)
    for name, source in ties.items():
        groups[root(name)] |= {name, source}
    return {
        name
        for names in groups.values()
        if len({id(tensors.get(name)) for name in names}) > 1
        for name in names
    }


def state_to_write(model: Any) -> dict[str, Tensor]:
    """The tensors of a state_dict that a file must hold for a new model of this class to be filled by it: one
    of those that are tied, and each of those that are not tied any more."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    tensors, untied = _tensors(model), undone_ties(model)
    state = model.state_dict()
    first: dict[int, str] = {}
    floats: dict[str, Tensor] = {}
    quantized: dict[str, Tensor] = {}
    for name, t in state.items():
        if name in (model._keys_to_ignore_on_save or ()):
            continue
        again = first.setdefault(id(tensors.get(name, t)), name) != name
        if isinstance(held(t), RTNQuantizedTensor):
            if held(t) is not t:
                raise ValueError(
                    f"{name} is a rank's part of a quantized weight; gather the whole model first, or use "
                    "torch.distributed.checkpoint"
                )
            if not again or name in untied:
                quantized[name] = t
        else:
            floats[name] = t.clone() if again and name in untied else t
    found = remove_tied_weights_from_state_dict(floats, model) | quantized
    return {name: found[name] for name in state if name in found}


def conversions_to_write(model: Any, kept: list[Any] | None) -> list[Any]:
    """What transformers undoes as it writes `model`: what it has `kept`, or else all that its tables know, as
    it does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if kept is not None:
        return kept
    table = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in table if not isinstance(entry, PrefixChange)]


def _under_old_names(
    model: Any, tensors: Mapping[str, Tensor], conversions: list[Any] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What transformers would write of `tensors`, quantized ones as their planes, and the metadata that says
    so.

    transformers writes tensors as they were in the checkpoint that a model is of: under their old names, and
    undoing what it computes. With planes it cannot compute, and so they, and floats that would be computed
    together with them, are only renamed.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        rename_source_key,
        revert_weight_conversion,
    )

    conversions = conversions_to_write(model, conversions)
    reverse = [entry.reverse_transform() for entry in conversions[::-1]]
    renamings = [entry for entry in reverse if not isinstance(entry, WeightConverter)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        target, pattern = rename_source_key(name, [], converters)
        groups[target if pattern is not None else name].append(name)
    kept = {
        name
        for names in groups.values()
        if any(isinstance(tensors[n], RTNQuantizedTensor) for n in names)
        for name in names
    }
    with set_for_now([(model, "_weight_conversions", conversions)]):
        written = revert_weight_conversion(
            model, {name: t for name, t in tensors.items() if name not in kept}
        )
    flat, metadata = flattened(tensors)
    new, (_, reading) = renaming(model), conversions_of(model)
    for name, t in flattened({name: tensors[name] for name in tensors if name in kept})[0].items():
        ways = (rename_source_key(name, renamings, [])[0], name)
        fits = [way for way in ways if new(way) == name and rename_source_key(name, [], reading)[1] is None]
        if not fits:
            raise ValueError(
                f"{name} would be read under another name by transformers; leave its weight float"
            )
        written[fits[0]] = t
    return written, metadata


@cache
def _quantizer_class() -> type:
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    # A model that was pickled whole comes here first, in a process that has quantized none.
    register_experts()

    class RTNHfQuantizer(TorchAoHfQuantizer):
        """What transformers asks about a model that `quantize_` or `load` quantized.

        Attributes:
            conversions: the model's `_weight_conversions`, in whose place it has none: what is written is
                converted here.
        """

        __module__, __qualname__ = __name__, "RTNHfQuantizer"
        conversions: list[Any] | None = None

        @property
        # Adapters over it are; transformers' own goes by the name of the config, and says no of int4.
        def is_trainable(self) -> bool:
            return True

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict, dict]:
            # It is a part of another model, maybe, whose config says nothing of it, or is its own config,
            # too.
            _set([(submodel.config, "quantization_config", None) for _, submodel in _submodels(model)])
            _set([(model.config, "quantization_config", in_config(_quantization_config(model)))])
            return _under_old_names(model, state_to_write(model), self.conversions)

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            dequantize_(model)
            return model.to(dtype) if isinstance(dtype, torch.dtype) and dtype != model.dtype else model

    return RTNHfQuantizer


def __getattr__(name: str) -> Any:
    """Of the class that is made only where transformers is there, so that it can be pickled."""
    if name == "RTNHfQuantizer":
        return _quantizer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _quantization_config(model: nn.Module) -> Any:
    """The `TorchAoConfig` that describes the quantized `model`, or None for a float one."""
    from transformers import TorchAoConfig

    quant_type, floats = how_quantized(model)
    if quant_type is None:
        return None
    embedding = isinstance(getattr(ends(model)[0], "weight", None), RTNQuantizedTensor)
    return TorchAoConfig(quant_type, modules_to_not_convert=floats, include_input_output_embeddings=embedding)


def _description(model: Any) -> list[tuple[Any, str, Any]]:
    """The attributes (owner, name, value) by which transformers knows how `model`, or what in it is its own,
    is quantized; None: to be removed."""
    settings: list[tuple[Any, str, Any]] = []
    whole: list[str] = []
    for prefix, submodel in _submodels(model):
        settings += _of_one(submodel)
        # No part of another; its config may be that of the other, too.
        if not any(f"{prefix}.".startswith(outer) for outer in whole):
            whole.append(f"{prefix}." if prefix else "")
            config = in_config(_quantization_config(submodel))
            if config is not None or is_ours(getattr(submodel.config, "quantization_config", None)):
                settings.append((submodel.config, "quantization_config", config))
    return settings


def _deserializes(entry: Any) -> bool:
    """Whether an entry of transformers' table makes quantized weights of planes."""
    from transformers.integrations.torchao import TorchAoDeserialize

    return any(isinstance(op, TorchAoDeserialize) for op in getattr(entry, "operations", ()))


def conversions_kept(model: Any) -> list[Any] | None:
    """How transformers remembers to have converted what it read of `model`'s checkpoint; None where it did
    not read one."""
    before: Any = getattr(model, "hf_quantizer", None)
    known = type(before).__name__ == "RTNHfQuantizer"
    conversions = before.conversions if known else vars(model).get("_weight_conversions")
    # Of a model that was read quantized, it remembers how, and refuses to write it: it cannot go back that
    # way.
    return conversions and [entry for entry in conversions if not _deserializes(entry)]


def _of_one(model: Any) -> list[tuple[Any, str, Any]]:
    """`_description`, of `model` without its config and without the models in it."""
    settings: list[tuple[Any, str, Any]] = []
    before: Any = getattr(model, "hf_quantizer", None)
    known = type(before).__name__ == "RTNHfQuantizer"
    conversions = conversions_kept(model)
    if (quantization_config := _quantization_config(model)) is not None:
        quantizer = _quantizer_class()(quantization_config, pre_quantized=True)
        quantizer.conversions = conversions
        settings += [(model, "hf_quantizer", quantizer), (model, "_weight_conversions", [])]
    elif known or before is not None and is_ours(before.quantization_config.to_dict()):
        # And it was dequantized since.
        settings += [(model, "hf_quantizer", None), (model, "_weight_conversions", conversions)]
    tensors, ties = _tensors(model), _ties(model)
    kept = {name: source for name, source in ties.items() if tensors.get(name) is tensors.get(source)}
    own = model._tied_weights_keys
    if len(kept) < len(ties) or isinstance(own, _Ties):
        left = _Ties(kept)
        left.all = own.all if isinstance(own, _Ties) else own
        together = {
            name: source
            for name, source in vars(model).get("all_tied_weights_keys", {}).items()
            if tensors.get(name) is tensors.get(source)
        }
        settings += [(model, "_tied_weights_keys", left), (model, "all_tied_weights_keys", together)]
    return settings


def _set(settings: list[tuple[Any, str, Any]]) -> None:
    """Sets attributes, or removes those whose value is None: transformers asks whether they are there."""
    for owner, name, value in settings:
        if value is not None:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)


@contextmanager
def set_for_now(settings: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """`_set`, undone at the end."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in settings]
    try:
        _set(settings)
        yield
    finally:
        _set(before[::-1])


def describe(model: Any) -> None:
    """Tells transformers how `model`, or what in it is its own, is quantized, so that `save_pretrained`,
    `tie_weights` and `Trainer` take it."""
    if "transformers" in sys.modules:
        _set(_description(model))


def described(model: Any) -> Any:
    """`describe`, undone at the end."""
    return set_for_now(_description(model))
