"""What a quantized causal language model still does: its perplexity on a text."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtn_tensor.evaluation.decoding import positions
from rtn_tensor.integrations.transformers.models import is_pretrained

ROWS = 256  # logits turned to fp32 at once: with a vocabulary of 150k that is 150 MB
PROBE = 8  # tokens, of which the last 3 are changed to see whether the first 5 notice
# Of the logits' norm; of a causal model nothing, but for the sums of experts that get other numbers of
# tokens.
NOTICED = 5e-3


def check_causal(model: Any) -> None:
    """Raises ValueError where transformers' `model` is of a kind that predicts no next token from those
    before it."""
    if not is_pretrained(model):
        return
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, which does not continue a text; give a causal language model"
        )
    if not model.can_generate():
        raise ValueError(
            f"{name} does not predict the next token; give a causal language model, as of a "
            "class ...ForCausalLM"
        )


def check_tokens(model: Any, ids: Tensor) -> None:
    """Raises ValueError where `ids` holds a token that `model` has no embedding of."""
    if not is_pretrained(model) or not ids.numel():
        return
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if known is not None and (low < 0 or high >= known):
        raise ValueError(
            f"token {low if low < 0 else high} is none of the {known} of the model's vocabulary; use the "
            "tokenizer that came with the model"
        )


@torch.no_grad()
def check_ahead(model: Any, ids: Tensor) -> None:
    """Raises ValueError where `model` sees the tokens after a token, too: what it predicts then means
    nothing. It is tried on `ids`."""
    if not is_pretrained(model) or ids.numel() < 2:
        return
    tokens = ids[:PROBE]
    kept = max(1, tokens.numel() - 3)
    other = torch.cat([tokens[:kept], tokens[:1].expand(tokens.numel() - kept)])
    if torch.equal(tokens, other):
        other[kept:] = 0 if tokens[0] else 1
    one, two = (model(t[None], use_cache=False).logits[0, :kept].float() for t in (tokens, other))
    if (one - two).norm() > NOTICED * (one - one.mean(-1, keepdim=True)).norm():
        raise ValueError(
            f"{type(model).__name__} predicts a token from those after it, too, so that neither its "
            "perplexity nor what it writes means "
            "anything; give a causal language model (where it can be one, with is_decoder in its config)"
        )


def scored(model: Any, input_ids: Tensor, window: int) -> Tensor:
    """The tokens [T] on the model's device. Raises ValueError where `model` cannot score them, `window`
    tokens at once."""
    if model.training:
        raise ValueError(
            "the model is in training mode, where dropout makes its loss random; call model.eval() first"
        )
    if input_ids.ndim not in (1, 2) or input_ids.shape[:-1].numel() != 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; pass one sequence, [T] or [1, T]")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; pass int64 tokens")
    if window < 2 or input_ids.numel() < 2:
        raise ValueError(
            f"got {input_ids.numel()} tokens and window={window}; both must be at least 2, as a "
            "token is scored given another"
        )
    check_causal(model)
    ids = input_ids.reshape(-1).long().to(next(model.parameters()).device)
    check_tokens(model, ids)
    if (most := positions(model)) is not None and min(window, ids.numel()) > most:
        raise ValueError(
            f"window={window}, and {type(model).__name__} has {most} positions (max_position_embeddings); "
            f"use a window of {most} or less, and a stride no larger"
        )
    check_ahead(model, ids)
    return ids


@torch.inference_mode()
def token_losses(
    model: nn.Module,
    input_ids: Tensor,
    window: int = 1024,
    stride: int = 512,
    progress: Callable[[list[int]], Iterable[int]] | None = None,
) -> Tensor:
    """The negative log-likelihood, in nats, of each token that a sliding window scores: fp32, [S], in the
    order of the text.

    A window covers `window` tokens and starts `stride` tokens after the one before; it scores only the tokens
    that no earlier window scored, so all but the first window's have at least `window - stride` tokens of
    context. The first token is not scored; where stride equals window, the first token of each window is not,
    as nothing precedes it there. The loss is fp32, over the model's own logits. Method:
    https://huggingface.co/docs/transformers/perplexity

    Args:
        model: a transformers causal language model, in eval mode.
        input_ids: tokens, integers, [T] or [1, T].
        window: tokens the model sees at once; no more than it was trained for. A shorter text is one window.
        stride: tokens from one window to the next; smaller is slower and gives more context.
        progress: wraps the list of window starts, e.g. `tqdm.tqdm`.

    Raises:
        ValueError: a model in training mode, or one that is not causal; fewer than two tokens, another shape
            or dtype, a token that the model does not have; not 1 <= stride <= window, or a window of more
            tokens than the model has positions.
    """
    ids = scored(model, input_ids, window)
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} with window={window}; it must be at least 1 and at most window")
    length = ids.numel()
    last = max(0, -(-(length - window) // stride))  # index of the first window that reaches the end
    starts = [stride * i for i in range(last + 1)]

    losses, done = [], 0  # `done`: tokens of the windows so far
    for start in progress(starts) if progress else starts:
        tokens = ids[start : start + window]
        first = max(done - start, 1)
        done = start + tokens.numel()
        logits = model(tokens[None], use_cache=False).logits[0, first - 1 : -1]
        targets = tokens[first:]
        for part, target in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
            losses.append(F.cross_entropy(part.float(), target, reduction="none").cpu())
    return torch.cat(losses)


def perplexity(
    model: nn.Module,
    input_ids: Tensor,
    window: int = 1024,
    stride: int = 512,
    progress: Callable[[list[int]], Iterable[int]] | None = None,
) -> float:
    """exp(mean of `token_losses`), which takes and raises the same."""
    return token_losses(model, input_ids, window, stride, progress).double().mean().exp().item()
