"""Copies, files, and `.data`."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from quantized_weights import (
    assert_same,
    assert_same_planes,
    every_format,
    gaussian,
)
from torch import nn

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn_int4

# ------------------------------------------------------------------------ copies and files


def saved_and_loaded(t, **kwargs):
    buffer = io.BytesIO()
    torch.save(t, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, **kwargs)


ROUND_TRIPS = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "save": saved_and_loaded,
    "clone": torch.clone,
    "detach": torch.Tensor.detach,
}


@every_format
@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_round_trip(trip, bits, group_size, dtype):
    w = gaussian(2, 5, 300, bits=bits, group_size=group_size, scale_method="signed", dtype=dtype)
    for t in (w, w.mT, w[1], w[:, 2:4]):
        t.note = ["kept"]
        out = ROUND_TRIPS[trip](t)
        assert type(out) is RTNQuantizedTensor
        assert_same_planes(out, t)
        assert out.__tensor_flatten__() == t.__tensor_flatten__()
        stride = t.dequantize().clone().stride() if trip in ("deepcopy", "clone") else t.stride()
        assert (out.shape, out.stride(), out.dtype, out.note) == (t.shape, stride, t.dtype, ["kept"])
        assert (out.qdata.data_ptr() == t.qdata.data_ptr()) == (trip in ("detach", "copy"))


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "save"])
def test_parameter_round_trip(trip):
    p = nn.Parameter(gaussian(6, 96))
    p.input_dim = 1
    out = ROUND_TRIPS[trip](p)
    assert isinstance(out, nn.Parameter)
    assert not out.requires_grad
    assert out.input_dim == 1


def test_deepcopy_keeps_ties():
    module = nn.ModuleList([nn.Linear(96, 6), nn.Linear(96, 6)])
    module[0].weight = module[1].weight = nn.Parameter(gaussian(6, 96))
    twin = copy.deepcopy(module)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight.qdata.data_ptr() != module[0].weight.qdata.data_ptr()


def test_load_with_map_location():
    w = gaussian(6, 96)
    meta = saved_and_loaded(w, map_location="meta")
    assert (meta.device.type, meta.qdata.device.type, meta.shape) == ("meta", "meta", w.shape)
    assert_same_planes(saved_and_loaded(w, map_location="cpu"), w)


def test_a_fresh_process_loads_with_weights_only(tmp_path):
    module = quantize(nn.Linear(96, 6))
    x = torch.randn(3, 96)
    torch.save({"state": module.state_dict(), "x": x, "y": module(x)}, tmp_path / "model.pt")
    code = """
import sys, torch, rtn_tensor
saved = torch.load(sys.argv[1], weights_only=True)
module = torch.nn.Linear(96, 6, device="meta")
module.load_state_dict(saved["state"], assign=True)
assert isinstance(module.weight, rtn_tensor.RTNQuantizedTensor)
assert torch.equal(module(saved["x"]), saved["y"])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=100)


def quantize(module, **kwargs):
    quantize_(module, rtn_int4(group_size=32, **kwargs))
    return module


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", ["float-to-quantized", "quantized-to-float", "quantized-to-quantized"])
def test_load_state_dict(case, assign, swap):
    source, target = nn.Linear(96, 6), nn.Linear(96, 6)
    if case.startswith("quantized"):
        quantize(source)
    if case.endswith("to-quantized"):
        quantize(target)
    target.weight.weight_loader = "kept"
    before = target.weight
    try:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        assert (
            str(target.load_state_dict(source.state_dict(), assign=assign))
            == "<All keys matched successfully>"
        )
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert isinstance(target.weight, nn.Parameter)
    if assign:
        assert isinstance(target.weight, RTNQuantizedTensor) == case.startswith("quantized")
        kept = source.weight
    else:
        # The target stays what it is: a float checkpoint is quantized as it is loaded, and a quantized one
        # dequantized.
        assert target.weight is before
        # A swapped dense parameter loses its attributes in torch too.
        if not swap or case.endswith("to-quantized"):
            assert target.weight.weight_loader == "kept"
        assert isinstance(target.weight, RTNQuantizedTensor) == case.endswith("to-quantized")
        kept = quantize(copy.deepcopy(source)).weight if case == "float-to-quantized" else source.weight
        kept = kept.dequantize() if case == "quantized-to-float" else kept
    if isinstance(kept, RTNQuantizedTensor):
        assert_same_planes(target.weight, kept)
    else:
        assert_same(target.weight.detach(), kept.detach())
    assert_same(target.bias, source.bias)


def test_load_state_dict_of_another_shape_reports_it():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        quantize(nn.Linear(96, 6)).load_state_dict(nn.Linear(64, 6).state_dict())


def test_state_dict_shares_the_planes():
    module = quantize(nn.Linear(96, 6))
    assert module.state_dict()["weight"].qdata.data_ptr() == module.weight.qdata.data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.to("cpu"),
        lambda m: m.to("meta"),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.share_memory(),
        lambda m: m._apply(torch.clone),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: (m.load_state_dict(saved_and_loaded(m.state_dict())), m)[1],
        lambda m: (m.load_state_dict(saved_and_loaded(m.state_dict()), assign=True), m)[1],
        lambda m: (m.load_state_dict(nn.Linear(96, 6).state_dict()), m)[1],
    ],
    ids=[
        "to",
        "half",
        "cpu",
        "meta",
        "to_empty",
        "share",
        "apply",
        "deepcopy",
        "pickle",
        "load",
        "assign",
        "load-float",
    ],
)
def test_attributes_on_the_parameter_stay(change):
    module = quantize(nn.Linear(96, 6))
    module.weight.input_dim, module.weight.output_dim = 1, 0
    module.weight.tags = {"shard": [1, 2]}
    module = change(module)
    assert isinstance(module.weight, nn.Parameter)
    assert isinstance(module.weight, RTNQuantizedTensor)
    assert (module.weight.input_dim, module.weight.output_dim, module.weight.tags) == (
        1,
        0,
        {"shard": [1, 2]},
    )


def test_functions_on_the_parameter_stay():
    """vLLM hangs its weight_loader on the parameter, and takes views of `.data`."""
    module = quantize(nn.Linear(96, 6))
    module.weight.weight_loader = loader = lambda parameter, loaded: parameter.copy_(loaded)
    module.half()
    module.weight.weight_loader(module.weight.data.narrow(0, 2, 2), torch.zeros(2, 96))
    assert module.weight.weight_loader is loader
    assert not module.weight.dequantize()[2:4].any()


def test_equal():
    w = gaussian(6, 96)
    assert torch.equal(w, w.clone())
    assert torch.equal(w.t(), w.clone().t())
    assert not torch.equal(w, gaussian(6, 96))
    assert not torch.equal(w, w[:5])
    assert not torch.equal(w, w.half())
    assert not torch.equal(w, w.dequantize())
    assert not torch.equal(w.dequantize(), w)


# ----------------------------------------------------------------------------------- .data


@pytest.mark.parametrize("turned", [False, True])
def test_data_takes_a_float_tensor(turned):
    p = nn.Parameter(gaussian(6, 96).mT if turned else gaussian(6, 96), requires_grad=False)
    kept, before = p.data, p.dequantize()
    p.data = torch.ones(p.shape, dtype=torch.bfloat16)
    assert (p.dtype, p.scale.dtype, p.transposed) == (torch.bfloat16, torch.bfloat16, turned)
    fresh = torch.ones(kept.shape, dtype=torch.bfloat16)
    assert_same(
        p.dequantize(),
        RTNQuantizedTensor.from_float(fresh, kept.bits, kept.group_size, kept.scale_method).dequantize(),
    )
    assert_same(kept.dequantize(), before)
    p.data = kept
    assert_same(p.dequantize(), before)


def test_data_takes_a_quantized_tensor_of_another_format():
    p, new = (
        nn.Parameter(gaussian(6, 96), requires_grad=False),
        gaussian(4, 64, bits=8, dtype=torch.float16).t(),
    )
    p.__tensor_flatten__()
    p.data = new
    assert isinstance(p, nn.Parameter)
    assert (p.shape, p.stride(), p.dtype, p.bits) == ((64, 4), new.stride(), torch.float16, 8)
    assert p.__tensor_flatten__() == new.__tensor_flatten__()
    assert p.qdata is new.qdata
    assert_same(p.dequantize(), new.dequantize())


def test_data_takes_a_cast_of_itself_and_a_vector():
    layer = nn.Linear(96, 6, bias=False)
    layer.weight = nn.Parameter(gaussian(6, 96, dtype=torch.bfloat16), requires_grad=False)
    layer.weight.data = layer.weight.data.to(torch.float32)
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), x @ layer.weight.dequantize().t(), rtol=1e-4, atol=1e-4)
    vector = torch.randn(6 * 96)
    nn.utils.vector_to_parameters(vector, layer.parameters())
    assert torch.equal(
        layer.weight,
        RTNQuantizedTensor.from_float(vector.view(6, 96), layer.weight.bits, layer.weight.group_size),
    )


@pytest.mark.parametrize(
    ("new", "error"),
    [
        (torch.ones(0), ValueError),
        (torch.ones(6, 96, dtype=torch.int8), TypeError),
        (torch.ones(6, 96, device="meta"), RuntimeError),
        (gaussian(6, 96).to("meta"), RuntimeError),
        (None, TypeError),
    ],
    ids=["shape", "dtype", "meta", "quantized-on-meta", "none"],
)
def test_data_refuses(new, error):
    w = gaussian(6, 96)
    w.fqn = "up"
    before = w.dequantize()
    with pytest.raises(error, match=r"^up: (cannot set \.data to|dtype torch.int8 is not supported)"):
        w.data = new
    assert_same(w.dequantize(), before)


@pytest.mark.parametrize(
    "options",
    [{"device": "cpu"}, {"dtype": torch.bfloat16}, {"device": "meta"}, {"device": "cpu", "copy": True}],
    ids=str,
)
def test_to_in_inference_mode(options):
    w = gaussian(6, 96)
    with torch.inference_mode():
        out = w.to(**options)
    assert (out.dtype, out.device.type) == (options.get("dtype", w.dtype), options.get("device", "cpu"))
    assert (out.qdata.data_ptr() != w.qdata.data_ptr()) or len(options) == 1
    layer = nn.Linear(96, 6, bias=False)
    layer.weight = nn.Parameter(w, requires_grad=False)
    with torch.inference_mode():
        layer.to(**{name: value for name, value in options.items() if name != "copy"})
    assert layer.weight.device.type == options.get("device", "cpu")


def test_flatten_follows_the_attributes():
    w = gaussian(6, 96)
    before = w.__tensor_flatten__()
    w.scale_method = "signed"
    assert w.__tensor_flatten__() != before
