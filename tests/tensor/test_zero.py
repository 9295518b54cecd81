"""Weights with zero points: their third plane goes wherever the scale goes."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import assert_same, every_dtype, every_width, gaussian, message, requantized
from test_copies import GATHERS
from test_views import VIEWS, VIEWS_3D, check_view
from torch import nn
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from rtn_tensor import RTNQuantizedTensor, load, ops, quantize_, rtn, rtn_int4, save
from rtn_tensor.checkpoint.sources import flattened


def skewed(*shape, bits=4, group_size=32, **kwargs):
    """A weight with zero points, none of which is like its neighbours."""
    w = torch.randn(shape) + torch.randn(*shape[:-1], 1)
    return RTNQuantizedTensor.from_float(w, bits, group_size, "minmax", **kwargs)


def assert_same_weight(a, b):
    """Of the same planes and attributes."""
    assert a.planes.keys() == b.planes.keys()
    for name, plane in a.planes.items():
        assert_same(plane, b.planes[name])
    assert [getattr(a, name) for name in a.tensor_attribute_names] == [
        getattr(b, name) for name in b.tensor_attribute_names
    ]


@every_width
def test_what_it_holds(bits):
    w = skewed(6, 300, bits=bits)
    assert (w.zero.shape, w.zero.dtype, w.version) == (w.scale.shape, torch.int8, 2)
    assert len(w.zero.unique()) > 6
    assert w.nbytes == w.qdata.nbytes + w.scale.nbytes + w.zero.nbytes
    assert w.element_size() == w.nbytes / w.numel()
    symmetric = gaussian(6, 300, bits=bits)
    assert symmetric.zero is None
    assert symmetric.version == 1
    assert not {"zero", "zero_point"} & {*vars(symmetric)}


@pytest.mark.parametrize("inference", [False, True])
@every_width
@pytest.mark.parametrize("view", VIEWS)
def test_view(view, bits, inference):
    w = skewed(6, 300, bits=bits)
    with torch.inference_mode(inference):
        check_view(w, VIEWS[view])


@every_width
@pytest.mark.parametrize("view", VIEWS_3D)
def test_view_3d(view, bits):
    check_view(skewed(3, 4, 100, bits=bits, dtype=torch.bfloat16), VIEWS_3D[view])


@every_width
def test_one_group_per_row_shares_its_zero_point(bits):
    w = skewed(3, 100, bits=bits, group_size=-1)
    part = w[:, 32:64]
    assert part.zero.data_ptr() == w.zero.data_ptr()
    assert_same(part.dequantize(), w.dequantize()[:, 32:64])
    with pytest.raises(ValueError, match="its other columns share the scale"):
        part.copy_(torch.randn(3, 32))


@pytest.mark.parametrize("view", ["rows", "columns-end", "t", "select", "unsqueeze", "rows-step"])
def test_a_view_writes_and_reads_through(view):
    w = skewed(6, 300)
    v = VIEWS[view](w)
    assert v.zero.untyped_storage().data_ptr() == w.zero.untyped_storage().data_ptr()
    w.copy_(torch.randn(6, 300) + 1)
    assert_same(v.dequantize(), VIEWS[view](w.dequantize()))


@every_width
@pytest.mark.parametrize("gather", GATHERS)
def test_gather(gather, bits):
    w = skewed(6, 300, bits=bits)
    assert_same(GATHERS[gather](w).dequantize(), GATHERS[gather](w.dequantize()))


def test_it_joins_none_without_zero_points():
    w, other = skewed(6, 64), gaussian(6, 64)
    for join in (torch.cat, torch.stack):
        with pytest.raises(TypeError, match="format and dtype must be the same"):
            join([w, other])
    with pytest.raises(TypeError, match="the formats differ"):
        w.copy_(other)
    with pytest.raises(TypeError, match="the formats differ"):
        other.copy_(w)
    assert not torch.equal(w, other)


@every_width
@every_dtype
def test_copies_and_changes(bits, dtype):
    w = skewed(5, 100, bits=bits, dtype=dtype)
    dense = w.dequantize()
    for same in (w.clone(), w.detach(), copy.copy(w), copy.deepcopy(w), w.contiguous(), w.to("cpu"), w.data):
        assert_same_weight(same, w)
        assert torch.equal(same, w)
    new = torch.randn(5, 100).to(dtype) + 2
    for fill in (lambda v: v.copy_(new), lambda v: setattr(v, "data", new)):
        filled = w.clone()
        fill(filled)
        assert_same_weight(filled, requantized(w, new))
    assert_same_weight(torch.empty_like(w).copy_(w), w)
    assert_same(torch.zeros_like(w).dequantize(), torch.zeros_like(dense))
    assert torch.zeros_like(w).zero.shape == w.zero.shape
    assert_same(w.clone().mul_(2.0).dequantize(), dense * 2)
    assert_same_weight(w.clone().add_(torch.zeros(5, 100, dtype=dtype)), w)
    added = w.clone()
    added[2].add_(1.0)
    assert_same_weight(added[:2], w[:2])
    assert_same_weight(added[2:3], requantized(w, dense[2:3] + 1))
    other = w.to(torch.float32)
    assert other.scale.dtype == torch.float32
    assert torch.equal(other.zero, w.zero)
    transposed = w.t().clone()
    transposed.copy_(new.t())
    assert_same_weight(transposed.t(), requantized(w, new))


def test_rows_that_stay_keep_their_bits():
    """As resize_token_embeddings asks."""
    w = skewed(5, 64)
    grown = w.clone()
    grown.data = torch.cat([w.dequantize(), torch.randn(2, 64)])
    assert grown.zero.shape == (7, 2)
    assert_same_weight(grown[:5], w)


def test_data_may_lose_its_zero_points():
    w, symmetric = skewed(5, 64), gaussian(5, 64)
    x = torch.randn(3, 64)
    w.data = symmetric
    assert w.zero is None
    assert "zero" not in repr(w.__reduce_ex__(2))
    assert_same(F.linear(x, w), F.linear(x, symmetric))
    w.data = skewed(5, 64)
    assert w.zero is not None
    w.requires_grad_(False)
    assert_same(F.linear(x, w), ops.linear(x, w.qdata, w.scale, None, 4, 32, w.zero))


@pytest.mark.parametrize("group_size", [32, -1])
@every_width
def test_products(bits, group_size):
    """In each of the forms that reach an op: the zero points come along."""
    w = skewed(6, 100, bits=bits, group_size=group_size)
    experts = skewed(3, 6, 100, bits=bits, group_size=group_size)
    dense, dense_experts = w.dequantize(), experts.dequantize()
    x, y, bias = torch.randn(4, 100), torch.randn(4, 6), torch.randn(6)
    offs = torch.tensor([1, 3, 4], dtype=torch.int32)
    index = torch.tensor([[5, 0], [2, 2]])
    for fn in (
        lambda w, e: F.linear(x, w, bias),
        lambda w, e: x @ w.t(),
        lambda w, e: y @ w,
        lambda w, e: torch.addmm(bias, x, w.t()),
        lambda w, e: w @ x.t(),
        lambda w, e: torch.bmm(x[:3, None], e.mT),
        lambda w, e: F.embedding(index, w),
        lambda w, e: F.linear(x, w[1:4]),
        lambda w, e: F.linear(x, e[1]),
    ):
        torch.testing.assert_close(fn(w, experts), fn(dense, dense_experts), rtol=1e-4, atol=1e-4)
    got = torch.ops.rtn.grouped(x, experts.qdata, experts.scale, offs, bits, group_size, experts.zero)
    rows = [x[:1] @ dense_experts[0].t(), x[1:3] @ dense_experts[1].t(), x[3:] @ dense_experts[2].t()]
    torch.testing.assert_close(got, torch.cat(rows), rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(F.linear(x, w).sum(), x)
    torch.testing.assert_close(grad, dense.sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)


def test_compiled_functions_take_it():
    w, symmetric = skewed(6, 64), gaussian(6, 64)
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x, w: F.linear(x, w[1:]) + 1, fullgraph=True, backend="aot_eager")
    for weight in (w, symmetric, w):
        assert_same(compiled(x, weight), F.linear(x, weight[1:]) + 1)
    # What a graph makes of a float weight, too.
    fill = torch.compile(lambda w, new: w.copy_(new), fullgraph=True, backend="aot_eager")
    new = torch.randn(6, 64) + 1
    fill(w, new)
    assert_same_weight(w, requantized(w, new))
    names, _ = w.__tensor_flatten__()
    assert names == ["qdata", "scale", "zero"]
    assert symmetric.__tensor_flatten__()[0] == ["qdata", "scale"]


def test_exported_programs_take_it():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(skewed(6, 64), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight)

    layer, x = Layer(), torch.randn(3, 64)
    program = torch.export.export(layer, (x,))
    assert_same(program.module()(x), layer(x))


# -------------------------------------------------------------------------------- in files


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 7), nn.Linear(7, 7))


def asymmetric_model():
    made = model()
    rules = [("0.weight", rtn(4, 32, "minmax")), ("1.weight", rtn_int4(32))]
    quantize_(made, rules)
    return made


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    w = skewed(5, 100)
    assert_same_weight(pickle.loads(pickle.dumps(w, protocol)), w)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_save(tmp_path, mmap):
    w = skewed(5, 100)
    torch.save({"w": w}, tmp_path / "w.pt")
    assert_same_weight(torch.load(tmp_path / "w.pt", weights_only=True, mmap=mmap)["w"], w)


def test_a_symmetric_weight_is_pickled_as_ever():
    state = gaussian(5, 64).__reduce_ex__(2)
    assert "zero" not in repr(state)


def test_a_pickle_without_its_zero_points():
    w = skewed(5, 64)
    state = dict(vars(w))
    del state["zero"]
    with pytest.raises(ValueError, match="scale_method='minmax' makes a plane zero, and there is none"):
        copy.copy(w).__setstate__(state)
    state["zero"], state["version"] = w.zero, 1
    with pytest.raises(ValueError, match="version=1 of the format has no plane zero; it came with version 2"):
        copy.copy(w).__setstate__(state)


def test_save_and_load(tmp_path):
    made, x = asymmetric_model(), torch.randn(3, 64)
    save(made, tmp_path / "folder")
    read = load(tmp_path / "folder", model=model)
    assert_same_weight(read[0].weight, made[0].weight)
    assert_same(read(x), made(x))
    fresh = asymmetric_model()
    fresh.load_state_dict(made.state_dict())
    assert_same_weight(fresh[0].weight, made[0].weight)


def test_both_writers_of_safetensors_write_the_same():
    state = {"a.weight": skewed(5, 64), "b.weight": gaussian(5, 64)}
    mine, about = flattened(state)
    theirs, their_about = flatten_tensor_state_dict(state)
    assert mine.keys() == theirs.keys()
    assert "a._weight_zero_point" in mine
    assert "b._weight_zero_point" not in mine
    for name, t in mine.items():
        assert_same(t, theirs[name])
    for name in state:
        one, other = (json.loads(metadata[name]) for metadata in (about, their_about))
        assert one["_data"] == other["_data"]
        assert {*one["_tensor_data_names"]} == {*other["_tensor_data_names"]}
    assert json.loads(about["a.weight"])["_data"]["version"] == 2
    assert json.loads(about["b.weight"])["_data"]["version"] == 1
    read, left = unflatten_tensor_state_dict(mine, about)
    assert not left
    for name, w in state.items():
        assert_same_weight(read[name], w)


def test_errors():
    w = skewed(5, 64)
    planes = {"qdata": w.qdata, "scale": w.scale}
    arguments = {"bits": 4, "group_size": 32, "scale_method": "minmax", "in_features": 64}
    assert "makes a plane zero, and there is none" in message(
        ValueError, lambda: RTNQuantizedTensor(**planes, **arguments)
    )
    symmetric = arguments | {"scale_method": "absmax"}
    assert "makes no plane zero, and there is one" in message(
        ValueError, lambda: RTNQuantizedTensor(**planes, zero=w.zero, **symmetric)
    )
    for zero, kind, what in (
        (w.zero.int(), TypeError, "zero is torch.int32"),
        (w.zero[:, :1], ValueError, "zero is of shape (5, 1) and scale of shape (5, 2)"),
        (w.zero[0], ValueError, "zero is of shape (2,) and scale of shape (5, 2)"),
        (w.zero.to("meta"), ValueError, "qdata is on cpu and zero on meta"),
        (8, TypeError, "zero is an int; it must be a tensor"),
    ):
        error = message(kind, lambda zero=zero: RTNQuantizedTensor(**planes, zero=zero, **arguments))
        assert what in error, error


def test_ops_check_it():
    w, x = skewed(5, 64), torch.randn(3, 64)
    for zero in (w.zero.int(), w.zero[:, :1], w.zero.to("meta")):
        for door in (ops.linear, torch.ops.rtn.linear):
            with pytest.raises(RuntimeError, match="rtn::linear: zero is torch.int.*it must be int8"):
                door(x, w.qdata, w.scale, None, 4, 32, zero)
