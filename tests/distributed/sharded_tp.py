"""Tensor parallelism of quantized models."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import Cases
from sharded_models import mlp, parallel, quantized, same, x_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rtn_tensor import RTNQuantizedTensor, dequantize_, quantize_, report, rtn_int4, rtn_int8

case = Cases(2, 3)


@case
def plans(ranks, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    x, expected = x_of(64, 2, 3), quantized(mlp())(x_of(64, 2, 3))
    for source in (None, 0):
        model = parallel(quantized(mlp()), mesh, src_data_rank=source)
        assert isinstance(model.down.weight.to_local(), RTNQuantizedTensor)
        same(model(x), expected)
        with torch.no_grad():
            same(model(x), expected)
        with torch.inference_mode():
            same(model(x), expected)
    gradients = []
    for m in (model, quantized(mlp())):
        inputs = x.clone().requires_grad_()
        m(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    same(*gradients)


@case
def zero_points_and_8_bit_scales(ranks, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    for method in ("minmax", "search8"):
        config = rtn_int4(32, method)
        x, expected = x_of(64), quantized(mlp(), config)(x_of(64))
        model = parallel(quantized(mlp(), config), mesh)
        same(model(x), expected)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for m, given in zip((model, quantized(mlp(), config)), inputs, strict=True):
            m(given).square().sum().backward()
        same(inputs[0].grad, inputs[1].grad)
        whole = model.up.weight.full_tensor()
        assert (whole.zero is not None) == (method == "minmax")


@case
def int8_activations(ranks, folder):
    config = rtn_int4(group_size=32, activations="int8")
    x, expected = x_of(64), quantized(mlp(), config)(x_of(64))
    same(parallel(quantized(mlp(), config), init_device_mesh("cpu", (ranks,)))(x), expected)
    assert (expected - quantized(mlp())(x)).abs().max() > 1e-4


@case
def plans_compiled(ranks, folder):
    torch._dynamo.reset()
    model = torch.compile(parallel(quantized(mlp()), init_device_mesh("cpu", (ranks,))), fullgraph=True)
    same(model(x_of(64)), quantized(mlp())(x_of(64)))


@case
def parts_made_by_hand(ranks, folder):
    mesh, rank = init_device_mesh("cpu", (ranks,)), dist.get_rank()
    whole = quantized(mlp())
    model = copy.deepcopy(whole)
    for layer, dim in ((model.up, 0), (model.down, 1)):
        part = layer.weight.detach().chunk(ranks, dim)[rank]
        layer.weight = nn.Parameter(DTensor.from_local(part, mesh, [Shard(dim)]), requires_grad=False)
    model.up.bias = nn.Parameter(distribute_tensor(model.up.bias.detach(), mesh, [Shard(0)]))
    model.down.bias = nn.Parameter(distribute_tensor(model.down.bias.detach(), mesh, [Replicate()]))
    y = model(DTensor.from_local(x_of(64), mesh, [Replicate()])).full_tensor()
    same(y, whole(x_of(64)))
    assert torch.equal(model.up.weight.full_tensor().qdata, whole.up.weight.qdata)
    assert torch.equal(model.down.weight.full_tensor().qdata, whole.down.weight.qdata)


@case
def cuts_inside_a_group(ranks, folder):
    model = quantized(mlp(48 * ranks), rtn_int4(group_size=96))
    message = (
        "down.weight: cannot slice columns 0:48; with bits=4 and group_size=96 cuts must be multiples of 96"
    )
    with pytest.raises(ValueError, match=message):
        parallel(model, init_device_mesh("cpu", (ranks,)))


@case
def quantized_after_sharding(ranks, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    expected, model = quantized(mlp()), parallel(mlp(), mesh)
    quantize_(model, rtn_int4(group_size=32))
    for got, w in ((model.up.weight, expected.up.weight), (model.down.weight, expected.down.weight)):
        assert torch.equal(got.full_tensor().qdata, w.qdata)
        assert torch.equal(got.full_tensor().scale, w.scale)
    same(model(x_of(64)), expected(x_of(64)))
    assert report(model).rows[2].note == "part of 64 x 192"
    dequantize_(model)
    assert isinstance(model.up.weight, DTensor)
    same(model(x_of(64)), expected(x_of(64)))
    # One scale per row: each rank's part has its own, so the numbers are others, and no worse.
    plain, model = mlp(), parallel(mlp(), mesh)
    quantize_(model, rtn_int8(group_size=-1))
    same(model(x_of(64)), plain(x_of(64)), 2e-2)


@case
def unfit_after_sharding(ranks, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    model = parallel(mlp(48 * ranks), mesh)
    message = "down.weight is cut into 48 columns per rank, inside a group of 32; use a group_size that divides 48, -1, or another"
    with pytest.raises(ValueError, match=message):
        quantize_(model, rtn_int4(group_size=32))
    # A NaN that one rank holds stops all of them.
    with torch.no_grad():
        if dist.get_rank() == ranks - 1:
            model.up.weight.to_local()[0, 0] = float("nan")
    before = model.up.weight
    with pytest.raises(ValueError, match="up.weight holds NaN or inf"):
        quantize_(model, rtn_int4(group_size=-1))
    assert model.up.weight is before
