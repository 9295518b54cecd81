"""What is at the destination of `save` and `rtn-tensor quantize`: nothing of another's is deleted, and
nothing half-made stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from file_tree import tree
from tiny_llama import tiny_llama
from torch import nn

from rtn_tensor import load, quantize_, rtn_int4, save
from rtn_tensor.checkpoint.folders import new_folder


def a_file(at):
    at.write_text("precious")


def a_link_to_a_model(at):
    save(nn.Linear(2, 2), at.with_name("elsewhere"))
    at.symlink_to("elsewhere")


def a_link_to_nothing(at):
    at.symlink_to("nowhere")


def a_folder_of_texts(at):
    at.mkdir()
    (at / "thesis.txt").write_text("precious")


def a_program_with_a_config(at):
    at.mkdir()
    (at / "config.json").write_text('{"port": 80}')
    (at / "model.safetensors").write_text("precious")


def a_folder_of_models(at):
    save(nn.Linear(2, 2), at / "a")


def many_models_in_one_folder(at):
    at.mkdir()
    (at / "a.safetensors").write_text("precious")
    (at / "b.safetensors").write_text("precious")


def a_model_that_is_a_repository(at):
    tiny_llama().save_pretrained(at)
    (at / ".git").mkdir()


def a_model_with_a_folder_of_its_training(at):
    tiny_llama().save_pretrained(at)
    (at / "checkpoint-500").mkdir()


OTHERS = [
    a_file,
    a_link_to_a_model,
    a_link_to_nothing,
    a_folder_of_texts,
    a_program_with_a_config,
    a_folder_of_models,
    many_models_in_one_folder,
    a_model_that_is_a_repository,
    a_model_with_a_folder_of_its_training,
]


@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_model_is_never_replaced(tmp_path, make, force):
    make(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(
        FileExistsError, match="only a model's folder is replaced" if force else "pass force=True"
    ):
        save(nn.Linear(2, 2), tmp_path / "out", force=force)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_stays(tmp_path, force):
    for make in (
        a_file,
        a_link_to_nothing,
        a_folder_of_texts,
        Path.mkdir if not force else a_folder_of_models,
    ):
        folder = tmp_path / make.__name__
        folder.mkdir()
        with (  # noqa: PT012
            pytest.raises(FileExistsError, match="choose another name"),
            new_folder(folder / "out", force) as partial,
        ):
            (partial / "new").write_text("new")
            make(folder / "out")
            before = tree(folder / "out")
        assert tree(folder / "out") == before
        assert [path.name for path in folder.iterdir() if path.name != "elsewhere"] == ["out"]


def an_empty_folder(at):
    at.mkdir()


def a_module(at):
    save(nn.Linear(4, 4), at)


def a_module_in_shards(at):
    save(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), at, max_shard_size=20_000)


def a_quantized_model(at):
    quantize_(model := tiny_llama(), rtn_int4(32))
    save(model, at)
    (at / "notes").write_text("of the old one")


def one_of_sentence_transformers(at):
    tiny_llama().save_pretrained(at)
    (at / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]')
    (at / "1_Pooling").mkdir()
    (at / "1_Pooling" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    "make",
    [an_empty_folder, a_module, a_module_in_shards, a_quantized_model, one_of_sentence_transformers],
    ids=lambda make: make.__name__,
)
def test_a_model_is_replaced_by_force(tmp_path, make):
    make(tmp_path / "out")
    save(nn.Linear(2, 3), tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert load(tmp_path / "out", model=nn.Linear(2, 3)).weight.shape == (3, 2)


@pytest.mark.parametrize("name", [".", "..", "a/.."])
def test_names_that_are_no_names(tmp_path, monkeypatch, name):
    """The folder that they mean is replaced, or not, like any other."""
    a_folder_of_texts(tmp_path / "work")
    (tmp_path / "work" / "a").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="only a model's folder is replaced"):
        save(nn.Linear(2, 2), name, force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save(nn.Linear(2, 2), tmp_path / "module")
        save(tiny_llama(), tmp_path / "model", max_shard_size="100KB")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
def test_nothing_half_made_stays(tmp_path, error):
    save(nn.Linear(2, 2), tmp_path / "old")
    for name in ("new", "old"):
        before = tree(tmp_path)
        with pytest.raises(type(error)), new_folder(tmp_path / name, force=True) as partial:  # noqa: PT012
            (partial / "half").write_text("")
            raise error
        assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.BIN", "x.gguf", "x.h5", "x.onnx", "x.pkl"])
def test_names_of_files(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is named as a file is, and it is to be a folder"):
        save(nn.Linear(2, 2), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    save(nn.Linear(2, 2), tmp_path / "Qwen2.5-0.5B")


WRITER = """
import os, sys, time
from rtn_tensor.checkpoint.folders import new_folder
with new_folder(sys.argv[1], force=True) as folder:
    (folder / "half").write_text("")
    print("writing", flush=True)
    time.sleep(60)
"""


def writer(path):
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WRITER, path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path, number):
    with writer(tmp_path / "out") as process:
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    """And what another process is writing is not."""
    save(nn.Linear(2, 2), tmp_path / "out")
    with writer(tmp_path / "out") as killed:
        killed.kill()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".out.1.replaced").mkdir()
    (tmp_path / ".other.1.partial").mkdir()
    with writer(tmp_path / "out") as alive:
        save(nn.Linear(2, 3), tmp_path / "out", force=True)
        kept = {f".out.{alive.pid}.partial", ".other.1.partial", "out"}
        assert {path.name for path in tmp_path.iterdir()} == kept
        alive.kill()
    save(nn.Linear(2, 3), tmp_path / "out", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {".other.1.partial", "out"}


def test_what_was_about_to_be_replaced_comes_back(tmp_path):
    save(nn.Linear(2, 2), tmp_path / "out")
    before = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.1.replaced")
    with pytest.raises(FileExistsError, match="pass force=True"):
        save(nn.Linear(2, 3), tmp_path / "out")
    assert tree(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
