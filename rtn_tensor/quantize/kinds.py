"""What modules do with their weights: which they multiply by, and why the others stay float."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.integrations import LISTENERS
from rtn_tensor.quantize.experts import is_router, routers, transposed_experts, unknown_experts
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.wording import with_article

FilterFn = Callable[[nn.Module, str], bool]

REMOVE_IT = "remove that first, or leave the module out"
COMPUTED = f"is computed by its module, not stored (a parametrization?); {REMOVE_IT}"

# --------------------------------------------------------------------------- what is multiplied by


def is_linear(module: nn.Module, fqn: str) -> bool:
    """Every nn.Linear that runs itself (torchao's rule)."""
    return isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear, which multiplies by a weight [in_features, out_features]."""
    transformers: Any = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def factors(module: nn.Module) -> dict[str, bool]:
    """The parameters that `module` is known to multiply by, as a linear does, by name; and whether they are
    stored `[..., in_features, out_features]`."""
    if isinstance(module, nn.Linear):
        return {"weight": False}
    if _is_conv1d(module):
        return {"weight": True}
    # The weight of its out_proj is that module's.
    if isinstance(module, nn.MultiheadAttention):
        return {name: False for name in _OF_ATTENTION if module._parameters.get(name) is not None}
    return transposed_experts(module)


def stored_transposed(module: nn.Module, name: str) -> bool:
    """Whether in_features is the last but one dim of the module's parameter `name`."""
    return factors(module).get(name, False)


def owns(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` is what is meant by the name of its module."""
    return name in factors(module) or (name == "weight" and isinstance(module, nn.Embedding))


# Linears of transformers whose weights are no factor of a product, by the class of the module that they
# belong to and their names in it: joined to another's columns, indexed by columns, or taken for a
# convolution's.
_REL_POS = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
_USED_OTHERWISE = {
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "LayoutLMv2Encoder": _REL_POS,
    "LayoutLMv3Encoder": _REL_POS,
    "PPDocLayoutV2ReadingOrderEncoder": _REL_POS,
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
}


def used_otherwise(model: nn.Module) -> set[nn.Module]:
    """The linears of `model` that are known not to multiply by their weights, and would fail with quantized
    ones."""
    found = set()
    for module in model.modules():
        for kind in type(module).__mro__:
            found |= {
                module._modules[name]
                for name in _USED_OTHERWISE.get(kind.__name__, ())
                if module._modules.get(name) is not None
            }
    return found  # type: ignore[return-value]


# What a layer with a recurrent state (Mamba, gated delta nets) has beside its large projections.
STEPS = {"x_proj", "dt_proj", "in_proj_ba", "in_proj_b", "in_proj_a", "a_proj", "b_proj"}
STEPS |= {"f_proj", "f_a_proj", "f_b_proj"}


def steps(model: nn.Module) -> set[nn.Module]:
    """The small linears that say how far a recurrent state moves at each token, and what it forgets: an error
    of theirs stays in the state. They belong to a module that holds the state's decay, `A_log`, or to the
    parent of one."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if any("A_log" in part._parameters for part in (module, *module.children())):
            linears = {n: m for n, m in module.named_children() if n in STEPS and isinstance(m, nn.Linear)}
            found |= set(linears.values())
    return found


ROUTER, OTHERWISE, STEP = (
    "router",
    "used otherwise than in a product",
    "steps of a recurrent state",
)


def kept_float(model: nn.Module) -> dict[nn.Module, str]:
    """The linears of `model` that stay float by default, and why."""
    return (
        dict.fromkeys(steps(model), STEP)
        | dict.fromkeys(routers(model), ROUTER)
        | dict.fromkeys(used_otherwise(model), OTHERWISE)
    )


def products(model: nn.Module) -> FilterFn:
    """The default `filter_fn`: every module that has `factors` but those that are `kept_float`."""
    kept = kept_float(model)
    return lambda module, fqn: module not in kept and bool(factors(module))


# --------------------------------------------------------------------------- what is not

# torch's modules whose weights are multiplied as matrices, or looked up by rows, and those that hold what
# others multiply by.
_MULTIPLYING = (nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.RNNCellBase)


_HOLDING = ("container", "module", "transformer")


def computed_from(module: nn.Module) -> set[str]:
    """The names of what the hooks of torch's older `weight_norm` and `spectral_norm` compute, and of what
    they compute it from."""
    hooks = [
        h
        for h in module._forward_pre_hooks.values()
        if type(h).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
    ]
    return {f"{hook.name}{end}" for hook in hooks for end in ("", "_g", "_v", "_orig")}  # type: ignore[attr-defined]


def no_product(module: nn.Module, name: str) -> tuple[str, str] | None:
    """Where `module` is of a kind that is known to use its parameter `name` in a way that a quantized weight
    cannot be used in: why, for a report, and what an error says of the parameter; else None."""
    if isinstance(module, ParametrizationList) or name in computed_from(module):
        return (
            "a parametrization or norm computes another weight from it",
            f"belongs to a parametrization or norm, which computes another weight from it; {REMOVE_IT}",
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return (
            "an nn.Embedding with max_norm rewrites its rows",
            "belongs to an nn.Embedding with max_norm, which rewrites rows of its weight; set "
            "max_norm to None, or leave it out",
        )
    known = [
        c
        for c in type(module).__mro__
        if c.__module__.startswith("torch.nn.modules.") and c.__module__.rpartition(".")[2] not in _HOLDING
    ]
    if known and (not isinstance(module, _MULTIPLYING) or name in ("bias_k", "bias_v")):
        return (
            f"weight of {with_article(known[0].__name__)}: no kernel",
            f"belongs to an nn.{known[0].__name__}, which no kernel here computes with a quantized weight; "
            "leave it out",
        )
    return None


def why_float(module: nn.Module, name: str, w: Tensor, kept: dict[nn.Module, str]) -> str:
    """Why the parameter `name` of `module`, `w`, is not quantized, in a few words; `kept` is
    `kept_float(model)`."""
    if isinstance(w, UninitializedParameter):
        return "uninitialized"
    if w.dim() < 2:
        return "vector"
    if w.dtype not in FLOAT_DTYPES:
        return f"of {w.dtype}"
    if why := no_product(module, name):
        return why[0]
    if w.dim() > 3:
        return f"has {w.dim()} dims"
    if owns(module, name):
        return kept.get(module, "not selected")
    kind = with_article(type(module).__name__)
    if name in unknown_experts(module):
        return f"experts of {kind}? not understood"
    if is_router(module):
        return ROUTER
    if isinstance(module, nn.RNNCellBase):
        return f"weight of {kind}: only by its full name"
    return f"weight of {kind}: use not known"


# ------------------------------------------------------------------------------- torch's encoder


def _without_nested_tensors(model: nn.Module) -> None:
    """`nn.TransformerEncoder` asks its first layer alone whether all take the nested tensors that it makes of
    padded text, and attention over quantized weights takes none."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(p, RTNQuantizedTensor) for p in module.parameters()
        ):
            module.use_nested_tensor = False


LISTENERS.append(_without_nested_tensors)
