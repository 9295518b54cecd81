"""`quantize_`, which checks every weight before it changes one, and its undoing."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, register_quantize_module_handler

from rtn_tensor import _torchao
from rtn_tensor.config import CLASSES, RTNConfig
from rtn_tensor.distributed import as_part, check_idle, fully_sharded, held
from rtn_tensor.formats import format_of
from rtn_tensor.integrations import on_quantized
from rtn_tensor.quantize import printing  # noqa: F401  (print(model) names what is quantized)
from rtn_tensor.quantize.kinds import FilterFn, computed_from, is_linear
from rtn_tensor.quantize.report import Report, report
from rtn_tensor.quantize.selection import (
    Rules,
    check_module,
    tensors_of,
)
from rtn_tensor.quantize.targets import Target, check_targets, keys_for, targets_of
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.tensor.attributes import user_attributes


def _rounded(w: Tensor, config: RTNConfig) -> RTNQuantizedTensor:
    return RTNQuantizedTensor.from_float(w, **format_of(config))


def _parameter(target: Target, q: RTNQuantizedTensor) -> nn.Parameter:
    """`q`, [..., N, K], as the parameter that goes in the place of the target's, with what users set on
    that."""
    w = target.parameter
    assert w is not None
    new = nn.Parameter(as_part(q.mT if target.transposed else q, w), requires_grad=False)
    vars(new).update(user_attributes(w))
    return new


def float_weight(target: Target) -> Tensor:
    """This rank's part of the weight, [..., N, K]."""
    assert target.parameter is not None
    part = held(target.parameter).detach()
    return part.mT if target.transposed else part


class Exchange:
    """Puts quantized weights in the places of a model's float ones: a shared weight is quantized once, and
    where only some of its places are selected, the others keep the float one."""

    def __init__(self, model: nn.Module, targets: Sequence[Target]):
        places: dict[int, list[str]] = defaultdict(list)
        for fqn, _, _, parameter in tensors_of(model):
            places[id(parameter)].append(fqn)
        # By name from here on: a move may give a module other parameter objects.
        self._sharing = {fqn: names for names in places.values() for fqn in names}
        self._selected = {t.fqn for t in targets}
        self._done: dict[str, nn.Parameter] = {}

    def put(
        self, target: Target, rounded: Callable[[Tensor, RTNConfig], RTNQuantizedTensor] = _rounded
    ) -> None:
        """Quantizes the target's weight by `rounded`, of it as [..., N, K], unless it was at another
        place."""
        names = self._sharing[target.fqn]
        if names[0] not in self._done:
            q = rounded(float_weight(target), target.config)
            q.fqn = target.fqn  # for the errors of a later slice or product
            if rest := [name for name in names if name not in self._selected]:
                q.untied_from = rest
            self._done[names[0]] = _parameter(target, q)
        setattr(target.module, target.parameter_name, self._done[names[0]])


def quantize_(
    model: nn.Module,
    config: AOBaseConfig | Rules,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    progress: Callable[[list], Iterable] | None = None,
) -> Report:
    """Quantizes the weights of `model` in place. Modules stay what they are; their weights become
    `RTNQuantizedTensor`s.

    Every selected weight is checked first, and nothing changes if one is unfit. Modules that share a weight
    share the quantized one; where only some of them are selected, the others keep the float weight, and the
    report says "untied".

    Args:
        model: any module; float32, bfloat16 or float16 weights, on any device (a meta weight becomes an empty
            quantized one).
        config: `rtn_int4()`, `rtn_int8()` or `rtn(...)`; or rules, a list of (pattern, such a config or None
            for float), of which the first that matches a parameter's name or its module's counts; or
            torchao's `FqnToConfig`. A pattern has shell wildcards, as in
            "model.layers.0.*", or is a regular expression after "re:". What no rule matches stays float.
        filter_fn: given a module and its name, whether to quantize its weights. By default every nn.Linear,
            as in torchao, GPT-2's Conv1D, nn.MultiheadAttention, and the experts of every
            mixture-of-experts layer, but not its router, the steps of a recurrent state, nor what is known to
            be used otherwise than in a product; nn.Embedding can be selected too. A rule with
            wildcards reaches only what this selects, one that has a weight's full name any weight. Not with
            `FqnToConfig`.
        device: where to move each module just before it is quantized, and the rest of the model at the end.
        progress: wraps the list of weights to come, for instance `tqdm.tqdm`.

    Returns:
        `report(model)`.

    Raises:
        TypeError: `config` is not one of the above.
        ValueError: a rule matches no weight (the error gives the nearest names); a weight is unfit (the error
            names each): already quantized, of another dtype, NaN or inf inside, not a matrix, or not of an
            nn.Linear or nn.Embedding; or `filter_fn` is given with `FqnToConfig`.
    """
    targets = targets_of(model, config, filter_fn)
    if fully_sharded(model) and any(not t.parameter.is_meta for t in targets):  # type: ignore[union-attr]
        raise ValueError(
            "the model is sharded by fully_shard, which would look for the float weights' "
            "memory; quantize_ it first"
        )
    exchange = Exchange(model, targets)
    for target in targets if progress is None else progress(targets):
        if device is not None:
            target.module.to(device)
        exchange.put(target)
    if device is not None:
        model.to(device)
    on_quantized(model)
    return report(model)


def _quantize_module(
    module: nn.Module, config: RTNConfig, *, parameter_name: str = "weight", fqn: str = ""
) -> nn.Module:
    """What torchao's own `quantize_`, and so transformers, calls for each module; the keyword lets
    FqnToConfig name parameters."""
    # PEFT, to merge an adapter, puts a tensor in the place of the weight, which is then no parameter.
    if isinstance(w := vars(module).get(parameter_name), Tensor) and parameter_name not in computed_from(
        module
    ):
        setattr(module, parameter_name, nn.Parameter(w.detach()))
    target = Target(
        module, parameter_name, fqn or f"{type(module).__name__}.{parameter_name}", config, by_name=True
    )
    check_targets([target])
    setattr(module, parameter_name, _parameter(target, _rounded(float_weight(target), config)))
    on_quantized(module)
    return module


for _kind in (RTNConfig, *CLASSES.values()):  # torchao looks for the exact class
    register_quantize_module_handler(_kind)(_quantize_module)


def _quantize_by_fqn(
    module: nn.Module, fqn: str, config: FqnToConfig, others: Callable[..., nn.Module]
) -> nn.Module:
    """What torchao's own `quantize_` does of an FqnToConfig to one module, as `quantize_` here does it.

    Of patterns that overlap torchao 0.18 applies one after the other, biases included, and lets a later one
    quantize what None excludes; by its documentation the first that matches decides. `others` is its own
    function, for what is of no format here.
    """
    table: Mapping[str, Any] = config.fqn_to_config
    if not any(isinstance(c, RTNConfig) for c in table.values()):
        return others(module, fqn, config)
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        keys = keys_for(table, fqn, module, name, parameter)
        if not keys and name == "weight" and is_linear(module, fqn):
            keys = ["_default"]
        chosen = table.get(keys[0]) if keys else None
        full = f"{fqn}.{name}" if fqn else name
        if isinstance(chosen, RTNConfig):
            _quantize_module(module, chosen, parameter_name=name, fqn=full)
        elif chosen is not None:
            module = others(
                module, fqn, FqnToConfig(OrderedDict({fqn if name == "weight" else full: chosen}))
            )
    return module


_torchao.handle_fqn_configs(_quantize_by_fqn)


def dequantize_(model: nn.Module) -> Report:
    """Puts plain float parameters (q * S, in each weight's dtype) in place of the quantized ones; shared
    weights stay shared."""
    check_module(model)
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
