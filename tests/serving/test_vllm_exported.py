"""What `export` writes, served by vLLM as it is, without this library's plugin."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import difference

from rtn_tensor import dequantize_, export, load, quantize_, rtn, rtn_int4

# Of log probabilities in fp16; between these int4 weights and the float ones it is 1 and more.
ROUNDING = 0.05
RULES = [("*.o_proj", None), ("*.down_proj", rtn_int4(32)), ("*", rtn_int4(64, "signed"))]


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """By the name of an export: the model, what vLLM generates, and how it runs each module."""
    to = tmp_path_factory.mktemp("exported")
    models = {
        "ct": load(folder("llama"), rtn_int4(64, "signed"), dtype=torch.float16),
        "ct-tied": load(folder("tied"), rtn_int4(128), dtype=torch.float16),
        "ct-rows": load(folder("llama"), rtn_int4(-1), dtype=torch.float16),
        "ct-zeros": load(folder("llama"), rtn(4, 64, "minmax"), dtype=torch.float16),
        "ct-mixed": load(folder("llama"), RULES, dtype=torch.float16),
        "ct-output": load(folder("llama"), dtype=torch.float16),
        "gptq": load(folder("llama"), rtn_int4(128), dtype=torch.float16),
        "gptq-mixed": load(folder("llama"), RULES, dtype=torch.float16),
    }
    quantize_(models["ct-output"], rtn_int4(64))
    for name, model in models.items():
        report = export(model, to / name, "gptq" if name.startswith("gptq") else "compressed-tensors")
        assert report.engines[0].startswith("vLLM 0.32 reads it")
    stock = Path(__file__).with_name("stock.py")
    folders = [str(to / name) for name in models]
    command = [sys.executable, "-W", "ignore", str(stock), str(to / "results.json"), "float16", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    results = json.loads((to / "results.json").read_text())
    return {name: (model, *results[str(to / name)]) for name, model in models.items()}


@pytest.mark.parametrize(
    "name", ["ct", "ct-tied", "ct-rows", "ct-zeros", "ct-mixed", "ct-output", "gptq", "gptq-mixed"]
)
def test_same_tokens_as_ours(served, name):
    model, generated, methods = served[name]
    off = difference(model, generated)
    assert off < ROUNDING
    quantized = {
        n for n, m in methods.items() if m.endswith("LinearMethod") and m != "UnquantizedLinearMethod"
    }
    assert len(quantized) == (9 if name == "ct-output" else 6 if "mixed" in name else 8), methods
    assert ("lm_head" in quantized) == (name == "ct-output")
    dequantize_(model)
    assert difference(model, generated) < ROUNDING
