"""`rtn-tensor quantize`: which folders it may replace, what it takes along, and what stays of it when it ends
early."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from file_tree import tree
from tiny_llama import tiny_llama, tiny_tokenizer

from rtn_tensor import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "a"
    tiny_llama(tied=True, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def models(model, tmp_path, monkeypatch):
    """A folder with the model `a`, its sibling `b`, links to both, and a text; it is the working
    directory."""
    folder = tmp_path / "models"
    shutil.copytree(model, folder / "a")
    shutil.copytree(model, folder / "b")
    shutil.copy(model / "config.json", folder)  # so that the folder of both looks like a model's, too
    (folder / "thesis.txt").write_text("precious")
    (tmp_path / "to_models").symlink_to(folder)
    (tmp_path / "to_a").symlink_to(folder / "a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------ source and destination


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("models/a", "models"),
        ("models/a", "models/a"),
        ("models/a", "models/a/"),
        ("models/a", "models/b/../a"),
        ("models/a", "models/a/.."),
        ("models/a", "models/a/new"),
        ("models/a", "models/a/new/new"),
        ("models/a", "to_models"),
        ("models/a", "to_models/a"),
        ("models/a", "to_a"),
        ("models/a", "to_a/new"),
        ("models/a", "."),
        ("models/a", ".."),
        ("models/a", "/"),
        ("to_a", "models"),
        ("to_a", "models/a"),
        ("to_a", "to_a"),
        ("to_models/a", "models/a/new"),
        ("models/a/../a", "models"),
        ("models/a", "models/thesis.txt"),
        ("models/a", "models/thesis.txt/new"),
    ],
)
def test_no_source_is_ever_replaced(run, models, source, destination):
    before = tree(models)
    status, out, err = run("quantize", source, destination, "--force")
    assert (status, out) == (1, "")
    assert err.startswith("rtn-tensor: error: ")
    assert err.count("\n") == 1
    assert tree(models) == before


def test_what_the_source_links_to_is_kept(run, models):
    """As in the hub's cache, where a snapshot's files are links."""
    (models / "snapshot").mkdir()
    for file in (models / "models" / "b").iterdir():
        (models / "snapshot" / file.name).symlink_to(file)
    before = tree(models)
    status, _, err = run("quantize", "snapshot", "models/b", "--force")
    assert status == 1
    assert "models/b holds snapshot/" in err
    assert tree(models) == before


def test_a_sibling_is_replaced(run, models):
    (models / "models" / "b" / "old").write_text("")
    assert run("quantize", "models/a", "to_models/b", "--force")[0] == 0
    assert not (models / "models" / "b" / "old").exists()
    assert sorted(file.name for file in (models / "models").iterdir()) == [
        "a",
        "b",
        "config.json",
        "thesis.txt",
    ]
    assert load(models / "models" / "b").lm_head is not None


def test_any_name_will_do(run, models):
    name = "a b\n\u00e4\u4e2d"
    assert run("quantize", "models/a", f"new/{name}")[0] == 0
    assert run("inspect", f"new/{name}")[0] == 0


def test_what_appears_meanwhile_is_kept(run, models, monkeypatch):
    from rtn_tensor.cli import quantize

    write = quantize.write

    def and_another(model, folder):
        write(model, folder)
        (models / "new").mkdir()
        (models / "new" / "precious").write_text("text")

    monkeypatch.setattr(quantize, "write", and_another)
    status, _, err = run("quantize", "models/a", "new")
    assert status == 1
    assert err.endswith(
        "rtn-tensor: error: new appeared while it was being written, and is left as it is; "
        "choose another name\n"
    )
    assert [file.name for file in (models / "new").iterdir()] == ["precious"]
    assert not list(models.glob(".*"))


# ------------------------------------------------------------------------- what goes along


def test_what_comes_with_a_model(run, models):
    source = models / "models" / "a"
    kept = {
        "LICENSE": "free",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "preprocessor_config.json": "{}",
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../b"}, '
        '{"path": "/etc"}]',
        "1_Pooling/config.json": "{}",
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "a dense layer's own",
        "config_sentence_transformers.json": "{}",
        "qformer_tokenizer/tokenizer_config.json": "{}",
        "qformer_tokenizer/vocab.txt": "a",
        "spiece.model": "sentences",
        "vocab.spm": "sentences",
    }
    left_out = {
        "tf_model.h5": "another framework's weights, which are not quantized",
        "flax_model.msgpack": "another framework's weights, which are not quantized",
        "rust_model.ot": "another framework's weights, which are not quantized",
        "model.onnx": "another framework's weights, which are not quantized",
        "pytorch_model.bin": "weights that are not quantized",
        "consolidated.00.pth": "weights that are not quantized",
        "adapter_config.json": "an adapter, which is not merged into the weights",
        "adapter_model.bin": "an adapter, which is not merged into the weights",
        "optimizer.pt": "of a training run",
        "training_args.bin": "of a training run",
        "hf_quant_config.json": "it describes another quantization",
        ".gitattributes": "hidden",
    }
    folders = [
        "onnx/model.onnx",
        "original/params.json",
        "checkpoint-5/model.safetensors",
        ".git/HEAD",
        "figures/a.png",
    ]
    for name, text in {**kept, **left_out, **dict.fromkeys(folders, "x")}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    os.mkfifo(source / "pipe.json")
    (source / "LICENSE").chmod(0o400)
    status, _, err = run("quantize", source, "out")
    assert status == 0
    for name, text in kept.items():
        assert (models / "out" / name).read_text() == text, name
    there = {
        file.relative_to(models / "out").as_posix() for file in (models / "out").rglob("*") if file.is_file()
    }
    assert there - set(kept) == {
        "README.md",
        "rtn_recipe.yaml",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    said = dict(
        line.removeprefix("Left out ").split(": ", 1)
        for line in err.splitlines()
        if line.startswith("Left out ")
    )
    why = "neither modules.json names it nor does it hold a tokenizer, a processor or templates alone"
    assert said == left_out | {f"{name.partition('/')[0]}/": why for name in folders} | {
        "pipe.json": "it is no file"
    }
    assert (models / "out" / "LICENSE").stat().st_mode == (models / "out" / "config.json").stat().st_mode


def test_tensors_that_have_no_place_are_said(run, models):
    from safetensors.torch import load_file, save_file

    file = models / "models" / "a" / "model.safetensors"
    tensors = load_file(file)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(12) for i in (0, 1)}
    save_file(tensors | extra, file, {"format": "pt"})
    status, _, err = run("quantize", "models/a", "out")
    assert status == 0
    assert (
        "Left out model.layers.*.self_attn.rotary_emb.inv_freq (2 such): LlamaForCausalLM has no place for "
        "it\n" in err
    )


def test_an_embedding_that_is_most_of_the_result_is_said(run, models):
    large = tiny_llama(tied=True)
    large.resize_token_embeddings(4000)
    large.save_pretrained(models / "large")
    status, _, err = run("quantize", models / "large", models / "q")
    assert status == 0
    assert "The embedding stays float and is 9" in err
    assert "of the result; --embedding quantizes it, too" in err
    status, _, err = run("quantize", models / "large", models / "all", "--embedding")
    assert status == 0
    assert "The embedding" not in err


@pytest.mark.parametrize("name", ["new.safetensors", "new.GGUF", "new.bin"])
def test_a_destination_that_is_named_as_a_file_is(run, models, name):
    before = tree(models)
    status, out, err = run("quantize", "models/a", name, "--group-size", "32")
    assert (status, out) == (1, "")
    assert f"error: {name} is named as a file is, and it is to be a folder; leave out" in err
    assert tree(models) == before


# ---------------------------------------------------------------------------- an early end


def test_a_tokenizer_that_cannot_be_copied_leaves_nothing(run, models, monkeypatch):
    def full(source, to):
        raise OSError(28, "No space left on device", str(to))

    monkeypatch.setattr(shutil, "copyfile", full)
    before = tree(models)
    for destination in ("new", "models/b"):
        status, out, err = run("quantize", "models/a", destination, "--force")
        assert (status, out) == (1, "")
        assert err.endswith(": No space left on device; free some space, or write to another disk\n")
        assert tree(models) == before


WAITS = """
import sys, time
from rtn_tensor.cli import main, quantize

def write(model, folder):
    (folder / "half").write_text("")
    print("writing", flush=True)
    time.sleep(60)

quantize.write = write
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "times", "status", "name"),
    [
        (signal.SIGTERM, 1, 143, "SIGTERM"),
        (signal.SIGINT, 3, 130, "SIGINT"),
        (signal.SIGHUP, 1, 129, "SIGHUP"),
    ],
)
def test_a_signal_leaves_nothing(models, number, times, status, name):
    before = tree(models)
    command = [sys.executable, "-c", WAITS, "quantize", "models/a", "models/b", "--force"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.001)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, "")
    assert re.sub(": .* per weight", "", err) == (
        f"Loading models/a\nWriting models/b\nrtn-tensor: stopped by {name}\n"
    )
    assert tree(models) == before


def test_a_signal_that_is_ignored_stays_ignored(models):
    """As nohup has it."""
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    command = [sys.executable, "-c", ignore + WAITS.replace("60", "1"), "quantize", "models/a", "new"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads((models / "new" / "tokenizer_config.json").read_text())
