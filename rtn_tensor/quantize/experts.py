"""Which parameters of a model are experts' weights, and which of its linears choose among experts
(routers)."""

import re
from itertools import permutations

import torch
from torch import Tensor, nn

from rtn_tensor.tensor import RTNQuantizedTensor


def stacks_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own 3-D float parameters; those of torch's own modules (convolutions, say) are no
    experts'."""
    if type(module).__module__.startswith("torch.nn."):
        return {}
    return {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.dim() == 3 and (p.is_floating_point() or isinstance(p, RTNQuantizedTensor))
    }


def transposed_experts(module: nn.Module) -> dict[str, bool]:
    """The parameters of `module` that are experts' weights, by name, and whether they are `[E, in_features,
    out_features]`.

    transformers' modules say it themselves. Of others, two weights whose shapes fit one another as up (or
    gate and up) and down of one layer, in one way only: `[E, 2 I, H]` and `[E, H, I]`, or `[E, H, 2 I]` and
    `[E, I, H]`; one weight whose module says what goes in and comes out; or matrices that the module's
    numbers of experts and features say are experts' rows below one another.
    """
    if "A_log" in module._parameters:  # it has heads of a recurrent state (Zamba), not experts
        return {}
    stacks = stacks_of(module)
    if not stacks:
        return dict.fromkeys(_rows_of_experts(module), False)
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return dict.fromkeys(stacks, bool(module.is_transposed))
    if len(stacks) == 1:
        return _one_stack(module, *stacks.items())
    if len(stacks) != 2:
        return {}
    # LongCat has room in the one for experts that compute nothing.
    any_count = "experts" in _words(type(module).__name__)
    ways = set()
    for up, down in permutations(stacks.values()):
        (e, a, b), (e_, c, d) = up.shape, down.shape
        if e != e_ and not (any_count and min(e, e_) > 1):
            continue
        if b == c and a in (d, 2 * d):
            ways.add(False)
        if a == d and b in (c, 2 * c):
            ways.add(True)
    return dict.fromkeys(stacks, True in ways) if len(ways) == 1 else {}


def _one_stack(module: nn.Module, item: tuple[str, Tensor]) -> dict[str, bool]:
    """`transposed_experts`, of a module with one weight, as JetMoE's for gate and up: it holds its sizes."""
    name, w = item
    count, *sides = w.shape
    sizes = [
        (getattr(module, f"output_{kind}", None), getattr(module, f"input_{kind}", None))
        for kind in ("size", "dim")
    ] + [(getattr(module, "out_features", None), getattr(module, "in_features", None))]
    if getattr(module, "num_experts", None) == count:
        for out_in in sizes:
            # Where both are equal, they lie as those of any linear do.
            if tuple(sides) in (out_in, out_in[::-1]):
                return {name: tuple(sides) != out_in}
    return {}


def _rows_of_experts(module: nn.Module) -> list[str]:
    """The names of two matrices or more `[E * I, H]`, as DBRX has them: a module that holds E, I and H, and
    is called an expert, views them as `[E, I, H]`."""
    if "expert" not in "".join(_words(type(module).__name__)):
        return []
    found = [
        getattr(module, name, None)
        for name in ("moe_num_experts", "num_experts", "ffn_hidden_size", "intermediate_size", "hidden_size")
    ]
    experts, width, hidden = found[0] or found[1], found[2] or found[3], found[4]
    if not (isinstance(experts, int) and isinstance(width, int) and experts > 1 and width > 1):
        return []
    names = [
        n for n, p in module._parameters.items() if p is not None and p.shape == (experts * width, hidden)
    ]
    return names if len(names) > 1 else []


def unknown_experts(module: nn.Module) -> list[str]:
    """Names of 3-D parameters that look like experts' weights, several matrices of 32 and more a side, and
    are not understood."""
    known = transposed_experts(module)
    stacks = {
        n: p.shape
        for n, p in stacks_of(module).items()
        if n not in known and p.shape[0] > 1 and min(p.shape[1:]) >= 32
    }
    return [
        name
        for name, shape in stacks.items()
        if "expert" in f"{type(module).__name__} {name}".lower()
        or any(_may_be_up_and_down(shape, other) for another, other in stacks.items() if another != name)
    ]


def _may_be_up_and_down(one: torch.Size, other: torch.Size) -> bool:
    """Whether, however they lie, they have the model's width in common, and beside it the experts' width or
    twice that (gate and up)."""
    (e, *one_sides), (e_, *other_sides) = one, other
    ways = [
        (a, b, c, d) for a, b in (one_sides, one_sides[::-1]) for c, d in (other_sides, other_sides[::-1])
    ]
    return e == e_ and any(a == c and (b == d or b == 2 * d or d == 2 * b) for a, b, c, d in ways)


ROUTING = {"router", "routers", "routing", "gate", "gates", "gating"}


def _words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+", name)}


def is_router(module: nn.Module) -> bool:
    """Whether `module` is of a class that is called a router."""
    return bool(ROUTING & _words(type(module).__name__))


def _chooses(name: str, module: nn.Module) -> bool:
    return bool((ROUTING | {"switch", "wg"}) & _words(name)) or is_router(module)


def _count(module: nn.Module) -> int:
    """How many modules, or matrices in one parameter, `module` holds side by side; 0 where it holds none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module)
    lists = [len(child) for child in module.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
    return next(
        iter([stack.shape[0] for stack in stacks_of(module).values()] + lists),
        getattr(module, "num_experts", 0),
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _routers_of(parent: nn.Module) -> set[nn.Module]:
    children = dict(parent.named_children())
    choosing = {name: child for name, child in children.items() if _chooses(name, child)}
    counts = {_count(parent)} if transposed_experts(parent) else set()
    lists: list[nn.ModuleList] = []
    for name, child in children.items():
        words = _words(name)
        called = "shared" not in words and {"expert", "experts"} & (words | _words(type(child).__name__))
        if name not in choosing and (called or transposed_experts(child)):
            counts.add(_count(child))
        elif isinstance(child, nn.ModuleList) and len({type(part) for part in child}) == 1:
            lists.append(child)
    counts -= {0, 1}
    found: set[nn.Module] = set()
    if counts:
        sized = [
            n
            for n, child in children.items()
            if isinstance(child, nn.Linear) and child.out_features in counts
        ]
        # A head may have as many classes: what has no such name counts only where nothing else chooses.
        unnamed = not choosing and not any(ROUTING & _words(name) for name in parent._parameters)
        found |= {children[name] for name in sized if unnamed or name in choosing}
        for child in choosing.values():
            found |= set() if isinstance(child, nn.Linear) else set(_linears(child))
    for experts in lists:  # of which nothing says that they are experts
        inputs = {parts[0].in_features for expert in experts if (parts := _linears(expert))}
        for child in choosing.values():
            parts = _linears(child)
            if (
                parts
                and len(experts) > 1
                and parts[-1].out_features == len(experts)
                and inputs == {parts[0].in_features}
            ):
                found |= set(parts)
    return found


def routers(model: nn.Module) -> set[nn.Module]:
    """The linears that choose among experts. They are small, an error of theirs sends a token elsewhere, and
    so they stay float unless they are named.

    They are what is called a router; beside experts, all of what is called a gate or the like, or, where
    nothing is, what has an output for each; and beside a list of equal modules that are called nothing, a
    gate with their number of inputs and an output for each. A list alone is none: a head may have as many
    classes as a model has layers.
    """
    found = {
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "router" in _words(name.rpartition(".")[2])
    }
    return found.union(*(_routers_of(parent) for parent in model.modules()))
