"""What a quantized causal language model still does: its perplexity, and what it writes."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtn_tensor.decode import Decoder

ROWS = 256  # logits turned to fp32 at once: with a vocabulary of 150k that is 150 MB


@torch.inference_mode()
def token_losses(
    model: nn.Module, input_ids: Tensor, window: int = 1024, stride: int = 512, progress: Callable[[list[int]], Iterable[int]] | None = None
) -> Tensor:
    """The negative log-likelihood, in nats, of each token that a sliding window scores: fp32, [S], in the order of the text.

    A window covers `window` tokens and starts `stride` tokens after the one before; it scores only the tokens that no earlier window
    scored, so all but the first window's have at least `window - stride` tokens of context. The first token is not scored; where stride
    equals window, the first token of each window is not, as nothing precedes it there. The loss is fp32, over the model's own logits.
    Method: https://huggingface.co/docs/transformers/perplexity

    Args:
        model: a transformers causal language model, in eval mode.
        input_ids: tokens, integers, [T] or [1, T].
        window: tokens the model sees at once; no more than it was trained for. A shorter text is one window.
        stride: tokens from one window to the next; smaller is slower and gives more context.
        progress: wraps the list of window starts, e.g. `tqdm.tqdm`.

    Raises:
        ValueError: a model in training mode, fewer than two tokens, another shape or dtype, or not 1 <= stride <= window.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes its loss random; call model.eval() first")
    if input_ids.ndim not in (1, 2) or input_ids.shape[:-1].numel() != 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; pass one sequence, [T] or [1, T]")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; pass int64 tokens")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} with window={window}; it must be at least 1 and at most window")
    if window < 2 or input_ids.numel() < 2:
        raise ValueError(f"got {input_ids.numel()} tokens and window={window}; both must be at least 2, as a token is scored given another")

    ids = input_ids.reshape(-1).long().to(next(model.parameters()).device)
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
    model: nn.Module, input_ids: Tensor, window: int = 1024, stride: int = 512, progress: Callable[[list[int]], Iterable[int]] | None = None
) -> float:
    """exp(mean of `token_losses`), which takes and raises the same."""
    return token_losses(model, input_ids, window, stride, progress).double().mean().exp().item()


@dataclass(frozen=True)
class Generation:
    """What `generate` wrote."""

    text: str
    tokens: int  # new ones, an end-of-sequence token included
    seconds: float  # the prompt's forward pass included

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@torch.inference_mode()
def generate(model, tokenizer, prompt: str, max_new_tokens: int, compile: bool = False) -> Generation:
    """Greedy continuation of `prompt`, asked as the user's turn of a chat where the tokenizer has a chat template.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        prompt: text; not empty.
        max_new_tokens: at most this many, at least 1; the model may stop earlier.
        compile: decode by a compiled `Decoder` in the place of transformers' own loop; the time to compile is not counted in `seconds`.

    Raises:
        ValueError: an empty prompt, max_new_tokens below 1, or `compile` for a model that asks for a repetition penalty.
    """
    if not prompt:
        raise ValueError("the prompt is empty; pass some text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = ids.to(next(model.parameters()).device)
    if compile:
        return _generate_compiled(model, tokenizer, ids, max_new_tokens)
    # Without a pad token `generate` logs that it takes the end-of-sequence token; so do we, quietly.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    started = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad
    )
    new = out[0, ids.shape[1] :].tolist()  # waits for an accelerator
    seconds = time.perf_counter() - started
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)


def _generate_compiled(model, tokenizer, ids: Tensor, max_new_tokens: int) -> Generation:
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    if model.generation_config.repetition_penalty not in (None, 1.0):
        raise ValueError("the model's generation_config has a repetition_penalty, which compiled decoding does not apply; generate without")
    decoder = Decoder(model, ids.shape[1] + max_new_tokens, compile=True)
    new: list[int] = []
    started = time.perf_counter()
    for token in decoder(ids):
        new.append(int(token))
        if new[-1] in ends:
            break
    seconds = time.perf_counter() - started
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)
