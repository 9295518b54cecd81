"""The memory that `load` takes beside the finished model, of a checkpoint that another library quantized."""

import json
import sys

import foreign_formats as made
import pytest
import torch
from safetensors.torch import save_file
from test_load_memory import measured

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")


def repeated(t, times, dim=0):
    return torch.cat([t] * times, dim)


def fp8(n, k):
    planes, _ = made.fp8(128, k)
    return {
        "weight": repeated(planes["weight"], n // 128),
        "weight_scale_inv": repeated(planes["weight_scale_inv"], n // 128),
    }


def gptq(n, k):
    planes, _ = made.gptq(32, k, group_size=128, symmetric=False)
    wide = {name: repeated(planes[name], n // 32, 1) for name in ("qweight", "scales", "qzeros")}
    return wide | {"g_idx": planes["g_idx"]}


def bnb(n, k):
    planes, _ = made.bnb4(n, k)
    return planes


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (fp8, made.FP8_CONFIG),
        pytest.param(gptq, made.gptq_config(group_size=128), marks=pytest.mark.slow),
        pytest.param(bnb, made.BNB4_CONFIG, marks=pytest.mark.slow),
    ],
    ids=["fp8", "GPTQ", "bitsandbytes"],
)
def test_peak_memory(tmp_path, make, config):
    """One weight is 256 MiB in fp32, and its integers are 32 or 64; beside the model it takes 64 at most."""
    n, k = 16384, 4096
    planes = make(n, k)
    big = tmp_path / "big"
    big.mkdir()
    save_file({f"0.{end}": plane for end, plane in planes.items()}, big / "model.safetensors")
    (big / "config.json").write_text(json.dumps({"quantization_config": config}))
    model = "nn.Sequential(nn.Linear(4096, 16384, bias=False, device='meta').bfloat16())"
    finished, peak = measured(tmp_path, "", big, model, "model(torch.ones(1, 4096, dtype=torch.bfloat16))")
    assert peak - finished < 64 << 20
