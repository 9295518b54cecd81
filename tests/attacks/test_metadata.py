"""What a file says of a quantized weight: each lie is an error that names the file and the weight, in every
reader."""

import io
import json
import logging

import pytest
from folders import QUANTIZED, make, parts, put, read, saved
from forked import survives
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM

from rtn_tensor import quantize_, rtn_int4, save
from rtn_tensor.checkpoint.sources import saved_attributes
from rtn_tensor.cli import main
from rtn_tensor.formats import VERSION

WEIGHT = "model.layers.0.self_attn.q_proj.weight"

# Of a weight of 96 columns and 64 at most elsewhere; as in the file: 4 bits in groups of 32.
ATTRIBUTES = {
    "bits of none": {"bits": None},
    "bits as text": {"bits": "4"},
    "bits of a bool": {"bits": True},
    "bits of 2": {"bits": 2},
    "bits of 0": {"bits": 0},
    "bits of another width": {"bits": 8},
    "bits of a float": {"bits": 4.0},
    "huge bits": {"bits": 1 << 70},
    "negative bits": {"bits": -4},
    "a list of bits": {"bits": [4]},
    "group_size of 0": {"group_size": 0},
    "group_size of 16": {"group_size": 16},
    "group_size of -128": {"group_size": -128},
    "group_size of another number of scales": {"group_size": 64},
    "group_size of a row": {"group_size": -1},
    "huge group_size": {"group_size": 1 << 80},
    "group_size of a float": {"group_size": 32.0},
    "group_size of an object": {"group_size": {"_type": "torch.dtype", "_data": "int8"}},
    "negative in_features": {"in_features": -96},
    "in_features of 0": {"in_features": 0},
    "in_features beyond the planes": {"in_features": 1 << 26},
    "in_features short of the planes": {"in_features": 32},
    "huge in_features": {"in_features": 1 << 70},
    "in_features of a float": {"in_features": 96.0},
    "in_features of a bool": {"in_features": True},
    "in_features as text": {"in_features": "96"},
    "an unknown scale_method": {"scale_method": "median"},
    "scale_method of a number": {"scale_method": 3},
    "scale_method of a list": {"scale_method": ["absmax"]},
    "transposed as text": {"transposed": "no"},
    "transposed of a number": {"transposed": 1},
    "a later version": {"version": VERSION + 1},
    "a version of 0": {"version": 0},
    "a negative version": {"version": -1},
    "a version as text": {"version": "1"},
    "a version of none": {"version": None},
    "a huge version": {"version": 1 << 90},
    "minmax without its plane": {"scale_method": "minmax"},
    "an unknown attribute": {"zeros": 8},
    "planes among the attributes": {"qdata": [1, 2]},
}
LACKING = ["bits", "group_size", "scale_method", "in_features"]
TEXTS = {
    "no JSON": '{"_type": "RTNQuantizedTensor", "_data"',
    "no object": "[]",
    "empty": "",
    "deep": '{"_type":' * 100_000,
    "digits": '{"_type": "RTNQuantizedTensor", "_data": {"bits": ' + "4" * 10_000 + "}}",
    "no attributes": '{"_type": "RTNQuantizedTensor"}',
    "attributes of none": '{"_type": "RTNQuantizedTensor", "_data": null}',
    "attributes of a list": '{"_type": "RTNQuantizedTensor", "_data": [4, 32, "absmax", 96]}',
    "no type": "{}",
    "a tensor": '{"_type": "Tensor"}',
    "another library": '{"_type": "Int4Tensor", "_data": {}}',
    "a type of none": '{"_type": null}',
    "a type of a list": '{"_type": ["RTNQuantizedTensor"]}',
    "a type of a config": '{"_type": "PerRow", "_data": {}}',
}


def altered(file, name, change):
    """Changes what the metadata of `file` says of the weight `name`: attributes that are set, or one that is
    taken out; or all of it."""
    header, data = parts(file)
    if isinstance(change, dict) or change in LACKING:
        about = json.loads(header["__metadata__"][name])
        about["_data"] = (
            about["_data"] | change
            if isinstance(change, dict)
            else {k: v for k, v in about["_data"].items() if k != change}
        )
        change = json.dumps(about)
    header["__metadata__"][name] = change
    put(file, header, data)


CHANGES = [*ATTRIBUTES.values(), *LACKING, *TEXTS.values()]
NAMES = [*ATTRIBUTES, *(f"lacking {name}" for name in LACKING), *TEXTS]


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_load(tmp_path, change):
    file = saved(tmp_path / "model")
    altered(file, QUANTIZED, change)
    outcome = survives(read, tmp_path / "model")
    assert outcome.error == "ValueError"
    assert outcome.message.startswith(f"{file}: 1.")
    assert len(outcome.message) < 1000


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    model = tiny_llama(layers=1)
    quantize_(model, rtn_int4(32), lambda module, fqn: fqn.endswith("q_proj"))
    save(model, folder)
    return folder, (folder / "model.safetensors").read_bytes()


def from_pretrained(folder):
    """transformers logs our errors, and raises another in their place."""
    handler = logging.StreamHandler(log := io.StringIO())
    logging.getLogger("transformers").addHandler(handler)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        return f"{log.getvalue()}\n{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_every_reader_of_a_transformers_folder(llama, change):
    folder, content = llama
    file = folder / "model.safetensors"
    file.write_bytes(content)
    altered(file, WEIGHT, change)
    assert survives(main, ["inspect", str(folder)]).value == 1
    assert survives(lambda: len(saved_attributes(folder, lambda: str)), allowed=(ValueError,)).value in (
        None,
        0,
    )
    error = survives(from_pretrained, folder).value
    if isinstance(change, dict):
        if change != {"qdata": [1, 2]}:  # the planes take its place
            assert WEIGHT in error
            assert (
                f"{next(iter(change))}=" in error
                or "its attributes" in error
                or "is of version" in error
                or "are not the planes" in error
            )
    else:
        assert change in error if change in LACKING else error


def test_a_right_file_is_read(tmp_path, llama):
    saved(tmp_path / "model")
    assert survives(read, tmp_path / "model").value is True
    folder, content = llama
    (folder / "model.safetensors").write_bytes(content)
    assert survives(main, ["inspect", str(folder)]).value == 0
    assert (
        survives(lambda: type(AutoModelForCausalLM.from_pretrained(folder)).__name__).value
        == "LlamaForCausalLM"
    )
    assert make()[1].weight.shape == (33, 96)
