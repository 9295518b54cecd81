"""What a quantized causal language model still does: its perplexity, and what it writes."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtn_tensor.decode import Decoder, positions
from rtn_tensor.pretrained import is_pretrained

ROWS = 256  # logits turned to fp32 at once: with a vocabulary of 150k that is 150 MB
PROBE = 8  # tokens, of which the last 3 are changed to see whether the first 5 notice
NOTICED = 5e-3  # of the logits' norm; of a causal model nothing, but for the sums of experts that get other numbers of tokens


def check_causal(model: Any) -> None:
    """Raises ValueError where transformers' `model` is of a kind that predicts no next token from those before it."""
    if not is_pretrained(model):
        return
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder, which does not continue a text; give a causal language model")
    if not model.can_generate():
        raise ValueError(f"{name} does not predict the next token; give a causal language model, as of a class ...ForCausalLM")


def check_tokens(model: Any, ids: Tensor) -> None:
    """Raises ValueError where `ids` holds a token that `model` has no embedding of."""
    if not is_pretrained(model) or not ids.numel():
        return
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if known is not None and (low < 0 or high >= known):
        raise ValueError(
            f"token {low if low < 0 else high} is none of the {known} of the model's vocabulary; use the tokenizer that came with the model"
        )


@torch.no_grad()
def check_ahead(model: Any, ids: Tensor) -> None:
    """Raises ValueError where `model` sees the tokens after a token, too: what it predicts then means nothing. It is tried on `ids`."""
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
            f"{type(model).__name__} predicts a token from those after it, too, so that neither its perplexity nor what it writes means "
            "anything; give a causal language model (where it can be one, with is_decoder in its config)"
        )


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
        ValueError: a model in training mode, or one that is not causal; fewer than two tokens, another shape or dtype, a token that the
            model does not have; not 1 <= stride <= window, or a window of more tokens than the model has positions.
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

    check_causal(model)
    ids = input_ids.reshape(-1).long().to(next(model.parameters()).device)
    length = ids.numel()
    check_tokens(model, ids)
    if (most := positions(model)) is not None and min(window, length) > most:
        raise ValueError(
            f"window={window}, and {type(model).__name__} has {most} positions (max_position_embeddings); use a window of {most} or less, "
            "and a stride no larger"
        )
    check_ahead(model, ids)
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
        TypeError: the prompt is no text, or max_new_tokens no whole number.
        ValueError: an empty prompt, max_new_tokens below 1, or more tokens than the model has positions; a model that is not causal; a
            chat template that fails; a tokenizer of another vocabulary; `compile` for a model whose generation_config asks for more than
            greedy decoding.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is a {type(prompt).__name__}; pass some text")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens={max_new_tokens!r}; it must be a whole number")
    if not prompt:
        raise ValueError("the prompt is empty; pass some text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
    check_causal(model)
    if compile:
        check_greedy(model)
    ids = _prompt_ids(tokenizer, prompt)
    check_tokens(model, ids)
    most, length = positions(model), ids.shape[1]
    if most is not None and length + max_new_tokens > most:
        fits = f"use max_new_tokens={most - length} or less" if length < most else f"shorten it to less than {most} tokens"
        raise ValueError(
            f"the prompt has {length} tokens and max_new_tokens={max_new_tokens}, and {type(model).__name__} has {most} positions "
            f"(max_position_embeddings); {fits}"
        )
    ids = ids.to(next(model.parameters()).device)
    if is_pretrained(model) and getattr(model.config, "is_decoder", None) is False:  # XLNet has none, and writes by masks of its own
        check_ahead(model, ids[0])
    if compile:
        return _generate_compiled(model, tokenizer, ids, max_new_tokens)
    # Without a pad token `generate` logs that it takes the end-of-sequence token; so do we, quietly.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        return_dict_in_generate=False,
        tokenizer=tokenizer,  # for stop strings
    )
    new = out[0, length:].tolist()  # waits for an accelerator
    seconds = time.perf_counter() - started
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)


def _prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """int64 [1, T]"""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(
                f"the tokenizer's chat template fails ({type(error).__name__}: {error}); mend chat_template.jinja, or the chat_template of "
                "tokenizer_config.json, or remove it to continue the prompt as it is"
            ) from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("the tokenizer makes no tokens of the prompt; pass some other text")
    return torch.tensor([ids], dtype=torch.long)


# What a generation_config may say beside its defaults, as greedy decoding of one text is the same with it.
APPLIED = {
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "max_length",
    "max_new_tokens",
    "do_sample",
    "num_beams",
}
OF_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits"}
OF_BEAMS = {"early_stopping", "length_penalty", "diversity_penalty"}
OF_SPEED = {"use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile", "low_memory"} | {
    *(
        "prefill_chunk_size",
        "continuous_batching_config",
        "use_mtp",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
    ),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"),
}
OF_THE_RESULT = {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}
OF_THE_FILE = {"transformers_version", "_from_model_config"}
NEUTRAL = {"repetition_penalty": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1, "num_return_sequences": 1, "num_beam_groups": 1}


def check_greedy(model: Any) -> None:
    """Raises ValueError where the model's generation_config asks for more than the most likely token each time."""
    from transformers import GenerationConfig

    harmless = APPLIED | OF_SAMPLING | OF_BEAMS | OF_SPEED | OF_THE_RESULT | OF_THE_FILE
    given = vars(model.generation_config)
    asked = [name for name in vars(GenerationConfig()) if name not in harmless and given.get(name) and given[name] != NEUTRAL.get(name)]
    if asked:
        raise ValueError(
            f"the model's generation_config has {' and '.join(asked)}, which compiled decoding does not apply; generate without "
            "compiling, or remove it there"
        )


def _generate_compiled(model, tokenizer, ids: Tensor, max_new_tokens: int) -> Generation:
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    decoder = Decoder(model, ids.shape[1] + max_new_tokens, compile=True)
    new: list[int] = []
    started = time.perf_counter()
    for token in decoder(ids):
        new.append(int(token))
        if new[-1] in ends:
            break
    seconds = time.perf_counter() - started
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)
