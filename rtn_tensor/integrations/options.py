"""What a plugin for a serving engine is told, and decides by it: which layers are quantized, and how.

The engines' own classes are in `integrations/`; here is what all of them share, and it imports none of them.
"""

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rtn_tensor import reference
from rtn_tensor.checkpoint.sources import saved_attributes, tensor_names
from rtn_tensor.config import RTNConfig, rtn
from rtn_tensor.formats import ASYMMETRIC, FORMAT_KEYS, FORMATS, SCALES_OF_8_BITS, format_of
from rtn_tensor.integrations.transformers.folders import empty_model
from rtn_tensor.integrations.transformers.names import renaming
from rtn_tensor.quantize.kinds import STEPS
from rtn_tensor.quantize.selection import (
    Rules,
    bits_of,
    config_from_json,
    matches,
    reaches,
    rules_from_json,
)
from rtn_tensor.reference import SwiGLU

SECTIONS = ("linear", "moe")
KEYS = ("quant_method", *FORMAT_KEYS, "ignore", "rules", "targets", *SECTIONS)
# Of the names that vLLM's own online quantization has for formats, those of weights of integers.
ONLINE = {
    "int4_per_group_32": {"bits": 4, "group_size": 32},
    "int8_per_channel_static": {"bits": 8, "group_size": -1},
    "int8_per_channel_weight_only": {"bits": 8, "group_size": -1},
}
ROUTERS = ("gate", "router", "shared_expert_gate")  # what engines call the linears that choose among experts
# Of a layer with fewer inputs or outputs nothing is saved: it has less than a group, or a handful of rows.
SMALLEST = 32


# ----------------------------------------------------------------------- what is asked for


def _format(given: Any, where: str) -> Any:
    """`given`, with what vLLM's own online quantization calls a format as the format that it means."""
    if isinstance(given, Mapping) and "weight" in given:
        if beside := [key for key, value in given.items() if key != "weight" and value is not None]:
            raise ValueError(
                f"{where} has {', '.join(map(repr, beside))} beside 'weight', which is not supported; "
                f"give a format, as in {{'bits': 4, 'activations': 'int8'}}"
            )
        given = given["weight"]
    if isinstance(given, str):
        if given not in ONLINE:
            raise ValueError(
                f"{where} is {given!r}, which is not supported; use {', '.join(map(repr, ONLINE))}, "
                'or a format, as in {"bits": 4, "group_size": 64}'
            )
        return ONLINE[given]
    return given


def _of_targets(
    targets: Any, config: Mapping[str, Any], default: RTNConfig | None
) -> list[tuple[str, RTNConfig | None]]:
    """The rules that `targets` says, as vLLM's own online quantization spells them: a format for each
    pattern, and all other layers stay float."""
    beside = [key for key in ("rules", *SECTIONS) if config.get(key)]
    if not isinstance(targets, Mapping) or beside:
        said = f"there beside {', '.join(beside)}" if beside else repr(targets)
        raise ValueError(
            f"quantization_config: targets is {said}; give the one or the other, and targets as in "
            '{"re:.*down_proj": {"bits": 8}}, which leaves other layers float'
        )
    rules = [[pattern, _format(given, f"targets[{pattern!r}]")] for pattern, given in targets.items()]
    return [*rules_from_json(rules, default), ("*", None)]


def _of_sections(config: Mapping[str, Any], default: RTNConfig) -> dict[str, RTNConfig | None]:
    """What `linear` and `moe` say of linear layers and of experts, as vLLM's own online quantization spells
    them: where one is there and the other is not, the other's layers stay float."""
    sections: dict[str, RTNConfig | None] = {}
    if any(config.get(kind) is not None for kind in SECTIONS):
        for kind in SECTIONS:
            where = f"quantization_config: {kind}"
            given = _format(config.get(kind), where)
            sections[kind] = None if given is None else config_from_json(given, default, where)
    return sections


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no number; use {name}={default}, or unset it") from None


def _default_format() -> dict[str, Any]:
    """What RTN_NUM_BITS and RTN_GROUP_SIZE say, or their defaults, with the scales of vLLM's own `rtn`."""
    bits, group_size = _from_environment("RTN_NUM_BITS", 8), _from_environment("RTN_GROUP_SIZE", 128)
    for name, asked in (("RTN_NUM_BITS", (bits, 128)), ("RTN_GROUP_SIZE", (8, group_size))):
        try:
            rtn(*asked)
        except ValueError as error:
            raise ValueError(f"{name}={os.environ[name]}: {error}, or unset {name}") from None
    return {"bits": bits, "group_size": group_size, "scale_method": "absmax"}


def _check_served(config: RTNConfig | None, unserved: Collection[str]) -> None:
    if config is not None and config.scale_method in unserved:
        raise ValueError(
            f"quantization_config: the scale method {config.scale_method!r} has planes that this engine does "
            "not hold yet; use 'search', or export the folder to compressed-tensors"
        )


@dataclass(frozen=True)
class KeptConfig(RTNConfig):
    """The format of a weight of a quantized folder whose scales keep their dtype, whatever the engine's."""

    scale_dtype: torch.dtype = torch.float16


@dataclass
class Options:
    """Which layers are quantized, and how.

    Attributes:
        default: the format of what no rule names; None for a folder that is quantized already.
        rules: (pattern, format or None for float), of which the first that matches a layer's name counts; as
            in `quantize_`, wildcards that ask for bits reach only what is quantized by default.
        sections: in the place of `default`, that of linear layers and that of experts, None for float.
        saved: of a folder that is quantized already, the format of each weight by its name.
    """

    default: RTNConfig | None
    rules: Rules = field(default_factory=list)
    sections: dict[str, RTNConfig | None] = field(default_factory=dict)
    saved: dict[str, RTNConfig] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)
    _formats: Counter[str] = field(default_factory=Counter)
    _kept: Counter[str] = field(default_factory=Counter)
    _bytes: list[int] = field(default_factory=lambda: [0, 0])

    @classmethod
    def read(
        cls,
        config: Mapping[str, Any],
        own: Sequence[str] = (),
        unserved: Collection[str] = (*ASYMMETRIC, *SCALES_OF_8_BITS),
    ) -> "Options":
        """From the quantization_config that a user gives; what it leaves out is RTN_NUM_BITS (8),
        RTN_GROUP_SIZE (128), "absmax".

        Args:
            config: what is given.
            own: keys that the engine's plugin reads itself.
            unserved: scale methods whose planes it does not hold.

        Raises:
            ValueError: an unknown key or an unfit value; it says which, and what is allowed.
        """
        keys = (*KEYS, *own)
        if unknown := sorted(set(config) - set(keys)):
            near = difflib.get_close_matches(unknown[0], keys, 1)
            meant = f" (for {unknown[0]!r}, is {near[0]!r} meant?)" if near else ""
            raise ValueError(
                f"quantization_config has {', '.join(map(repr, unknown))}; it takes "
                f"{', '.join(map(repr, keys))}{meant}"
            )
        base = _default_format()
        given = {key: config[key] for key in FORMAT_KEYS if key in config}
        default = config_from_json(base | given, None, "quantization_config")
        ignore = config.get("ignore") or []
        if isinstance(ignore, str) or not (
            isinstance(ignore, Sequence) and all(isinstance(pattern, str) for pattern in ignore)
        ):
            raise ValueError(f"quantization_config: ignore is {ignore!r}; it takes a list of names")
        rules = rules_from_json([[pattern, None] for pattern in ignore]) + rules_from_json(
            config.get("rules") or [], default
        )
        if (targets := config.get("targets")) is not None:
            rules += _of_targets(targets, config, default)
        sections = _of_sections(config, default)
        for config_of in (default, *sections.values(), *(given for _, given in rules)):
            _check_served(config_of, unserved)
        return cls(default, rules, sections)

    # -------------------------------------------------------------- what becomes of a layer

    def of(
        self, name: str, parts: Sequence[str] = (), by_default: bool = True, section: str = "linear"
    ) -> RTNConfig | None:
        """The format of the layer `name`, or None where it stays float.

        Args:
            name: the engine's name of the layer.
            parts: the names of those that it is made of, where the engine fuses several (q, k and v, say).
            by_default: whether it is quantized where no rule names it.
            section: which of `SECTIONS` speaks of it.

        Raises:
            ValueError: its parts would be different.
        """
        found = {part: self._of_part(part, name, by_default, section) for part in parts or (name,)}
        if len(set(found.values())) > 1:
            texts = [f"{part.rpartition('.')[2]} {format_text(config)}" for part, config in found.items()]
            each = ", ".join(dict.fromkeys(texts))  # once of many experts
            how = (
                "quantize the folder again with one format"
                if self.default is None
                else "give all of them one"
            )
            raise ValueError(
                f"{name} is one layer here, and its parts would be of different formats ({each}); {how}"
            )
        return next(iter(found.values()))

    def of_linear(
        self,
        name: str,
        fused: Mapping[str, Sequence[str]],
        in_features: int,
        out_features: int,
        itemsize: int,
    ) -> RTNConfig | None:
        """`of` a linear layer; `fused` has the parts of fused layers by the last part of their names. One
        that stays float is noted."""
        head, dot, last = name.rpartition(".")
        parts = [f"{head}{dot}{part}" for part in fused.get(last, [last])]
        by_default = worth_it(name, in_features, out_features)
        config = self.of(name, parts, by_default)
        if (
            config is None
            and not by_default
            and self.default is not None
            and not self.rule(*parts, name, by_default=False)[0]
        ):
            self.note(name, None, in_features * out_features, out_features, itemsize)
        return config

    def of_experts(
        self, name: str, gate_up: Sequence[str] = (), down: Sequence[str] = ()
    ) -> tuple[RTNConfig, RTNConfig] | None:
        """`of` the experts of a layer: of gate and up, which may be named as `name`.gate_up_proj, and of
        down, `name`.down_proj; or as `gate_up` and `down`, each expert's modules, where a quantized folder
        has these.

        Raises:
            ValueError: only one of the two would be quantized, or the experts would be different.
        """

        def of(whole: str, each: Sequence[str]) -> RTNConfig | None:
            apart = any(f"{module}.weight" in self.saved for module in each)
            return self.of(name, each if apart else [f"{name}.{whole}"], section="moe")

        up_config, down_config = of("gate_up_proj", gate_up), of("down_proj", down)
        if up_config is None and down_config is None:
            return None
        if up_config is None or down_config is None:
            kept = "gate_up_proj" if up_config is None else "down_proj"
            raise ValueError(
                f"{name}: {kept} would stay float, and the other not; give both a format, or neither"
            )
        return up_config, down_config

    def _of_part(self, part: str, name: str, by_default: bool, section: str) -> RTNConfig | None:
        if self.default is None:
            weight = f"{part}.weight" if f"{part}.weight" in self.saved else part
            self.matched.add(weight)
            return self.saved.get(weight)
        named, config = self.rule(part, name, by_default=by_default)
        if named:
            return config
        return self.sections.get(section, self.default) if by_default else None

    def rule(self, *names: str, by_default: bool) -> tuple[bool, RTNConfig | None]:
        """Whether a rule reaches one of `names`, which all mean one layer, or the name of its weight, and
        what the first that does says."""
        names = (*names, *(f"{name}.weight" for name in names))  # as a plan has them
        hits = [
            (pattern, config)
            for pattern, config in self.rules
            if reaches(pattern, config, by_default) and matches(pattern, *names)
        ]
        self.matched.update(pattern for pattern, _ in hits)
        return (True, hits[0][1]) if hits else (False, None)

    def check(self) -> None:
        """To be called when all layers are made.

        Raises:
            ValueError: a rule matches no layer, or a weight of a quantized folder has no place.
        """
        if unknown := [pattern for pattern, _ in self.rules if pattern not in self.matched]:
            raise ValueError(
                f"quantization_config: no layer matches {', '.join(map(repr, unknown))}, or only such as "
                "stay float unless named in full; "
                "names are as in 'model.layers.0.mlp.down_proj', and * matches any text"
            )
        if lost := [name for name in self.saved if name not in self.matched]:
            raise ValueError(
                f"{lost[0]} (of {len(lost)} such) is quantized in the folder, and no layer here can take it; "
                "serve the float folder, or without quantization='rtn' where another library quantized it"
            )

    # ------------------------------------------------------------------- what is said of it

    def note(self, name: str, config: RTNConfig | None, weights: int, rows: int, itemsize: int) -> None:
        """Remembers, for `summary`, a layer of `weights` elements in `rows` rows that becomes `config`, or
        stays float by default."""
        before = after = weights * itemsize
        if config is None:
            self._kept[re.sub(r"\.\d+(?=\.)", ".*", name)] += 1
        elif rows:
            of_scale = config.scale_dtype.itemsize if isinstance(config, KeptConfig) else itemsize
            after = bits_of((rows, weights // rows), config, 8 * of_scale) // 8
            self._formats[format_text(config)] += 1
        self._bytes[0] += before
        self._bytes[1] += after

    def summary(self) -> str:
        """One line: what was quantized, what it saves, and what stayed float because of what it is."""
        before, after = self._bytes
        quantized = (
            ", ".join(f"{count} {what}" for what, count in sorted(self._formats.items())) or "no layer"
        )
        kept = ", ".join(
            f"{name} ({count})" if count > 1 else name for name, count in sorted(self._kept.items())
        )
        return f"rtn: {quantized}; {before / 1e6:,.1f} MB of weights are {after / 1e6:,.1f} MB" + (
            f"; float, as routers, steps of a recurrent state and layers of fewer than {SMALLEST} rows or "
            f"columns are by default: {kept}"
            if kept
            else ""
        )


def kept_config(config: RTNConfig, scale_dtype: torch.dtype) -> KeptConfig:
    return KeptConfig(**format_of(config), scale_dtype=scale_dtype)


def format_text(config: RTNConfig | None) -> str:
    """As in "int4 g128"."""
    if config is None:
        return "float"
    return (
        f"int{config.bits} g{config.group_size}"
        + (f" {config.scale_method}" if config.scale_method != "absmax" else "")
        + (f", {config.activations} activations" if config.activations else "")
    )


def worth_it(name: str, in_features: int, out_features: int) -> bool:
    """Whether a linear layer is quantized where no rule names it: all but routers, whose errors send tokens
    elsewhere, the steps of a recurrent state, whose errors stay in it, and the smallest."""
    kept = name.rpartition(".")[2] in (*ROUTERS, *STEPS)
    return not kept and min(in_features, out_features) >= SMALLEST


def check_cut(name: str, config: RTNConfig, in_features: int, of_rank: int) -> None:
    """Raises ValueError where tensor parallelism, which gives each rank `of_rank` of a layer's columns, would
    cut inside a group."""
    unit = FORMATS[config.bits].chunk if config.group_size == -1 else config.group_size
    if of_rank != in_features and of_rank % unit:
        fits = [size for size in (128, 64, 32) if of_rank % size == 0]
        how = (
            f"use group_size {' or '.join(map(str, fits))}"
            if fits
            else "keep the layer float, or use fewer ranks"
        )
        raise ValueError(
            f"{name}: tensor parallelism gives each rank {of_rank} of its {in_features} columns, a cut "
            f"inside a group of {unit}; {how}"
        )


# What engines call the activations of experts. The last has no limit of its own, and every model gives it
# one.
ACTIVATIONS = {
    "silu": SwiGLU(),
    "swigluoai": reference.ACTIVATIONS["gpt_oss"],
    "swigluoai_uninterleave": SwiGLU(limit=math.nan),
}


def activation_of(
    name: str, kind: str, limit: float | None, alpha: float | None, beta: float | None
) -> str | SwiGLU:
    """What the experts `name` compute between their products, as `moe.run` takes it.

    Args:
        kind: the engine's word for it.
        limit, alpha, beta: what the model sets of it; None: what goes with `kind`.

    Raises:
        ValueError: an activation that is not one of `ACTIVATIONS`, or not with these settings.
    """
    how = f"name {name!r} in ignore to keep them float"
    if kind not in ACTIVATIONS:
        raise ValueError(
            f"{name}: experts with the activation {kind!r} are not supported, only "
            f"{', '.join(ACTIVATIONS)}; {how}"
        )
    given = {
        key: value for key, value in (("limit", limit), ("alpha", alpha), ("beta", beta)) if value is not None
    }
    wanted = replace(ACTIVATIONS[kind], **given)
    plain = kind == "silu" and (wanted.alpha, wanted.beta) != (1, 0)  # engines differ in what they make of it
    if plain or (wanted.limit is not None and not wanted.limit > 0):
        settings = ", ".join(f"swiglu_{key}={value}" for key, value in given.items()) or "no swiglu_limit"
        raise ValueError(
            f"{name}: experts with the activation {kind!r} and {settings} are not supported: 'silu' takes a "
            "limit alone, the others alpha, "
            f"beta and a limit above 0; {how}"
        )
    return next((known for known, each in reference.ACTIVATIONS.items() if each == wanted), wanted)


def check_router(name: str, on_input: bool, top_k: int) -> None:
    """Raises ValueError where router weights are for the inputs of several experts per token: one product has
    one input."""
    if on_input and top_k != 1:
        raise ValueError(
            f"{name}: apply_router_weight_on_input with {top_k} experts per token is not supported, only "
            f"with 1; name {name!r} in ignore "
            "to keep them float"
        )


# -------------------------------------------------------------- folders that are quantized


def is_saved(config: Mapping[str, Any]) -> bool:
    """Whether a folder's quantization_config is of weights that `save`, `rtn-tensor quantize` or transformers
    wrote quantized."""
    ours = re.search("RTN(Int[48]Weight)?Config", str(config.get("quant_type", "")))
    return config.get("quant_method") == "torchao" and ours is not None


def saved_formats(path: str | os.PathLike, swapped: str | None = None) -> dict[str, RTNConfig]:
    """The format of each quantized weight of a folder, by its name there.

    Args:
        path: the folder.
        swapped: a regular expression for the weights that the engine's plugin takes as [in_features,
            out_features].

    Raises:
        FileNotFoundError: `path` is no folder on this machine, or holds no checkpoint.
        ValueError: weights of an order that engines do not have.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"{path} is no folder on this machine; download the quantized model first, and give its folder"
        )
    formats = {}
    for name, about in saved_attributes(path, lambda: renaming(empty_model(path))).items():
        if about["transposed"] and not (swapped and re.search(swapped, name)):
            raise ValueError(
                f"{name} is saved as [in_features, out_features]; serve the float folder "
                "instead, with quantization='rtn'"
            )
        config = RTNConfig(**{name: about[name] for name in FORMAT_KEYS if name in about})
        # A scale of 8 bits has no other dtype; the weight is of the engine's.
        if about.get("float_dtype") is not None and config.scale_method not in SCALES_OF_8_BITS:
            config = kept_config(config, about["scale_dtype"])
        formats[name] = config
    return formats


def has_own_output(path: str | os.PathLike) -> bool:
    """Whether a folder holds an output layer, which one whose output layer is its embedding does not,
    whatever its config says."""
    return any(re.search(r"(^|\.)lm_head\._?weight", name) for name in tensor_names(path))
