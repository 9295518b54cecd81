"""Weights whose scales have 8 bits: wherever a weight goes, its numbers stay the same."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import assert_same, every_dtype, every_width
from test_copies import GATHERS
from test_views import VIEWS, VIEWS_3D, check_view
from tiny_llama import tiny_llama
from torch import nn

from rtn_tensor import (
    RTNQuantizedTensor,
    compare,
    load,
    plan,
    quantize_,
    refine_,
    report,
    rtn,
    rtn_int4,
    save,
)
from rtn_tensor.checkpoint.sources import flattened
from rtn_tensor.formats import SCALE8
from rtn_tensor.reference import widened

BF16 = torch.bfloat16


def weight(*shape, bits=4, group_size=32, **kwargs):
    return RTNQuantizedTensor.from_float(torch.randn(shape), bits, group_size, "search8", **kwargs)


def assert_same_weight(a, b):
    assert (a.dtype, a.shape, a.scale_method, a.version) == (b.dtype, b.shape, b.scale_method, b.version)
    assert torch.equal(a.qdata, b.qdata)
    assert torch.equal(a.scale, b.scale)


@every_width
def test_what_it_holds(bits):
    w = weight(6, 300, bits=bits, dtype=BF16)
    assert (w.scale.dtype, w.scale.shape, w.dtype, w.version) == (SCALE8, (6, 10), BF16, 2)
    assert w.nbytes == w.qdata.nbytes + 60
    exact = RTNQuantizedTensor(w.qdata, widened(w.scale), bits, 32, "search", 300)
    assert_same(w.dequantize(torch.float32), exact.dequantize())
    assert_same(w.dequantize(), exact.dequantize().to(BF16))


@pytest.mark.parametrize("inference", [False, True])
@every_width
@pytest.mark.parametrize("view", VIEWS)
def test_view(view, bits, inference):
    w = weight(6, 300, bits=bits)
    with torch.inference_mode(inference):
        check_view(w, VIEWS[view])


@pytest.mark.parametrize("view", VIEWS_3D)
def test_view_3d(view):
    check_view(weight(3, 4, 100, dtype=BF16), VIEWS_3D[view])


@pytest.mark.parametrize("gather", GATHERS)
def test_gather(gather):
    w = weight(6, 300)
    assert_same(GATHERS[gather](w).dequantize(), GATHERS[gather](w.dequantize()))


@every_dtype
def test_copies_and_changes(dtype):
    w = weight(5, 100, dtype=dtype)
    for same in (w.clone(), w.detach(), copy.copy(w), copy.deepcopy(w), w.contiguous(), w.to("cpu"), w.data):
        assert_same_weight(same, w)
        assert torch.equal(same, w)
    assert_same_weight(pickle.loads(pickle.dumps(w)), w)
    new = torch.randn(5, 100).to(dtype)
    due = RTNQuantizedTensor.from_float(new, 4, 32, "search8")
    for fill in (lambda v: v.copy_(new), lambda v: v.copy_(due), lambda v: setattr(v, "data", new)):
        filled = w.clone()
        fill(filled)
        assert_same_weight(filled, due)
    for other in (torch.float32, torch.float16, BF16):
        moved = w.to(other)  # the numbers are those of before
        assert (moved.dtype, moved.scale.dtype) == (other, SCALE8)
        assert_same(moved.dequantize(torch.float32), w.dequantize(torch.float32))
    assert not torch.equal(w, due)
    w.mul_(0.5)
    assert torch.zeros_like(w).scale.dtype == SCALE8


def test_other_scales_are_another_format():
    w, other = weight(6, 64), RTNQuantizedTensor.from_float(torch.randn(6, 64), 4, 32, "search")
    for a, b in ((w, other), (other, w)):
        with pytest.raises(TypeError, match="the formats differ"):
            a.clone().copy_(b)
        with pytest.raises(TypeError, match="format and dtype must be the same"):
            torch.cat([a, b])


@every_dtype
def test_products(dtype):
    w, x = weight(5, 100, dtype=dtype), torch.randn(3, 100).to(dtype)
    exact = w.dequantize(torch.float64)
    torch.testing.assert_close(F.linear(x, w).double(), x.double() @ exact.t(), rtol=2**-7, atol=0.05)
    torch.testing.assert_close(F.embedding(torch.tensor([4, 0]), w), w.dequantize()[[4, 0]], rtol=0, atol=0)
    with pytest.raises(TypeError, match="x is torch.float64 but the weight is"):
        F.linear(x.double(), w)
    graph = torch.compile(lambda x: F.linear(x, w), fullgraph=True)
    torch.testing.assert_close(graph(x), F.linear(x, w))


@pytest.fixture
def model():
    return tiny_llama(dtype=BF16).eval()


def test_files(model, tmp_path):
    quantize_(model, rtn(4, 32, "search8"))
    save(model, tmp_path / "q")
    again = load(tmp_path / "q")
    name = "model.layers.0.mlp.down_proj.weight"
    assert_same_weight(again.get_parameter(name), model.get_parameter(name))
    _, about = flattened({"a.w": model.get_parameter(name)})
    assert "bfloat16" in str(json.loads(about["a.w"])["_data"]["float_dtype"])
    torch.save(model.state_dict(), tmp_path / "q.pt")
    again.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    assert_same_weight(again.get_parameter(name), model.get_parameter(name))


def test_a_damaged_scale_in_a_file(model, tmp_path):
    quantize_(model, rtn(4, 32, "search8"))
    model.model.layers[0].mlp.down_proj.weight.scale[0, 0] = 0x7F  # NaN
    save(model, tmp_path / "q")
    with pytest.raises(ValueError, match="down_proj.* holds NaN or inf"):
        load(tmp_path / "q")


def test_a_folder_is_quantized_as_the_model_is(model, tmp_path):
    model.save_pretrained(tmp_path / "float")
    config = rtn_int4(32, "search8")
    quantized = load(tmp_path / "float", config)
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    for name, w in quantized.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            assert_same_weight(w, model.get_parameter(name))


@pytest.mark.filterwarnings("ignore:the quantized model's next-token")  # its logits are near one-hot
def test_refined(model):
    reference = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    ids = torch.randint(0, 300, (8, 128), generator=torch.Generator().manual_seed(0))
    quantize_(plain, rtn(4, 32, "search8"))
    result = refine_(model, rtn(4, 32, "search8"), tokens=ids)
    w = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert (w.scale_method, w.scale.dtype, w.dtype) == ("search8", SCALE8, BF16)
    assert result.error < 0.9
    ours, theirs = (compare(m, reference, ids.flatten(), window=128).divergence for m in (model, plain))
    assert ours < theirs


@pytest.mark.filterwarnings("ignore:the quantized model's next-token")
def test_its_size_is_that_of_twice_the_group(model):
    planned = plan(model.float(), 8, options=[rtn(4, 32, "search8")], sequences=1, length=16)
    quantize_(model.bfloat16(), planned)
    rows = [row for row in report(model).rows if row.bits]
    weights = sum(torch.Size(row.shape).numel() for row in rows)
    assert planned.bits_per_weight == pytest.approx(8 * sum(row.bytes_after for row in rows) / weights)


def test_weights_that_are_too_large(model, tmp_path):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 40
    model.save_pretrained(tmp_path / "float")
    before = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    message = (
        "up_proj.weight.* has weights of up to 40, and the 8-bit scales of 'search8' are for weights of at "
    )
    with pytest.raises(ValueError, match=message + "most 28; use 'search' for it"):
        quantize_(model, rtn(4, 32, "search8"))
    assert model.get_parameter("model.layers.0.mlp.down_proj.weight") is before
    with pytest.raises(ValueError, match="weights of up to 40"):
        load(tmp_path / "float", rtn(4, 32, "search8"))


def test_planes_that_do_not_fit():
    w = weight(6, 64, dtype=BF16)
    with pytest.raises(ValueError, match="say nothing of the weight's dtype; give float_dtype"):
        RTNQuantizedTensor(w.qdata, w.scale, 4, 32, "search8", 64)
    with pytest.raises(TypeError, match="scale is torch.uint8"):
        RTNQuantizedTensor(w.qdata, w.scale, 4, 32, "search", 64, float_dtype=BF16)
    with pytest.raises(TypeError, match="it must be a strided tensor of torch.uint8"):
        RTNQuantizedTensor(w.qdata, widened(w.scale), 4, 32, "search8", 64, float_dtype=BF16)
    with pytest.raises(ValueError, match="came with version 2"):
        RTNQuantizedTensor(w.qdata, w.scale, 4, 32, "search8", 64, version=1, float_dtype=BF16)
