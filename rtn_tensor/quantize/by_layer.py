"""Rules that give whole layers, or modules of a kind, another format than the rest."""

from collections.abc import Iterable

from torch import nn

from rtn_tensor.config import RTNConfig, rtn, rtn_int8
from rtn_tensor.quantize.kinds import products
from rtn_tensor.quantize.selection import (
    Rules,
    bits_of,
    check_module,
    find,
    matches,
    parameter_of,
    scale_bits_of,
    shape_of,
    unmatched,
    weights,
)


class Selection(list[tuple[str, RTNConfig | None]]):
    """Rules, a list like any other, whose `str()` says what they cost."""

    def __init__(self, model: nn.Module, what: str, rules: Rules, config: RTNConfig):
        super().__init__(rules)
        default = [w for w in weights(model, products(model)) if w.default]
        chosen = [w for w in default if find(rules, *w.names) is not None]
        total, count = (sum(parameter_of(w).numel() for w in some) for some in (default, chosen))
        bits = sum(bits_of(shape_of(w), config, scale_bits_of(w)) for w in chosen)
        at_4 = sum(bits_of(shape_of(w), rtn(4, config.group_size), scale_bits_of(w)) for w in chosen)
        self._cost = (
            f"{what}: {count:,} of {total:,} weights at {bits / count:.3f} bits per weight, "
            f"{(bits - at_4) / total:+.3f} bits per weight on average from 4-bit"
        )

    def __str__(self) -> str:
        return self._cost


def layers_of(model: nn.Module) -> list[str]:
    """The names of the model's layers, in order: the parts of every nn.ModuleList that is in no other and
    holds weights.

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
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of layers; write rules over the names "
            "of its modules"
        )
    return names


def select_layers(
    model: nn.Module,
    first: int = 0,
    last: int = 0,
    indices: Iterable[int] = (),
    config: RTNConfig | None = None,
) -> Selection:
    """Rules that give whole layers `config`; their `str()` says what that costs. Put them before a rule for
    the rest:

        rules = select_layers(model, first=2) + select_modules(model, ["down_proj"])
        quantize_(model, rules + [("*", rtn_int4())])

    Args:
        model: one whose layers are in an nn.ModuleList; of several (an encoder's and a decoder's), the layers
            are counted on.
        first: so many layers at the start.
        last: so many at the end.
        indices: these too, from 0; negative ones count from the end.
        config: by default `rtn_int8()`.

    Raises:
        ValueError: the model has no such list, or not so many layers; or none is selected.
    """
    check_module(model)
    names = layers_of(model)
    count = len(names)
    asked = {*range(first), *range(count - last, count), *(i + count if i < 0 else i for i in indices)}
    if not asked or min(first, last) < 0 or not asked <= set(range(count)):
        raise ValueError(
            f"first={first}, last={last}, indices={list(indices)} of {count} layers; select 1 "
            f"to {count} of them"
        )
    config = config or rtn_int8()
    rules: list[tuple[str, RTNConfig | None]] = [(f"{names[i]}.*", config) for i in sorted(asked)]
    return Selection(model, f"{len(asked)} of {count} layers", rules, config)


def select_modules(model: nn.Module, names: Iterable[str], config: RTNConfig | None = None) -> Selection:
    """Rules that give the modules of these kinds `config`, in every layer; see `select_layers`.

    Args:
        model: any module.
        names: last parts of modules' or experts' names, as "down_proj".
        config: by default `rtn_int8()`.

    Raises:
        ValueError: no weight has such a name; it says which are nearest.
    """
    check_module(model)
    if isinstance(names, str):
        raise TypeError(f"names is {names!r}; give a list, as in [{names!r}]")
    default = [w.names for w in weights(model, products(model)) if w.default]
    config = config or rtn_int8()
    names = list(names)
    rules: list[tuple[str, RTNConfig | None]] = []
    for name in names:
        patterns = [p for p in (f"*.{name}", name) if any(matches(p, *each) for each in default)]
        if not patterns:
            parts = (
                part for each in default for full in each if (part := full.rpartition(".")[2]) != "weight"
            )
            raise ValueError(unmatched(name, parts))
        rules += [(pattern, config) for pattern in patterns]
    if not rules:
        raise ValueError("names is empty; give last parts of modules' names, as in ['down_proj']")
    return Selection(model, ", ".join(names), rules, config)
