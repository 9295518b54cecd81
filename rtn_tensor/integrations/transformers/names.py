"""Where in a transformers model each tensor of a checkpoint goes, by transformers' own tables."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.sources import Source


def conversions_of(model: Any) -> tuple[list[Any], list[Any]]:
    """transformers' own of old names in checkpoints, and of layers that it fuses."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    return [entry for entry in table if not isinstance(entry, WeightConverter)], converters


def renaming(model: Any) -> Callable[[str], str]:
    """The model's name of what a checkpoint may have under an old one, by transformers' table; layers that it
    fuses keep theirs."""
    from transformers.core_model_loading import rename_source_key

    renamings, _ = conversions_of(model)
    state = model.state_dict()

    def new(name: str) -> str:
        name = rename_source_key(name, renamings, [])[0]
        module, _, last = name.rpartition(".")
        if (plane := re.fullmatch("_(.+)_(qdata|scale|zero_point)", last)) is None:
            return name
        # transformers adds or removes the prefix of a base model by the name of the weight.
        weight = rename_source_key(f"{module}.{plane[1]}", [], [], model.base_model_prefix, state)[0]
        return f"{weight.removesuffix(plane[1])}{last}"

    return new


def placed(model: Any, found: Mapping[str, Source]) -> list[tuple[Source, str, tuple[int | slice, ...]]]:
    """Where each tensor of a checkpoint goes, by transformers' own table of old names and of layers that it
    fuses: the tensor, its name in the model, and the index of its part of that. Where transformers computes
    with tensors, they are what it makes of them, when asked for.

    Raises:
        ValueError: transformers cannot make of some tensors what its table says.
    """
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        dot_natural_key,
        rename_source_key,
    )

    renamings, converters = conversions_of(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    places: list[tuple[Source, str, tuple[int | slice, ...]]] = []
    fused: dict[str, dict[str, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(found, key=dot_natural_key):
        if found[name].quantized:  # under the model's own name
            places.append((found[name], name, ()))
            continue
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = name, None
        if pattern is None:
            places.append((found[name], new, ()))
        else:
            fused[new][pattern].append(found[name])
    computed: dict[str, dict[str, list[Source]]] = {}
    for new, parts in fused.items():
        converter = by_pattern[next(iter(parts))]
        kinds = [type(op) for op in converter.operations]
        experts, rows = MergeModulelist in kinds, Concatenate in kinds
        along = {MergeModulelist: 0, Concatenate: 1 if experts else 0}
        if any(
            kind not in along or op.dim != along[kind]
            for kind, op in zip(kinds, converter.operations, strict=True)
        ):
            computed[new] = parts
            continue
        start = 0
        for pattern in converter.source_patterns:
            for i, source in enumerate(parts[pattern]):
                stop = start + source.shape[0]
                places.append(
                    (source, new, (*((i,) if experts else ()), *((slice(start, stop),) if rows else ())))
                )
            start = stop
    places += [(source, target, ()) for target, source in _computed(model, by_pattern, computed)]
    filled = {target for _, target, _ in places}
    where = next(iter(found.values())).file if found else Path()
    # transformers does not write these, and makes them anew.
    own = [name for name in model._keys_to_ignore_on_save or () if name in state and name not in filled]
    return places + [(_initial(model, name, state[name], where), name, ()) for name in own]


def _initial(model: Any, name: str, t: Tensor, file: Path) -> Source:
    """What the model itself puts into its tensor `t` of this name, which the checkpoint in `file` lacks."""

    def view() -> Tensor:
        module, _, last = name.rpartition(".")
        new = copy.deepcopy(model.get_submodule(module)).to_empty(device="cpu")
        model._init_weights(new)
        return getattr(new, last).detach()

    return Source(file, name, tuple(t.shape), t.dtype, view, view)


def _computed(
    model: Any, by_pattern: Mapping[str, Any], groups: Mapping[str, Mapping[str, list[Source]]]
) -> Iterator[tuple[str, Source]]:
    """What transformers computes of each group of tensors, and its name. It is computed again each time, but
    for the last group's."""

    def convert(new: str, tensor: Callable[[Source], Tensor]) -> dict[str, Tensor]:
        parts = groups[new]
        some = next(iter(parts))
        converter = copy.deepcopy(by_pattern[some])
        for pattern, sources in parts.items():
            for source in sources:
                converter.add_tensor(new, source.name, pattern, tensor(source))
        try:
            made = converter.convert(new, model=model, config=model.config)
        except (
            RuntimeError,
            ValueError,
            AttributeError,
            IndexError,
            TypeError,
        ) as error:  # of transformers' operations, on what a file holds
            kinds = ", ".join(type(op).__name__ for op in converter.operations)
            raise parts[some][0].error(f"cannot become {new} by transformers' {kinds}: {error}") from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def dense(source: Source) -> Tensor:
        return source.view() if source.rows is None else source.private()

    last = lru_cache(maxsize=1)(lambda new: convert(new, dense))
    for new, parts in groups.items():
        first = next(iter(parts.values()))[0]
        for target, t in convert(
            new, lambda source: torch.empty(source.shape, dtype=source.dtype, device="meta")
        ).items():
            view: Callable[[], Tensor] = lambda new=new, target=target: last(new)[target]  # noqa: E731
            yield (
                target,
                Source(
                    first.file, first.name, tuple(t.shape), t.dtype, lambda view=view: view().clone(), view
                ),
            )
