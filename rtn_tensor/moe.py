"""Mixture-of-experts layers: which parameters are experts' weights, and the function that runs them quantized.

transformers keeps the experts of a layer in 3-D parameters of one module, `[E, 2 I, H]` for gate and up and `[E, H, I]` for down, or with
the last two dims swapped, and runs them by one of several functions (`ALL_EXPERTS_FUNCTIONS`). Ours is registered there as "rtn".
"""

import re
import sys
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor import ops, reference
from rtn_tensor.tensor import RTNQuantizedTensor

IMPLEMENTATION = "rtn"

# ------------------------------------------------------------------------------------------- which parameters


def _stacks(module: nn.Module) -> dict[str, Tensor]:
    """The module's own 3-D float parameters; those of torch's own modules (convolutions, say) are no experts'."""
    if type(module).__module__.startswith("torch.nn."):
        return {}
    return {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.dim() == 3 and (p.is_floating_point() or isinstance(p, RTNQuantizedTensor))
    }


def transposed_experts(module: nn.Module) -> dict[str, bool]:
    """The parameters of `module` that are experts' weights, by name, and whether they are `[E, in_features, out_features]`.

    transformers' modules say it themselves. Of others, two weights whose shapes fit one another as up (or gate and up) and down of one
    layer, in one way only: `[E, 2 I, H]` and `[E, H, I]`, or `[E, H, 2 I]` and `[E, I, H]`.
    """
    stacks = _stacks(module)
    if not stacks:
        return {}
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return dict.fromkeys(stacks, bool(module.is_transposed))
    if len(stacks) != 2:
        return {}
    ways = set()
    for up, down in permutations(stacks.values()):
        (e, a, b), (e_, c, d) = up.shape, down.shape
        if e == e_ and b == c and a in (d, 2 * d):
            ways.add(False)
        if e == e_ and a == d and b in (c, 2 * c):
            ways.add(True)
    return dict.fromkeys(stacks, True in ways) if len(ways) == 1 else {}


def unknown_experts(module: nn.Module) -> list[str]:
    """Names of 3-D parameters that look like experts' weights, several matrices of 32 and more a side, and are not understood."""
    known = transposed_experts(module)
    stacks = {n: p.shape for n, p in _stacks(module).items() if n not in known and p.shape[0] > 1 and min(p.shape[1:]) >= 32}
    return [
        name
        for name, shape in stacks.items()
        if "expert" in f"{type(module).__name__} {name}".lower()
        or any(_may_be_up_and_down(shape, other) for another, other in stacks.items() if another != name)
    ]


def _may_be_up_and_down(one: torch.Size, other: torch.Size) -> bool:
    """Whether, however they lie, they have the model's width in common, and beside it the experts' width or twice that (gate and up)."""
    (e, *one_sides), (e_, *other_sides) = one, other
    ways = [(a, b, c, d) for a, b in (one_sides, one_sides[::-1]) for c, d in (other_sides, other_sides[::-1])]
    return e == e_ and any(a == c and (b == d or b == 2 * d or d == 2 * b) for a, b, c, d in ways)


ROUTING = {"router", "routers", "routing", "gate", "gates", "gating"}


def _words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+", name)}


def _chooses(name: str, module: nn.Module) -> bool:
    return bool((ROUTING | {"switch", "wg"}) & _words(name) or ROUTING & _words(type(module).__name__))


def _count(module: nn.Module) -> int:
    """How many modules, or matrices in one parameter, `module` holds side by side; 0 where it holds none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module)
    lists = [len(child) for child in module.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
    return next(iter([stack.shape[0] for stack in _stacks(module).values()] + lists), getattr(module, "num_experts", 0))


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
        sized = [n for n, child in children.items() if isinstance(child, nn.Linear) and child.out_features in counts]
        # A head may have as many classes: what has no such name counts only where nothing else chooses.
        unnamed = not choosing and not any(ROUTING & _words(name) for name in parent._parameters)
        found |= {children[name] for name in sized if unnamed or name in choosing}
        for child in choosing.values():
            found |= set() if isinstance(child, nn.Linear) else set(_linears(child))
    for experts in lists:  # of which nothing says that they are experts
        inputs = {parts[0].in_features for expert in experts if (parts := _linears(expert))}
        for child in choosing.values():
            parts = _linears(child)
            if parts and len(experts) > 1 and parts[-1].out_features == len(experts) and inputs == {parts[0].in_features}:
                found |= set(parts)
    return found


def routers(model: nn.Module) -> set[nn.Module]:
    """The linears that choose among experts. They are small, an error of theirs sends a token elsewhere, and so they stay float unless they
    are named.

    They are what is called a router; beside experts, all of what is called a gate or the like, or, where nothing is, what has an output
    for each; and beside a list of equal modules that are called nothing, a gate with their number of inputs and an output for each. A
    list alone is none: a head may have as many classes as a model has layers.
    """
    found = {
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "router" in _words(name.rpartition(".")[2])
    }
    return found.union(*(_routers_of(parent) for parent in model.modules()))


# ------------------------------------------------------------------------------------------- running them


def _is_silu(act_fn: Any) -> bool:
    """Whether calling `act_fn` is silu and nothing else: of a class of which this is known, without a `forward` of its own or hooks."""
    if act_fn is nn.functional.silu:
        return True
    activations: Any = sys.modules.get("transformers.activations")
    kind = type(act_fn)
    known = kind is nn.SiLU or (activations is not None and kind is activations.SiLUActivation)
    return (
        known and getattr(act_fn.forward, "__func__", None) is kind.forward and not act_fn._forward_hooks and not act_fn._forward_pre_hooks
    )


def activation_of(module: Any) -> str | None:
    """Which of `reference.ACTIVATIONS` the experts of a transformers module compute between their products; None where it is none of them.

    What the module is decides it: trying `_apply_gate` on some numbers would miss a clamp beyond them. It is asked at every call, as an
    `act_fn` or a limit can be exchanged.
    """
    gate = getattr(getattr(module, "_apply_gate", None), "__func__", None)
    if gate is None or not module.has_gate:
        return None
    if gate.__module__ == "transformers.integrations.moe":  # what experts have that bring no gate of their own
        return "silu" if _is_silu(module.act_fn) else None
    if gate.__module__ == "transformers.models.gpt_oss.modeling_gpt_oss":
        known = reference.ACTIVATIONS["gpt_oss"]
        return "gpt_oss" if (module.alpha, module.limit) == (known.alpha, known.limit) else None
    return None


def _product(x: Tensor, w: Tensor, offs: Tensor, transposed: bool, bias: Tensor | None, of_row: Tensor) -> Tensor:
    """Rows of `x`, sorted by expert, through the experts of `w`, with gradients."""
    y = torch.nn.functional.grouped_mm(x, w if transposed else w.transpose(-2, -1), offs=offs)
    return y if bias is None else y + bias[of_row]


def run(
    x: Tensor,
    up: RTNQuantizedTensor,
    down: RTNQuantizedTensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    experts: Tensor,
    router: Tensor | None,
    top_k: int,
    activation: str | Callable[[Tensor], Tensor],
) -> Tensor:
    """Quantized experts in two launches, whatever the routing: one for gate, up and the activation, one for down and the router's weights.

    Args:
        x: `[T, H]`, of the weights' dtype.
        up, down: `[E, 2 I, H]` and `[E, H, I]`, biases `[E, 2 I]` and `[E, H]`.
        experts: `[T * top_k]`, the expert of each pair of a token and one of its experts; of one that is not in 0 .. E - 1 the row is zero.
        router: `[T * top_k]`, what each pair's row is multiplied by.
        activation: one of `reference.ACTIVATIONS`; or a function of `[T * top_k, 2 I]`, called between the launches, which are then without
            gradients.

    Returns:
        `[T * top_k, H]`; the sum over top_k is the caller's.
    """
    # A pair a program, where they are so few that hardly two have the same expert: sorting them would take as long as a product.
    handful = x.is_cuda and len(experts) <= max(8, up.shape[0] // 4)
    pairs, offs = (None, None) if handful else reference.sorted_pairs(experts, up.shape[0])
    (up_planes, up_format), (down_planes, down_format) = (((w.qdata, w.scale), (w.bits, w.group_size)) for w in (up, down))
    named = activation if isinstance(activation, str) else ""
    h = ops.routed(x, *up_planes, up_bias, experts, pairs, offs, None, top_k, named, *up_format)
    if not isinstance(activation, str):
        h = activation(h)
    return ops.routed(h, *down_planes, down_bias, experts, pairs, offs, router, 1, "", *down_format)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a transformers module, `hidden_states [T, H]`, `top_k_index` and `top_k_weights` `[T, top_k]` -> `[T, H]`.

    Quantized, they are `run`, with the module's own activation where no kernel has it. Where a gradient may be asked for, they are two
    grouped products, and the module's own activation between them.
    """
    names = ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")
    up, down = (getattr(self, name) for name in names)
    if not (isinstance(up, RTNQuantizedTensor) and isinstance(down, RTNQuantizedTensor)):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    up_bias, down_bias = (getattr(self, f"{name}_bias") if self.has_bias else None for name in names)
    tokens, top_k = top_k_index.shape
    experts, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    x = hidden_states
    has_norm = getattr(self, "has_post_expert_norm", False)  # transformers' from 5.20 on
    learned = [t for t in (x, weights, up_bias, down_bias) if t is not None and t.requires_grad]
    activation, own = activation_of(self), self._apply_gate if self.has_gate else self.act_fn
    fused = (
        not (torch.is_grad_enabled() and (learned or activation is None))  # an activation may have parameters
        and not ops.transformed()  # it has no derivative
        and x.dtype == up.dtype == down.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )
    if fused:
        router = None if has_norm else weights
        y = run(x, up, down, up_bias, down_bias, experts, router, top_k, activation or own)
        if router is None:
            y = self.post_expert_norm(y) * weights[:, None]
        return y.view(tokens, top_k, y.shape[-1]).sum(1).to(x.dtype)
    pairs, offs = reference.sorted_pairs(experts, up.shape[0])
    of_row = experts[pairs].clamp(0, up.shape[0] - 1)
    h = _product(x[pairs // top_k].to(up.dtype), up, offs, self.is_transposed, up_bias, of_row)
    y = _product(own(h).to(down.dtype), down, offs, self.is_transposed, down_bias, of_row)
    if has_norm:
        y = self.post_expert_norm(y)
    y = y * weights[pairs][:, None]
    back = torch.empty_like(pairs, dtype=torch.int64).scatter_(0, pairs.long(), torch.arange(len(pairs), device=pairs.device))
    return y[back].view(tokens, top_k, y.shape[-1]).sum(1).to(x.dtype)


def use(model: nn.Module) -> None:
    """Has transformers' modules of quantized experts in `model` run them by `experts_forward`, and all that share a config with them.

    `quantize_` and `load` do it. `model.set_experts_implementation(...)` chooses another."""
    transformers: Any = sys.modules.get("transformers.integrations.moe")
    module: Any
    for module in model.modules() if transformers else ():
        is_transformers = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
        if is_transformers and any(isinstance(w, RTNQuantizedTensor) for w in _stacks(module).values()):
            transformers.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
            module.config._experts_implementation = IMPLEMENTATION
