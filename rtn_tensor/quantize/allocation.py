"""A format for each weight under a budget of bits, found without calibration data.

To second order in the rounding errors D of the weights, the divergence between the float model's next-token
distributions and the quantized one's is 1/2 D^T F D, with F the Fisher information: the mean of g g^T over
labels *drawn from the model itself*, g the gradient of their log-likelihood. Rounding errors hardly
correlate, so F's diagonal is enough, and one backward pass a sequence measures every format of every weight
at once: 1/2 sum(F_ii D_ii^2). The tokens are those that the model itself writes, which tell nearly what text
does; random ones overstate SmolLM2's first layer, its v_proj by 20 times.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtn_tensor.config import RTNConfig, rtn
from rtn_tensor.integrations.transformers.models import but_the_output
from rtn_tensor.quantize.api import quantize_
from rtn_tensor.quantize.cost import SEQUENCES, Cost, float_weights, warn_if_much
from rtn_tensor.quantize.kinds import FilterFn
from rtn_tensor.quantize.plan import Measured, Plan, last_part
from rtn_tensor.quantize.selection import bits_of, check_module, unmatched
from rtn_tensor.quantize.targets import Target, targets_of
from rtn_tensor.quantize.written import check_tokens, finite_logits, written
from rtn_tensor.tensor import RTNQuantizedTensor

OPTIONS = (
    *(rtn(4, size, method) for size in (128, 64, 32) for method in ("signed", "search")),
    rtn(4, 32, "search8"),
    rtn(8, 128),
)
Fuse = Mapping[str, Sequence[str]]


# ----------------------------------------------------------------------------- sensitivity


@contextmanager
def _only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Meanwhile these of its parameters have gradients, and no others."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def _fisher(
    model: Any,
    parameters: list[nn.Parameter],
    ids: Tensor,
    seed: int,
    progress: Callable[[list], Iterable] | None,
) -> list[Tensor]:
    """The diagonal of the Fisher information of each parameter, fp32, for one token."""
    sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for row in progress(list(ids)) if progress else ids:
        with torch.enable_grad():
            logits = finite_logits(model, row[None].to(device))[0]
            # Positions' scores are uncorrelated, as labels are drawn from the model: the square of their sum
            # is the sum of their squares.
            drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, drawn.to(device), reduction="sum")
            # Experts that no token went to have none.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.float().square_()
    return [total.div_(ids.numel()) for total in sums]


@torch.no_grad()
def _cost(target: Target, fisher: Tensor, config: RTNConfig) -> float:
    """The divergence in nats per token of this weight alone in this format."""
    assert target.parameter is not None
    w, f = (t.mT if target.transposed else t for t in (target.parameter.detach(), fisher))
    rounded = RTNQuantizedTensor.from_float(
        w, config.bits, config.group_size, config.scale_method
    ).dequantize()
    return 0.5 * float((f * (rounded.float() - w.float()).square()).sum(dtype=torch.float64))


def plan(
    model: Any,
    bits_per_weight: float = 4.25,
    *,
    options: Sequence[RTNConfig] = OPTIONS,
    text: Tensor | None = None,
    fuse: Fuse | None = None,
    filter_fn: FilterFn | None = None,
    sequences: int = 16,
    length: int = 256,
    seed: int = 0,
    progress: Callable[[list], Iterable] | None = None,
) -> Plan:
    """Rules for `quantize_` and `refine_` that spend a budget of bits on the weights where it helps most, by
    their second-order effect on what the model predicts. The model stays as it is. The same arguments give
    the same rules on one machine.

    It takes the writing, and a forward and a backward pass per sequence, and meanwhile 4 bytes per weight,
    and its gradients, beside the model. At the end the model is quantized by the plan, to measure what it
    costs, and its float weights are put back; of more than 0.3 nats per token a warning tells.

    Args:
        model: a float causal language model of transformers, in eval mode: `model(ids [1, T]).logits` is `[1,
            T, vocabulary]`.
        bits_per_weight: the average over the weights that `filter_fn` selects, scales included, is at most
            this.
        options: the formats to choose among; of every weight all are tried.
        text: tokens `[sequences, length]` to measure on, in the place of those that the model writes.
        fuse: modules that a serving engine makes one, and that so must have one format, as in `load`:
            {"qkv_proj": ["q_proj", ...]}.
        filter_fn: as for `load`: by default every linear but the output layer, and experts.
        sequences: that the model writes; more measure more finely, and take longer.
        length: tokens a sequence.
        seed: of what it writes, and of the labels that are drawn.
        progress: wraps the list of tokens to write, and that of sequences to come, for instance `tqdm.tqdm`.

    Raises:
        ValueError: the model is in training mode; a budget below what the smallest of `options` takes; a
            weight that cannot be quantized, or none at all; `fuse` names what no weight is called; `text`
            that is no tokens; all that before anything is measured. Then, logits or gradients that are not
            finite.
        TypeError: `model`, `options` or `fuse` is of another type; or the model cannot write, and no `text`
            is given.
        RuntimeError: it is called under torch.inference_mode().
    """
    check_module(model)
    if model.training:
        raise ValueError(
            "the model is in training mode, where dropout makes its loss random; call model.eval() first"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("plan takes gradients; call it outside of torch.inference_mode()")
    options = list(options)
    if not options or not all(isinstance(option, RTNConfig) for option in options):
        raise TypeError(f"options is {options}; give formats to choose among, as [rtn_int4(), rtn_int8()]")
    check_tokens(model, text, sequences, length, "text", "tokens as text")
    found = targets_of(model, options[0], filter_fn or but_the_output(model))
    targets, sizes = _sizes(found, options, fuse or {})
    Plan(bits_per_weight, sizes)  # what it raises, it raises before all is measured
    ids = written(model, sequences, length, seed, progress) if text is None else text.long()
    tokens = f"{ids.numel()} {'tokens of its own' if text is None else 'given tokens'}"
    parameters: list[Any] = [t.parameter for t in targets]
    with _only(model, parameters):
        fishers = _fisher(model, parameters, ids, seed, progress)
    costs = {
        t.fqn: {option: _cost(t, fisher, option) for option in options}
        for t, fisher in zip(targets, fishers, strict=True)
    }
    for t in targets:
        if not all(math.isfinite(cost) for cost in costs[t.fqn].values()):
            raise ValueError(
                f"{t.fqn}: its gradients overflow in {parameters[0].dtype}; load the model in bfloat16 or "
                "float32"
            )
    planned = Plan(bits_per_weight, replace(sizes, sensitivity=costs, tokens=tokens))
    last = ids[-SEQUENCES:].to(parameters[0].device)
    planned.measured = _measured(model, found, planned, list(last))
    on_what = f"the last {last.numel()} of {tokens}"
    warn_if_much(planned.measured, on_what, "give it more bits, or refine_ the model by the plan")
    return planned


def _measured(
    model: Any, found: Sequence[Target], planned: Plan, sequences: Sequence[Tensor]
) -> float | None:
    put_back = float_weights(model, found)
    cost = Cost(model, sequences)
    try:
        quantize_(model, planned)
        return cost.divergence(model)
    finally:
        put_back()


def _sizes(
    found: Iterable[Target], options: Sequence[RTNConfig], fuse: Fuse
) -> tuple[list[Target], Measured]:
    """The weights, each at its first place, and what is known of them before anything is measured: no format
    costs anything."""
    places: dict[int, list[Target]] = defaultdict(list)
    for target in found:
        places[id(target.parameter)].append(target)
    if not places:
        raise ValueError(
            "no weight is selected, so there is nothing to plan; check filter_fn, or the kinds "
            "of the model's layers"
        )
    targets = [same[0] for same in places.values()]
    parameters: dict[str, Any] = {t.fqn: t.parameter for t in targets}
    return targets, Measured(
        sensitivity={name: dict.fromkeys(options, 0.0) for name in parameters},
        bits={t.fqn: _bits(t, options) for t in targets},
        counts={name: p.numel() for name, p in parameters.items()},
        together=_together(list(parameters), fuse),
        places={same[0].fqn: [t.fqn for t in same] for same in places.values()},
        wide=any(p.dtype == torch.float32 for p in parameters.values()),
        tokens="",
    )


def _together(names: Sequence[str], fuse: Fuse) -> list[list[str]]:
    """The names by groups that must share a format."""
    if not isinstance(fuse, Mapping) or any(isinstance(parts, str) for parts in fuse.values()):
        raise TypeError(
            f"fuse is {fuse!r}; give a dict of lists, as {{'qkv_proj': ['q_proj', 'k_proj', 'v_proj']}}"
        )
    fused = {part: whole for whole, parts in fuse.items() for part in parts}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        last = last_part(name)
        head = name.removesuffix(".weight").removesuffix(last)
        groups[head + fused.get(last, last)].append(name)
    kinds = [last_part(name) for name in names]
    for part in fused:
        if part not in kinds:
            raise ValueError(f"fuse: {unmatched(part, kinds)}")
    return list(groups.values())


def _bits(target: Target, options: Sequence[RTNConfig]) -> dict[RTNConfig, float]:
    w = target.parameter
    assert w is not None
    shape = (w.mT if target.transposed else w).shape
    return {option: bits_of(shape, option, 8 * w.dtype.itemsize) for option in options}
