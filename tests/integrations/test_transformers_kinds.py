"""What transformers' models do with their weights besides multiplying by them: they tie them, compute them
from a checkpoint's, give them names with no dot, scale by a flag of the config. Each comes back from both
writers through both readers as it was."""

import io
import pickle
import re

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_llama import tiny_llama
from torch import nn
from transformers_models import ALL, IDS, MODELS, TEXT, assert_same, but_one_layer, make, output, ties

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, quantize_, rtn_int4, rtn_int8, save


@ALL
@pytest.mark.parametrize("choice", [None, but_one_layer], ids=["all", "some"])
@pytest.mark.parametrize("writer", ["save", "save_pretrained"])
def test_written_and_read(name, choice, writer, tmp_path):
    model = make(name)
    tied = getattr(model.config, "tie_word_embeddings", None)
    quantize_(model, rtn_int8(32), choice)
    assert getattr(model.config, "tie_word_embeddings", None) == tied
    save(model, tmp_path / "model") if writer == "save" else model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert_same(name, loaded, model)
    read = type(model).from_pretrained(tmp_path / "model").eval()
    assert_same(name, read, model)
    for again in (loaded, read):
        save(again, tmp_path / "again", force=True)
        assert_same(name, load(tmp_path / "again"), model)


@ALL
def test_float_folder(name, tmp_path):
    make(name).save_pretrained(tmp_path / "float")
    expected = type(make(name)).from_pretrained(tmp_path / "float").eval()
    assert_same(name, load(tmp_path / "float"), expected)
    loaded = load(tmp_path / "float", rtn_int8(32))
    by_load = {
        fqn.removesuffix(".weight")
        for fqn, w in loaded.named_parameters()
        if isinstance(w, RTNQuantizedTensor)
    }
    quantize_(
        expected,
        rtn_int8(32),
        lambda module, fqn: fqn in by_load or any(f"{fqn}.{name}" in by_load for name in module._parameters),
    )
    assert_same(name, loaded, expected)


@pytest.mark.filterwarnings("ignore:.*so they are not tied, as in transformers")
@ALL
def test_dequantized(name, tmp_path):
    """The answer, too: where it was scaled by the flag, it was 8 times too large."""
    model = make(name)
    quantize_(model, rtn_int8(32))
    quantized = output(name, model)
    model.tie_weights()
    assert torch.equal(output(name, model), quantized)
    assert ((quantized - output(name, make(name))).norm() / quantized.norm()) < 0.1
    dequantize_(model)
    torch.testing.assert_close(output(name, model), quantized, rtol=1e-4, atol=1e-4)
    model.tie_weights()
    torch.testing.assert_close(output(name, model), quantized, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "dequantized")
    assert_same(name, type(model).from_pretrained(tmp_path / "dequantized").eval(), model)
    assert_same(name, load(tmp_path / "dequantized"), model)


@ALL
def test_pickled(name, tmp_path):
    model = make(name)
    quantize_(model, rtn_int8(32))
    assert_same(name, pickle.loads(pickle.dumps(model)), model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_same(name, again, model)
    again.save_pretrained(tmp_path / "model")
    assert_same(name, load(tmp_path / "model"), model)
    assert_same(name, pickle.loads(pickle.dumps(load(tmp_path / "model"))), model)
    dequantize_(model)
    assert again.dequantize() is again
    assert not again.is_quantized
    assert_same(name, again, model)


# ------------------------------------------------------------------------------------ ties


class Tracker(transformers.LlamaModel):
    """As transformers' Sam3TrackerVideoModel, which may be made without its tower."""

    tower = None

    def get_input_embeddings(self):
        return self.tower.get_input_embeddings()


def test_an_embedding_in_a_part_that_is_not_there():
    model = Tracker(tiny_llama().config)
    assert quantize_(model, rtn_int8(32)).rows[1].bits == 8


def test_three_of_one_tensor(tmp_path):
    """The encoder's embedding quantized, the decoder's and the output float: a new model ties all of them."""
    name = "T5ForConditionalGeneration"
    model = make(name)
    quantize_(model, [("encoder.embed_tokens.weight", rtn_int8(32))])
    assert ties(model) == [["shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"]]
    save(model, tmp_path / "model")
    assert_same(name, load(tmp_path / "model"), model)
    read = type(model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(output(name, read), output(name, model))
    save(load(tmp_path / "model"), tmp_path / "again")
    assert_same(name, load(tmp_path / "again"), model)


@pytest.mark.filterwarnings("ignore:.*so they are not tied, as in transformers")
@pytest.mark.parametrize("tied", ["equal", "different"])
def test_a_file_with_both_of_a_tied_pair(tied, tmp_path):
    """As transformers has it: tied where they are equal, and else not."""
    from safetensors.torch import load_file, save_file

    name = "BertForMaskedLM"
    model = make(name)
    model.save_pretrained(tmp_path / "float")
    state = load_file(tmp_path / "float" / "model.safetensors")
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"] + (
        tied == "different"
    )
    save_file(state, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    expected = type(model).from_pretrained(tmp_path / "float").eval()
    assert_same(name, load(tmp_path / "float"), expected)
    quantize_(expected, rtn_int8(32))
    assert_same(
        name,
        load(tmp_path / "float", rtn_int8(32), filter_fn=lambda module, fqn: isinstance(module, nn.Linear)),
        expected,
    )


# ----------------------------------------------------------------- a part of another model


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.head = nn.Linear(64, 32)


def test_what_is_inside_another_module(tmp_path):
    """As in sentence-transformers: its models' `save_pretrained`, and that of a model inside a model."""
    name = "BertForMaskedLM"
    wrapper = Wrapper(make(name))
    quantize_(wrapper, rtn_int8(32))
    wrapper.model.save_pretrained(tmp_path / "model")
    assert_same(name, load(tmp_path / "model"), wrapper.model)
    save(wrapper.model, tmp_path / "saved")
    assert_same(name, type(wrapper.model).from_pretrained(tmp_path / "saved").eval(), wrapper.model)
    wrapper.model.bert.save_pretrained(tmp_path / "bert")
    inner = transformers.BertModel.from_pretrained(tmp_path / "bert").eval()
    expected = wrapper.model.bert
    assert torch.equal(inner(IDS).last_hidden_state, expected(IDS).last_hidden_state)
    dequantize_(wrapper)
    wrapper.model.save_pretrained(tmp_path / "float")
    assert_same(name, type(wrapper.model).from_pretrained(tmp_path / "float").eval(), wrapper.model)


needs_a_forward_that_compiles = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="transformers 5.19 copies its config in the forward, which Dynamo does not trace",
)


@needs_a_forward_that_compiles
@pytest.mark.parametrize("name", ["BartForConditionalGeneration"])
def test_compiled_whole(name):
    """Their forward looks through the config for what kind of cache to make."""
    model = make(name)
    quantize_(model, rtn_int8(32))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(**MODELS[name][2])[0]
        assert torch.equal(compiled, model(**MODELS[name][2])[0])


@needs_a_forward_that_compiles
def test_whisper_compiled_whole():
    config = transformers.WhisperConfig(
        **{f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")},
        **{"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "num_mel_bins": 8},
        **{
            "max_source_positions": 8,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    quantize_(model, rtn_int4(32))
    inputs = {"input_features": torch.randn(1, 8, 16), "decoder_input_ids": torch.tensor([[1, 3, 4]])}
    with torch.no_grad():
        assert torch.equal(
            torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits, model(**inputs).logits
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [300, 340])
def test_resized_embeddings(tied, tokens):
    """The output layer becomes a float one of what the quantized one stood for."""
    model = tiny_llama(tied)
    quantize_(model, rtn_int8(32))
    expected = model.lm_head.weight.dequantize()
    model.resize_token_embeddings(tokens, mean_resizing=False)
    kept = min(tokens, len(expected))
    assert torch.equal(model.lm_head.weight[:kept], expected[:kept])
    assert model(IDS).logits.shape[-1] == tokens


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [300, 340])
def test_resized_embeddings_that_are_quantized(tied, tokens, mean, tmp_path):
    """They stay quantized, rows that stay keep their bits, and new ones are what transformers makes of the
    others, by default the mean."""
    model = tiny_llama(tied)
    quantize_(model, [("*", rtn_int4(32))], lambda module, fqn: isinstance(module, nn.Linear | nn.Embedding))
    before, logits = model.model.embed_tokens.weight, model(IDS).logits
    old = before.detach().clone()
    model.resize_token_embeddings(tokens, mean_resizing=mean)
    w, kept = model.model.embed_tokens.weight, min(tokens, len(old))
    assert isinstance(w, RTNQuantizedTensor)
    assert w.shape == (tokens, old.shape[1])
    assert w.qdata[:kept].equal(old.qdata[:kept])
    assert w.scale[:kept].equal(old.scale[:kept])
    if mean and tokens > len(old):
        average = old.dequantize().mean(0)
        new = w.dequantize()[len(old) :]
        assert (new - average).abs().max() < 0.1 * average.abs().max()
    assert (model.lm_head.weight is w) == tied
    torch.testing.assert_close(model(IDS).logits[..., :kept], logits[..., :kept], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(IDS).logits, model(IDS).logits)


# ----------------------------------------------------------------------- not only products


OTHERWISE = {
    # joins the output layer's weight with another's columns
    "MobileBertForMaskedLM": (
        "MobileBertConfig",
        TEXT | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "cls.predictions.decoder.weight",
    ),
    # takes rows of the transposed weight of a layer that it never runs
    "LayoutLMv3ForSequenceClassification": (
        "LayoutLMv3Config",
        TEXT | {"coordinate_size": 8, "shape_size": 16, "visual_embed": False, "max_position_embeddings": 64},
        "layoutlmv3.encoder.rel_pos_bias.weight",
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_weight_that_is_used_otherwise(name):
    """By default it stays float; where it is selected, the error says which stays float, and how; and with
    that it runs."""
    config, sizes, weight = OTHERWISE[name]
    inputs = {"input_ids": IDS} | (
        {"bbox": torch.zeros(2, 9, 4, dtype=torch.int64)} if "Layout" in name else {}
    )
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        rows = {row.name: row for row in quantize_(model, rtn_int8(32)).rows}
        model(**inputs)
    assert rows[weight].bits is None
    assert rows[weight].note.startswith(("used otherwise than in a product", "shared with"))
    kept = []
    while message := refusal(name, config, sizes, kept, inputs):
        pattern = (
            r"(?s)(\S+): cannot .*; a weight that its model uses so stays float by the rule \('(\S+)', None\)"
        )
        named = re.fullmatch(pattern, message)
        assert named, message
        assert named[1] == named[2] not in kept
        kept.append(named[1])
    assert OTHERWISE[name][2] in kept


def refusal(name, config, sizes, kept, inputs):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    quantize_(
        model,
        [*((fqn, None) for fqn in kept), ("*", rtn_int8(32))],
        lambda module, fqn: isinstance(module, nn.Linear),
    )
    try:
        model(**inputs)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
