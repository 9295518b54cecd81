"""Weights whose scales have another dtype than the tensor, as float16 scales of GPTQ's in a bfloat16 model."""

import copy
import io
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, report, save

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def apart(n=48, k=96, bits=4, group_size=32, dtype=BF16, scale_dtype=F16, lead=()):
    w = RTNQuantizedTensor.from_float(torch.randn(*lead, n, k), bits, group_size, dtype=scale_dtype)
    return RTNQuantizedTensor(
        w.qdata, w.scale, bits, group_size, w.scale_method, w.in_features, float_dtype=dtype
    )


def same(a, b):
    assert (a.dtype, a.float_dtype, a.version, a.shape) == (b.dtype, b.float_dtype, b.version, b.shape)
    assert a.scale.dtype == b.scale.dtype
    assert torch.equal(a.qdata, b.qdata)
    assert torch.equal(a.scale, b.scale)


DTYPES = [pair for pair in itertools.product((F16, BF16, F32), repeat=2) if pair[0] != pair[1]]


@pytest.mark.parametrize(("dtype", "scale_dtype"), DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_it_multiplies_with_the_scales_that_it_has(dtype, scale_dtype, bits):
    w = apart(bits=bits, dtype=dtype, scale_dtype=scale_dtype)
    assert (w.dtype, w.scale.dtype, w.version) == (dtype, scale_dtype, 2)
    x = torch.randn(3, 96, dtype=dtype)
    exact = RTNQuantizedTensor(w.qdata, w.scale, bits, 32, w.scale_method, 96).dequantize(F32)
    y = nn.functional.linear(x, w)
    assert y.dtype == dtype
    u = torch.finfo(dtype).eps
    bound = (x.float().abs() @ exact.abs().t()) * u * 2
    assert ((y.float() - x.float() @ exact.t()).abs() <= bound).all()
    assert torch.equal(w.dequantize(), exact.to(dtype))
    assert torch.equal(w.dequantize(F32), exact)
    for other in {F16, BF16, F32} - {dtype}:
        with pytest.raises(TypeError, match=f"x is {other} but the weight is {dtype}"):
            nn.functional.linear(x.to(other), w)


def test_views_and_copies():
    w = apart(lead=(3,))
    for view in (w[1], w[:, 8:24], w[..., 32:], w.mT, w.mT.mT, w.clone(), w.detach(), copy.deepcopy(w)):
        assert (view.dtype, view.scale.dtype, view.float_dtype) == (BF16, F16, BF16)
    assert torch.equal(w[1, :4].dequantize(), w.dequantize()[1, :4])
    assert torch.equal(w.mT.dequantize(), w.dequantize().mT)
    joined = torch.cat([w[0], w[1]])
    assert (joined.dtype, joined.scale.dtype) == (BF16, F16)
    assert torch.equal(joined.dequantize(), torch.cat([w[0].dequantize(), w[1].dequantize()]))
    for empty in (torch.empty_like(w), w.new_empty(2, 5, 96), torch.zeros_like(w)):
        assert (empty.dtype, empty.scale.dtype) == (BF16, F16)
    with pytest.raises((TypeError, ValueError)):
        torch.cat([w[0], RTNQuantizedTensor.from_float(torch.randn(48, 96), 4, 32, dtype=F16)])
    assert not torch.equal(w, RTNQuantizedTensor(w.qdata, w.scale, 4, 32, w.scale_method, 96))
    assert torch.equal(w, w.clone())
    p = nn.Parameter(w, requires_grad=False)
    assert (p.dtype, p.scale.dtype, p.float_dtype) == (BF16, F16, BF16)


def test_conversions_keep_the_scales():
    w = apart()
    for dtype in (F32, BF16, F16):
        other = w.to(dtype)
        assert other.dtype == dtype
        assert torch.equal(other.scale, w.scale)
        assert other.scale.dtype == F16
        assert other.float_dtype == (None if dtype == F16 else dtype)
        assert other.version == (1 if dtype == F16 else 2)
    layer = nn.Linear(96, 48, bias=False)
    layer.weight = nn.Parameter(w, requires_grad=False)
    layer.to(F32)
    assert (layer.weight.dtype, layer.weight.scale.dtype) == (F32, F16)
    assert layer(torch.randn(2, 96)).dtype == F32
    with pytest.raises(TypeError, match="not supported"):
        w.to(torch.float64)


def test_what_is_copied_into_it_is_quantized_with_scales_of_its_own():
    w, new = apart(), torch.randn(48, 96, dtype=BF16)
    w.copy_(new)
    due = RTNQuantizedTensor.from_float(new, 4, 32, w.scale_method, dtype=F16)
    assert torch.equal(w.qdata, due.qdata)
    assert torch.equal(w.scale, due.scale)
    other = apart()
    w.copy_(other)
    same(w, other)
    w += torch.ones(48, 96, dtype=BF16)
    assert (w.dtype, w.scale.dtype) == (BF16, F16)


@pytest.mark.parametrize("rows", [4, 48, 50])
def test_rows_that_stay_keep_their_bits_when_data_is_set(rows):
    """As `resize_token_embeddings` sets it."""
    w = apart()
    p = nn.Parameter(w.clone(), requires_grad=False)
    more = torch.randn(2, 96, dtype=BF16)
    p.data = torch.cat([w.dequantize(), more])[:rows]
    assert (p.dtype, p.scale.dtype, p.shape) == (BF16, F16, (rows, 96))
    if rows != 48:
        assert torch.equal(p.dequantize()[:48], w.dequantize()[:rows])
    p.data = nn.Parameter(torch.randn(rows, 96, dtype=BF16)) * 2
    assert (p.requires_grad, p.grad_fn, p.scale.dtype) == (False, None, F16)


def test_embedding():
    layer = nn.Embedding(48, 96)
    layer.weight = nn.Parameter(apart(), requires_grad=False)
    ids = torch.tensor([[3, 0], [47, 3]])
    assert torch.equal(layer(ids), layer.weight.dequantize()[ids])
    assert layer(ids).dtype == BF16
    for wrong in (48, -1):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([wrong]))


def test_gradients_reach_the_input():
    w, x = apart(dtype=F32), torch.randn(3, 96, requires_grad=True)
    nn.functional.linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.dequantize().sum(0).expand(3, -1))


def test_compiled():
    layer = nn.Linear(96, 48, bias=False)
    layer.weight = nn.Parameter(apart(), requires_grad=False)
    x = torch.randn(3, 96, dtype=BF16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    layer.to(F32)
    assert compiled(x.float()).dtype == F32


@pytest.mark.parametrize("weights_only", [True, False])
def test_pickles(weights_only):
    w = apart()
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    same(torch.load(file, weights_only=weights_only), w)


def test_files(tmp_path):
    """Version 2 of the format, and a line more; what shows its scales' dtype is written as before."""
    model = nn.Sequential(nn.Linear(96, 48, bias=False), nn.Linear(48, 96, bias=False))
    model[0].weight = nn.Parameter(apart(), requires_grad=False)
    model[1].weight = nn.Parameter(apart(96, 48, dtype=F16), requires_grad=False)
    save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        about = [json.loads(opened.metadata()[f"{i}.weight"])["_data"] for i in (0, 1)]
    assert [(a["version"], a.get("float_dtype")) for a in about] == [
        (2, {"_type": "torch.dtype", "_data": "bfloat16"}),
        (1, None),
    ]
    assert "float_dtype" not in about[1]
    made = nn.Sequential(nn.Linear(96, 48, bias=False, dtype=BF16), nn.Linear(48, 96, bias=False, dtype=F16))
    again = load(tmp_path / "out", model=made)
    for i in (0, 1):
        same(again[i].weight, model[i].weight)
    assert report(again).rows[0].bits == 4
    dequantize_(again)
    assert again[0].weight.dtype == BF16


@pytest.mark.parametrize("value", ["float64", "bfloat17", 3, ["bfloat16"], {"a": 1}])
def test_dtypes_that_are_none(value):
    w = apart()
    with pytest.raises(ValueError, match="float_dtype=.* is not supported; use torch.float32"):
        RTNQuantizedTensor(w.qdata, w.scale, 4, 32, "absmax", 96, float_dtype=value)
    with pytest.raises(ValueError, match="version=1 of the format has no dtype but that of the scale"):
        RTNQuantizedTensor(w.qdata, w.scale, 4, 32, "absmax", 96, version=1, float_dtype=BF16)


def test_of_experts():
    w = apart(lead=(2,), dtype=BF16)
    x = torch.randn(2, 3, 96, dtype=BF16)
    y = torch.bmm(x, w.mT)
    assert y.dtype == BF16
    torch.testing.assert_close(y, torch.bmm(x, w.dequantize().mT), rtol=0.02, atol=0.1)


def test_torchao_writes_and_reads_the_same():
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
        unflatten_tensor_state_dict,
    )

    from rtn_tensor.checkpoint.sources import flattened

    state = {"0.weight": apart(), "1.weight": apart(dtype=F16)}
    flat, about = flattened(state)
    theirs, their_about = flatten_tensor_state_dict(state)
    for name, w in state.items():
        one, other = (json.loads(metadata[name]) for metadata in (about, their_about))
        assert one["_data"] == other["_data"]
        same(unflatten_tensor_state_dict(flat, about)[0][name], w)
    assert set(flat) == set(theirs)
