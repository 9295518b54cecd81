"""The weights that a config, rules or an FqnToConfig select, and why some of them cannot be quantized."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from rtn_tensor.config import RTNConfig
from rtn_tensor.distributed import check_idle, columns_a_rank, everywhere, held, ranks_of
from rtn_tensor.formats import FLOAT_DTYPES, LARGEST_OF_8_BITS, SCALES_OF_8_BITS
from rtn_tensor.quantize import printing  # noqa: F401  (print(model) names what is quantized)
from rtn_tensor.quantize.experts import unknown_experts
from rtn_tensor.quantize.kinds import (
    COMPUTED,
    FilterFn,
    factors,
    no_product,
    owns,
    products,
    stored_transposed,
)
from rtn_tensor.quantize.selection import (
    Rules,
    bits_of,
    check_module,
    check_pattern,
    find,
    is_name,
    matches,
    resolve,
    tensors_of,
    weights,
)
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.wording import with_article


@dataclass(frozen=True)
class Target:
    module: nn.Module
    parameter_name: str
    fqn: str
    config: RTNConfig
    by_name: bool = False  # the parameter itself was named, so its module may be of any type

    @property
    def parameter(self) -> Tensor | None:
        return self.module._parameters.get(self.parameter_name)

    @property
    def transposed(self) -> bool:
        """Whether in_features is the last but one dim of the parameter."""
        return stored_transposed(self.module, self.parameter_name)


def _targets(model: nn.Module, config: RTNConfig, filter_fn: FilterFn) -> Iterator[Target]:
    for w in weights(model, filter_fn):
        if w.default:
            yield Target(w.module, w.parameter_name, w.fqn, config)


def _rule_targets(model: nn.Module, rules: Rules, filter_fn: FilterFn) -> Iterator[Target]:
    for w, config in resolve(rules, list(weights(model, filter_fn))):
        yield Target(w.module, w.parameter_name, w.fqn, config, by_name=True)


def _means(key: str, name: str) -> bool:
    """Whether a key of FqnToConfig, which knows no wildcards, is the whole of `name`, or matches it after
    "re:"."""
    return matches(key, name) if key.startswith("re:") else key == name


def keys_for(
    table: Mapping[str, Any], prefix: str, module: nn.Module, name: str, parameter: Tensor
) -> list[str]:
    """The keys of an FqnToConfig that are for a parameter, by torchao's precedence: the parameter's name, its
    module's name, "re:" on the parameter, "re:" on the module."""
    fqn = f"{prefix}.{name}" if prefix else name
    owns_weight = owns(module, name)
    patterns = [key for key in table if key.startswith("re:")]
    # A pattern for a layer's weight is not meant for its bias.
    vector = not isinstance(parameter, UninitializedParameter) and parameter.dim() < 2
    by_parameter = [key for key in patterns if not vector and matches(key, fqn)]
    by_module = [key for key in patterns if owns_weight and matches(key, prefix)]
    return (
        [key for key in (fqn, *([prefix] if owns_weight else [])) if key in table] + by_parameter + by_module
    )


def _fqn_targets(model: nn.Module, config: FqnToConfig) -> Iterator[Target]:
    """The first of `keys_for` decides; without any, "_default" does, on what is quantized by default."""
    table: Mapping[str, Any] = config.fqn_to_config
    for key in table:
        check_pattern(key, f"FqnToConfig: {key!r}")
    # What stays float may be any module or vector.
    named = [name for names in (model.named_modules(), model.named_parameters()) for name, _ in names]
    floats = {key for key in table if table[key] is None and any(_means(key, name) for name in named)}
    unseen = set(table) - {"_default"} - floats
    by_default = products(model)
    for fqn, module, name, parameter in tensors_of(model):
        prefix = fqn.removesuffix(name).removesuffix(".")
        keys = keys_for(table, prefix, module, name, parameter)
        unseen.difference_update(keys)
        if not keys and name in factors(module) and by_default(module, prefix):
            keys = ["_default"]
        found: Any = table.get(keys[0]) if keys else None
        if found is not None:
            yield Target(module, name, fqn, found, by_name=True)
    if unseen:
        raise ValueError(
            f"FqnToConfig names {', '.join(sorted(unseen))}, which is no parameter and no linear or "
            "embedding of the model; "
            "use a name from model.named_parameters(), or a pattern 're:...' that matches the whole of one"
        )


def is_finite(t: Tensor) -> bool:
    """Whether `t` holds no NaN or inf, in one pass and no copy."""
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


def why_unfit(target: Target) -> str | None:
    """None where the weight can be quantized, else why it cannot, and what to do."""
    whole: Any = target.parameter
    w: Any = held(whole)
    if not isinstance(target.config, RTNConfig):
        return (
            f"has {with_article(type(target.config).__name__)} as its config; use rtn_int4(), rtn_int8() or "
            "None here, or torchao's own quantize_"
        )
    if w is None:
        return COMPUTED
    if isinstance(w, RTNQuantizedTensor):
        return (
            f"is already quantized ({w.bits} bits, group_size={w.group_size}); leave it out, or "
            "dequantize_ the model first"
        )
    if isinstance(w, UninitializedParameter):
        return "is uninitialized until its module has run; call the model once, or leave it out"
    if w.dtype not in FLOAT_DTYPES or type(w) not in (Tensor, nn.Parameter):
        return (
            f"is {type(w).__name__} of {w.dtype}; only plain {', '.join(map(str, FLOAT_DTYPES))} "
            "weights can be quantized. Convert it, or leave it out"
        )
    if w.dim() > 1 and (why := no_product(target.module, target.parameter_name)):
        return why[1]
    if w.dim() not in (2, 3):
        return f"has shape {tuple(w.shape)}; a weight must be [N, K], or [E, N, K] for experts. Leave it out"
    if not target.by_name and not owns(target.module, target.parameter_name):
        kind = type(target.module).__name__
        return (
            f"belongs to {with_article(kind)}; a filter can select only nn.Linear and nn.Embedding weights. "
            "Leave it out, or name it in FqnToConfig"
        )
    dim, group_size = -2 if target.transposed else -1, target.config.group_size
    columns, all_columns = columns_a_rank(whole, dim), whole.shape[dim]
    if isinstance(target.module, nn.Linear) and target.parameter_name == "weight":
        all_columns = target.module.in_features  # transformers gives a rank's part as a plain tensor
    if columns < all_columns and group_size != -1 and columns % group_size:
        return (
            f"is cut into {columns} columns per rank, inside a group of {group_size}; use a group_size that "
            f"divides {columns}, -1, or "
            "another number of ranks"
        )
    if w.is_meta:
        return None
    if not everywhere(is_finite(w.detach()), ranks_of(whole)):
        return "holds NaN or inf; repair the checkpoint, or leave the weight out"
    why = too_large(w, target.config.scale_method)
    if everywhere(why is None, ranks_of(whole)):
        return None
    return why or "has weights on another rank that are too large for 8-bit scales; that rank says more"


def too_large(w: Tensor, scale_method: str) -> str | None:
    """Why `w`, of finite numbers, cannot have scales by this method; None where it can."""
    if scale_method not in SCALES_OF_8_BITS or not w.numel():
        return None
    if (largest := float(w.detach().abs().max())) <= LARGEST_OF_8_BITS:
        return None
    return (
        f"has weights of up to {largest:.3g}, and the 8-bit scales of {scale_method!r} are for weights of at "
        f"most {LARGEST_OF_8_BITS:g}; use {SCALES_OF_8_BITS[scale_method]!r} for it"
    )


def check_targets(targets: list[Target]) -> None:
    problems: dict[str, list[str]] = defaultdict(list)
    configs: dict[int, Target] = {}
    for t in targets:
        if why := why_unfit(t):
            problems[why].append(t.fqn)
            continue
        other = configs.setdefault(id(t.parameter), t)
        if other.config != t.config:
            problems[f"shares its weight with {other.fqn} but has another config; give both the same"].append(
                t.fqn
            )
    if problems:
        lines = [
            f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {why}"
            for why, names in problems.items()
        ]
        raise ValueError("cannot quantize, and nothing was changed:\n  " + "\n  ".join(lines))


def _unknown(model: nn.Module, config: AOBaseConfig | Rules, selected: set[str]) -> list[str]:
    """Names of what may be experts' weights, and is neither selected nor named by `config`."""
    if isinstance(config, FqnToConfig):
        keys = config.fqn_to_config
        named = lambda n: any(_means(key, n) for key in keys)  # noqa: E731
    else:
        rules = config if isinstance(config, Sequence) else []
        named = lambda n: find(rules, n) is not None  # noqa: E731
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in unknown_experts(module)
    ]
    return [n for n in names if n not in selected and not named(n)]


def _bytes(target: Target) -> tuple[int, float]:
    """Of the weight as it is, and quantized."""
    w: Any = target.parameter
    shape = (w.mT if target.transposed else w).shape
    return w.numel() * w.itemsize, bits_of(shape, target.config, 8 * w.itemsize) / 8


def _not_larger(model: nn.Module, targets: list[Target], config: RTNConfig | Rules) -> list[Target]:
    """`targets` without what would be copies beside float weights that stay, where the copies would take more
    than all others save: the output layer of a small model with a large vocabulary, which is tied to the
    embedding. What a rule names in full is kept."""
    names = {t.fqn for t in targets}
    left = {id(w) for fqn, _, _, w in tensors_of(model) if fqn not in names}
    copies = {id(t.parameter): t for t in targets if id(t.parameter) in left}
    others = {id(t.parameter): t for t in targets if id(t.parameter) not in left}
    saved = sum(before - after for before, after in map(_bytes, others.values()))
    if not others or sum(_bytes(t)[1] for t in copies.values()) <= saved:
        return targets
    rules = config if isinstance(config, Sequence) else []
    full = [pattern for pattern, _ in rules if is_name(pattern)]
    return [
        t
        for t in targets
        if id(t.parameter) not in left or t.fqn in full or t.fqn.removesuffix(".weight") in full
    ]


def targets_of(model: nn.Module, config: AOBaseConfig | Rules, filter_fn: FilterFn | None) -> list[Target]:
    """The weights that `quantize_` would quantize, checked; it says what it raises."""
    check_module(model, "give a module, or quantize a folder by load(path, config)")
    check_idle(model)
    if not (filter_fn is None or callable(filter_fn)):
        raise TypeError(
            f"filter_fn is {filter_fn!r}; give a function of a module and its name, or choose by rules"
        )
    if isinstance(config, FqnToConfig):
        if filter_fn is not None:
            raise ValueError("FqnToConfig says itself which weights to quantize; leave filter_fn out")
        targets = list(_fqn_targets(model, config))
    elif isinstance(config, RTNConfig):
        targets = list(_targets(model, config, filter_fn or products(model)))
    elif isinstance(config, Sequence) and not isinstance(config, str):
        targets = list(_rule_targets(model, config, filter_fn or products(model)))
    else:
        kind = type(config).__name__
        raise TypeError(
            f"config is {with_article(kind)}; use rtn_int4(), rtn_int8(), rtn(...), a list of rules, or "
            "FqnToConfig with those"
        )
    check_targets(targets)
    if filter_fn is None and not isinstance(config, FqnToConfig):
        targets = _not_larger(model, targets, config)
    if unknown := _unknown(model, config, {t.fqn for t in targets}):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        warnings.warn(
            f"{unknown[0]}{more} may be experts' weights, but how they are used is not understood, and they "
            "stay float; name them in "
            "a rule or FqnToConfig, to quantize them along their last dim",
            stacklevel=3,
        )
    if not targets:  # at the line that called `quantize_` or `load`
        warnings.warn(
            "no weight is selected, and so none quantized; check filter_fn or the names in the config",
            stacklevel=3,
        )
    return targets
