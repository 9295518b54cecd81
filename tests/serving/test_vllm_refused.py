"""What the vLLM plugin refuses."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from engine import engine, memory, rtn
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm_models import HERE, saved, weights

import rtn_tensor
from rtn_tensor import rtn_int4, rtn_int8
from rtn_tensor.integrations.vllm import RTNQuantizationConfig
from rtn_tensor.integrations.vllm.linear import RTNLinearMethod

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

    def watched(*args, **kwargs):
        before, stop = memory(), threading.Event()
        peaks.append(before)

        def watch():
            while not stop.wait(0.001):
                peaks[-1] = max(peaks[-1], memory())

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
        ({"ignore": "lm_head"}, "ignore is 'lm_head'; it takes a list of names"),
        ({"ignore": [3]}, "ignore is [3]; it takes a list of names"),
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
        RTNQuantizationConfig.from_config({"quant_method": "rtn", **options})


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
    config = RTNQuantizationConfig.from_config({"quant_method": "rtn", "bits": 4, "group_size": 128})
    method = RTNLinearMethod(config, config.options.default, "mlp.down_proj")
    said = "mlp.down_proj: tensor parallelism gives each rank 192 of its 384 columns, a cut inside a group of 128; use group_size 64 or 32"
    with pytest.raises(ValueError, match=re.escape(said)):
        method.create_weights(nn.Module(), 192, [256], 384, 256, torch.float32, weight_loader=None)


def test_tied_lm_head_alone_is_refused(folder):
    with (
        pytest.raises(ValueError, match="lm_head is the embedding, too"),
        engine(folder("tied"), **rtn(rules=[["lm_head", {}]])),
    ):
        pass


def test_adapters_of_quantized_experts_are_refused(folder):
    """Which vLLM would make room for in every layer of experts, unless it is told the layers to adapt."""
    said = r"layers\.0\.mlp\.experts: LoRA over quantized experts is not supported; .*lora_target_modules"
    with pytest.raises(ValueError, match=said), engine(folder("qwen3_moe"), enable_lora=True, **rtn(bits=4)):
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
        config=FqnToConfig({r"re:.*\.q_proj": rtn_int8(), r"re:.*\.k_proj": rtn_int4(128, "absmax")}),
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
