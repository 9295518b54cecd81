"""Headers of safetensors files that lie about the file, and files that are none: each is an error that names
the file, at once."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from folders import make, parts, put, read, saved
from forked import survives
from tiny_llama import tiny_llama

from rtn_tensor import load
from rtn_tensor.cli import main


def at(begin, end):
    return lambda header: header["1.bias"].update(data_offsets=[begin, end])


def set_to(key, value):
    return lambda header: header["1.bias"].update({key: value})


def without(key):
    return lambda header: header["1.bias"].pop(key)


def replaced(value):
    return lambda header: header.update({"1.bias": value})


# `1.bias` is F32 [33].
CHANGES = {
    "offsets past the end": lambda header: header["1.bias"].update(data_offsets=[1 << 40, (1 << 40) + 132]),
    "huge offsets": at(1 << 80, (1 << 80) + 132),
    "offsets backwards": at(132, 0),
    "negative offsets": at(-132, 0),
    "one offset": set_to("data_offsets", [0]),
    "three offsets": set_to("data_offsets", [0, 132, 264]),
    "offsets as text": set_to("data_offsets", ["0", "132"]),
    "offsets of floats": set_to("data_offsets", [0.0, 132.0]),
    "offsets of bools": set_to("data_offsets", [False, True]),
    "offsets of none": set_to("data_offsets", None),
    "overlapping offsets": lambda header: header["1.bias"].update(
        data_offsets=header["0.weight"]["data_offsets"]
    ),
    "overlapping and of one size": lambda header: header.update({"more": header["1.bias"]}),
    "a hole": lambda header: header["1.bias"].update(
        data_offsets=[n + 4 for n in header["1.bias"]["data_offsets"]]
    ),
    "a tensor less": lambda header: header.pop("1.bias"),
    "a negative shape": set_to("shape", [-33]),
    "two negative sizes": set_to("shape", [-11, -3]),
    "a shape of floats": set_to("shape", [33.0]),
    "a shape of bools": set_to("shape", [33, True]),
    "a shape of text": set_to("shape", "33"),
    "a shape of none": set_to("shape", None),
    "a shape of one more": set_to("shape", [34]),
    "a huge shape": set_to("shape", [1 << 80]),
    "a huge empty shape": lambda header: header.update(
        {"0": {"dtype": "F32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}
    ),
    "many dims": set_to("shape", [1] * 1000 + [33]),
    "another dtype": set_to("dtype", "F64"),
    "an unknown dtype": set_to("dtype", "F33"),
    "a dtype of torch": set_to("dtype", "float32"),
    "a dtype of none": set_to("dtype", None),
    "a dtype of a list": set_to("dtype", ["F32"]),
    "no dtype": without("dtype"),
    "no shape": without("shape"),
    "no data_offsets": without("data_offsets"),
    "a tensor of none": replaced(None),
    "a tensor of a list": replaced([]),
    "a tensor of text": replaced("F32"),
    "metadata of none": lambda header: header.update(__metadata__=None),
    "metadata of a list": lambda header: header.update(__metadata__=["format", "pt"]),
    "metadata of numbers": lambda header: header["__metadata__"].update(format=1),
    "metadata of objects": lambda header: header["__metadata__"].update({"1.weight": {"_type": "Tensor"}}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_headers(tmp_path, change):
    file = saved(tmp_path / "model")
    header, data = parts(file)
    change(header)
    put(file, header, data)
    for path in (file, tmp_path / "model"):
        outcome = survives(read, path)
        assert outcome.error == "ValueError"
        assert outcome.message.startswith(f"{file} is truncated or corrupt (")
        assert outcome.message.endswith("); copy or download it again")


def test_data_that_is_another_size(tmp_path):
    file = saved(tmp_path / "model")
    content = file.read_bytes()
    for changed in (content[:-1], content + b"\0", content[: len(content) // 2]):
        file.write_bytes(changed)
        assert survives(read, file).message.startswith(f"{file} is truncated or corrupt (its tensors take")


CONTENTS = {
    "empty": b"",
    "short": b"\0" * 7,
    "no header": struct.pack("<Q", 0),
    "a header of all there is": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "a header of more than the file": struct.pack("<Q", 1000) + b"{}",
    "a header larger than any": struct.pack("<Q", 100_000_001) + b"{}",
    "zeros": b"\0" * 1000,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134217728\n",
    "a zip": b"PK\3\4" + b"\0" * 100,
}
HEADERS = {
    "no JSON": b"{'1.bias': 1}",
    "no UTF-8": b'{"\xff": 1}',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "cut": b'{"1.bias": {"dtype": "F3',
    "two of one name": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "two keys of one tensor": b'{"a":{"dtype":"U8","shape":[0],"shape":[9],"data_offsets":[0,0]}}',
    "two metadata": b'{"__metadata__":{},"__metadata__":{"format":"pt"}}',
}


@pytest.mark.parametrize("name", [*CONTENTS, *HEADERS])
def test_files_that_are_none(tmp_path, name):
    file = tmp_path / "model.safetensors"
    if name in CONTENTS:
        file.write_bytes(CONTENTS[name])
    else:
        put(file, HEADERS[name])
    outcome = survives(read, file)
    assert outcome.error == "ValueError"
    assert outcome.message.startswith(f"{file} is truncated or corrupt (")


def test_a_header_of_a_hundred_megabytes_is_not_read_for_a_small_file(tmp_path):
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", 1 << 40))
        opened.truncate(1 << 41)  # of which nothing is on the disk
    assert "cannot begin with a header of" in survives(read, file, seconds=5).message


# ------------------------------------------------------------------------ no regular files


def a_pipe(file):
    os.mkfifo(file)


def a_device(file):
    file.symlink_to("/dev/zero")


def a_device_that_waits(file):
    file.symlink_to("/dev/tty")


def a_folder(file):
    file.mkdir()


def a_link_to_nothing(file):
    file.symlink_to("nowhere")


def a_link_to_itself(file):
    file.symlink_to(file.name)


KINDS = [a_pipe, a_device, a_device_that_waits, a_folder, a_link_to_nothing, a_link_to_itself]
NAMES = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "other.safetensors",
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_no_regular_files(tmp_path, kind, name):
    kind(tmp_path / name)
    outcome = survives(read, tmp_path, allowed=(ValueError, FileNotFoundError, OSError), seconds=20)
    assert outcome.error
    assert str(tmp_path / name) in outcome.message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_no_regular_files_of_a_transformers_folder(tmp_path, kind, name):
    tiny_llama(layers=1).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    kind(tmp_path / name)
    assert survives(main, ["inspect", str(tmp_path)], seconds=20).value == 1
    outcome = survives(
        lambda: load(tmp_path) and None, allowed=(ValueError, FileNotFoundError, OSError), seconds=20
    )
    assert outcome.error
    assert str(tmp_path) in outcome.message


def test_a_name_that_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "nothing", tmp_path / ("x" * 300)):
        outcome = survives(read, path, allowed=(ValueError, FileNotFoundError, OSError), seconds=20)
        assert str(path) in outcome.message


def test_a_right_file_is_read(tmp_path):
    """With an empty tensor, whose bytes are where another begins, and one header of spaces at its end."""
    model = make()
    model.empty = torch.nn.Parameter(torch.empty(0, 7))
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    header, data = parts(tmp_path / "model.safetensors")
    put(tmp_path / "model.safetensors", json.dumps(header).encode() + b" " * 9, data)

    def both():
        other = make()
        other.empty = torch.nn.Parameter(torch.empty(0, 7))
        return load(tmp_path, model=other)[1].weight.sum().item()

    assert survives(both).value == model[1].weight.sum().item()
