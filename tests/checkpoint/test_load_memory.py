"""The memory that `load` takes beside the finished model, of a checkpoint that no test holds either; each in
a process of its own."""

import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")

MEASURE = """
import resource, sys, threading
from pathlib import Path
import torch
from torch import nn
import rtn_tensor, safetensors, numpy, rich.progress
from rtn_tensor import load, rtn_int4, report

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

MAKE
torch.ones(512, 512).bfloat16() @ torch.ones(512, 512).bfloat16()  # the thread pools
load(WARM, rtn_int4(), nn.Linear(64, 64, bias=False).bfloat16())
BEFORE_LOADING
before, peak, stop = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = load(CHECKPOINT, rtn_int4(), MODEL)
stop.set(); watcher.join()
print(report(model).bytes_after, peak - before)
if rtn_tensor.kernels.cpu.isa() is None:  # plain torch dequantizes a weight to multiply by it
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(bool(USE.float().abs().sum() > 0))
"""


def synthetic(path, shapes):
    """bf16 weights, written some at a time."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = (torch.randn(2048, 4096) / 64).bfloat16().view(torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = 2 * math.prod(shape)
            while left:
                file.write(block[: min(left, len(block))])
                left -= min(left, len(block))
    return at


def measured(folder, make, checkpoint, model, use, limit=""):
    """Bytes of the finished model, and the most that loading it took."""
    warm = folder / "warm" / "model.safetensors"
    warm.parent.mkdir()
    save_file({"weight": torch.randn(64, 64).bfloat16()}, warm)
    parts = {"MAKE": make, "WARM": repr(str(warm)), "BEFORE_LOADING": limit}
    program = MEASURE
    for name, value in (parts | {"CHECKPOINT": repr(str(checkpoint)), "MODEL": model, "USE": use}).items():
        program = program.replace(name, textwrap.dedent(str(value)))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers, works = done.stdout.splitlines()
    assert works == "True"
    finished, peak = map(int, numbers.split())
    assert finished < peak + (8 << 20)  # what was watched is what was loaded
    return finished, peak


def linears(folder, layers, rows, limit=""):
    """Layers of 2048 x 4096, and an embedding, which is read in chunks. Also gives the bytes of the
    checkpoint."""
    shapes = {"embedding.weight": (rows, 4096)} | {f"layers.{i}.weight": (2048, 4096) for i in range(layers)}
    size = synthetic(folder / "big.safetensors", shapes)
    make = f"""
    with torch.device("meta"):
        layers = nn.ModuleList([nn.Linear(4096, 2048, bias=False) for _ in range({layers})])
        empty = nn.ModuleDict({{"embedding": nn.Embedding({rows}, 4096), "layers": layers}}).bfloat16()
    x = torch.randint({rows}, (2, 3))
    """
    use = 'sum(layer(model["embedding"](x)).float() for layer in model["layers"])'
    every = "empty, filter_fn=lambda module, fqn: True"
    return size, *measured(folder, make, folder / "big.safetensors", every, use, limit)


def test_peak_memory(tmp_path):
    """Beside the finished model, 64 MiB, though the embedding alone is 128."""
    _, finished, peak = linears(tmp_path, layers=12, rows=16384)
    assert peak - finished < 64 << 20


@pytest.mark.slow
def test_peak_memory_of_2_gigabytes(tmp_path):
    size, finished, peak = linears(tmp_path, layers=96, rows=65536)
    assert size >= 2 << 30
    assert peak - finished < 64 << 20


def test_under_a_limit_smaller_than_the_float_model(tmp_path):
    """What the process has before, the finished model and 64 MiB: an allocation beyond them fails."""
    limit = """
    used = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used + (152 << 20), resource.RLIM_INFINITY))
    """
    size, finished, _ = linears(tmp_path, layers=12, rows=16384, limit=limit)
    assert finished < 88 << 20
    assert size > 2 * (152 << 20)


@pytest.mark.parametrize("fused", [False, True])
def test_peak_memory_of_experts(tmp_path, fused):
    """Expert by expert (14 MB each) or a layer's in one tensor (235 MB): beside the finished model 64 MiB, of
    0.7 GB in bf16."""
    from transformers import GptOssConfig, MixtralConfig

    E, H, inner, V, layers = 8, 2048, 3584, 256, 2
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": H // 8}
    common = {
        "hidden_size": H,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_local_experts": E,
        "vocab_size": V,
        **heads,
    }
    kind, config = ("GptOss", GptOssConfig) if fused else ("Mixtral", MixtralConfig)
    config(**common, architectures=[f"{kind}ForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path)
    shapes = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + name + ".weight": (H,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (H, H) for name in "qkvo"}
        if fused:
            shapes |= {f"{at}self_attn.{name}_proj.bias": (H,) for name in "qkvo"} | {
                at + "self_attn.sinks": (8,)
            }
            shapes |= {at + "mlp.router.weight": (E, H), at + "mlp.router.bias": (E,)}
            shapes |= {
                at + "mlp.experts.gate_up_proj": (E, H, 2 * inner),
                at + "mlp.experts.gate_up_proj_bias": (E, 2 * inner),
            }
            shapes |= {at + "mlp.experts.down_proj": (E, inner, H), at + "mlp.experts.down_proj_bias": (E, H)}
        else:
            shapes[at + "block_sparse_moe.gate.weight"] = (E, H)
            for e in range(E):
                part = f"{at}block_sparse_moe.experts.{e}."
                shapes |= {
                    part + "w1.weight": (inner, H),
                    part + "w2.weight": (H, inner),
                    part + "w3.weight": (inner, H),
                }
    size = synthetic(tmp_path / "model.safetensors", shapes)
    # transformers' code for this model is imported before what is measured.
    make = f"""
    import transformers
    transformers.{kind}ForCausalLM
    """
    finished, peak = measured(tmp_path, make, tmp_path, "None", "model(torch.tensor([[1, 2, 3]])).logits")
    assert size > 0.7e9
    assert finished < 0.3 * size
    assert peak - finished < 64 << 20
