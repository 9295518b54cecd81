import shutil

import pytest
import torch
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer

from rtn_tensor.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float model's folder with its tokenizer, a text, and what a download leaves behind."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_llama(tied=True, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("free")
    (folder / "pytorch_model.bin").write_text("the weights once more")
    (folder / "figures").mkdir()
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def quantized(source):
    folder = source.parent / "quantized"
    assert main(["quantize", str(source), str(folder), "--group-size", "64"]) == 0
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, texts, and files that are none."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertLMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    folder = tmp_path_factory.mktemp("home")
    tiny_llama(tied=True, dtype=torch.bfloat16).save_pretrained(folder / "model")
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(folder / "bert")
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(folder / "bert-lm")
    t5 = T5Config(
        vocab_size=320, d_model=64, num_layers=2, num_heads=4, d_ff=96, d_kv=16, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    for name in ("model", "bert", "bert-lm", "t5"):
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "text").write_text(TEXT)
    (folder / "long").write_text(TEXT * 20)
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture
def run_at_home(capsys, home, monkeypatch):
    monkeypatch.chdir(home)

    def run(*args):
        """(exit status, stdout, stderr without what it was doing)"""
        capsys.readouterr()
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return (
            status,
            out,
            "".join(
                line
                for line in err.splitlines(keepends=True)
                if not line.startswith(("Loading ", "usage: ", " "))
            ),
        )

    return run


@pytest.fixture
def copy(home, tmp_path):
    """A copy of the model, of which one file is to be spoiled."""
    return shutil.copytree(home / "model", tmp_path / "copy")
