"""What quantizing costs a causal language model, measured on some sequences of tokens."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor.evaluation.comparison import divergences
from rtn_tensor.quantize.targets import Target

SEQUENCES = 2  # that are measured
MUCH = 0.3  # nats per token: a model that loses as much writes visibly worse


class Cost:
    """What the float model predicts of `sequences`, to compare with what is made of it."""

    def __init__(self, model: Any, sequences: Sequence[Tensor]):
        self._pairs = [(ids, _logits(model, ids)) for ids in sequences]

    def divergence(self, model: Any) -> float | None:
        """Of the model's next-token distributions from the float model's, in nats per token; None where there
        are no sequences.

        Raises:
            ValueError: it is NaN or inf.
        """
        if not self._pairs:
            return None
        found = torch.cat([divergences(expected, _logits(model, ids)) for ids, expected in self._pairs])
        if not math.isfinite(divergence := float(found.mean())):
            raise ValueError("the model's logits hold NaN or inf; load it in bfloat16 or float32")
        return divergence


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids[None], use_cache=False).logits[0]


def warn_if_much(divergence: float | None, measured: str, instead: str) -> None:
    """To the caller of who calls it."""
    if divergence is not None and divergence > MUCH:
        warnings.warn(
            "the quantized model's next-token distributions differ from the float model's by "
            f"{divergence:.2f} nats per token on {measured}, more than {MUCH}; {instead}",
            stacklevel=3,
        )


def float_weights(model: nn.Module, targets: Sequence[Target]) -> Callable[[], None]:
    """A function that puts the weights back as they are now, and what the model's configs say of them."""
    weights = [(t.module, t.parameter_name, t.parameter) for t in targets]
    # What transformers is told of quantized weights stands in its configs.
    found = (getattr(module, "config", None) for module in model.modules())
    configs = [(config, vars(config).copy()) for config in found if hasattr(config, "to_dict")]

    def put_back() -> None:
        for module, name, parameter in weights:
            module._parameters[name] = parameter  # type: ignore[assignment]
        for config, before in configs:
            vars(config).clear()
            vars(config).update(before)

    return put_back


@contextmanager
def unless_it_fails(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """Puts the weights back where what follows fails; until then they are kept."""
    put_back = float_weights(model, targets)
    try:
        yield
    except BaseException:
        put_back()
        raise
