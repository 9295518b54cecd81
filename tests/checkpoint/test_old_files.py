"""What version 0.1.0 wrote loads, with its numbers: `written_by_0_1_0/` is never made anew."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.testing import assert_close

from rtn_tensor import RTNQuantizedTensor, load, quantize_, rtn_int4

OLD = Path(__file__).with_name("written_by_0_1_0")


def assert_same(state, dequantized):
    assert state.keys() == dequantized.keys()
    for name, expected in dequantized.items():
        t = state[name]
        assert_close(t.dequantize() if isinstance(t, RTNQuantizedTensor) else t, expected, rtol=0, atol=0)


def small():
    """The model whose state dict was written."""
    return nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 7, bias=False))


def test_tensors():
    weights = torch.load(OLD / "weights.pt", weights_only=True)
    assert_same(weights, torch.load(OLD / "dequantized_weights.pt"))
    assert all(type(w) is RTNQuantizedTensor for w in weights.values())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    model = small()
    quantize_(model, rtn_int4(32))
    model.load_state_dict(torch.load(OLD / "state_dict.pt", weights_only=True), assign=assign)
    assert_same(model.state_dict(), torch.load(OLD / "dequantized_state_dict.pt"))


def test_pickled_model():
    model = torch.load(OLD / "model.pt", weights_only=False)
    assert_same(model.state_dict(), torch.load(OLD / "dequantized_state_dict.pt"))


def test_distributed_checkpoint():
    model = small()
    quantize_(model, rtn_int4(32))
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one process
        dcp.load(state, checkpoint_id=str(OLD / "dcp"))
    assert_same(state, torch.load(OLD / "dequantized_state_dict.pt"))


@pytest.mark.parametrize("file", ["plain", "state_dict.pt"])
def test_load(file):
    model = load(OLD / file, model=small())
    assert_same(model.state_dict(), torch.load(OLD / "dequantized_state_dict.pt"))


@pytest.mark.parametrize("folder", ["llama", "llama_transformers"])
@pytest.mark.parametrize("reader", ["ours", "transformers"])
def test_transformers_folder(folder, reader):
    from transformers import AutoModelForCausalLM

    model = load(OLD / folder) if reader == "ours" else AutoModelForCausalLM.from_pretrained(OLD / folder)
    assert_close(
        model(torch.arange(8)[None]).logits, torch.load(OLD / "llama_logits.pt"), rtol=2**-7, atol=2**-7
    )


def test_pickled_transformers_model():
    """The pickle names modules as they were called then."""
    model = torch.load(OLD / "llama_model.pt", weights_only=False)
    assert_close(
        model(torch.arange(8)[None]).logits, torch.load(OLD / "llama_logits.pt"), rtol=2**-7, atol=2**-7
    )
    assert model.dequantize() is model
    assert type(model.lm_head.weight.data) is torch.Tensor
