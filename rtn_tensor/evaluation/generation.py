"""Continuing a prompt, or a chat, by a transformers model: by its own loop, or a compiled one."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.evaluation.decoding import Decoder, positions
from rtn_tensor.evaluation.perplexity import check_ahead, check_causal, check_tokens
from rtn_tensor.integrations.transformers.models import is_pretrained
from rtn_tensor.wording import with_article


@dataclass(frozen=True)
class Generation:
    """What `generate` wrote."""

    text: str
    tokens: int  # new ones, an end-of-sequence token included
    seconds: float  # the prompt's forward pass included

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, by transformers' `generate`.

    Attributes:
        temperature: that the logits are divided by, above 0.
        top_p: of the tokens, the likeliest whose probabilities sum to it are drawn from; above 0, at most 1.
        seed: of torch's generators, for the same text again; None for another each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}; it must be above 0; without one decoding is greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; it must be above 0 and at most 1")


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompt: str | Sequence[Mapping[str, str]],
    max_new_tokens: int,
    compile: bool = False,
    *,
    raw: bool = False,
    sampling: Sampling | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Generation:
    """Continues `prompt`, greedily by default, asked as the user's turn of a chat where the tokenizer has a
    chat template.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        prompt: text, not empty; or the messages of a chat, {"role": "user", "content": ...} the last.
        max_new_tokens: at most this many, at least 1; the model may stop earlier.
        compile: decode by a compiled `Decoder` in the place of transformers' own loop; the time to compile is
            not counted in `seconds`.
        raw: continue the text as it is, whatever chat template there is.
        sampling: how to draw tokens, in the place of the likeliest.
        on_text: is called with each piece of the text as soon as it is written.

    Raises:
        TypeError: the prompt is no text, or max_new_tokens no whole number.
        ValueError: an empty prompt, max_new_tokens below 1, or more tokens than the model has positions; a
            model that is not causal; messages, and no chat template; a chat template that fails; a tokenizer
            of another vocabulary; `compile` with `sampling`, or for a model whose generation_config asks for
            more than greedy decoding.
    """
    chat = not isinstance(prompt, str)
    if chat and not (isinstance(prompt, Sequence) and all(isinstance(each, Mapping) for each in prompt)):
        raise TypeError(f"prompt is {with_article(type(prompt).__name__)}; pass some text")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens={max_new_tokens!r}; it must be a whole number")
    if not prompt:
        raise ValueError("the prompt is empty; pass some text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
    if chat and (raw or not tokenizer.chat_template):
        raise ValueError("the tokenizer has no chat template, so that it can have no chat; pass some text")
    if compile and sampling:
        raise ValueError("compiled decoding takes the likeliest token; leave out compile, or sampling")
    check_causal(model)
    if compile:
        check_greedy(model)
    ids = _prompt_ids(tokenizer, prompt, raw)
    check_tokens(model, ids)
    most, length = positions(model), ids.shape[1]
    if most is not None and length + max_new_tokens > most:
        fits = (
            f"use max_new_tokens={most - length} or less"
            if length < most
            else f"shorten it to less than {most} tokens"
        )
        raise ValueError(
            f"the prompt has {length} tokens and max_new_tokens={max_new_tokens}, and {type(model).__name__} "
            f"has {most} positions "
            f"(max_position_embeddings); {fits}"
        )
    ids = ids.to(next(model.parameters()).device)
    # XLNet has none, and writes by masks of its own.
    if is_pretrained(model) and getattr(model.config, "is_decoder", None) is False:
        check_ahead(model, ids[0])
    pieces = _streamer(tokenizer, on_text)
    if compile:
        return _generate_compiled(model, tokenizer, ids, max_new_tokens, pieces)
    # Without a pad token `generate` logs that it takes the end-of-sequence token; so do we, quietly.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        # All tokens but those that top_p leaves out: transformers' own default is the best 50.
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        num_beams=1,
        pad_token_id=pad,
        return_dict_in_generate=False,
        tokenizer=tokenizer,  # for stop strings
        streamer=pieces,
        **how,
    )
    new = out[0, length:].tolist()  # waits for an accelerator
    return _generation(tokenizer, new, started)


def _generation(tokenizer: Any, new: list[int], started: float) -> Generation:
    seconds = time.perf_counter() - started
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)


def _streamer(tokenizer: Any, on_text: Callable[[str], Any] | None) -> Any:
    """Of transformers, whole words at a time; None where no one listens."""
    if on_text is None:
        return None
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.begun else text.lstrip()
            self.begun = self.begun or bool(text)
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> Tensor:
    """int64 [1, T]"""
    if tokenizer.chat_template and not raw:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(
                f"the tokenizer's chat template fails ({type(error).__name__}: {error}); mend "
                "chat_template.jinja, or the chat_template of "
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


OF_SAMPLING = {
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
}


OF_BEAMS = {"early_stopping", "length_penalty", "diversity_penalty"}


OF_SPEED = {
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "low_memory",
} | {
    *(
        "prefill_chunk_size",
        "continuous_batching_config",
        "use_mtp",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
    ),
    *(
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
    ),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"),
}


OF_THE_RESULT = {
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
}


OF_THE_FILE = {"transformers_version", "_from_model_config"}


NEUTRAL = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
}


def check_greedy(model: Any) -> None:
    """Raises ValueError where the model's generation_config asks for more than the most likely token each
    time."""
    from transformers import GenerationConfig

    harmless = APPLIED | OF_SAMPLING | OF_BEAMS | OF_SPEED | OF_THE_RESULT | OF_THE_FILE
    given = vars(model.generation_config)
    asked = [
        name
        for name in vars(GenerationConfig())
        if name not in harmless and given.get(name) and given[name] != NEUTRAL.get(name)
    ]
    if asked:
        raise ValueError(
            f"the model's generation_config has {' and '.join(asked)}, which compiled decoding does not "
            "apply; generate without "
            "compiling, or remove it there"
        )


def _generate_compiled(model, tokenizer, ids: Tensor, max_new_tokens: int, pieces: Any) -> Generation:
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    decoder = Decoder(model, ids.shape[1] + max_new_tokens, compile=True)
    new: list[int] = []
    if pieces:
        pieces.put(ids)
    started = time.perf_counter()
    for token in decoder(ids):
        new.append(int(token))
        if pieces:
            pieces.put(token[0].cpu())
        if new[-1] in ends:
            break
    if pieces:
        pieces.end()
    return _generation(tokenizer, new, started)
