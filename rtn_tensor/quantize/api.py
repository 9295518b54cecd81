"""`quantize_`, which checks every weight before it changes one, its undoing, and the report of what is quantized."""

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, register_quantize_module_handler

from rtn_tensor import _torchao
from rtn_tensor.config import RTNConfig, RTNInt4WeightConfig, RTNInt8WeightConfig
from rtn_tensor.distributed import as_part, check_idle, columns_a_rank, everywhere, fully_sharded, held, ranks_of
from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.integrations import on_quantized
from rtn_tensor.quantize import printing  # noqa: F401  (print(model) names what is quantized)
from rtn_tensor.quantize.experts import routers, transposed_experts, unknown_experts
from rtn_tensor.quantize.selection import (
    COMPUTED,
    REMOVE_IT,
    FilterFn,
    Rules,
    check_pattern,
    find,
    is_linear,
    matches,
    owns,
    products,
    resolve,
    stored_transposed,
    tensors_of,
    weights,
)
from rtn_tensor.tensor.quantized import RTNQuantizedTensor
from rtn_tensor.text_table import table

# ------------------------------------------------------------------------------------------- which weights


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
            yield Target(w.module, w.parameter_name, w.fqn, config, by_name=w.parameter_name in transposed_experts(w.module))


def _rule_targets(model: nn.Module, rules: Rules, filter_fn: FilterFn) -> Iterator[Target]:
    for w, config in resolve(rules, list(weights(model, filter_fn))):
        yield Target(w.module, w.parameter_name, w.fqn, config, by_name=True)


def _means(key: str, name: str) -> bool:
    """Whether a key of FqnToConfig, which knows no wildcards, is the whole of `name`, or matches it after "re:"."""
    return matches(key, name) if key.startswith("re:") else key == name


def _keys_for(table: Mapping[str, Any], prefix: str, module: nn.Module, name: str, parameter: Tensor) -> list[str]:
    """The keys of an FqnToConfig that are for a parameter, by torchao's precedence: the parameter's name, its module's name, "re:" on the
    parameter, "re:" on the module."""
    fqn = f"{prefix}.{name}" if prefix else name
    owns_weight = owns(module, name)
    patterns = [key for key in table if key.startswith("re:")]
    # A pattern for a layer's weight is not meant for its bias.
    vector = not isinstance(parameter, UninitializedParameter) and parameter.dim() < 2
    by_parameter = [key for key in patterns if not vector and matches(key, fqn)]
    by_module = [key for key in patterns if owns_weight and matches(key, prefix)]
    return [key for key in (fqn, *([prefix] if owns_weight else [])) if key in table] + by_parameter + by_module


def _fqn_targets(model: nn.Module, config: FqnToConfig) -> Iterator[Target]:
    """The first of `_keys_for` decides; without any, "_default" does, on what is quantized by default."""
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
        keys = _keys_for(table, prefix, module, name, parameter)
        unseen.difference_update(keys)
        if not keys and ((name == "weight" and by_default(module, prefix)) or name in transposed_experts(module)):
            keys = ["_default"]
        found: Any = table.get(keys[0]) if keys else None
        if found is not None:
            yield Target(module, name, fqn, found, by_name=True)
    if unseen:
        raise ValueError(
            f"FqnToConfig names {', '.join(sorted(unseen))}, which is no parameter and no linear or embedding of the model; "
            "use a name from model.named_parameters(), or a pattern 're:...' that matches the whole of one"
        )


def is_finite(t: Tensor) -> bool:
    """Whether `t` holds no NaN or inf, in one pass and no copy."""
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


# torch's modules whose weights are multiplied as matrices, or looked up by rows, and those that hold what others multiply by.
_MULTIPLYING = (nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.RNNCellBase)
_HOLDING = ("container", "module", "transformer")


def _computed_from(module: nn.Module) -> set[str]:
    """The names of what the hooks of torch's older `weight_norm` and `spectral_norm` compute, and of what they compute it from."""
    hooks = [
        h
        for h in module._forward_pre_hooks.values()
        if type(h).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
    ]
    return {f"{hook.name}{end}" for hook in hooks for end in ("", "_g", "_v", "_orig")}  # type: ignore[attr-defined]


def _why_no_product(module: nn.Module, name: str) -> str | None:
    """None unless `module` is of a kind that is known to use its parameter `name` in a way that a quantized weight cannot be used in."""
    if isinstance(module, ParametrizationList) or name in _computed_from(module):
        return f"belongs to a parametrization or norm, which computes another weight from it; {REMOVE_IT}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "belongs to an nn.Embedding with max_norm, which rewrites rows of its weight; set max_norm to None, or leave it out"
    known = [
        c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules.") and c.__module__.rpartition(".")[2] not in _HOLDING
    ]
    if known and (not isinstance(module, _MULTIPLYING) or name in ("bias_k", "bias_v")):
        return f"belongs to an nn.{known[0].__name__}, which no kernel here computes with a quantized weight; leave it out"
    return None


def _why_unfit(target: Target) -> str | None:
    """None where the weight can be quantized, else why it cannot, and what to do."""
    whole: Any = target.parameter
    w: Any = held(whole)
    if not isinstance(target.config, RTNConfig):
        return f"has a {type(target.config).__name__} as its config; use rtn_int4(), rtn_int8() or None here, or torchao's own quantize_"
    if w is None:
        return COMPUTED
    if isinstance(w, RTNQuantizedTensor):
        return f"is already quantized ({w.bits} bits, group_size={w.group_size}); leave it out, or dequantize_ the model first"
    if isinstance(w, UninitializedParameter):
        return "is uninitialized until its module has run; call the model once, or leave it out"
    if w.dtype not in FLOAT_DTYPES or type(w) not in (Tensor, nn.Parameter):
        return f"is {type(w).__name__} of {w.dtype}; only plain {', '.join(map(str, FLOAT_DTYPES))} weights can be quantized"
    if w.dim() > 1 and (why := _why_no_product(target.module, target.parameter_name)):
        return why
    if w.dim() not in (2, 3):
        return f"has shape {tuple(w.shape)}; a weight must be [N, K], or [E, N, K] for experts. Leave it out"
    if not target.by_name and not owns(target.module, target.parameter_name):
        kind = type(target.module).__name__
        return f"belongs to a {kind}; a filter can select only nn.Linear and nn.Embedding weights. Leave it out, or name it in FqnToConfig"
    dim, group_size = -2 if target.transposed else -1, target.config.group_size
    columns, all_columns = columns_a_rank(whole, dim), whole.shape[dim]
    if isinstance(target.module, nn.Linear) and target.parameter_name == "weight":
        all_columns = target.module.in_features  # transformers gives a rank's part as a plain tensor
    if columns < all_columns and group_size != -1 and columns % group_size:
        return (
            f"is cut into {columns} columns a rank, inside a group of {group_size}; use a group_size that divides {columns}, -1, or "
            "another number of ranks"
        )
    if not w.is_meta and not everywhere(is_finite(w.detach()), ranks_of(whole)):
        return "holds NaN or inf; repair the checkpoint, or leave the weight out"
    return None


def _check(targets: list[Target]) -> None:
    problems: dict[str, list[str]] = defaultdict(list)
    configs: dict[int, Target] = {}
    for t in targets:
        if why := _why_unfit(t):
            problems[why].append(t.fqn)
            continue
        other = configs.setdefault(id(t.parameter), t)
        if other.config != t.config:
            problems[f"shares its weight with {other.fqn} but has another config; give both the same"].append(t.fqn)
    if problems:
        lines = [f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {why}" for why, names in problems.items()]
        raise ValueError("cannot quantize, and nothing was changed:\n  " + "\n  ".join(lines))


# ------------------------------------------------------------------------------------------- quantize and back


def _quantized(target: Target) -> Any:
    w, config = target.parameter, target.config
    assert w is not None
    part = held(w).detach()
    q = RTNQuantizedTensor.from_float(part.mT if target.transposed else part, config.bits, config.group_size, config.scale_method)
    new = nn.Parameter(as_part(q.mT if target.transposed else q, w), requires_grad=False)
    for name, value in vars(w).items():
        setattr(new, name, value)
    return new


def _unknown(model: nn.Module, config: AOBaseConfig | Rules, selected: set[str]) -> list[str]:
    """Names of what may be experts' weights, and is neither selected nor named by `config`."""
    if isinstance(config, FqnToConfig):
        keys = config.fqn_to_config
        named = lambda n: any(_means(key, n) for key in keys)  # noqa: E731
    else:
        rules = config if isinstance(config, Sequence) else []
        named = lambda n: find(rules, n) is not None  # noqa: E731
    names = [f"{prefix}.{name}" if prefix else name for prefix, module in model.named_modules() for name in unknown_experts(module)]
    return [n for n in names if n not in selected and not named(n)]


def targets_of(model: nn.Module, config: AOBaseConfig | Rules, filter_fn: FilterFn | None) -> list[Target]:
    """The weights that `quantize_` would quantize, checked; it says what it raises."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a module, or quantize a folder by load(path, config)")
    check_idle(model)
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
        raise TypeError(f"config is a {kind}; use rtn_int4(), rtn_int8(), rtn(...), a list of rules, or FqnToConfig with those")
    _check(targets)
    if unknown := _unknown(model, config, {t.fqn for t in targets}):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        warnings.warn(
            f"{unknown[0]}{more} may be experts' weights, but how they are used is not understood, and they stay float; name them in "
            "a rule or FqnToConfig, to quantize them along their last dim",
            stacklevel=3,
        )
    if not targets:  # at the line that called `quantize_` or `load`
        warnings.warn("no weight is selected, and so none quantized; check filter_fn or the names in the config", stacklevel=3)
    return targets


def quantize_(
    model: nn.Module,
    config: AOBaseConfig | Rules,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    progress: Callable[[list], Iterable] | None = None,
) -> "Report":
    """Quantizes the weights of `model` in place. Modules stay what they are; their weights become `RTNQuantizedTensor`s.

    Every selected weight is checked first, and nothing changes if one is unfit. Modules that share a weight share the quantized one;
    where only some of them are selected, the others keep the float weight, and the report says "untied".

    Args:
        model: any module; float32, bfloat16 or float16 weights, on any device (a meta weight becomes an empty quantized one).
        config: `rtn_int4()`, `rtn_int8()` or `rtn(...)`; or rules, a list of (pattern, such a config or None for float), of which the first
            that matches a parameter's name or its module's counts; or torchao's `FqnToConfig`. A pattern has shell wildcards, as in
            "model.layers.0.*", or is a regular expression after "re:". What no rule matches stays float.
        filter_fn: given a module and its name, whether to quantize its weight. By default every nn.Linear, as in torchao, and the experts
            of every mixture-of-experts layer, but not its router; nn.Embedding can be selected too. A rule with wildcards reaches only what
            this selects, one that has a weight's full name any weight. Not with `FqnToConfig`.
        device: where to move each module just before it is quantized, and the rest of the model at the end.
        progress: wraps the list of weights to come, for instance `tqdm.tqdm`.

    Returns:
        `report(model)`.

    Raises:
        TypeError: `config` is not one of the above.
        ValueError: a rule matches no weight (the error gives the nearest names); a weight is unfit (the error names each): already
            quantized, of another dtype, NaN or inf inside, not a matrix, or not of an nn.Linear or nn.Embedding; or `filter_fn` is given
            with `FqnToConfig`.
    """
    targets = targets_of(model, config, filter_fn)
    if fully_sharded(model) and any(not t.parameter.is_meta for t in targets):  # type: ignore[union-attr]
        raise ValueError("the model is sharded by fully_shard, which would look for the float weights' memory; quantize_ it first")
    places: dict[int, list[str]] = defaultdict(list)
    for fqn, _, _, parameter in tensors_of(model):
        places[id(parameter)].append(fqn)
    # By name from here on: a move may give a module other parameter objects.
    sharing = {fqn: names for names in places.values() for fqn in names}
    selected = {t.fqn for t in targets}
    done: dict[str, nn.Parameter] = {}
    for target in targets if progress is None else progress(targets):
        if device is not None:
            target.module.to(device)
        names = sharing[target.fqn]
        if names[0] not in done:
            new = _quantized(target)
            new.fqn = target.fqn  # for the errors of a later slice or product
            if rest := [name for name in names if name not in selected]:
                new.untied_from = rest
            done[names[0]] = new
        setattr(target.module, target.parameter_name, done[names[0]])
    if device is not None:
        model.to(device)
    on_quantized(model)
    return report(model)


@register_quantize_module_handler(RTNConfig)
@register_quantize_module_handler(RTNInt4WeightConfig)
@register_quantize_module_handler(RTNInt8WeightConfig)
def _quantize_module(module: nn.Module, config: RTNConfig, *, parameter_name: str = "weight", fqn: str = "") -> nn.Module:
    """What torchao's own `quantize_`, and so transformers, calls for each module; the keyword lets FqnToConfig name parameters."""
    # PEFT, to merge an adapter, puts a tensor in the place of the weight, which is then no parameter.
    if isinstance(w := vars(module).get(parameter_name), Tensor) and parameter_name not in _computed_from(module):
        setattr(module, parameter_name, nn.Parameter(w.detach()))
    target = Target(module, parameter_name, fqn or f"{type(module).__name__}.{parameter_name}", config, by_name=True)
    _check([target])
    setattr(module, parameter_name, _quantized(target))
    on_quantized(module)
    return module


def _quantize_by_fqn(module: nn.Module, fqn: str, config: FqnToConfig, others: Callable[..., nn.Module]) -> nn.Module:
    """What torchao's own `quantize_` does of an FqnToConfig to one module, as `quantize_` here does it.

    Of patterns that overlap torchao 0.18 applies one after the other, biases included, and lets a later one quantize what None excludes;
    by its documentation the first that matches decides. `others` is its own function, for what is of no format here.
    """
    table: Mapping[str, Any] = config.fqn_to_config
    if not any(isinstance(c, RTNConfig) for c in table.values()):
        return others(module, fqn, config)
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        keys = _keys_for(table, fqn, module, name, parameter)
        if not keys and name == "weight" and is_linear(module, fqn):
            keys = ["_default"]
        chosen = table.get(keys[0]) if keys else None
        full = f"{fqn}.{name}" if fqn else name
        if isinstance(chosen, RTNConfig):
            _quantize_module(module, chosen, parameter_name=name, fqn=full)
        elif chosen is not None:
            module = others(module, fqn, FqnToConfig(OrderedDict({fqn if name == "weight" else full: chosen})))
    return module


_torchao.handle_fqn_configs(_quantize_by_fqn)


def dequantize_(model: nn.Module) -> "Report":
    """Puts plain float parameters (q * S, in each weight's dtype) in place of the quantized ones; shared weights stay shared."""
    check_idle(model)
    shared: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for _, module, name, parameter in list(tensors_of(model)):
        part = held(parameter)
        if isinstance(part, RTNQuantizedTensor):
            if id(parameter) not in shared:
                shared[id(parameter)] = parameter, nn.Parameter(as_part(part.dequantize(), parameter))
            setattr(module, name, shared[id(parameter)][1])
    on_quantized(model)
    return report(model)


# ------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """One parameter. `bits` and `group_size` are None where it stayed float; `note` then says why. Bytes of a shared one are counted at
    its first place only."""

    name: str
    shape: tuple[int, ...]
    bits: int | None
    group_size: int | None
    bytes_before: int
    bytes_after: int
    note: str


@dataclass(frozen=True)
class Report:
    """What of a model is quantized. Printed, one row a weight; vectors (norms, biases) share a row.

    Attributes:
        rows: one `Row` a parameter, vectors included.
    """

    rows: list[Row]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters, had none been quantized."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters as they are, scales included."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits a parameter takes on average, over the whole model: those that stayed float, and the scales, are counted."""
        count = sum(torch.Size(row.shape).numel() for row in self.rows if row.bytes_before)
        return 8 * self.bytes_after / count if count else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types, ready for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "weights": [asdict(row) | {"shape": list(row.shape)} for row in self.rows],
        }

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            if len(row.shape) > 1:
                shape = " x ".join(map(str, row.shape))
                bits, group = ("float", "") if row.bits is None else (str(row.bits), str(row.group_size))
                lines.append([row.name, shape, bits, group, f"{row.bytes_before:,}", f"{row.bytes_after:,}", row.note])
        vectors = [row for row in self.rows if len(row.shape) < 2]
        if vectors:
            before, after = (sum(getattr(row, key) for row in vectors) for key in ("bytes_before", "bytes_after"))
            count = f"{len(vectors)} vectors" if len(vectors) > 1 else "1 vector"
            lines.append([count, "", "float", "", f"{before:,}", f"{after:,}", "norms and biases"])
        total = ["total", "", f"{self.bits_per_weight:.2f}", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", ""]
        return table(["weight", "shape", "bits", "group", "bytes before", "bytes after", "note"], [*lines, total])


def report(model: nn.Module) -> Report:
    """Says of every parameter of `model` how it is stored, or why it stayed float; of a sharded one, the part that this rank holds."""
    rows: list[Row] = []
    first: dict[int, str] = {}
    untied: dict[str, str] = {}
    for fqn, _, _, w in tensors_of(model):
        for other in getattr(w, "untied_from", []):
            untied.setdefault(other, fqn)
    kept = routers(model)
    for fqn, module, name, whole in tensors_of(model):
        w = held(whole)
        quantized = isinstance(w, RTNQuantizedTensor)
        before = w.numel() * w.dtype.itemsize
        after = w.qdata.nbytes + w.scale.nbytes if quantized else before
        if id(whole) in first:
            note, before, after = f"shared with {first[id(whole)]}", 0, 0
        elif quantized and hasattr(whole, "untied_from"):
            note, before = f"untied from {', '.join(whole.untied_from)}", 0  # the float weight it shared is counted there
        elif quantized:
            note = ""
        elif fqn in untied:
            note = f"untied from {untied[fqn]}"
        elif isinstance(w, UninitializedParameter):
            note, before, after = "uninitialized", 0, 0
        elif w.dim() < 2:
            note = "vector"
        elif owns(module, name):
            note = "router" if module in kept else "not selected"
        elif name in unknown_experts(module):
            note = f"experts of a {type(module).__name__}? not understood"
        else:
            note = f"weight of a {type(module).__name__}"
        if w is not whole and w.dim() > 1:
            note = f"part of {' x '.join(map(str, whole.shape))}{', ' if note else ''}{note}"
        first.setdefault(id(whole), fqn)
        bits, group_size = getattr(w, "bits", None), getattr(w, "group_size", None)
        rows.append(Row(fqn, tuple(w.shape), bits, group_size, before, after, note))
    return Report(rows)
