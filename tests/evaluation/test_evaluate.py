import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from tiny_llama import greedy, tiny_llama, tiny_tokenizer
from torch import nn

from rtn_tensor import quantize_, rtn_int4
from rtn_tensor.evaluation.decoding import positions
from rtn_tensor.evaluation.generation import generate
from rtn_tensor.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def tokens(n):
    return torch.randint(0, 320, (n,), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def brute_force(model, ids, window, stride):
    """Scores each token once, given all that precedes it in the first window that holds it, by a forward pass
    of its own."""
    losses = []
    for i in range(1, len(ids)):
        start = stride * max(0, math.ceil((i + 1 - window) / stride))
        if start < i:
            logits = model(ids[None, start:i]).logits[0, -1]
            losses.append(F.cross_entropy(logits.double(), ids[i]).item())
    return math.exp(sum(losses) / len(losses))


def test_one_window_is_cross_entropy(model):
    ids = tokens(100)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], ids[1:]).exp().item()
    assert perplexity(model, ids, window=100, stride=50) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, ids, window=256, stride=1) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, ids[None].int()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("n", "window", "stride"),
    [
        (33, 16, 8),
        (32, 16, 8),
        (31, 16, 1),
        (40, 16, 15),
        (48, 16, 16),  # no overlap: the first token of a window has no context
        (49, 16, 16),  # and here the last window is that one token
        (17, 16, 5),
        (5, 2, 1),
        (6, 2, 2),
        (2, 2, 1),
    ],
)
def test_windows_by_brute_force(model, n, window, stride):
    ids = tokens(n)
    assert perplexity(model, ids, window, stride) == pytest.approx(
        brute_force(model, ids, window, stride), rel=1e-4
    )


def test_more_rows_than_are_cast_at_once(model, monkeypatch):
    ids = tokens(90)
    whole = perplexity(model, ids, 64, 32)
    monkeypatch.setattr("rtn_tensor.evaluation.perplexity.ROWS", 7)
    assert perplexity(model, ids, 64, 32) == pytest.approx(whole, rel=1e-6)


def test_logits_are_scored_in_fp32():
    """At this size a loss summed in bf16 is wrong in its third digit."""
    model, ids = tiny_llama(dtype=torch.bfloat16), tokens(200)
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits[:-1].double(), ids[1:]).exp().item()
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)


def test_a_quantized_model():
    model, ids = tiny_llama(), tokens(100)
    float_value = perplexity(model, ids, 64, 32)
    quantize_(model, rtn_int4(32))
    value = perplexity(model, ids, 64, 32)
    assert value != float_value
    assert value == pytest.approx(brute_force(model, ids, 64, 32), rel=1e-4)


def test_progress_wraps_the_windows(model):
    seen = []
    perplexity(model, tokens(40), 16, 8, progress=lambda starts: seen.append(starts) or starts)
    assert seen == [[0, 8, 16, 24]]


def test_perplexity_checks_its_input(model):
    class Training(nn.Module):
        pass

    messages = []
    for call in (
        lambda: perplexity(Training(), tokens(9)),
        lambda: perplexity(model, tokens(8).view(2, 4)),
        lambda: perplexity(model, tokens(8).view(1, 2, 4)),
        lambda: perplexity(model, torch.tensor(3)),
        lambda: perplexity(model, tokens(9).float()),
        lambda: perplexity(model, tokens(9).bool()),
        lambda: perplexity(model, tokens(9), 8, 0),
        lambda: perplexity(model, tokens(9), 8, 9),
        lambda: perplexity(model, tokens(9), 1, 1),
        lambda: perplexity(model, tokens(1)),
        lambda: perplexity(model, tokens(0)),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the messages are pinned below)
            call()
        messages.append(str(caught.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
the model is in training mode, where dropout makes its loss random; call model.eval() first
input_ids has shape [2, 4]; pass one sequence, [T] or [1, T]
input_ids has shape [1, 2, 4]; pass one sequence, [T] or [1, T]
input_ids has shape []; pass one sequence, [T] or [1, T]
input_ids has dtype torch.float32; pass int64 tokens
input_ids has dtype torch.bool; pass int64 tokens
stride=0 with window=8; it must be at least 1 and at most window
stride=9 with window=8; it must be at least 1 and at most window
got 9 tokens and window=1; both must be at least 2, as a token is scored given another
got 1 tokens and window=1024; both must be at least 2, as a token is scored given another
got 0 tokens and window=1024; both must be at least 2, as a token is scored given another""",
    )


# -------------------------------------------------------------------------------- generate


def test_generate_is_greedy(model, tokenizer):
    result = generate(model, tokenizer, "We the people", 10)
    ids = tokenizer("We the people", return_tensors="pt")["input_ids"]
    new = greedy(model, ids, 10)[0, ids.shape[1] :]
    assert 1 not in new  # the end-of-sequence token would have stopped it
    assert result.text == tokenizer.decode(new).strip()
    assert result.tokens == 10
    assert result.seconds > 0
    assert result.tokens_per_second == result.tokens / result.seconds


def test_generate_stops_at_the_end_of_sequence(tokenizer):
    model = tiny_llama()
    ids = tokenizer("We the people", return_tensors="pt")["input_ids"]
    new = greedy(model, ids, 10)[0, ids.shape[1] :].tolist()
    stop = new[4]
    first = new.index(stop)
    model.generation_config.eos_token_id = stop
    result = generate(model, tokenizer, "We the people", 10)
    assert result.tokens == first + 1
    assert result.text == tokenizer.decode(new[: first + 1]).strip()


def test_generate_uses_the_chat_template(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}user: {{ messages[0]['content'] }}{% if add_generation_prompt %} state:{% endif %}"
    )
    asked = generate(model, tokenizer, "the people", 10)
    ids = tokenizer("<s>user: the people state:", return_tensors="pt")["input_ids"]
    assert asked.text == tokenizer.decode(greedy(model, ids, 10)[0, ids.shape[1] :]).strip()


def test_generate_checks_its_input(model, tokenizer):
    with pytest.raises(ValueError, match=r"^the prompt is empty; pass some text$"):
        generate(model, tokenizer, "", 5)
    with pytest.raises(ValueError, match=r"^max_new_tokens=0; it must be at least 1$"):
        generate(model, tokenizer, "We", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.1),
        ("no_repeat_ngram_size", 1),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [5]),
        ("begin_suppress_tokens", [5]),
        ("sequence_bias", [[[5], -1.0]]),
        ("min_new_tokens", 1),
        ("min_length", 4),
        ("forced_bos_token_id", 5),
        ("forced_eos_token_id", 5),
        ("stop_strings", ["e"]),
        ("max_time", 1.0),
        ("guidance_scale", 2.0),
        ("exponential_decay_length_penalty", (1, 1.1)),
        ("remove_invalid_values", True),
        ("token_healing", True),
        ("watermarking_config", {"greenlist_ratio": 0.5}),
        ("penalty_alpha", 0.5),
        ("dola_layers", "low"),
        ("num_return_sequences", 2),
        ("encoder_repetition_penalty", 1.1),
    ],
)
def test_compiled_generate_refuses_what_it_does_not_apply(tokenizer, name, value):
    model = tiny_llama()
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"{name}, which compiled decoding does not apply"):
        generate(model, tokenizer, "We", 5, compile=True)


def test_what_changes_no_greedy_token_is_no_reason_to_refuse(monkeypatch, tokenizer):
    settings = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "do_sample": True,
        "num_beams": 4,
        "max_length": 4096,
        "repetition_penalty": 1.0,
    }
    settings |= {
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
        "cache_implementation": "static",
        "length_penalty": 2.0,
        "guidance_scale": 1.0,
    }
    settings |= {
        "no_repeat_ngram_size": 0,
        "bad_words_ids": None,
        "suppress_tokens": [],
        "min_length": 0,
        "of_another_program": "chatml",
    }
    model = tiny_llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    monkeypatch.setattr("rtn_tensor.evaluation.decoding._compiled", lambda step: step)
    assert (
        generate(model, tokenizer, "We", 5, compile=True).text
        == generate(tiny_llama(), tokenizer, "We", 5).text
    )


def test_generate_keeps_to_what_the_model_asks_for(tokenizer):
    """A setting that changes the result's type, and one that transformers applies only if it is given the
    tokenizer."""
    model = tiny_llama()
    plain = generate(model, tokenizer, "We the people", 10)
    model.generation_config.return_dict_in_generate = True
    assert generate(model, tokenizer, "We the people", 10).text == plain.text
    assert "y" in plain.text[:-1]
    model.generation_config.stop_strings = ["y"]
    assert generate(model, tokenizer, "We the people", 10).tokens < 10


@pytest.mark.parametrize("compile", [False, True])
def test_a_model_that_is_not_causal_is_refused(tokenizer, compile):
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    for kind in (BertForMaskedLM, BertLMHeadModel):
        model = kind(BertConfig(**sizes)).eval()
        with pytest.raises(ValueError, match="give a causal language model"):
            generate(model, tokenizer, "We the people", 5, compile=compile)
        with pytest.raises(ValueError, match="give a causal language model"):
            perplexity(model, tokens(20))
    assert perplexity(BertLMHeadModel(BertConfig(is_decoder=True, **sizes)).eval(), tokens(20)) > 0


def test_positions_are_those_of_the_config():
    from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MambaConfig, XLNetConfig

    def of(config):
        return positions(type("Model", (), {"config": config}))

    assert of(LlamaConfig(max_position_embeddings=64)) == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert of(LlamaConfig(max_position_embeddings=64, rope_parameters=yarn)) == 256
    assert of(LlamaConfig(max_position_embeddings=256, rope_parameters=yarn)) == 256
    assert of(Gemma3TextConfig(max_position_embeddings=64)) == 64
    assert of(GPT2Config(n_positions=32)) == 32
    assert of(MambaConfig()) is of(XLNetConfig()) is positions(nn.Linear(2, 2)) is None


@pytest.mark.slow
def test_compiled_generate(tokenizer):
    """The same text as without, and the same end."""
    model = tiny_llama()
    quantize_(model, rtn_int4(group_size=32))
    expected = generate(model, tokenizer, "We the people", 10)
    got = generate(model, tokenizer, "We the people", 10, compile=True)
    assert (got.text, got.tokens) == (expected.text, expected.tokens)
    prompt = tokenizer("We the people", return_tensors="pt")["input_ids"]
    model.generation_config.eos_token_id = greedy(model, prompt, 3)[0, -1].item()
    stopped = generate(model, tokenizer, "We the people", 10, compile=True)
    assert stopped.tokens == generate(model, tokenizer, "We the people", 10).tokens <= 3
