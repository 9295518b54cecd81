"""`refine_`: int4 and int8 weights whose rounding errors make up for one another, on text that the model
writes itself."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from rtn_tensor.checkpoint.load import reader
from rtn_tensor.config import rtn
from rtn_tensor.distributed import held
from rtn_tensor.formats import computing
from rtn_tensor.integrations import on_quantized
from rtn_tensor.integrations.transformers.models import ends, is_pretrained
from rtn_tensor.quantize.by_module import InFiles, InModel, Progress, Refining
from rtn_tensor.quantize.cost import SEQUENCES, Cost, unless_it_fails, warn_if_much
from rtn_tensor.quantize.in_step import Call, run_in_step
from rtn_tensor.quantize.kinds import FilterFn
from rtn_tensor.quantize.report import Report, report
from rtn_tensor.quantize.selection import Rules, check_module, tensors_of
from rtn_tensor.quantize.targets import Target, targets_of
from rtn_tensor.quantize.written import check_tokens, written
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.wording import with_article

Batches = Sequence[Mapping[str, Any]]

TOKENS = 4096  # that go through the model at once


@dataclass(frozen=True)
class Refinement(Report):
    """A `Report` whose notes say what refining made of each weight.

    Attributes:
        inputs: what it was refined on, as in "4096 tokens of its own".
        error: the mean square error of the weights' outputs, divided by that of plain rounding: the geometric
            mean over the weights.
        plain: names of weights that kept plain rounding, as it was better by that error, or as none of the
            inputs came to them.
        divergence: from the float model, in nats per token, of the next-token distributions over `measured`;
            None of a model that has none.
        measured: what that was measured on.
    """

    inputs: str
    error: float
    plain: list[str]
    divergence: float | None
    measured: str

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("inputs", "error", "plain", "divergence", "measured")}
        return super().to_dict() | own

    @property
    def summary(self) -> str:
        """What is said beside the table of weights."""
        count = len(self.plain)
        lines = [
            f"refined on {self.inputs}: {self.error:.3f} times the error of plain rounding in the weights' "
            "outputs; "
            f"{count} weight{'' if count == 1 else 's'} kept plain rounding",
        ]
        if self.divergence is not None:
            lines.append(
                f"divergence from the float model: {self.divergence:.4f} nats per token on {self.measured}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.summary}"


def refine_(
    model: nn.Module,
    config: AOBaseConfig | Rules | None = None,
    filter_fn: FilterFn | None = None,
    *,
    source: str | os.PathLike | None = None,
    tokens: Tensor | None = None,
    batches: Batches | None = None,
    sequences: int = 16,
    length: int = 256,
    seed: int = 0,
    progress: Callable[[list], Iterable] | None = None,
) -> Refinement:
    """Quantizes the weights of `model` in place as `quantize_` does, to the same format and size, but so that
    the errors of the rounding make up for one another (GPTQ, arXiv 2210.17323).

    The model runs once. Before a module runs, the second moments of its inputs, which the modules quantized
    before it give, say how to round its weight: column by column, the error of each spread over those to
    come, and with the scale method "search" the scales are searched by the same moments. A weight that comes
    out worse than by plain rounding keeps plain rounding, and so do those that no input comes to, an
    embedding, say, or an expert with fewer than 32 inputs.

    It takes the writing and one forward pass, and per weight matrix a few operations for each column. Memory:
    the float weights are kept until the end, so that an error leaves the model as it was. With `source` the
    float model is never in memory, but the weights of one module at a time.

    Args:
        model: a float model in eval mode; or with `source` one that `load(source, config)` gave.
        config, filter_fn: as for `quantize_`; the scale method "search" is the best here, too. Not with
            `source`: each quantized weight keeps its format.
        source: the transformers folder of the float model, of which `model` is a quantized one.
        tokens: int64 `[sequences, length]` to refine on, in the place of those that the model writes.
        batches: of a model that is no causal language model, a list of keyword arguments to call it with, as
            [{"pixel_values": ...}, ...]. What an attention_mask says is padding does not count.
        sequences, length: that a causal language model of transformers writes; more are better, and take
            longer.
        seed: of what it writes.
        progress: wraps the list of tokens to write, and that of modules to come, for instance `tqdm.tqdm`.

    Returns:
        A `Refinement`: `report(model)`, and what refining did.

    Raises:
        TypeError, ValueError: as `quantize_` does, and for a model in training mode, on meta or sharded; or
            the model cannot write, and neither `tokens` nor `batches` are given; or inputs of a module hold
            NaN or inf. A float model is then as it was; of a quantized one some weights may be refined
            already.
    """
    targets = _targets(model, config, filter_fn, source)
    if model.training:
        raise ValueError(
            "the model is in training mode, where dropout changes its inputs; call model.eval() first"
        )
    for t in targets:
        assert t.parameter is not None
        if held(t.parameter) is not t.parameter or t.parameter.is_meta:
            raise ValueError(
                f"{t.fqn} is {'on meta' if t.parameter.is_meta else 'sharded'}, and refine_ needs it whole; "
                "refine the model before it is sharded or offloaded"
            )
    weights = InModel(model, targets) if source is None else InFiles(reader(Path(source), model))
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        unless_it_fails(model, targets) if source is None else nullcontext(),
        _products_seen(),
    ):
        inputs = _inputs(model, tokens, batches, sequences, length, seed, progress)
        # With `source`, of the float model nothing runs.
        cost = Cost(model, inputs.held_out if source is None else [])
        refining = Refining(targets, weights, [_mask(call) for call in inputs.calls], progress)
        run_in_step(
            [partial(_run, model, refining.modules, call) for call in inputs.calls],
            refining.modules,
            refining.reached,
        )
        refining.rest()
        on_quantized(model)
        divergence = cost.divergence(model)
    warn_if_much(divergence, inputs.measured, "use smaller groups, plan(), or 8 bits")
    rows = [replace(row, note=refining.notes.get(row.name, row.note)) for row in report(model).rows]
    return Refinement(rows, inputs.told, refining.error(), refining.plain, divergence, inputs.measured)


def _targets(
    model: nn.Module,
    config: AOBaseConfig | Rules | None,
    filter_fn: FilterFn | None,
    source: str | os.PathLike | None,
) -> list[Target]:
    if source is None:
        if config is None:
            raise TypeError("config is missing; give rtn_int4(), or with source= a model that is quantized")
        return targets_of(model, config, filter_fn)
    check_module(model, "give a model, as load(path, config) returns")
    if config is not None or filter_fn is not None:
        raise ValueError(
            "with source= each quantized weight keeps its format; leave config and filter_fn out, or give a "
            "float model"
        )
    found = [
        Target(module, name, fqn, rtn(w.bits, w.group_size, computing(w.bits, w.scale_method), w.activations))
        for fqn, module, name, w in tensors_of(model)
        if isinstance(w, RTNQuantizedTensor)
    ]
    if not found:
        raise ValueError(
            "no weight of the model is quantized; give load(source, config), or leave source out"
        )
    return found


# ------------------------------------------------------------------------------- what it runs on


@dataclass(frozen=True)
class _Inputs:
    calls: Sequence[Call]
    told: str
    held_out: Sequence[Tensor] = ()
    measured: str = ""


def _inputs(
    model: Any,
    tokens: Tensor | None,
    batches: Batches | None,
    sequences: int,
    length: int,
    seed: int,
    progress: Progress | None,
) -> _Inputs:
    if batches is not None:
        if tokens is not None:
            raise ValueError("tokens and batches are both given; leave one out")
        if (
            not isinstance(batches, Sequence)
            or not batches
            or not all(isinstance(batch, Mapping) for batch in batches)
        ):
            raise TypeError(
                f"batches is {with_article(type(batches).__name__)}; give a list of the model's keyword "
                "arguments, one "
                'dict or more, as [{"pixel_values": images}]'
            )
        return _Inputs([((), dict(batch)) for batch in batches], f"{len(batches)} given batches")
    check_tokens(model, tokens, sequences, length, "tokens", "tokens, or batches of its keyword arguments")
    if tokens is None:
        own = written(model, sequences + SEQUENCES, length, seed, progress)
        ids, held_out = own[:sequences], list(own[sequences:])
        told, measured = f"{ids.numel()} tokens of its own", f"{SEQUENCES * length} more of its own"
    else:
        ids = tokens.to(next(model.parameters()).device, torch.long)
        held_out = list(ids[-SEQUENCES:]) if is_pretrained(model) and model.can_generate() else []
        told, measured = f"{ids.numel()} given tokens", f"{sum(map(len, held_out))} of these"
    return _Inputs(
        [((part,), {}) for part in ids.split(max(1, TOKENS // ids.shape[1]))], told, held_out, measured
    )


@contextmanager
def _products_seen() -> Iterator[None]:
    """Meanwhile nn.MultiheadAttention runs its products one by one, and not as one op, whose inputs are not
    seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _mask(call: Call) -> Tensor | None:
    """Which of the tokens [sequences, length] are no padding, where the call says it."""
    mask = call[1].get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _run(model: Any, modules: Sequence[nn.Module], call: Call) -> None:
    """One forward pass that keeps no keys and values; of its logits only what `modules` need."""
    args, kwargs = call
    known = inspect.signature(model.forward).parameters
    wanted: dict[str, Any] = {"use_cache": False}
    if is_pretrained(model) and ends(model)[1] not in modules:
        wanted["logits_to_keep"] = 1
    model(*args, **{name: value for name, value in wanted.items() if name in known} | kwargs)
