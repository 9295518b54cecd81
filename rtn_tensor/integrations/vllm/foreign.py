# pyright: reportMissingImports=false
"""Folders that other libraries quantized: what is kept of each weight, and how the planes that vLLM reads
become this library's."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from rtn_tensor.checkpoint.files import read_json
from rtn_tensor.checkpoint.foreign.reading import (
    FILES,
    OF_ACTIVATIONS,
    READERS,
    Description,
    configs_in,
    description,
    put_together,
)
from rtn_tensor.checkpoint.foreign.words import quantizes_activations
from rtn_tensor.checkpoint.hub import NAME, local
from rtn_tensor.checkpoint.sources import IN_FILES, sources, state_sources, tensor_names
from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import ASYMMETRIC, GIVEN, GIVEN_ASYMMETRIC
from rtn_tensor.integrations.options import KeptConfig, is_saved, kept_config

VLLMS_OWN = "leave out quantization='rtn', for vLLM's own kernels"
UNLIKE_THE_FIRST = (
    "is not as in the folder that the engine started with, which has other planes or another format; start "
    "an engine with this one"
)
# What lies beside planes, or is made of them already.
PASSED = ("bias", *(f"{begin}weight_{plane}" for begin in ("", "_") for plane in IN_FILES.values()))


@dataclass(frozen=True)
class ForeignFolder:
    """A folder of weights that `load` would keep as they are, all of them.

    Attributes:
        how: which library quantized them, and what it says of it.
        formats: of each weight, by its name. All of one format have a plane `zero` where any has one, so that
            those that vLLM holds as one fit together.
        weight_of: of each plane in the files the weight that it is of; None of one that is left out.
        count_of: how many planes each weight has there.
    """

    how: Description
    formats: dict[str, KeptConfig]
    weight_of: dict[str, str | None]
    count_of: dict[str, int]

    def turned(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` as they are read, in any order, with this library's planes in the place of the
        other's.

        Raises:
            ValueError: a plane is missing, or a weight is not as it was when the folder was first read.
        """
        held: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, t in weights:
            if name not in self.weight_of:
                module, _, last = name.rpartition(".")
                if f"{module}.weight" in self.formats and last not in PASSED:
                    raise ValueError(f"{name} {UNLIKE_THE_FIRST}")
                yield name, t
            elif (weight := self.weight_of[name]) is not None:
                held[weight][name] = t.cpu()
                if len(held[weight]) == self.count_of[weight]:
                    yield from self._planes(weight, held.pop(weight))
        if held:
            weight, planes = next(iter(held.items()))
            raise ValueError(
                f"{weight}: of its {self.count_of[weight]} planes there were only {', '.join(planes)}; give "
                "the whole checkpoint, quantized as the one that the engine started with"
            )

    def _planes(self, weight: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        found = {source.name: source for source in state_sources(tensors, Path(self.how.where))}
        READERS[self.how.method](found, self.how.options, self.how.where)
        rows, config = found[weight].rows, self.formats[weight]
        w: Any = None if rows is None or rows.kept is None else rows.read()
        zeros = config.scale_method in ASYMMETRIC
        if (
            w is None
            or (w.bits, w.group_size, w.scale.dtype) != (config.bits, config.group_size, config.scale_dtype)
            or (w.zero is not None and not zeros)
        ):
            raise ValueError(f"{weight} {UNLIKE_THE_FIRST}")
        planes = w.planes
        if zeros and w.zero is None:
            planes["zero"] = torch.zeros_like(w.scale, dtype=torch.int8)
        module = weight.removesuffix(".weight")
        # As our parameters are called, once vLLM has put `w13_` or `w2_` for the name of an expert's module.
        begin = f"{module}.weight" if re.search(r"\.experts\.\d+\.\w+$", module) else f"{module}._weight"
        for plane, data in planes.items():
            yield f"{begin}_{IN_FILES[plane]}", data


def each_expert(
    weights: Iterable[tuple[str, Tensor]], modules: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """`weights` with stacked experts one by one, as some models' code takes them only.

    Those of GPT-OSS, which has no `modules`, are float weights and biases, which its code would else copy
    past vLLM's layerwise loading; those of other models are planes, of gate and up, and of down, whose
    `modules` are called so.
    """
    for name, t in weights:
        if modules and (planes := re.fullmatch(r"(.*\.experts)\._(gate_up|down)_proj_(\w+)", name)):
            experts, part, plane = planes.groups()
            for i, expert in enumerate(t):
                parts = (expert,) if part == "down" else expert.chunk(2)
                for module, data in zip(modules[2:] if part == "down" else modules[:2], parts, strict=True):
                    yield f"{experts}.{i}.{module}.weight_{plane}", data
        elif not modules and (floats := re.fullmatch(r"(.*\.experts)\.((gate_up|down)_proj(_bias)?)", name)):
            for i, expert in enumerate(t):
                yield f"{floats[1]}.{i}.{floats[2]}", expert
        else:
            yield name, t


@dataclass
class LoadedMapper(WeightsMapper):
    """A mapper of names that first lets a folder turn its planes, or takes stacked experts apart; it stays
    one when vLLM adds it to others."""

    folder: ForeignFolder | None = None
    modules: Sequence[str] | None = None

    def _with(self, names: WeightsMapper) -> WeightsMapper:
        return LoadedMapper(**vars(names), folder=self.folder, modules=self.modules)

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return self._with(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> WeightsMapper:
        return self._with(WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        if self.folder is not None:
            weights = self.folder.turned(weights)
        return super().apply(weights if self.modules is None else each_expert(weights, self.modules))


def folder_of(model_name: str, revision: str | None = None) -> Path:
    """The folder of a model that vLLM was given by that name: of one on the hub, what huggingface_hub has in
    its cache, where vLLM finds the files afterwards.

    Of a quantized one the weights, too, are fetched if they are not there yet, as only they say how they are
    quantized; of others config.json is enough, which vLLM has read.
    """
    name = NAME.fullmatch(model_name)
    if os.path.lexists(model_name) or not name:
        return Path(model_name)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name[1], "config.json", revision=revision)
    if not isinstance(config, str):
        return Path(model_name)
    folder = Path(config).parent
    if not configs_in(read_json(Path(config))) and not any((folder / file).is_file() for file in FILES):
        return folder
    return local(f"{name[1]}@{revision}" if revision else name[1])


def is_ours_at(path: str | os.PathLike) -> bool:
    """Whether a folder on this machine says that this library quantized it."""
    file = Path(path) / "config.json"
    return file.is_file() and any(is_saved(how) for _, how in configs_in(read_json(file)))


def foreign_folder(path: str | os.PathLike) -> ForeignFolder | None:
    """What another library's folder holds; None where none such is on this machine at `path`.

    Raises:
        ValueError: not all of it can be kept as it is.
    """
    path = Path(path)
    if not path.is_dir():
        return None
    beside = any((path / name).is_file() for name in FILES)
    how = description(path, tensor_names(path) if beside else ())
    if how is None:
        return None
    if quantizes_activations(how.options):
        raise ValueError(
            f"{how.where}: the activations are quantized, too, and this library quantizes weights only; "
            f"{VLLMS_OWN}"
        )
    try:
        found = sources(path)
        weights, _ = put_together(path, found)
    except ValueError as error:
        raise ValueError(f"{error}; or {VLLMS_OWN}") from None
    kept = {name: source.rows.kept for name, source in weights.items() if source.rows is not None}
    if lost := [name for name, of_weight in kept.items() if of_weight is None]:
        raise ValueError(
            f"{how.where}: {lost[0]} (of {len(lost)} such) is quantized by {how.kind} in a way that this "
            "library's kernels do not run: only integers of 4 and 8 bits, with columns in their own order in "
            f"groups of a multiple of 32 or whole rows. Quantize it anew, by rtn-tensor quantize {path} DST; "
            f"or {VLLMS_OWN}"
        )
    asymmetric = {each[:3] for each in kept.values() if each is not None and each.asymmetric}
    formats = {
        name: kept_config(
            RTNConfig(each.bits, each.group_size, GIVEN_ASYMMETRIC if each[:3] in asymmetric else GIVEN),
            each.scale_dtype,
        )
        for name, each in kept.items()
        if each is not None
    }
    weight_of: dict[str, str | None] = {}
    count_of: dict[str, int] = defaultdict(int)
    for name, source in found.items():
        if weights.get(name) is source:
            continue
        weight = f"{name.rpartition('.')[0]}.weight"
        of_activations = re.search(OF_ACTIVATIONS, name) or weight not in formats
        weight_of[name] = None if of_activations else weight
        count_of[weight] += not of_activations
    return ForeignFolder(how, formats, weight_of, dict(count_of))
