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
