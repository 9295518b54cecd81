import pytest
import torch
from tiny_llama import greedy, tiny_llama

from rtn_tensor import quantize_, rtn_int4
from rtn_tensor.evaluation.decoding import Decoder
from rtn_tensor.kernels import cpu


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    quantize_(model, rtn_int4(group_size=32))
    return model


def tokens(n):
    return torch.randint(0, 320, (1, n), generator=torch.Generator().manual_seed(n))


def check(model, decoder, prompt):
    written = list(decoder(prompt))
    assert len(written) == decoder.room - prompt.shape[1]
    assert torch.equal(torch.cat([prompt, *written], dim=1), greedy(model, prompt, len(written)))


def test_greedy_for_prompts_of_any_length(model):
    decoder = Decoder(model, 24)
    for n in (5, 23, 1, 12):
        check(model, decoder, tokens(n))


def test_two_at_a_time(model):
    """Each decoder has a cache of its own; of one decoder, the later prompt takes the cache over."""
    a, b = Decoder(model, 20)(tokens(4)), Decoder(model, 20)(tokens(7))
    both = [torch.cat(t) for t in zip(a, b, strict=False)]
    expected = [greedy(model, tokens(n), 13)[:, n:] for n in (4, 7)]
    assert torch.equal(torch.cat(both, dim=1), torch.cat(expected))


@pytest.mark.parametrize(
    "prompt",
    [tokens(24), tokens(30), tokens(5)[:, :0], tokens(5)[0], tokens(6).view(2, 3)],
    ids=lambda t: str(t.shape),
)
def test_prompts_that_do_not_fit(model, prompt):
    with pytest.raises(
        ValueError,
        match=r"input_ids has shape \[.*\]; pass \[1, T\] with 1 <= T < 24, the " r"decoder's room",
    ):
        Decoder(model, 24)(prompt)


@pytest.mark.parametrize(
    ("room", "error", "message"),
    [
        (1, ValueError, "room=1; it must be at least 2 tokens, and at most the model's 256 positions"),
        (-3, ValueError, "room=-3; it must be at least 2 tokens"),
        (257, ValueError, "room=257; it must be at least 2 tokens, and at most the model's 256 positions"),
        (20.0, TypeError, "room=20.0; it must be a whole number of tokens"),
    ],
)
def test_rooms_that_are_none(model, room, error, message):
    with pytest.raises(error, match=message):
        Decoder(model, room)


def test_models_that_keep_other_states_than_keys_and_values():
    """They would be decoded without their past, or start anew at each token."""
    from transformers import (
        MambaConfig,
        MambaForCausalLM,
        RwkvConfig,
        RwkvForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        XLMConfig,
        XLMWithLMHeadModel,
    )

    small = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2}
    for other in (
        MambaForCausalLM(MambaConfig(**small)),
        RwkvForCausalLM(RwkvConfig(**small)),
        XLMWithLMHeadModel(XLMConfig(vocab_size=100, emb_dim=64, n_layers=2, n_heads=4)),
    ):
        with pytest.raises(
            TypeError, match="keeps other states than keys and values; decode by model.generate"
        ):
            Decoder(other.eval(), 20)
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=64, num_layers=2, num_heads=4, d_ff=96, d_kv=16)
    )
    for other in (encoder_decoder, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="is no causal language model of transformers"):
            Decoder(other.eval(), 20)


@pytest.mark.slow
def test_compiled(model, monkeypatch):
    """The same tokens, by our kernel, through weights that are not copied."""
    attention = model.config._attn_implementation
    decoder = Decoder(model, 40, compile=True)
    assert model.config._attn_implementation == attention
    for n in (9, 39, 1):
        check(model, decoder, tokens(n))
    calls = []
    linear = cpu.KERNEL.linear
    cpu.direct(False)
    monkeypatch.setitem(vars(cpu.KERNEL), "linear", lambda *args: calls.append(args[1]) or linear(*args))
    list(decoder(tokens(38)))
    cpu.direct(True)
    weights = {w.qdata.data_ptr() for w in model.parameters() if hasattr(w, "qdata")}
    assert len(calls) == 2 * len(weights) == 2 * 15
    assert {q.data_ptr() for q in calls} == weights


@pytest.mark.slow
def test_compiled_with_sliding_attention():
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    quantize_(model, rtn_int4(group_size=32))
    check(model, Decoder(model, 30), tokens(3))
    check(model, Decoder(model, 30, compile=True), tokens(3))
