"""Names on the hub wherever a folder goes, against a hub on the loopback address."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub import COMMIT, Hub, serving


@pytest.fixture(scope="module")
def hub(source):
    with serving(Hub({"tiny/llama": source, "tiny/private": source}, private=["tiny/private"])) as server:
        yield server


@pytest.fixture
def at_hub(hub, tmp_path):
    """Runs the command in a process of its own, as huggingface_hub reads the environment once."""

    def run(*args, **env):
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | env
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        command = [sys.executable, "-m", "rtn_tensor", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env=kept | env, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_name_is_quantized_and_used(at_hub, hub, tmp_path):
    status, out, err = at_hub("quantize", "tiny/llama", "q")
    assert status == 0, err
    assert "Loading tiny/llama: 357.3 kB -> " in err
    # Other frameworks' weights, and pickles beside safetensors, are not fetched.
    assert not [path for path in hub.asked if path.endswith("pytorch_model.bin")]
    (snapshot,) = (tmp_path / "home/hub/models--tiny--llama/snapshots").iterdir()
    assert snapshot.name == COMMIT
    # From the cache, with no hub.
    status, out, err = at_hub("inspect", "tiny/llama@main", "--json", HF_HUB_OFFLINE="1")
    assert status == 0, err
    assert json.loads(out)["bits_per_weight"] == 16
    assert (
        at_hub("generate", "tiny/llama", "We", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")[0] == 0
    )


def test_what_is_not_there(at_hub):
    status, out, err = at_hub("inspect", "tiny/none")
    assert (status, out) == (1, "")
    assert err.startswith(
        "rtn-tensor: error: tiny/none is neither here nor to be had from the hub: no model of this name"
    )
    assert err.count("\n") == 1
    err = at_hub("inspect", "tiny/private")[2]
    assert "it is gated; ask for access on its page there, then `hf auth login`" in err
    assert at_hub("inspect", "tiny/private", HF_TOKEN="hf_right")[0] == 0
    err = at_hub("inspect", "tiny/llama@v9")[2]
    assert "it has no branch, tag or commit v9; check what comes after the @" in err
    assert "it has no file no.gguf; check the file's name" in at_hub("inspect", "tiny/llama/no.gguf")[2]
    for env, why in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and the cache lacks it; unset it to download"),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "the hub cannot be reached, and the cache lacks it; check the",
        ),
    ):
        status, out, err = at_hub("inspect", "tiny/else", **env)
        assert (status, out) == (1, "")
        assert f"tiny/else is neither here nor to be had from the hub: {why}" in err


def test_an_address(run):
    status, _, err = run("inspect", "https://huggingface.co/tiny/llama")
    assert status == 1
    assert "https://huggingface.co/tiny/llama is an address; give the name of a model on the hub" in err


def test_a_download_that_broke_off_is_said(at_hub, tmp_path):
    assert at_hub("inspect", "tiny/llama")[0] == 0
    (snapshot,) = (tmp_path / "home/hub/models--tiny--llama/snapshots").iterdir()
    for file in ((snapshot / "model.safetensors").resolve(), snapshot / "model.safetensors"):
        file.unlink()
    status, _, err = at_hub("inspect", "tiny/llama", HF_HUB_OFFLINE="1")
    assert status == 1
    assert "the cache has only a part of it" in err
    status, _, err = at_hub("inspect", "tiny/llama")  # which goes on where it broke off
    assert status == 0
    assert "Downloading tiny/llama: 1 file, " in err


def test_what_cannot_be_written_is_said_before_a_download(at_hub, hub, tmp_path):
    (tmp_path / "q").mkdir()
    asked = len(hub.asked)
    status, _, err = at_hub("quantize", "tiny/llama", "q")
    assert (status, len(hub.asked)) == (1, asked)
    assert "q exists; choose another name, or replace it with --force" in err


def test_a_folder_comes_first(at_hub, hub, source, tmp_path):
    shutil.copytree(source, tmp_path / "tiny" / "llama")
    asked = len(hub.asked)
    assert at_hub("inspect", "tiny/llama")[0] == 0
    assert len(hub.asked) == asked


def test_push(at_hub, hub, source, tmp_path):
    status, _, err = at_hub("quantize", source, "q", "--push-to-hub", "me/llama-int4", HF_TOKEN="hf_right")
    assert status == 0, err
    assert err.endswith("/me/llama-int4\n")
    assert hub.uploaded == {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()}
    assert b"quantized_by: rtn-tensor" in hub.uploaded["README.md"]
    status, _, err = at_hub("quantize", source, "q1", "--push-to-hub", "me/llama-int4")
    assert (status, (tmp_path / "q1").exists()) == (1, False)  # before the work
    assert "--push-to-hub me/llama-int4 needs a login; `hf auth login`" in err
    status, _, err = at_hub("quantize", source, "q2", "--push-to-hub", "me/llama-int4", HF_TOKEN="hf_wrong")
    assert status == 1
    assert (tmp_path / "q2" / "config.json").exists()  # the folder is there, to be uploaded otherwise
    assert "hf auth login" in err
