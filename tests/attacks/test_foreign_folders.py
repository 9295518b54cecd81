"""Folders in the formats of other libraries that are broken, or lie: an error that names the file, and mostly the
tensor; never a crash, and the model stays as it was."""

import copy
import json
import warnings
from functools import partial

import foreign_formats as made
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rtn_tensor import load, rtn_int4

CT = made.ct_config
N, K = 64, 96
FORMATS = {
    "GPTQ": (partial(made.gptq), made.gptq_config()),
    "GPTQ, sorted": (partial(made.gptq, act_order=True, symmetric=False), made.gptq_config(desc_act=True)),
    "AWQ": (made.awq, made.AWQ_CONFIG),
    "compressed-tensors": (made.compressed, CT()),
    "compressed-tensors, asymmetric": (
        partial(made.compressed, symmetric=False, act_order=True),
        CT(symmetric=False),
    ),
    "compressed-tensors, int8": (
        partial(made.int_quantized, symmetric=False),
        CT("int-quantized", 8, None, symmetric=False),
    ),
    "NVFP4": (partial(made.nvfp4, compressed=True), CT("nvfp4-pack-quantized", 4, 16, kind="float")),
    "fp8": (partial(made.fp8, block=(32, 32)), made.FP8_CONFIG | {"weight_block_size": [32, 32]}),
    "ModelOpt": (made.nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "bitsandbytes, nf4": (partial(made.bnb4, nested=True), made.BNB4_CONFIG),
    "bitsandbytes, int8": (made.bnb8, made.BNB8_CONFIG),
    "MXFP4": (lambda n, k: (made.mxfp4(2, n, k)[0], None), {"quant_method": "mxfp4"}),
}
# Planes without which the format still says what the weight is.
OPTIONAL = {"g_idx", "weight_format", "weight_g_idx"}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.ones(2, K, N, dtype=torch.float16))


def module(kind):
    if kind == "MXFP4":
        return nn.ModuleDict({"0": Experts()})
    return nn.ModuleDict({"0": nn.Linear(K, N, bias=False, dtype=torch.float16)})


def written(folder, kind, change=lambda planes, config: None):
    make, config = FORMATS[kind]
    planes, config = dict(make(N, K)[0]), copy.deepcopy(config)
    change(planes, config)
    prefix = "0.up" if kind == "MXFP4" else "0."
    folder.mkdir(exist_ok=True)
    save_file(
        {f"{prefix}{name}": plane.contiguous() for name, plane in planes.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def refused(folder, kind, config=None):
    """The message of the error, of a model that is left as it was; None where it loads."""
    model = module(kind)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(folder, config, model)
    except (ValueError, FileNotFoundError) as error:
        for name, p in model.named_parameters():
            assert p is before[name][0]
            assert torch.equal(p, before[name][1])
        why = str(error)
    else:
        return None
    assert str(folder) in why or "model.safetensors" in why, why
    return why


def test_they_load_as_they_are(tmp_path):
    for kind in FORMATS:
        assert refused(written(tmp_path / "a", kind), kind) is None, kind


@pytest.mark.parametrize("kind", FORMATS)
def test_missing_planes(tmp_path, kind):
    names = list(FORMATS[kind][0](N, K)[0])
    optional = OPTIONAL - ({"g_idx"} if FORMATS[kind][1].get("desc_act") else set())
    for name in names:
        folder = written(tmp_path / "a", kind, lambda planes, config, name=name: planes.pop(name))
        for config in (None, rtn_int4(32)):
            why = refused(folder, kind, config)
            assert (why is None) == (name in optional), (name, why)
            assert why is None or "0." in why or "hold none that is" in why, why


def cut_rows(t):
    return t[:-1]


def cut_columns(t):
    return t[..., :-1]


def one_more(t):
    return torch.cat([t, t[:1]]) if t.dim() else t[None].repeat(2)


def of_another_dtype(t):
    return t.to(torch.int16) if t.dtype != torch.int16 else t.to(torch.int32)


def without_dims(t):
    return t.flatten()[0]


def with_more_dims(t):
    return t[None, None]


def as_bits(t):
    return t.contiguous().view(torch.uint8) if t.dtype != torch.uint8 and t.dim() else t[None, None]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "change", [cut_rows, cut_columns, one_more, of_another_dtype, without_dims, with_more_dims, as_bits]
)
def test_planes_that_are_not_as_the_others_say(tmp_path, kind, change):
    planes = FORMATS[kind][0](N, K)[0]
    for name, plane in planes.items():
        if name == "weight_format" or (plane.dim() == 0 and change in (cut_rows, cut_columns, without_dims)):
            continue

        def mutate(planes, config, name=name):
            planes[name] = change(planes[name])

        folder = written(tmp_path / "a", kind, mutate)
        why = refused(folder, kind)
        one_number = name in ("weight_scale_2", "weight_global_scale")
        in_a_row = kind.startswith("bitsandbytes, nf4") and name == "weight"
        if (one_number or in_a_row) and why is None:  # in whatever shape
            continue
        assert why is not None, name
        assert "0." in why, why


@pytest.mark.parametrize("kind", FORMATS)
def test_files_that_are_cut_off(tmp_path, kind):
    folder = written(tmp_path / "a", kind)
    data = (folder / "model.safetensors").read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:length])
        assert "truncated or corrupt" in refused(folder, kind)


VALUES = [None, True, -7, 3, 10**30, 0.5, "x", [], [1, 2, 3], {}, {"a": 1}, "\0", [[]]]


def places(config, path=()):
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("kind", FORMATS)
def test_configs_with_other_values(tmp_path, kind):
    """Any value in any place: it loads, or it is an error; nothing else."""
    folder = written(tmp_path / "a", kind)
    file = folder / "config.json"
    original = json.loads(file.read_text())["quantization_config"]
    for path in places(original):
        if path[-1] == "quant_method":
            continue
        for value in VALUES:
            config = copy.deepcopy(original)
            inner = config
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            file.write_text(json.dumps({"quantization_config": config}))
            refused(folder, kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_options_that_are_not_known(tmp_path, kind):
    folder = written(tmp_path / "a", kind, lambda planes, config: config.update(rotated_by="hadamard"))
    assert "'rotated_by' (hadamard), which load does not know" in refused(folder, kind)


AUTO_ROUND = {"quant_method": "auto-round", "data_type": "fp", "packing_format": "auto_round:fp8"}
LIES = {
    "GPTQ of other bits": ("GPTQ", {"bits": 8}),
    "GPTQ of other groups": ("GPTQ", {"group_size": 64}),
    "GPTQ of 3 bits": ("GPTQ", {"bits": 3}),
    "GPTQ of Marlin": ("GPTQ", {"checkpoint_format": "marlin"}),
    "GPTQ of two versions": ("GPTQ", {"checkpoint_format": "gptq", "format": "gptq_v2"}),
    "GPTQ with adapters": ("GPTQ", {"dynamic": {"+:0": {"adapter": {"rank": 8}}}}),
    "GPTQ of one endless group": ("GPTQ", {"group_size": 10**30}),
    "AWQ of one endless group": ("AWQ", {"group_size": 10**30}),
    "AWQ of other groups": ("AWQ", {"group_size": 96}),
    "AWQ for a vector": ("AWQ", {"version": "gemv"}),
    "fp8 of other blocks": ("fp8", {"weight_block_size": [64, 32]}),
    "fp8 of no blocks": ("fp8", {"weight_block_size": None}),
    "rotated": ("compressed-tensors", {"transform_config": {"config_groups": {}, "u": 1}}),
    "sparse": ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}),
    "of no group": ("compressed-tensors", {"config_groups": {}}),
    "auto-round of packed fp8": ("fp8", AUTO_ROUND | {"packing_format": "auto_round:llm_compressor"}),
    "auto-round of fp8 integers": ("fp8", AUTO_ROUND | {"data_type": "int"}),
    "auto-round of FP4 in fp8": ("NVFP4", AUTO_ROUND | {"data_type": "fp"}),
    "auto-round of FP4 in integers": ("compressed-tensors", AUTO_ROUND | {"data_type": "mx_fp"}),
    "another format": ("compressed-tensors", {"format": "marlin-24"}),
}


@pytest.mark.parametrize("value", [["gptq"], {"gptq": 1}, 4, None])
def test_methods_that_are_none(tmp_path, value):
    folder = written(tmp_path / "a", "GPTQ", lambda planes, config: config.update(quant_method=value))
    assert "quantized by" in refused(folder, "GPTQ")


def test_columns_that_are_sorted_without_saying_how(tmp_path):
    """The config says so, and the plane is not there."""

    def change(planes, config):
        del planes["weight_g_idx" if "config_groups" in config else "g_idx"]
        for group in config.get("config_groups", {}).values():
            group["weights"]["actorder"] = "group"

    assert "has no 0.g_idx beside it" in refused(
        written(tmp_path / "a", "GPTQ, sorted", change), "GPTQ, sorted"
    )
    kind = "compressed-tensors, asymmetric"
    folder = written(tmp_path / "b", kind, change)
    assert "has no 0.weight_g_idx beside it" in refused(folder, kind)


@pytest.mark.parametrize("kind", ["GPTQ", "AWQ"])
def test_planes_of_no_rows_and_endless_columns(tmp_path, kind):
    """A header of some bytes must not cost memory for what it says."""
    k = 1 << 37

    def empty(name, shape, dtype):
        return name, {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}

    header = dict(
        [
            empty("0.qweight", [k, 0], "I32"),
            empty("0.scales", [1, 0], "F16"),
            empty("0.qzeros", [1, 0], "I32"),
        ]
    )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    config = {**FORMATS[kind][1], "group_size": -1}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert refused(tmp_path, kind)


@pytest.mark.parametrize(("kind", "changes"), LIES.values(), ids=LIES)
def test_configs_that_lie(tmp_path, kind, changes):
    folder = written(tmp_path / "a", kind, lambda planes, config: config.update(changes))
    assert refused(folder, kind)


GROUP_LIES = [
    {"num_bits": 8},
    {"group_size": 64},
    {"strategy": "channel"},
    {"strategy": "block"},
    {"type": "float"},
]


@pytest.mark.parametrize("changes", GROUP_LIES)
def test_config_groups_that_lie(tmp_path, changes):
    def change(planes, config):
        config["config_groups"]["group_0"]["weights"].update(changes)

    assert refused(written(tmp_path / "a", "compressed-tensors", change), "compressed-tensors")


@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(
    ("kind", "name"), [("GPTQ", "g_idx"), ("compressed-tensors, asymmetric", "weight_g_idx")]
)
def test_groups_that_are_not_there(tmp_path, kind, name, value):
    def change(planes, config):
        planes[name][5] = value

    why = refused(written(tmp_path / "a", kind, change), kind)
    assert f"0.{name} names the groups" in why


@pytest.mark.parametrize("value", [[0, 0], [64, 10**9], [-64, 96], [64, 95], [96, 64], [2**62, 2**62]])
def test_shapes_that_are_not_the_weights(tmp_path, value):
    def change(planes, config):
        planes["weight_shape"] = torch.tensor(value)

    for kind in ("compressed-tensors", "compressed-tensors, asymmetric"):
        assert "0.weight" in refused(written(tmp_path / "a", kind, change), kind)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"garbage",
        b"[]",
        b"{}",
        b'{"quant_type": "nf4"}',
        b'{"quant_type": "nf4", "blocksize": 0, "shape": [64, 96]}',
        b'{"quant_type": "nf4", "blocksize": 64, "shape": [64, -96]}',
        b'{"quant_type": "nf4", "blocksize": 64, "shape": [1e400, 2]}',
        b'{"quant_type": "nf4", "blocksize": 64, "shape": [4611686018427387904, 2]}',
        b'{"quant_type": "nf4", "blocksize": 64, "shape": [64, 96], "nested_blocksize": 256, "nested_offset": "x"}',
        b"[" * 100_000,
    ],
)
def test_states_of_bitsandbytes(tmp_path, text):
    def change(planes, config):
        planes["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)

    assert "0.weight" in refused(written(tmp_path / "a", "bitsandbytes, nf4", change), "bitsandbytes, nf4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(tmp_path, value):
    ends = ("scales", "weight_scale", "weight_scale_inv", "weight_scale_2", "SCB", "weight.nested_absmax")
    for kind in FORMATS:
        planes = FORMATS[kind][0](N, K)[0]
        floats = (torch.float32, torch.float16, torch.bfloat16)  # an fp8 has no inf
        name = next((n for n in ends if n in planes and planes[n].dtype in floats), None)
        if name is None:
            continue

        def change(planes, config, name=name):
            planes[name] = torch.full_like(planes[name].float(), value).to(planes[name].dtype)

        for config in (None, rtn_int4(32)):
            assert "holds NaN or inf" in refused(written(tmp_path / "a", kind, change), kind, config), kind


def test_zeros_that_are_not_what_the_config_says(tmp_path):
    """What says that it is symmetric and is not keeps the zeros that it has."""

    def change(planes, config):
        planes["qzeros"][0, 0] += 1

    model = load(written(tmp_path / "a", "GPTQ", change), None, module("GPTQ"))
    assert model["0"].weight.zero.flatten().tolist().count(1) == 1


def test_names_that_are_twice(tmp_path):
    folder = written(tmp_path / "a", "GPTQ")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"0.weight": torch.ones(N, K)}, folder / "model.safetensors")
    assert "0.weight" in refused(folder, "GPTQ")


def test_a_config_that_says_two_things(tmp_path):
    folder = written(tmp_path / "a", "GPTQ")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"compression_config": made.AWQ_CONFIG}))
    assert "in two ways" in refused(folder, "GPTQ")
