"""Models by the name of their repository on the hub."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from engine import ROUNDING, difference, engine, greedy
from foreign_folders import gptq_mixed
from hub import COMMIT, Hub, serving
from vllm_models import reference, saved, weights

from rtn_tensor import load, rtn_int4
from rtn_tensor.integrations.vllm import RTNQuantizationConfig


def in_cache(home, name, folder):
    """As huggingface_hub keeps the main branch of a repository, in the folder HF_HOME."""
    at = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, at / "snapshots" / COMMIT)
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache, which is all that there is; huggingface_hub read the environment when it was imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "home"


def test_float_and_quantized_without_a_network(folder, tmp_path, offline):
    path, config = folder("llama"), rtn_int4(64, "absmax")
    quantized = saved(path, tmp_path / "q", config=config, dtype=torch.float32)
    in_cache(offline, "tiny/float", path)
    in_cache(offline, "tiny/quantized", quantized)
    for name, options in (("tiny/float", {"quantization": "rtn"}), ("tiny/quantized", {})):
        with engine(name, **options) as llm:
            generated = greedy(llm)
            assert len(weights(llm)) == 8
        default = RTNQuantizationConfig().options.default
        model = reference(path, default) if options else load(quantized)
        assert difference(model, generated) < ROUNDING["float32"]


def test_each_file_is_fetched_once(folder, tmp_path):
    """As vLLM does it: config.json, the plugin's question, and the weights. In a process of its own, as
    huggingface_hub reads the environment once."""
    program = """
import sys
from pathlib import Path
from huggingface_hub import hf_hub_download
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from rtn_tensor.checkpoint.files import read_json
from rtn_tensor.integrations.vllm import RTNQuantizationConfig

name, method = sys.argv[1:]
config = read_json(Path(hf_hub_download(name, "config.json")))["quantization_config"]
assert RTNQuantizationConfig.override_quantization_method(config, method) == "rtn"
quantization = RTNQuantizationConfig.from_config(config)
quantization.maybe_update_config(name)
print("weights", len(quantization.options.saved))
download_weights_from_hf(name, None, ["*.safetensors"])
"""
    models = {
        "tiny/ours": saved(folder("llama"), tmp_path / "q", config=rtn_int4(64)),
        "tiny/gptq": gptq_mixed(folder("llama"), tmp_path / "gptq"),
    }
    with serving(Hub(models)) as server:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        for name in models:
            command = [sys.executable, "-W", "ignore", "-c", program, name, "rtn"]
            done = subprocess.run(command, capture_output=True, text=True, env=kept | env)
            assert "weights 14" in done.stdout, done.stderr
    asked = [path for path in server.asked if path.endswith("model.safetensors") and "/resolve/" in path]
    # What the file is, and the file.
    assert sorted(asked) == sorted(2 * [f"{name}/resolve/{COMMIT}/model.safetensors" for name in models])
