"""FSDP2 of quantized models, and checkpoints of what it shards."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Cases
from sharded_models import layers, mlp, quantized, quantized_weights, same, sharded, x_of
from torch import nn
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rtn_tensor import (
    RTNQuantizedTensor,
    dequantize_,
    quantize_,
    report,
    rtn_int4,
    rtn_int8,
    set_activations_,
)

case = Cases(2, 3)

# Rows that every number of ranks divides, that none does, and fewer than there are ranks.
SIZES = [(64, 96, 48), (64, 97, 33, 5), (64, 32, 1)]


@case
def forward(ranks, folder):
    for sizes in SIZES:
        for config in (rtn_int4(32), rtn_int8(-1), rtn_int4(32, "minmax"), rtn_int4(32, "search8")):
            x, expected = x_of(64), quantized(layers(*sizes), config)(x_of(64))
            for options in (
                {},
                {"reshard_after_forward": False},
                {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
            ):
                model = sharded(quantized(layers(*sizes), config), **options)
                local = model[0].weight.to_local()
                assert isinstance(local, RTNQuantizedTensor)
                assert len(local) <= -(-sizes[1] // ranks)
                for _ in range(3):
                    same(model(x), expected)


@case
def mixed_precision(ranks, folder):
    model, plain = quantized(layers(64, 97, 48)), quantized(layers(64, 97, 48)).bfloat16()
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for _ in range(2):
        y = model(x_of(64))
        assert y.dtype == torch.bfloat16
        same(y.float(), plain(x_of(64).bfloat16()).float(), 1e-2)


@case
def scales_of_another_dtype(ranks, folder):
    """They are gathered as they are; of a MixedPrecisionPolicy's dtype is what the weight shows."""

    def apart(dtype):
        model = quantized(layers(64, 96, 48)).half()
        for layer in model[::2]:
            w = layer.weight
            about = w.bits, w.group_size, w.scale_method, w.in_features
            new = RTNQuantizedTensor(w.qdata, w.scale, *about, float_dtype=dtype)
            layer.weight = nn.Parameter(new, requires_grad=False)
            layer.bias.data = layer.bias.data.to(dtype)
        return model

    for dtype in (torch.float32, torch.bfloat16):
        x, expected = x_of(64).to(dtype), apart(dtype)(x_of(64).to(dtype))
        model = sharded(apart(dtype))
        assert model[0].weight.to_local().scale.dtype == torch.float16
        for _ in range(2):
            assert torch.equal(model(x), expected)
        dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/apart{dtype}")
    model = sharded(apart(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for _ in range(2):
        y = model(x_of(64))
        assert y.dtype == torch.bfloat16
        same(y.float(), apart(torch.bfloat16)(x_of(64).bfloat16()).float(), 1e-2)


@case
def int8_activations(ranks, folder):
    config = rtn_int4(group_size=32, activations="int8")
    x, expected = x_of(64), quantized(layers(64, 97, 48), config)(x_of(64))
    model = sharded(quantized(layers(64, 97, 48), config))
    same(model(x), expected)
    assert (expected - quantized(layers(64, 97, 48))(x)).abs().max() > 1e-4
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    other = sharded(quantized(layers(64, 97, 48), config))
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    same(other(x), expected)
    with pytest.raises(ValueError, match="do this before the first forward pass"):
        set_activations_(model, None)
    switched = sharded(quantized(layers(64, 97, 48)))
    set_activations_(switched, "int8")
    same(switched(x), expected)


@case
def wire(ranks, folder):
    """What is gathered of a weight of int4 with groups of 128: 0.26 of bf16, where the ranks divide the
    rows."""
    local = sharded(
        quantized(nn.Linear(1024, 48 * ranks, bias=False).bfloat16(), rtn_int4(128))
    ).weight.to_local()
    planes, _ = local.fsdp_pre_all_gather(DeviceMesh("cpu", list(range(ranks))))
    assert sum(plane.nbytes for plane in planes) <= 0.28 * 2 * 1024 * 48


@case
def adapters_below(ranks, folder):
    """Gradients of what lies below quantized layers, several steps: as without shards."""

    def trained(model, wrap):
        adapter = nn.Linear(64, 64)
        torch.manual_seed(3)
        nn.init.normal_(adapter.weight, std=0.1)
        nn.init.zeros_(adapter.bias)
        model = nn.Sequential(adapter, *model)
        before = [w.qdata.clone() for w in quantized_weights(model)]
        if wrap:
            sharded(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(4):
            loss = model(x_of(64, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, before, model

    plain, before, _ = trained(quantized(layers(64, 97, 32)), False)
    losses, _, model = trained(quantized(layers(64, 97, 32)), True)
    assert losses[-1] < losses[0]
    same(torch.tensor(losses), torch.tensor(plain))
    for w, q in zip(quantized_weights(model), before, strict=True):
        whole = w.full_tensor() if isinstance(w, DTensor) else w
        assert torch.equal(whole.qdata, q)


@case
def refresh(ranks, folder):
    """Fresh float weights into a live sharded model: no new memory, and the answers of a model quantized
    anew."""
    model = sharded(quantized(layers(64, 97, 48)))
    model(x_of(64))
    model.reshard()
    fresh = layers(64, 97, 48)
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(-1.5)
        for w, f in zip(model.parameters(), fresh.parameters(), strict=True):
            local = w.to_local()
            where = (local.qdata if isinstance(local, RTNQuantizedTensor) else local).data_ptr()
            local.copy_(f.chunk(ranks)[dist.get_rank()] if dist.get_rank() < len(f.chunk(ranks)) else f[:0])
            assert (local.qdata if isinstance(local, RTNQuantizedTensor) else local).data_ptr() == where
    same(model(x_of(64)), quantized(fresh)(x_of(64)))


@case
def meta_then_loaded(ranks, folder):
    """Made on meta, sharded, given memory, filled from a whole state dict."""
    whole = quantized(layers(64, 97, 48))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 97), nn.GELU(), nn.Linear(97, 48), nn.GELU())
    sharded(quantized(model)).to_empty(device="cpu")
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
    same(model(x_of(64)), whole(x_of(64)))


@case
def gathered(ranks, folder):
    whole = quantized(layers(64, 97, 48))
    state = get_model_state_dict(
        sharded(copy.deepcopy(whole)), options=StateDictOptions(full_state_dict=True)
    )
    if dist.get_rank() == 0:
        assert state.keys() == whole.state_dict().keys()
    for name, w in state.items():
        expected = whole.state_dict()[name]
        if isinstance(expected, RTNQuantizedTensor):
            assert torch.equal(w.qdata, expected.qdata)
            assert torch.equal(w.scale, expected.scale)


@case
def gathered_in_turn(ranks, folder):
    """One plane at a time: gloo corrupts the heap where two are gathered at once. And none is left that
    nobody waited for."""
    gather, in_flight, before = (
        torch.ops._c10d_functional.all_gather_into_tensor.default,
        [],
        _get_work_registry_size(),
    )

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if RTNQuantizedTensor in types:
                with self:
                    return RTNQuantizedTensor.__torch_dispatch__(func, types, args, kwargs)
            if func is gather:
                in_flight.append(_get_work_registry_size() - before)
            return func(*args, **(kwargs or {}))

    w = sharded(quantized(layers(64, 97, 48)))[0].weight
    with Watch():
        whole = w.full_tensor()
    assert in_flight == [0, 0]
    assert _get_work_registry_size() == before
    assert [type(whole.qdata), type(whole.scale)] == [torch.Tensor, torch.Tensor]


@case
def checkpointed(ranks, folder):
    whole = quantized(layers(64, 97, 48))
    model = sharded(copy.deepcopy(whole))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/dcp")
    same(loaded(sharded(quantized(layers(64, 97, 48))), f"{folder}/dcp")(x_of(64)), whole(x_of(64)))


def loaded(model, folder, group=None):
    """`model`, its weights zeroed and then read from the distributed checkpoint in `folder`."""
    with torch.no_grad():
        for w in model.parameters():
            local = w.to_local()
            (local.qdata if isinstance(local, RTNQuantizedTensor) else local).zero_()
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_model_state_dict(model, state["model"])
    return model


@case
def other_numbers_of_ranks(ranks, folder):
    """A checkpoint of all ranks, read by all but one; and the other way round."""
    whole = quantized(layers(64, 97, 48))
    fewer = DeviceMesh("cpu", list(range(ranks - 1)))
    takes_part = dist.get_rank() < ranks - 1
    dcp.save({"model": get_model_state_dict(sharded(copy.deepcopy(whole)))}, checkpoint_id=f"{folder}/all")
    if takes_part:
        model = loaded(sharded(quantized(layers(64, 97, 48)), mesh=fewer), f"{folder}/all", fewer.get_group())
        same(model(x_of(64)), whole(x_of(64)))
        state = {"model": get_model_state_dict(sharded(copy.deepcopy(whole), mesh=fewer))}
        dcp.save(state, checkpoint_id=f"{folder}/fewer", process_group=fewer.get_group())
    dist.barrier()
    same(loaded(sharded(quantized(layers(64, 97, 48))), f"{folder}/fewer")(x_of(64)), whole(x_of(64)))


@case
def broadcast_from_rank0(ranks, folder):
    """torch's other ranks would wait for a float tensor."""
    whole = quantized(layers(64, 97, 48))
    model = sharded(copy.deepcopy(whole))
    if dist.get_rank() == 0:
        with pytest.raises(
            NotImplementedError, match="cannot send an RTNQuantizedTensor: .* use rtn_tensor.load_from_rank0"
        ):
            set_model_state_dict(
                model,
                whole.state_dict(),
                options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
            )
    else:
        dist.broadcast_object_list([None], src=0)  # what comes before


@case
def nested_and_prefetched(ranks, folder):
    def block():
        return nn.Sequential(mlp(), nn.LayerNorm(64), mlp(97))

    x = x_of(64, 5)
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), *(quantized(block()) for _ in range(3)))
        if wrap:
            for b in model[1:]:
                fully_shard(b[0].up)
                fully_shard(b[0])
                fully_shard(b)
            fully_shard(model)
            model[1].set_modules_to_forward_prefetch([model[2], model[3]])
            model[3].set_modules_to_backward_prefetch([model[2], model[1]])
        for _ in range(2):
            inputs = x.clone().requires_grad_()
            y = model(inputs)
            y.square().mean().backward()
        results.append((y, inputs.grad))
    for got, expected in zip(*results, strict=True):
        same(got, expected)


@case
def after_sharding(ranks, folder):
    with pytest.raises(ValueError, match="the model is sharded by fully_shard, .* quantize_ it first"):
        quantize_(sharded(layers(64, 97, 48)), rtn_int4(group_size=32))
    model = sharded(quantized(layers(64, 97, 48)))
    rows = report(model).rows
    assert sum(row.bytes_after for row in rows) < report(quantized(layers(64, 97, 48))).bytes_after
    assert rows[0].bits == 4
    assert rows[0].note == "part of 97 x 64"
    dequantize_(model)
    same(model(x_of(64)), quantized(layers(64, 97, 48))(x_of(64)))
    with pytest.raises(
        ValueError,
        match="the model has run under fully_shard, which keeps its parameters; do this before the first",
    ):
        dequantize_(model)
