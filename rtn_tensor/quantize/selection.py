"""Which weights are quantized, and how: the default choice, ordered rules over names, and rules that keep layers or modules precise."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from rtn_tensor.config import RTNConfig, rtn, rtn_int8
from rtn_tensor.formats import FORMATS, groups
from rtn_tensor.quantize.experts import routers, transposed_experts

FilterFn = Callable[[nn.Module, str], bool]
Rules = Sequence[tuple[str, RTNConfig | None]]

REMOVE_IT = "remove that first, or leave the module out"
COMPUTED = f"is computed by its module, not stored (a parametrization?); {REMOVE_IT}"
FORMAT_KEYS = ("bits", "group_size", "scale_method")


# ------------------------------------------------------------------------------------------- without rules


def is_linear(module: nn.Module, fqn: str) -> bool:
    """Every nn.Linear whose weight its module really multiplies by (torchao's rule)."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear, which multiplies by a weight [in_features, out_features]."""
    transformers: Any = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def stored_transposed(module: nn.Module, name: str) -> bool:
    """Whether in_features is the last but one dim of the module's parameter `name`."""
    return transposed_experts(module).get(name, name == "weight" and _is_conv1d(module))


def owns(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` is what is meant by the name of its module."""
    return (name == "weight" and (isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module))) or name in transposed_experts(module)


def products(model: nn.Module) -> FilterFn:
    """The default `filter_fn`: every linear (`is_linear`) but routers, and the experts of every mixture-of-experts layer."""
    kept = routers(model)
    return lambda module, fqn: (is_linear(module, fqn) and module not in kept) or bool(transposed_experts(module))


def tensors_of(model: nn.Module, buffers: bool = False) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(fqn, module, name, tensor) of every parameter, shared ones at each of their places; with `buffers`, of all that a state_dict
    holds."""
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
        """What a pattern may match: the parameter's name, and its module's where that has no other such weight."""
        owns = self.parameter_name == "weight" or self.parameter_name in transposed_experts(self.module)
        return (self.fqn, self.module_name) if owns else (self.fqn,)


def weights(model: nn.Module, filter_fn: FilterFn) -> Iterator[Weight]:
    """All of `model`, in its order: what `filter_fn` selects, and every other parameter of two dims or more."""
    for prefix, module in model.named_modules():
        selected: list[str] = []
        if filter_fn(module, prefix):
            selected += transposed_experts(module)
            # A filter that goes by name alone also selects containers and activations, which have no weight.
            if isinstance(getattr(module, "weight", None), Tensor) and "weight" not in selected:
                selected.append("weight")
        held = {
            name: p for name, p in module._parameters.items() if p is not None and not isinstance(p, nn.parameter.UninitializedParameter)
        }
        for name in (*selected, *(name for name, p in held.items() if p.dim() > 1 and name not in selected)):
            yield Weight(module, name, f"{prefix}.{name}" if prefix else name, name in selected)


# ------------------------------------------------------------------------------------------- rules


def matches(pattern: str, *names: str) -> bool:
    """Whether `pattern` is the whole of one of `names`: with shell wildcards, case counting, or, after "re:", as a regular expression."""
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)


def find(rules: Rules, *names: str) -> int | None:
    """The index of the first rule that matches one of `names`, which all mean one weight; None where none does."""
    return next((i for i, (pattern, _) in enumerate(rules) if matches(pattern, *names)), None)


def is_name(pattern: str) -> bool:
    """Whether `pattern` is a name in full: no wildcard, no regular expression."""
    return not pattern.startswith("re:") and not set(pattern) & set("*?[")


def reaches(pattern: str, config: RTNConfig | None, default: bool) -> bool:
    """Whether a rule may concern a weight that is, or is not, quantized by default: wildcards that ask for bits only one that is."""
    return default or config is None or is_name(pattern)


def check_rules(rules: Any) -> None:
    """Raises TypeError or ValueError unless `rules` is a list of (pattern, RTNConfig or None)."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(f"rules is a {type(rules).__name__}; give a list of (pattern, config or None), of which the first match counts")
    for i, rule in enumerate(rules):
        if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
            raise TypeError(f"rules[{i}] is {rule!r}; give (pattern, config or None), as in ('*.down_proj', rtn_int8())")
        pattern, config = rule
        if config is not None and not isinstance(config, RTNConfig):
            raise TypeError(
                f"rules[{i}] gives {pattern!r} a {type(config).__name__}; use rtn_int4(), rtn_int8(), rtn(...), or None for float"
            )
        check_pattern(pattern, f"rules[{i}], {pattern!r},")


def check_pattern(pattern: str, where: str) -> None:
    """Raises ValueError, its message beginning with `where`, if what comes after "re:" is no regular expression."""
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
    """The weights that `rules` quantize, and how. A pattern with wildcards that asks for bits reaches what is quantized by default; a name
    in full, and None, reach every weight.

    Raises:
        TypeError, ValueError: as `check_rules`; or a pattern matches no weight.
    """
    check_rules(rules)
    reached: set[int] = set()
    result = []
    for weight in found:
        # Later rules too, so that one whose weights an earlier one took is no mistake: hybrids overlap.
        hits = [i for i, (p, c) in enumerate(rules) if reaches(p, c, weight.default) and matches(p, *weight.names)]
        reached.update(hits)
        if hits and (config := rules[hits[0]][1]) is not None:
            result.append((weight, config))
    for i, (pattern, _) in enumerate(rules):
        if i not in reached:
            if other := next((w for w in found if matches(pattern, *w.names)), None):
                raise ValueError(
                    f"the rule {pattern!r} matches only weights that stay float unless named in full, as in {other.names[-1]!r}"
                )
            raise ValueError(unmatched(pattern, (w.names[-1] for w in found)))
    return result


# ------------------------------------------------------------------------------------------- as text


def config_from_json(given: Any, default: RTNConfig, where: str) -> RTNConfig:
    """The format that a mapping of some of `FORMAT_KEYS` gives, the others as in `default`; `where` begins the message of a ValueError."""
    if not isinstance(given, Mapping) or (unknown := set(given) - set(FORMAT_KEYS)):
        got = f"has {', '.join(map(repr, sorted(unknown)))}" if isinstance(given, Mapping) else f"is {given!r}"
        raise ValueError(f"{where} {got}; it takes {', '.join(map(repr, FORMAT_KEYS))}")
    try:
        return RTNConfig(**{key: getattr(default, key) for key in FORMAT_KEYS} | dict(given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def rules_from_json(given: Any, default: RTNConfig | None = None) -> list[tuple[str, RTNConfig | None]]:
    """Rules from a list of [pattern, {"bits": 8, "group_size": 64, "scale_method": "signed"}], or [pattern, null] for float; keys left out
    are those of `default`, or else of `rtn_int4()`.

    Raises:
        ValueError: another form, an unknown key, an unfit value; it says which rule.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f'rules are {given!r}; give a list, as in [["*.down_proj", {{"bits": 8}}], ["lm_head", null]]')
    rules: list[tuple[str, RTNConfig | None]] = []
    for i, rule in enumerate(given):
        if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(f'rules[{i}] is {rule!r}; give [pattern, {{"bits": 8}}], or [pattern, null] for float')
        rules.append((rule[0], None if rule[1] is None else config_from_json(rule[1], default or rtn(), f"rules[{i}]")))
    check_rules(rules)
    return rules


def rules_to_json(rules: Rules) -> list[list[Any]]:
    """Plain lists and dicts for `json.dump`, which `rules_from_json` reads; a list, as the order counts."""
    check_rules(rules)
    return [[pattern, None if config is None else {key: asdict(config)[key] for key in FORMAT_KEYS}] for pattern, config in rules]


def parse_rule(text: str, default: RTNConfig | None = None) -> tuple[str, RTNConfig | None]:
    """A rule from "PATTERN=BITS[,GROUP_SIZE[,SCALE_METHOD]]" or "PATTERN=float"; what is left out is as in `default`, or `rtn_int4()`.

    Raises:
        ValueError: another form, or an unfit value.
    """
    pattern, _, format = text.rpartition("=")
    if pattern and format == "float":
        return pattern, None
    values: list[Any] = format.split(",")
    try:
        values[:2] = map(int, values[:2])
    except ValueError:
        pattern = ""
    if not pattern or len(values) > len(FORMAT_KEYS):
        raise ValueError(f"{text!r} is no rule; write PATTERN=BITS, PATTERN=BITS,GROUP_SIZE,SCALE_METHOD or PATTERN=float")
    return pattern, config_from_json(dict(zip(FORMAT_KEYS, values, strict=False)), default or rtn(), text)


# ------------------------------------------------------------------------------------------- selections


def bits_of(shape: Sequence[int], config: RTNConfig, scale_bits: int = 16) -> int:
    """Bits that a weight of `shape` [..., N, K] takes: its padded rows, and a scale a group."""
    *rows, k = shape
    count = 1
    for n in rows:
        count *= n
    return count * (8 * FORMATS[config.bits].row_bytes(k) + scale_bits * groups(k, config.group_size))


def _parameter(weight: Weight) -> Tensor:
    if (found := weight.module._parameters.get(weight.parameter_name)) is None:
        raise ValueError(f"{weight.fqn} {COMPUTED}")
    return found


def _shape(weight: Weight) -> Sequence[int]:
    shape = _parameter(weight).shape
    return (*shape[:-2], shape[-1], shape[-2]) if stored_transposed(weight.module, weight.parameter_name) else shape


def bits_per_weight(model: nn.Module, rules: Rules, filter_fn: FilterFn | None = None) -> float:
    """Bits that the weights take that `rules` quantize, scales included, divided by their number; what stays float is not counted, and a
    weight of several places once.

    Raises as `quantize_` does for rules; ValueError also where they quantize nothing.
    """
    chosen = {id(_parameter(w)): (w, config) for w, config in resolve(rules, list(weights(model, filter_fn or products(model))))}.values()
    if not chosen:
        raise ValueError("the rules quantize no weight")
    count = sum(_parameter(w).numel() for w, _ in chosen)
    return sum(bits_of(_shape(w), config, _scale_bits(w)) for w, config in chosen) / count


def _scale_bits(weight: Weight) -> int:
    return 8 * _parameter(weight).dtype.itemsize


def _say_cost(model: nn.Module, what: str, rules: Rules, config: RTNConfig) -> None:
    default = [w for w in weights(model, products(model)) if w.default]
    total = sum(_parameter(w).numel() for w in default)
    chosen = [w for w in default if find(rules, *w.names) is not None]
    count = sum(_parameter(w).numel() for w in chosen)
    bits = sum(bits_of(_shape(w), config, _scale_bits(w)) for w in chosen)
    at_4 = sum(bits_of(_shape(w), rtn(4, config.group_size), _scale_bits(w)) for w in chosen)
    print(
        f"{what}: {count:,} of {total:,} weights at {bits / count:.3f} bits, "
        f"which makes the average {(bits - at_4) / total:+.3f} bits a weight from 4-bit"
    )


def layers_of(model: nn.Module) -> list[str]:
    """The names of the model's layers, in order: the parts of every nn.ModuleList that is in no other and holds weights.

    Raises:
        ValueError: it has no such list.
    """
    default = [w.module_name for w in weights(model, products(model)) if w.default]
    names: list[str] = []
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(prefix.startswith(f"{name}.") for name in names):
            names += [f"{prefix}.{i}" if prefix else str(i) for i in range(len(module))]
    names = [name for name in names if any(w == name or w.startswith(f"{name}.") for w in default)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of layers; write rules over the names of its modules")
    return names


def select_layers(
    model: nn.Module, first: int = 0, last: int = 0, indices: Iterable[int] = (), config: RTNConfig | None = None
) -> list[tuple[str, RTNConfig | None]]:
    """Rules that give whole layers `config`, and prints what that costs. Put them before a rule for the rest:

        quantize_(model, select_layers(model, first=2) + select_modules(model, ["down_proj"]) + [("*", rtn_int4())])

    Args:
        model: one whose layers are in an nn.ModuleList; of several (an encoder's and a decoder's), the layers are counted on.
        first: so many layers at the start.
        last: so many at the end.
        indices: these too, from 0; negative ones count from the end.
        config: by default `rtn_int8()`.

    Raises:
        ValueError: the model has no such list, or not so many layers; or none is selected.
    """
    names = layers_of(model)
    count = len(names)
    asked = {*range(first), *range(count - last, count), *(i + count if i < 0 else i for i in indices)}
    if not asked or min(first, last) < 0 or not asked <= set(range(count)):
        raise ValueError(f"first={first}, last={last}, indices={list(indices)} of {count} layers; select 1 to {count} of them")
    config = config or rtn_int8()
    rules: list[tuple[str, RTNConfig | None]] = [(f"{names[i]}.*", config) for i in sorted(asked)]
    _say_cost(model, f"{len(asked)} of {count} layers", rules, config)
    return rules


def select_modules(model: nn.Module, names: Iterable[str], config: RTNConfig | None = None) -> list[tuple[str, RTNConfig | None]]:
    """Rules that give the modules of these kinds `config`, in every layer, and prints what that costs; see `select_layers`.

    Args:
        model: any module.
        names: last parts of modules' or experts' names, as "down_proj".
        config: by default `rtn_int8()`.

    Raises:
        ValueError: no weight has such a name; it says which are nearest.
    """
    if isinstance(names, str):
        raise TypeError(f"names is {names!r}; give a list, as in [{names!r}]")
    default = [w.names for w in weights(model, products(model)) if w.default]
    config = config or rtn_int8()
    names = list(names)
    rules: list[tuple[str, RTNConfig | None]] = []
    for name in names:
        patterns = [p for p in (f"*.{name}", name) if any(matches(p, *each) for each in default)]
        if not patterns:
            parts = (part for each in default for full in each if (part := full.rpartition(".")[2]) != "weight")
            raise ValueError(unmatched(name, parts))
        rules += [(pattern, config) for pattern in patterns]
    if not rules:
        raise ValueError("names is empty; give last parts of modules' names, as in ['down_proj']")
    _say_cost(model, ", ".join(names), rules, config)
    return rules
