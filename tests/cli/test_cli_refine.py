"""`rtn-tensor quantize --refine`."""

import json

import pytest
import torch
from tiny_llama import TEXT
from transformers import BertConfig, BertModel

from rtn_tensor import RTNQuantizedTensor, load, refine_, rtn_int4
from rtn_tensor.quantize import refine


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The model writes less, and so tests take seconds."""
    monkeypatch.setitem(refine.refine_.__kwdefaults__, "sequences", 2)
    monkeypatch.setitem(refine.refine_.__kwdefaults__, "length", 32)


FORMAT = ("--group-size", 32, "--scale-method", "search")


def same_weights(folder, model):
    weights = {n: p for n, p in load(folder).named_parameters() if isinstance(p, RTNQuantizedTensor)}
    others = dict(model.named_parameters())
    return weights and all(torch.equal(w.qdata, others[name].qdata) for name, w in weights.items())


def test_it_writes_what_refine_gives(run, source, tmp_path):
    status, out, err = run("quantize", source, tmp_path / "q", *FORMAT, "--refine", "--json")
    assert status == 0, err
    assert "Refining: the model writes some text first" in err
    assert (tmp_path / "q" / "tokenizer.json").exists()
    model = load(source, rtn_int4(32, "search"))
    result = refine_(model, source=source)
    assert same_weights(tmp_path / "q", model)
    told = json.loads(out)
    assert told["inputs"] == "64 tokens of its own"
    assert told["error"] == result.error
    assert told["divergence"] is None


def test_on_a_text(run, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(20 * TEXT)
    status, out, err = run("quantize", source, tmp_path / "q", *FORMAT, "--refine", "--refine-on", text)
    assert status == 0, err
    assert "given tokens" in out
    assert f"Refining on {text}" in err


def test_what_is_wrong_is_said_and_nothing_is_written(run, source, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("We the people")
    for arguments, message in [
        (("--refine-on", short), "--refine-on FILE is for --refine; add that, or leave it out"),
        (("--refine", "--refine-on", short), "give a text of 256 or more"),
        (("--refine", "--refine-on", tmp_path / "none"), "cannot read"),
    ]:
        status, _, err = run("quantize", source, tmp_path / "q", *FORMAT, *arguments)
        assert status == 1
        assert message in err
        assert not (tmp_path / "q").exists()


def test_a_model_that_cannot_write_is_refused_before_its_weights_are_read(run, tmp_path):
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, vocab_size=99
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    status, _, err = run("quantize", tmp_path / "bert", tmp_path / "q", *FORMAT, "--refine")
    assert status == 1
    assert "BertModel is no causal language model of transformers, which could write; give --refine-on" in err
    assert "Loading" not in err
    assert not (tmp_path / "q").exists()
