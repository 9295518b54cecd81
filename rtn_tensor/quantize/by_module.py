"""Refining the weights of one module after the other, as the passes of a model come to them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor import ops
from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import format_of
from rtn_tensor.integrations import on_quantized
from rtn_tensor.integrations.transformers.experts import one_by_one
from rtn_tensor.quantize.api import Exchange, float_weight
from rtn_tensor.quantize.in_step import Call
from rtn_tensor.quantize.moments import Moments, Watch
from rtn_tensor.quantize.rounding import Rounded, Spread, refine, spread
from rtn_tensor.quantize.targets import Target, is_finite
from rtn_tensor.tensor import RTNQuantizedTensor

FEW = 32  # inputs of an expert, of fewer than which nothing can be told
Progress = Callable[[list], Iterable]
Rounding = Callable[[Tensor, RTNConfig], RTNQuantizedTensor]


class InModel:
    """Float weights that lie in the model, and give their places to the quantized ones."""

    def __init__(self, model: nn.Module, targets: Sequence[Target]):
        self._exchange = Exchange(model, targets)

    def floats(self, targets: Sequence[Target]) -> AbstractContextManager:
        return nullcontext()

    def put(self, places: Sequence[Target], rounded: Rounding) -> None:
        for target in places:
            self._exchange.put(target, rounded)


class InFiles:
    """Float weights that `read` gives by their names, of a model that is quantized already: its planes are
    written over, so that beside it only the float weights of one module are in memory."""

    def __init__(self, read: Callable[[str], Tensor]):
        self._read = read
        self._planes: dict[str, Any] = {}

    @contextmanager
    def floats(self, targets: Sequence[Target]) -> Iterator[None]:
        self._planes = {t.fqn: t.parameter for t in targets}
        try:
            for t in targets:
                t.module._parameters[t.parameter_name] = nn.Parameter(self._read(t.fqn), requires_grad=False)
            yield
        finally:
            for t in targets:
                t.module._parameters[t.parameter_name] = self._planes[t.fqn]

    def put(self, places: Sequence[Target], rounded: Rounding) -> None:
        target = places[0]
        q, planes = rounded(float_weight(target), target.config), self._planes[target.fqn]
        for name, plane in planes.planes.items():
            plane.copy_(q.planes[name])


class Refining:
    """Rounds the weights of each module anew once the inputs of its products are known.

    Attributes:
        modules: those that `reached` is to be called for, in the model's order.
        notes: for a report, by the weight's name.
        plain: the names of weights that kept plain rounding.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        weights: InModel | InFiles,
        masks: Sequence[Tensor | None],
        progress: Progress | None,
    ):
        self._masks = masks
        self.notes: dict[str, str] = {}
        self.plain: list[str] = []
        self._weights = weights
        self._logs: list[float] = []  # of how many times plain rounding's error each weight has
        self._left: dict[nn.Module, list[Target]] = defaultdict(list)
        sharing: dict[int, list[Target]] = defaultdict(list)
        for t in targets:
            sharing[id(t.parameter)].append(t)
            self._left[t.module].append(t)
        self._places = {t.fqn: same for same in sharing.values() for t in same}
        self.modules = [module for module in self._left if not isinstance(module, nn.Embedding)]
        self._bar = iter(progress(self.modules) if progress else self.modules)
        # Of modules that have the same inputs, as q, k and v, they are looked at once.
        self._last: tuple[list[tuple[Tensor, int]], Moments] = ([], Moments())
        self._spread: tuple[Moments, Spread] | None = None

    def error(self) -> float:
        return math.exp(sum(self._logs) / len(self._logs)) if self._logs else 1.0

    def reached(self, module: nn.Module, calls: dict[int, Call]) -> None:
        targets = [t for t in self._left[module] if t.fqn in self._places]
        if targets:  # a shared weight is done where it was reached first
            with self._weights.floats(targets):
                for t, found in self._found(module, targets, calls):
                    self._put(t, found)
            on_quantized(module)
        next(self._bar, None)

    def rest(self) -> None:
        """Rounds plainly what no pass came to."""
        for targets in self._left.values():
            if left := [t for t in targets if t.fqn in self._places]:
                with self._weights.floats(left):
                    for t in left:
                        self._put(t, {})
        for _ in self._bar:
            pass

    def _found(
        self, module: nn.Module, targets: Sequence[Target], calls: dict[int, Call]
    ) -> Iterator[tuple[Target, dict[int, Moments]]]:
        """The moments of each weight's inputs, by expert."""
        if type(module).forward is nn.Linear.forward:
            moments = self._moments({i: (*args, *kwargs.values())[0] for i, (args, kwargs) in calls.items()})
            yield from ((t, {0: moments}) for t in targets)
            return
        weights = {t.fqn: (t.parameter, t.transposed) for t in targets if t.parameter is not None}
        with one_by_one(module), Watch(weights) as watch:
            for args, kwargs in calls.values():
                module(*args, **kwargs)
        for t in targets:
            yield t, {e: moments for (fqn, e), moments in watch.moments.items() if fqn == t.fqn}

    def _moments(self, inputs: dict[int, Tensor]) -> Moments:
        same = [(x, 0 if x.is_inference() else x._version) for x in inputs.values()]
        before, moments = self._last
        if len(before) != len(same) or any(
            x is not y or v != u for (x, v), (y, u) in zip(before, same, strict=True)
        ):
            moments = Moments()
            for i, x in inputs.items():
                mask = self._masks[i]
                moments.add(x if mask is None or mask.shape != x.shape[:-1] else x[mask])
            self._last = same, moments
        return moments

    def _put(self, target: Target, found: dict[int, Moments]) -> None:
        places = self._places[target.fqn]
        for t in places:
            del self._places[t.fqn]

        def rounded(w: Tensor, config: RTNConfig) -> RTNQuantizedTensor:
            parts = w if w.dim() == 3 else w[None]
            done = [self._refined(target.fqn, part, config, found.get(e)) for e, part in enumerate(parts)]
            self._note(target.fqn, [one for one in done if isinstance(one, Rounded)], len(done), bool(found))
            of_parts = (one.planes if isinstance(one, Rounded) else one for one in done)
            qdata, scale, *zero = (
                torch.stack(plane).view(*w.shape[:-1], -1) for plane in zip(*of_parts, strict=True)
            )
            return RTNQuantizedTensor(
                qdata,
                scale,
                **format_of(config),
                in_features=w.shape[-1],
                float_dtype=w.dtype,
                zero=zero[0] if zero else None,
            )

        # The one whose module was reached first: of it the float weight is there.
        self._weights.put(sorted(places, key=lambda t: t is not target), rounded)

    def _refined(
        self, fqn: str, w_NK: Tensor, config: RTNConfig, moments: Moments | None
    ) -> Rounded | Sequence[Tensor]:
        """The planes of one matrix, and the errors where its inputs are known."""
        if moments is None or moments.count < FEW:
            return ops.quantize(w_NK, config.bits, config.group_size, config.scale_method, w_NK.dtype)
        if self._spread is None or self._spread[0] is not moments:
            self._spread = moments, spread(_finite(fqn, moments, w_NK.dtype))
        return refine(w_NK, config, self._spread[1])

    def _note(self, fqn: str, seen: list[Rounded], parts: int, multiplied: bool) -> None:
        better = [one for one in seen if one.error < one.plain_error]
        if seen and (plain := sum(one.plain_error for one in seen)) > 0:
            ratio = sum(one.error for one in seen) / plain
            self._logs.append(math.log(max(ratio, 1e-30)))
            self.notes[fqn] = f"refined: {ratio:.2f} times plain rounding's error"
        if not better:
            self.plain.append(fqn)
            few = "as too few inputs came to it" if multiplied else "as no product by it was seen"
            self.notes[fqn] = f"plain rounding, {'which was better' if seen else few}"
        elif len(better) < parts:
            self.notes[fqn] += f"; {parts - len(better)} of {parts} experts keep plain rounding"


def _finite(fqn: str, moments: Moments, dtype: torch.dtype) -> Tensor:
    if not is_finite(estimate := moments.estimate()):
        raise ValueError(
            f"{fqn}: its inputs hold NaN or inf in {dtype}; load the model in bfloat16 or float32, or look "
            "for what is "
            "wrong with the inputs that were given"
        )
    return estimate
