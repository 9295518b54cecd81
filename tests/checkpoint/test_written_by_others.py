"""Folders that other libraries wrote (`written_by_others/make.py` says how): each weight is what the library that
wrote it takes it for."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rtn_tensor import RTNQuantizedTensor, export, load, rtn_int8

OTHERS = Path(__file__).with_name("written_by_others")
FOLDERS = sorted(path.name for path in OTHERS.iterdir() if path.is_dir() and path.name != "__pycache__")
FLOAT = {"gptqmodel-gptq-act-order"}  # whose columns are not in order


def test_all_of_them_are_there():
    assert len(FOLDERS) == 12


@pytest.mark.parametrize("name", FOLDERS)
def test_each_weight_is_what_its_writer_takes_it_for(name):
    kept = name not in FLOAT
    with nullcontext() if kept else pytest.warns(UserWarning, match="they are dequantized as they are read"):
        model = load(OTHERS / name, dtype=None if kept else torch.float16)
    theirs = load_file(OTHERS / name / "dequantized.safetensors")
    assert len(theirs) == 2
    for weight, due in theirs.items():
        w = model.get_parameter(weight)
        assert isinstance(w, RTNQuantizedTensor) == kept
        assert not kept or (w.zero is not None) == ("asymmetric" in name or "awq" in name)
        assert torch.equal(w.dequantize(torch.float32).to(due.dtype) if kept else w, due)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", FOLDERS)
def test_each_is_quantized_anew(name):
    with pytest.warns(UserWarning, match="quantized anew"):
        model = load(OTHERS / name, rtn_int8(32))
    assert model.model.layers[0].mlp.down_proj.weight.bits == 8


@pytest.mark.parametrize("name", ["gptqmodel-gptq", "llmcompressor-gptq-asymmetric"])
def test_what_was_loaded_is_exported_bit_for_bit(name, tmp_path):
    format_name = "gptq" if name.startswith("gptqmodel") else "compressed-tensors"
    export(load(OTHERS / name), tmp_path / "out", format_name)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (OTHERS / name, tmp_path / "out"))
    assert {key: t for key, t in ours.items() if ".mlp." in key or ".self_attn." in key}.keys() == {
        key for key in theirs if ".mlp." in key or ".self_attn." in key
    }
    for key, t in ours.items():
        assert torch.equal(t.to(theirs[key].dtype), theirs[key]), key
