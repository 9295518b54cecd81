"""vLLM while it runs: compiled, with LoRA, among ranks."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from engine import PROMPTS, ROUNDING, difference, engine, greedy, rtn
from foreign_folders import ct_mixed
from safetensors.torch import save_file
from torch import nn
from vllm.lora.request import LoRARequest
from vllm_models import HERE, other, places, reference, saved

from rtn_tensor import rtn_int4


def test_compiled_and_reload_takes_other_weights(folder, tmp_path):
    """As in reinforcement learning: the same compiled model with fresh weights, quantized as they come, in
    the same memory."""
    first, second = folder("llama"), other(folder("llama"), tmp_path / "other")
    with engine(first, enforce_eager=False, **rtn(bits=4, group_size=64)) as llm:
        before, where = greedy(llm), places(llm)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            greedy(llm, [[7, 8, 9]], new=2)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        llm.reset_prefix_cache()
        after = greedy(llm)
        assert where == places(llm)
    assert before != after
    for path, generated in ((first, before), (second, after)):
        assert difference(reference(path, rtn_int4(64, "absmax")), generated) < ROUNDING["float32"]
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("rtn::linear", 0) >= 2 * 4


RANK, SHAPES = (
    4,
    {"self_attn.q_proj": (256, 256), "self_attn.o_proj": (256, 256), "mlp.down_proj": (384, 256)},
)


def adapter(path, seed, modules):
    """The folder `path` of a random adapter, and its tensors."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module in modules:
            (k, n), prefix = SHAPES[module], f"base_model.model.model.layers.{layer}.{module}"
            tensors |= {
                f"{prefix}.lora_A.weight": torch.randn(RANK, k) / 16,
                f"{prefix}.lora_B.weight": torch.randn(n, RANK) / 4,
            }
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "bias": "none"}
    targets = {"target_modules": [module.rpartition(".")[2] for module in modules]}
    (path / "adapter_config.json").write_text(json.dumps(about | targets))
    return tensors


@contextmanager
def adapted(model, tensors):
    handles = []
    for name, a in tensors.items():
        if "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            linear = model.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            handles.append(
                linear.register_forward_hook(
                    lambda module, x, y, a=a, b=b: (
                        y + 2 * nn.functional.linear(nn.functional.linear(x[0], a), b)
                    )
                )
            )
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_lora(folder, tmp_path, name):
    """Two adapters in one batch, and the model without any; of a model with experts over its attention. On a
    CPU vLLM gives the last adapter to what has none in a batch with others, in float models, too."""
    modules = [module for module in SHAPES if name == "llama" or "self_attn" in module]
    adapters = [adapter(tmp_path / f"{i}", i, modules) for i in (1, 2)]
    options = {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} if name != "llama" else {}
    options |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    prompts = [PROMPTS[0]] * 2
    with engine(folder(name), **options, **rtn(bits=4, group_size=64)) as llm:
        requests = [LoRARequest(f"a{i}", i, str(tmp_path / f"{i}")) for i in (1, 2)]
        generated = greedy(llm, prompts[:1]) + greedy(llm, prompts, lora_request=requests)
    model = reference(folder(name), rtn_int4(64, "absmax"))
    for i, tensors in enumerate([{}, *adapters]):
        with adapted(model, tensors):
            off = [difference(model, [one], prompts[:1]) for one in generated]
        assert off[i] < ROUNDING["float32"]
        assert min(off[:i] + off[i + 1 :]) > 0.1


def test_two_ranks(folder, tmp_path):
    """A float folder, and quantized ones of experts: ours, one of them of stacked [in, out] experts, and
    another library's, of which columns are cut between groups and inside of rows that are one group."""
    config = rtn_int4(64, "absmax")
    dense, experts, stacked = folder("llama"), folder("qwen3_moe"), folder("gpt_oss")
    foreign = ct_mixed(experts, tmp_path / "foreign")
    two = [
        saved(path, tmp_path / f"q-{path.name}", config=config, dtype=torch.float32)
        for path in (experts, stacked)
    ]
    cases = [
        [str(dense), rtn(bits=4, group_size=64)],
        *([str(path), {}] for path in two),
        [str(foreign), {"quantization": "rtn"}],
    ]
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks.py"), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = [
        json.loads(line)["result"] for line in done.stdout.splitlines() if line.startswith('{"result"')
    ]
    assert len(results) == 4, done.stdout + done.stderr
    models = *(reference(path, config) for path in (dense, experts, stacked)), reference(foreign)
    for model, generated in zip(models, results, strict=True):
        assert difference(model, generated) < ROUNDING["float32"]


def test_tutorial():
    tutorial = HERE.parents[1] / "tutorials" / "07_serve_with_vllm.py"
    done = subprocess.run([sys.executable, str(tutorial)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from the quantized folder: the same" in done.stdout
