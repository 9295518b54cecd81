"""Which weights are quantized, and how: the default choice, ordered rules over names, and rules that keep
layers or modules precise."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import ASYMMETRIC, FORMAT_KEYS, FORMATS, SCALES_OF_8_BITS, format_of, groups
from rtn_tensor.quantize.kinds import COMPUTED, FilterFn, factors, products, stored_transposed
from rtn_tensor.wording import with_article

Rules = Sequence[tuple[str, RTNConfig | None]]


def tensors_of(model: nn.Module, buffers: bool = False) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(fqn, module, name, tensor) of every parameter, shared ones at each of their places; with `buffers`, of
    all that a state_dict holds."""
    for prefix, module in model.named_modules():
        for name, t in (*module._parameters.items(), *(module._buffers.items() if buffers else ())):
            if t is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, module, name, t


@dataclass(frozen=True)
class Weight:
    """A place in a model that holds a matrix, or a stack of them."""

    module: nn.Module
    parameter_name: str
    fqn: str
    default: bool  # whether `filter_fn` selects it

    @property
    def module_name(self) -> str:
        return self.fqn.removesuffix(self.parameter_name).removesuffix(".")

    @property
    def names(self) -> tuple[str, ...]:
        """What a pattern may match: the parameter's name, and its module's where that has no other such
        weight."""
        owns = self.parameter_name == "weight" or self.parameter_name in factors(self.module)
        return (self.fqn, self.module_name) if owns else (self.fqn,)


def weights(model: nn.Module, filter_fn: FilterFn) -> Iterator[Weight]:
    """All of `model`, in its order: what `filter_fn` selects, and every other parameter of two dims or
    more."""
    for prefix, module in model.named_modules():
        selected: list[str] = []
        if filter_fn(module, prefix):
            selected += [n for n in factors(module) if isinstance(getattr(module, n, None), Tensor)]
            # A filter that goes by name alone also selects containers and activations, which have no weight.
            if isinstance(getattr(module, "weight", None), Tensor) and "weight" not in selected:
                selected.append("weight")
        held = {
            name: p
            for name, p in module._parameters.items()
            if p is not None and not isinstance(p, nn.parameter.UninitializedParameter)
        }
        for name in (*selected, *(name for name, p in held.items() if p.dim() > 1 and name not in selected)):
            yield Weight(module, name, f"{prefix}.{name}" if prefix else name, name in selected)


def check_module(model: Any, advice: str = "give a module, as load(path) returns") -> None:
    """Raises TypeError, with that advice, unless `model` is a module: many a caller gives a folder's name."""
    if not isinstance(model, nn.Module):
        if isinstance(getattr(model, "components", None), dict):
            advice = "give a model of the pipeline, as pipe.transformer or pipe.unet"
        raise TypeError(f"model is {with_article(type(model).__name__)}; {advice}")


# ----------------------------------------------------------------------------------- rules


def matches(pattern: str, *names: str) -> bool:
    """Whether `pattern` is the whole of one of `names`: with shell wildcards, case counting, or, after "re:",
    as a regular expression."""
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)


def find(rules: Rules, *names: str) -> int | None:
    """The index of the first rule that matches one of `names`, which all mean one weight; None where none
    does."""
    return next((i for i, (pattern, _) in enumerate(rules) if matches(pattern, *names)), None)


def is_name(pattern: str) -> bool:
    """Whether `pattern` is a name in full: no wildcard, no regular expression."""
    return not pattern.startswith("re:") and not set(pattern) & set("*?[")


def reaches(pattern: str, config: RTNConfig | None, default: bool) -> bool:
    """Whether a rule may concern a weight that is, or is not, quantized by default: wildcards that ask for
    bits only one that is."""
    return default or config is None or is_name(pattern)


def check_rules(rules: Any) -> None:
    """Raises TypeError or ValueError unless `rules` is a list of (pattern, RTNConfig or None)."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(
            f"rules is {with_article(type(rules).__name__)}; give a list of (pattern, config or None), of "
            "which the first match counts"
        )
    for i, rule in enumerate(rules):
        if (
            not isinstance(rule, Sequence)
            or isinstance(rule, str)
            or len(rule) != 2
            or not isinstance(rule[0], str)
        ):
            raise TypeError(
                f"rules[{i}] is {rule!r}; give (pattern, config or None), as in ('*.down_proj', rtn_int8())"
            )
        pattern, config = rule
        if config is not None and not isinstance(config, RTNConfig):
            raise TypeError(
                f"rules[{i}] gives {pattern!r} {with_article(type(config).__name__)}; use rtn_int4(), "
                "rtn_int8(), rtn(...), or None for float"
            )
        check_pattern(pattern, f"rules[{i}], {pattern!r},")


def check_pattern(pattern: str, where: str) -> None:
    """Raises ValueError, its message beginning with `where`, if what comes after "re:" is no regular
    expression."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{where} is no regular expression: {error}") from None


def unmatched(pattern: str, names: Iterable[str]) -> str:
    """The error of a pattern that matches none of `names`: it says which are nearest."""
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(pattern, names, 3, 0.0)
    nearest = f"nearest are {', '.join(map(repr, near))}" if near else "the model has none"
    return f"the rule {pattern!r} matches no weight; {nearest}, and * matches any text"


def resolve(rules: Rules, found: Sequence[Weight]) -> list[tuple[Weight, RTNConfig]]:
    """The weights that `rules` quantize, and how. A pattern with wildcards that asks for bits reaches what is
    quantized by default; a name in full, and None, reach every weight.

    Raises:
        TypeError, ValueError: as `check_rules`; or a pattern matches no weight.
    """
    check_rules(rules)
    reached: set[int] = set()
    result = []
    for weight in found:
        # Later rules too, so that one whose weights an earlier one took is no mistake: hybrids overlap.
        hits = [
            i for i, (p, c) in enumerate(rules) if reaches(p, c, weight.default) and matches(p, *weight.names)
        ]
        reached.update(hits)
        if hits and (config := rules[hits[0]][1]) is not None:
            result.append((weight, config))
    for i, (pattern, _) in enumerate(rules):
        if i not in reached:
            if other := next((w for w in found if matches(pattern, *w.names)), None):
                raise ValueError(
                    f"the rule {pattern!r} matches only weights that stay float unless named in full, as in "
                    f"{other.names[-1]!r}"
                )
            raise ValueError(unmatched(pattern, (w.names[-1] for w in found)))
    return result


# --------------------------------------------------------------------------------- as text


def config_from_json(given: Any, default: RTNConfig | None, where: str) -> RTNConfig:
    """The format that a mapping of some of `FORMAT_KEYS` gives, the others as in `default`, or as `rtn` has
    them; `where` begins the message of a ValueError."""
    if not isinstance(given, Mapping) or (unknown := set(given) - set(FORMAT_KEYS)):
        got = (
            f"has {', '.join(map(repr, sorted(unknown)))}" if isinstance(given, Mapping) else f"is {given!r}"
        )
        near = difflib.get_close_matches(min(unknown), FORMAT_KEYS, 1) if isinstance(given, Mapping) else []
        meant = f" (for {min(unknown)!r}, is {near[0]!r} meant?)" if near else ""
        raise ValueError(f"{where} {got}; it takes {', '.join(map(repr, FORMAT_KEYS))}{meant}")
    try:
        others = {} if default is None else {key: getattr(default, key) for key in FORMAT_KEYS}
        return RTNConfig(**others | dict(given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def rules_from_json(given: Any, default: RTNConfig | None = None) -> list[tuple[str, RTNConfig | None]]:
    """Rules from a list of [pattern, {"bits": 8, "group_size": 64, "scale_method": "signed"}], or [pattern,
    null] for float; keys left out are as in `default`, or else as `rtn` has them.

    Raises:
        ValueError: another form, an unknown key, an unfit value; it says which rule.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(
            f'rules are {given!r}; give a list, as in [["*.down_proj", {{"bits": 8}}], ["lm_head", null]]'
        )
    rules: list[tuple[str, RTNConfig | None]] = []
    for i, rule in enumerate(given):
        if (
            not isinstance(rule, Sequence)
            or isinstance(rule, str)
            or len(rule) != 2
            or not isinstance(rule[0], str)
        ):
            raise ValueError(
                f'rules[{i}] is {rule!r}; give [pattern, {{"bits": 8}}], or [pattern, null] for float'
            )
        rules.append(
            (rule[0], None if rule[1] is None else config_from_json(rule[1], default, f"rules[{i}]"))
        )
    check_rules(rules)
    return rules


def rules_to_json(rules: Rules) -> list[list[Any]]:
    """Plain lists and dicts for `json.dump`, which `rules_from_json` reads; a list, as the order counts."""
    check_rules(rules)
    return [
        [pattern, None if config is None else {k: v for k, v in format_of(config).items() if v is not None}]
        for pattern, config in rules
    ]


def parse_rule(text: str, default: RTNConfig | None = None) -> tuple[str, RTNConfig | None]:
    """A rule from "PATTERN=BITS[,GROUP_SIZE[,SCALE_METHOD[,ACTIVATIONS]]]" or "PATTERN=float"; what is left
    out is as in `default`, or as `rtn` has it.

    Raises:
        ValueError: another form, or an unfit value.
    """
    pattern, _, given = text.rpartition("=")
    if pattern and given == "float":
        return pattern, None
    values: list[Any] = given.split(",")
    try:
        values[:2] = map(int, values[:2])
    except ValueError:
        pattern = ""
    if not pattern or len(values) > len(FORMAT_KEYS):
        raise ValueError(
            f"{text!r} is no rule; write PATTERN=BITS, PATTERN=BITS,GROUP_SIZE,SCALE_METHOD,"
            "ACTIVATIONS or PATTERN=float"
        )
    return pattern, config_from_json(dict(zip(FORMAT_KEYS, values, strict=False)), default, text)


# ------------------------------------------------------------------------------ selections


def bits_of(shape: Sequence[int], config: RTNConfig, scale_bits: int = 16) -> int:
    """Bits that a weight of `shape` [..., N, K] takes: its padded rows, and a scale per group, and a zero
    point."""
    *rows, k = shape
    if config.scale_method in SCALES_OF_8_BITS:
        scale_bits = 8
    elif config.scale_method in ASYMMETRIC:
        scale_bits += 8
    count = 1
    for n in rows:
        count *= n
    return count * (8 * FORMATS[config.bits].row_bytes(k) + scale_bits * groups(k, config.group_size))


def parameter_of(weight: Weight) -> Tensor:
    if (found := weight.module._parameters.get(weight.parameter_name)) is None:
        raise ValueError(f"{weight.fqn} {COMPUTED}")
    return found


def shape_of(weight: Weight) -> Sequence[int]:
    shape = parameter_of(weight).shape
    return (
        (*shape[:-2], shape[-1], shape[-2])
        if stored_transposed(weight.module, weight.parameter_name)
        else shape
    )


def bits_per_weight(model: nn.Module, rules: Rules, filter_fn: FilterFn | None = None) -> float:
    """Bits that the weights take that `rules` quantize, scales included, divided by their number; what stays
    float is not counted, and a weight of several places once.

    Raises as `quantize_` does for rules; ValueError also where they quantize nothing.
    """
    check_module(model)
    chosen = {
        id(parameter_of(w)): (w, config)
        for w, config in resolve(rules, list(weights(model, filter_fn or products(model))))
    }.values()
    if not chosen:
        raise ValueError("the rules quantize no weight; give some of the model's a config in place of None")
    count = sum(parameter_of(w).numel() for w, _ in chosen)
    return sum(bits_of(shape_of(w), config, scale_bits_of(w)) for w, config in chosen) / count


def scale_bits_of(weight: Weight) -> int:
    return 8 * parameter_of(weight).dtype.itemsize
