"""Planes that are not those of the weight that the metadata describes: each is an error that names the file
and the weight."""

import pytest
import torch
import torch.nn.functional as F
from folders import QUANTIZED, put, quantized, read, saved
from forked import survives
from safetensors import safe_open
from safetensors.torch import save_file
from test_metadata import WEIGHT, from_pretrained, llama  # noqa: F401  (a fixture)
from test_metadata import altered as metadata_altered
from tiny_llama import tiny_llama

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn_int4, save
from rtn_tensor.checkpoint.sources import sources
from rtn_tensor.cli import main

# What becomes of qdata [33, 48] and scale [33, 3]; None: the plane is left out.
CHANGES = {
    "qdata of signed bytes": (lambda q: q.view(torch.int8), None),
    "qdata of words": (lambda q: q.view(torch.int32), None),
    "qdata of floats": (lambda q: q.float(), None),
    "qdata one column short": (lambda q: q[:, :-1].contiguous(), None),
    "qdata one chunk short": (lambda q: q[:, :-16].contiguous(), None),
    "qdata one chunk longer": (lambda q: torch.cat([q, q[:, :16]], 1), None),
    "qdata one row short": (lambda q: q[:-1].contiguous(), None),
    "qdata without rows": (lambda q: q[:0], None),
    "qdata without columns": (lambda q: q[:, :0], None),
    "qdata of one dim": (lambda q: q.flatten(), None),
    "qdata of three dims": (lambda q: q[None], None),
    "qdata without dims": (lambda q: q[0, 0], None),
    "qdata transposed": (lambda q: q.T.contiguous(), None),
    "no qdata": ("missing", None),
    "scale of bytes": (None, lambda s: s.to(torch.uint8)),
    "scale of float64": (None, lambda s: s.double()),
    "scale of integers": (None, lambda s: s.to(torch.int32)),
    "scale of fp8": (None, lambda s: s.to(torch.float8_e4m3fn)),
    "scale of bools": (None, lambda s: s != 0),
    "scale one column short": (None, lambda s: s[:, :-1].contiguous()),
    "scale one column longer": (None, lambda s: torch.cat([s, s[:, :1]], 1)),
    "scale of one column": (None, lambda s: s[:, :1].contiguous()),
    "scale one row short": (None, lambda s: s[:-1].contiguous()),
    "scale without rows": (None, lambda s: s[:0]),
    "scale without columns": (None, lambda s: s[:, :0]),
    "scale of one dim": (None, lambda s: s.flatten()),
    "scale without dims": (None, lambda s: s[0, 0]),
    "scale transposed": (None, lambda s: s.T.contiguous()),
    "no scale": (None, "missing"),
    "both without rows": (lambda q: q[:0], lambda s: s[:0]),
    "both without columns": (lambda q: q[:, :0], lambda s: s[:, :0]),
    "both of another layer": (lambda q: q[:32].contiguous(), lambda s: s[:32].contiguous()),
}


def altered(file, names, changes):
    with safe_open(file, "pt") as opened:
        metadata, tensors = (
            opened.metadata(),
            {name: opened.get_tensor(name).clone() for name in opened.keys()},
        )
    for name, change in zip(names, changes, strict=True):
        if change == "missing":
            del tensors[name]
        elif change:
            tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_load(tmp_path, changes):
    file = saved(tmp_path / "model")
    altered(file, ("1._weight_qdata", "1._weight_scale"), changes)
    outcome = survives(read, tmp_path / "model")
    assert outcome.error == "ValueError"
    assert str(file) in outcome.message or "does not fit the model" in outcome.message
    assert QUANTIZED in outcome.message or "1._weight" in outcome.message


# What becomes of zero [33, 3].
OF_ZERO = {
    "of unsigned bytes": lambda z: z.to(torch.uint8),
    "of words": lambda z: z.to(torch.int32),
    "of floats": lambda z: z.float(),
    "of fp8": lambda z: z.float().to(torch.float8_e4m3fn),
    "of bools": lambda z: z != 0,
    "one column short": lambda z: z[:, :-1].contiguous(),
    "one column longer": lambda z: torch.cat([z, z[:, :1]], 1),
    "of one column": lambda z: z[:, :1].contiguous(),
    "one row short": lambda z: z[:-1].contiguous(),
    "without rows": lambda z: z[:0],
    "without columns": lambda z: z[:, :0],
    "of one dim": lambda z: z.flatten(),
    "of three dims": lambda z: z[None],
    "without dims": lambda z: z[0, 0],
    "transposed": lambda z: z.T.contiguous(),
    "missing": "missing",
}


@pytest.mark.parametrize("change", OF_ZERO.values(), ids=OF_ZERO)
def test_zero_points(tmp_path, change):
    file = saved(tmp_path / "model", scale_method="minmax")
    assert survives(read, tmp_path / "model").value is True
    altered(file, ["1._weight_zero_point"], [change])
    outcome = survives(read, tmp_path / "model")
    assert outcome.error == "ValueError"
    assert str(file) in outcome.message
    assert QUANTIZED in outcome.message or "1._weight" in outcome.message


@pytest.mark.parametrize("plane", ["qdata", "scale"])
def test_zero_points_without_another_plane(tmp_path, plane):
    file = saved(tmp_path / "model", scale_method="minmax")
    altered(file, [f"1._weight_{plane}"], ["missing"])
    outcome = survives(read, tmp_path / "model")
    assert outcome.error == "ValueError"
    assert f"is a plane of {QUANTIZED}, of which {plane} is missing" in outcome.message


def test_zero_points_of_a_symmetric_weight(tmp_path):
    """By the attributes or by the version there can be none."""
    for change, why in (
        ({"scale_method": "absmax"}, "makes no plane zero, and there is one"),
        ({"version": 1}, "version=1 of the format has no plane zero"),
    ):
        file = saved(tmp_path / next(iter(change)), scale_method="minmax")
        metadata_altered(file, QUANTIZED, change)
        outcome = survives(read, file.parent)
        assert outcome.error == "ValueError"
        assert why in outcome.message


@pytest.mark.parametrize("change", OF_ZERO.values(), ids=OF_ZERO)
def test_zero_points_of_a_transformers_folder(tmp_path, change):
    model = tiny_llama(layers=1)
    quantize_(model, rtn_int4(32, "minmax"), lambda module, fqn: fqn.endswith("q_proj"))
    save(model, tmp_path / "model")
    module, _, name = WEIGHT.rpartition(".")
    assert survives(from_pretrained, tmp_path / "model").value is None
    altered(tmp_path / "model" / "model.safetensors", [f"{module}._{name}_zero_point"], [change])
    assert survives(main, ["inspect", str(tmp_path / "model")]).value == 1
    assert WEIGHT in survives(from_pretrained, tmp_path / "model").value


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_every_reader_of_a_transformers_folder(llama, changes):  # noqa: F811
    folder, content = llama
    (folder / "model.safetensors").write_bytes(content)
    module, _, name = WEIGHT.rpartition(".")
    altered(
        folder / "model.safetensors", [f"{module}._{name}_{plane}" for plane in ("qdata", "scale")], changes
    )
    assert survives(main, ["inspect", str(folder)]).value == 1
    assert WEIGHT in survives(from_pretrained, folder).value


@pytest.mark.parametrize("rows", [0, 32, 95])
def test_transformers_compares_the_shape_of_a_weight(llama, rows):  # noqa: F811
    """It does so of float weights alone; the error comes before the model runs."""
    folder, content = llama
    (folder / "model.safetensors").write_bytes(content)
    module, _, name = WEIGHT.rpartition(".")
    planes = [f"{module}._{name}_{plane}" for plane in ("qdata", "scale")]
    altered(folder / "model.safetensors", planes, [lambda plane: plane[:rows].contiguous()] * 2)
    error = survives(from_pretrained, folder).value
    assert f"{WEIGHT} has shape ({rows}, 96) in the file, and (96, 96) in the model" in error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("end", ["folder", "file.pt"])
def test_scales_that_are_no_numbers(tmp_path, value, end):
    model = quantized()
    torch.save(model.state_dict(), tmp_path / "file.pt")
    file = saved(tmp_path / "folder")
    if end == "folder":
        altered(file, ["1._weight_scale"], [lambda s: s.index_fill(0, torch.tensor([32]), value)])
    else:
        model[1].weight.scale[32] = value
        torch.save(model.state_dict(), file := tmp_path / end)
    outcome = survives(read, tmp_path / end)
    assert (
        outcome.message
        == f"{file}: 1.weight holds NaN or inf; the checkpoint is damaged, copy or download it again"
    )


def values(file):
    found = sources(file)
    w = found[QUANTIZED].private()
    y = torch.nn.functional.linear(torch.ones(3, 96), w)
    return [
        t.flatten().tolist()
        for t in (w.dequantize(), y, found["0.weight"].private(), found["0.weight"].view())
    ]


def test_planes_at_odd_addresses(tmp_path):
    """As after a tensor of an odd size."""
    file = saved(tmp_path / "model")
    expected = survives(values, file).value
    with safe_open(file, "pt") as opened:
        metadata, tensors = (
            opened.metadata(),
            {name: opened.get_tensor(name).clone() for name in opened.keys()},
        )
    for shift in (1, 2, 3, 4, 8):
        header, data = {"__metadata__": metadata}, b""
        for name, t in {"odd": torch.zeros(shift, dtype=torch.uint8), **tensors}.items():
            begin = len(data)
            data += t.flatten().view(torch.uint8).numpy().tobytes()
            kind = {torch.uint8: "U8", torch.float32: "F32"}[t.dtype]
            header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [begin, len(data)]}
        put(file, header, data)
        assert survives(values, file).value == expected


def misaligned(t):
    """`t`, whose numbers begin inside a number, as in a file with such offsets."""
    memory = bytearray(t.nbytes + 1)
    moved = torch.frombuffer(memory, dtype=torch.uint8, offset=1)
    moved.copy_(t.contiguous().view(-1).view(torch.uint8))
    return torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_that_begin_inside_a_number(dtype):
    """The sanitizers, which run this too, see a read of one."""
    w, bias, x = torch.randn(48, 100).to(dtype), torch.randn(48).to(dtype), torch.randn(3, 100).to(dtype)
    whole = RTNQuantizedTensor.from_float(w, 4, 32)
    moved = RTNQuantizedTensor(misaligned(whole.qdata), misaligned(whole.scale), 4, 32, "search", 100)
    assert moved.scale.data_ptr() % dtype.itemsize
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            expected = F.linear(x, whole, bias)
            assert torch.equal(F.linear(misaligned(x), moved, misaligned(bias)), expected)
            assert torch.equal(F.embedding(torch.tensor([1, 47]), moved), whole.dequantize()[[1, 47]])
    assert torch.equal(moved.dequantize(), whole.dequantize())
    assert torch.equal(RTNQuantizedTensor.from_float(misaligned(w), 4, 32).dequantize(), whole.dequantize())
    moved.copy_(w * 2)
    assert torch.equal(moved.dequantize(), RTNQuantizedTensor.from_float(w * 2, 4, 32).dequantize())


@pytest.mark.parametrize("plane", ["qdata", "scale"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_plane_that_is_nested(plane):
    """It is strided, too, by what torch says of its layout, and has no sizes."""
    whole = RTNQuantizedTensor.from_float(torch.randn(8, 64), 4, 32)
    planes = {"qdata": whole.qdata, "scale": whole.scale}
    planes[plane] = torch.nested.nested_tensor([planes[plane]])
    with pytest.raises(TypeError, match=rf"{plane} is torch\.\w+, nested; it must be a strided tensor"):
        RTNQuantizedTensor(**planes, bits=4, group_size=32, scale_method="absmax", in_features=64)
