"""The function by which transformers runs quantized experts, registered in its `ALL_EXPERTS_FUNCTIONS` as
`rtn`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor import _torch, reference
from rtn_tensor.integrations.experts import run
from rtn_tensor.quantize.experts import stacks_of
from rtn_tensor.tensor import RTNQuantizedTensor

IMPLEMENTATION = "rtn"


def _is_silu(act_fn: Any) -> bool:
    """Whether calling `act_fn` is silu and nothing else: of a class of which this is known, without a
    `forward` of its own or hooks."""
    if act_fn is nn.functional.silu:
        return True
    activations: Any = sys.modules.get("transformers.activations")
    kind = type(act_fn)
    known = kind is nn.SiLU or (activations is not None and kind is activations.SiLUActivation)
    return (
        known
        and getattr(act_fn.forward, "__func__", None) is kind.forward
        and not act_fn._forward_hooks
        and not act_fn._forward_pre_hooks
    )


def activation_of(module: Any) -> str | None:
    """Which of `reference.ACTIVATIONS` the experts of a transformers module compute between their products;
    None where it is none of them.

    What the module is decides it: trying `_apply_gate` on some numbers would miss a clamp beyond them. It is
    asked at every call, as an `act_fn` or a limit can be exchanged.
    """
    gate = getattr(getattr(module, "_apply_gate", None), "__func__", None)
    if gate is None or not module.has_gate:
        return None
    # What experts have that bring no gate of their own.
    if gate.__module__ == "transformers.integrations.moe":
        return "silu" if _is_silu(module.act_fn) else None
    if gate.__module__ == "transformers.models.gpt_oss.modeling_gpt_oss":
        known = reference.ACTIVATIONS["gpt_oss"]
        return "gpt_oss" if (module.alpha, module.limit) == (known.alpha, known.limit) else None
    return None


def _product(
    x: Tensor, w: Tensor, offs: Tensor, transposed: bool, bias: Tensor | None, of_row: Tensor
) -> Tensor:
    """Rows of `x`, sorted by expert, through the experts of `w`, with gradients."""
    y = torch.nn.functional.grouped_mm(x, w if transposed else w.transpose(-2, -1), offs=offs)
    return y if bias is None else y + bias[of_row]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a transformers module, `hidden_states [T, H]`, `top_k_index` and `top_k_weights` `[T,
    top_k]` -> `[T, H]`.

    Quantized, they are `run`, with the module's own activation where no kernel has it. Where a gradient may
    be asked for, they are two grouped products, and the module's own activation between them.
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
        and not _torch.transformed()  # it has no derivative
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
    back = torch.empty_like(pairs, dtype=torch.int64).scatter_(
        0, pairs.long(), torch.arange(len(pairs), device=pairs.device)
    )
    return y[back].view(tokens, top_k, y.shape[-1]).sum(1).to(x.dtype)


@contextmanager
def one_by_one(module: Any) -> Iterator[None]:
    """Meanwhile transformers runs the float experts of `module` as the module itself does, a product for
    each."""
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        yield
        return
    before = module.config._experts_implementation
    module.config._experts_implementation = "eager"
    try:
        yield
    finally:
        module.config._experts_implementation = before


def register_experts() -> None:
    """Has transformers know `experts_forward` by the name that the config of a quantized model has."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def use_experts(model: nn.Module) -> None:
    """Has transformers' modules of quantized experts in `model` run them by `experts_forward`, and all that
    share a config with them.

    `quantize_` and `load` do it. `model.set_experts_implementation(...)` chooses another."""
    module: Any
    for module in model.modules() if "transformers.integrations.moe" in sys.modules else ():
        is_transformers = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
        if is_transformers and any(isinstance(w, RTNQuantizedTensor) for w in stacks_of(module).values()):
            register_experts()
            module.config._experts_implementation = IMPLEMENTATION
