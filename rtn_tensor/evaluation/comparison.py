"""How far a model's predictions are from those of the model that it was made of."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rtn_tensor.evaluation.perplexity import ROWS, scored


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        divergence: of the model's next-token distributions from the reference's (Kullback and Leibler's), in
            nats per token.
        agreement: the part of tokens for which both rank the same token first, 0 to 1.
        perplexity, reference_perplexity: of the model and of the reference.
        tokens: that were predicted.
    """

    divergence: float
    agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"divergence {self.divergence:.4f} nats per token, the same first token for "
            f"{100 * self.agreement:.1f} %, "
            f"perplexity {self.perplexity:.3f} (reference {self.reference_perplexity:.3f}), over "
            f"{self.tokens} tokens"
        )


def divergences(reference: Tensor, other: Tensor) -> Tensor:
    """Of logits `[tokens, vocabulary]`, the divergence of `other` from `reference` at each token, in nats:
    fp64."""
    parts = []
    for p, q in zip(reference.split(ROWS), other.split(ROWS), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts).double()


@torch.inference_mode()
def compare(
    model: Any,
    reference: Any,
    input_ids: Tensor,
    window: int = 1024,
    progress: Callable[[list], Iterable] | None = None,
) -> Comparison:
    """Compares what `model` predicts of each token with what `reference` does, as a quantized model with the
    float one. Windows of `window` tokens follow one another, and the first token of each is not predicted.

    Args:
        model, reference: causal language models of transformers with one vocabulary, in eval mode.
        input_ids: tokens, integers, [T] or [1, T].
        window: tokens that the models see at once.
        progress: wraps the list of windows, for instance `tqdm.tqdm`.

    Raises:
        ValueError: as `perplexity`, and for models of two vocabularies.
    """
    pairs = list(
        zip(*(scored(each, input_ids, window).split(window) for each in (model, reference)), strict=True)
    )
    windows = [pair for pair in pairs if len(pair[0]) > 1]
    sums = torch.zeros(4, dtype=torch.float64)
    for pair in progress(windows) if progress else windows:
        ours, theirs = (
            each(ids[None], use_cache=False).logits[0, :-1]
            for each, ids in zip((model, reference), pair, strict=True)
        )
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the models have {ours.shape[1]} and {theirs.shape[1]} tokens in their vocabularies; "
                "compare a model with the one that it was made of"
            )
        theirs, targets = theirs.to(ours.device), pair[0][1:]
        found = (
            divergences(theirs, ours),
            ours.argmax(-1) == theirs.argmax(-1),
            _losses(ours, targets),
            _losses(theirs, targets),
        )
        sums += torch.stack([x.sum(dtype=torch.float64) for x in found]).cpu()
    count = sum(len(pair[0]) - 1 for pair in windows)
    divergence, agreement, loss, reference_loss = (sums / count).tolist()
    return Comparison(divergence, agreement, math.exp(loss), math.exp(reference_loss), count)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in parts])
