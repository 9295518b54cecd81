"""Folders that are damaged at random: every reader gives a model or an error of its own, and no number from
elsewhere."""

import contextlib
import io
import json
import random
import shutil
import warnings

import pytest
import torch
import transformers
from folders import saved
from forked import survives
from fuzz_readers import KINDS, fuzz
from mutations import bytes_of, damage
from torchao.quantization import FqnToConfig

from rtn_tensor import load, quantize_, rtn_int4, rtn_int8, save
from rtn_tensor.cli import main

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A quantized model in one file and in shards, and a float one."""
    folder = tmp_path_factory.mktemp("models")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, tie_word_embeddings=True)).eval()
    save(model, folder / "float", max_shard_size="20KB")
    quantize_(
        model,
        FqnToConfig(
            {
                "re:.*self_attn.*": rtn_int8(32),
                "re:.*mlp.*": rtn_int4(64, "signed"),
                "model.embed_tokens": rtn_int4(32),
            }
        ),
    )
    save(model, folder / "whole")
    save(model, folder / "shards", max_shard_size="8KB")
    return folder


def everything(source, target, seed):
    """Which errors the readers raise of a damaged copy."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    touched = damage(target, seed)
    ends = []
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            model = load(target)
        except (ValueError, OSError) as error:
            if type(error) not in (ValueError, FileNotFoundError):
                raise RuntimeError(f"seed {seed} of {source.name}, {touched}") from error
            ends.append(type(error).__name__)
        except Exception as error:
            raise RuntimeError(f"seed {seed} of {source.name}, {touched}") from error
        else:
            ends.append("read")
            use(model)
        status = main(["inspect", str(target)])
        assert status == (ends[0] != "read"), (seed, source.name, touched)
        if "config.json" not in touched:  # whose numbers transformers believes
            with contextlib.suppress(Exception):
                use(transformers.AutoModelForCausalLM.from_pretrained(target))
    return ends[0]


def use(model):
    """Runs it, and reads every weight; a config that lies may make that impossible, and nothing may make it
    crash."""
    with contextlib.suppress(Exception), torch.no_grad():
        model(torch.arange(8)[None])
    for w in model.parameters():
        with contextlib.suppress(Exception):
            (w.dequantize() if hasattr(w, "qdata") else w).sum()


def some(source, target, seeds):
    transformers.logging.set_verbosity(100)
    return [everything(source, target, seed) for seed in seeds]


@pytest.mark.parametrize(("first", "count"), [(0, 200), pytest.param(1000, 1500, marks=pytest.mark.slow)])
def test_random_folders(folders, tmp_path, first, count):
    ends = []
    for start in range(first, first + count, 25):
        name = ("whole", "shards", "float")[start // 25 % 3]
        ends += survives(some, folders / name, tmp_path / name, range(start, start + 25), seconds=300).value
    assert {"read", "ValueError", "FileNotFoundError"} <= set(ends)


def seeds_of(folder):
    """Inputs of each kind for the fuzz target."""
    file = saved(folder / "model")
    state = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": {"c": torch.ones(2)}}, state)
    texts = [
        {"weight_map": {"a": "model.safetensors"}},
        {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "torchao"}},
    ]
    return [
        bytes([i]) + data
        for i, data in enumerate(
            [file.read_bytes(), *(json.dumps(text).encode() for text in texts), state.getvalue()]
        )
    ]


def fuzzed(folder, count):
    rng, ends = random.Random(0), []
    file = folder / "input"
    for data in [b"", *seeds_of(folder)]:
        ends.append(fuzz(data))
        for _ in range(count):
            file.write_bytes(data[1:])
            bytes_of(rng, file)
            ends.append(fuzz(data[:1] + file.read_bytes()))
    return ends


def test_the_fuzz_target(tmp_path):
    assert len(KINDS) == 4
    ends = survives(fuzzed, tmp_path, 50, seconds=300).value
    assert {"read", "ValueError"} <= set(ends)
