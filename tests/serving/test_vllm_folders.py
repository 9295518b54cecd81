"""Folders that are quantized already, served by vLLM."""

import shutil

import pytest
import torch
from engine import ROUNDING, difference, engine, greedy
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
from vllm_models import BY_TURNS, other, places, saved, weights

from rtn_tensor import load, rtn_int4, rtn_int8
from rtn_tensor.cli import main

PARTS = FqnToConfig(
    {
        r"re:.*\.down_proj": rtn_int8(32),
        r"re:.*\.(gate|up)_proj": rtn_int8(-1),
        r"re:.*\.(q|k|v)_proj": rtn_int4(128, "signed"),
    }
)


@pytest.mark.parametrize(
    ("name", "config"),
    [("llama", PARTS), ("qwen3_moe", BY_TURNS), ("mixtral", BY_TURNS), ("gpt_oss", BY_TURNS)],
)
def test_saved_and_reload_takes_another(folder, tmp_path, calls, name, config):
    """The second folder's weights land in the first one's memory."""
    sources = folder(name), other(folder(name), tmp_path / "float")
    first, second = (
        saved(path, tmp_path / f"{i}", config=config, dtype=torch.float32) for i, path in enumerate(sources)
    )
    with engine(first, **({"quantization": "rtn"} if name == "llama" else {})) as llm:
        before, where = greedy(llm), places(llm)
        formats = {(w.bits, w.group_size, w.scale_method) for w in weights(llm).values()}
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        llm.reset_prefix_cache()
        after = greedy(llm)
        assert where == places(llm)
    of_parts, by_turns = (
        {(8, 32, "absmax"), (8, -1, "absmax"), (4, 128, "signed")},
        {(4, 64, "absmax"), (8, -1, "absmax")},
    )
    assert formats == (of_parts if config is PARTS else by_turns)
    assert before != after
    assert difference(load(first), before) < ROUNDING["float32"]
    assert difference(load(second), after) < ROUNDING["float32"]
    assert calls["linear"]


def test_saved_by_the_command_line_with_the_embedding(folder, tmp_path):
    path = tmp_path / "saved"
    assert (
        main(["quantize", str(folder("tied")), str(path), "--bits", "8", "--embedding", "--skip", "*.o_proj"])
        == 0
    )
    with engine(path) as llm:
        generated = greedy(llm)
        assert "model.embed_tokens.weight" in weights(llm)
        assert not any("o_proj" in name for name in weights(llm))
    assert difference(load(path, dtype=torch.bfloat16).float(), generated) < ROUNDING["bfloat16"]


def test_saved_by_transformers(folder, tmp_path):
    config = TorchAoConfig(rtn_int4(group_size=32))
    model = AutoModelForCausalLM.from_pretrained(
        folder("llama"), dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(tmp_path / "saved")
    for file in folder("llama").glob("*token*"):
        shutil.copy(file, tmp_path / "saved")
    with engine(tmp_path / "saved") as llm:
        generated = greedy(llm)
        assert {(w.bits, w.group_size) for w in weights(llm).values()} == {(4, 32)}
    assert difference(model, generated) < ROUNDING["float32"]
