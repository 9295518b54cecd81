"""What test_distributed runs on several gloo ranks: one set of processes a number of ranks, every case in it."""

import copy
import tempfile
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn_int4, rtn_int8

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def run(rank, ranks, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    failed = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            function(ranks, folder)
        except Exception:
            failed[name] = traceback.format_exc()
        # A case that failed on one rank, and hangs on others in its next collective, ends all.
        found = [None] * ranks
        dist.all_gather_object(found, failed.get(name))
        for error in filter(None, found):
            failed[name] = error
    if rank == 0:
        results.put(failed)
    dist.destroy_process_group()


def run_all(ranks):
    """{case: traceback} of those that failed on any rank."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        results = context.SimpleQueue()
        mp.start_processes(run, (ranks, folder, results), nprocs=ranks, start_method="spawn")
        return results.get()


# ------------------------------------------------------------------------------------------- models


class MLP(nn.Module):
    def __init__(self, width=64, inner=128):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def layers(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.GELU())))


def quantized(model, config=None):
    quantize_(model, config or rtn_int4(group_size=32))
    return model


def sharded(model, **options):
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def x_of(width, *rows):
    return torch.randn(*(rows or (3,)), width, generator=torch.Generator().manual_seed(1))


def same(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1, expected.abs().max()), (got - expected).abs().max()


# ------------------------------------------------------------------------------------------- FSDP2


# Rows that every number of ranks divides, that none does, and fewer than there are ranks.
SIZES = [(64, 96, 48), (64, 97, 33, 5), (64, 32, 1)]


@case
def forward(ranks, folder):
    for sizes in SIZES:
        for config in (rtn_int4(group_size=32), rtn_int8(group_size=-1)):
            x, expected = x_of(64), quantized(layers(*sizes), config)(x_of(64))
            for options in ({}, {"reshard_after_forward": False}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
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
def wire(ranks, folder):
    """What is gathered of a weight of int4 with groups of 128: 0.26 of bf16, where the ranks divide the rows."""
    local = sharded(quantized(nn.Linear(1024, 48 * ranks, bias=False).bfloat16(), rtn_int4(128))).weight.to_local()
    planes, _ = local.fsdp_pre_all_gather(None)
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


def quantized_weights(model):
    return [w for w in model.parameters() if isinstance(w.to_local() if isinstance(w, DTensor) else w, RTNQuantizedTensor)]


@case
def refresh(ranks, folder):
    """Fresh float weights into a live sharded model: no new memory, and the answers of a model quantized anew."""
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
    state = get_model_state_dict(sharded(copy.deepcopy(whole)), options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert state.keys() == whole.state_dict().keys()
    for name, w in state.items():
        expected = whole.state_dict()[name]
        if isinstance(expected, RTNQuantizedTensor):
            assert torch.equal(w.qdata, expected.qdata)
            assert torch.equal(w.scale, expected.scale)


@case
def checkpointed(ranks, folder):
    whole = quantized(layers(64, 97, 48))
    model = sharded(copy.deepcopy(whole))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/dcp")
    other = sharded(quantized(layers(64, 97, 48)))
    with torch.no_grad():
        for w in other.parameters():
            local = w.to_local()
            (local.qdata if isinstance(local, RTNQuantizedTensor) else local).zero_()
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    set_model_state_dict(other, state["model"])
    same(other(x_of(64)), whole(x_of(64)))


# ------------------------------------------------------------------------------------------- tensor parallel


PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def parallel(model, mesh, **options):
    return parallelize_module(model, mesh, {name: style() for name, style in PLAN.items()}, **options)


def mlp():
    torch.manual_seed(0)
    return MLP(inner=192)


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
    torch.manual_seed(0)
    model = quantized(MLP(inner=48 * ranks), rtn_int4(group_size=96))
    message = "down.weight: cannot slice columns 0:48; with bits=4 and group_size=96 cuts must be multiples of 96"
    with pytest.raises(ValueError, match=message):
        parallel(model, init_device_mesh("cpu", (ranks,)))
