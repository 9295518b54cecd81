"""FSDP2 over tensor parallelism."""

import torch
import torch.distributed as dist
from ranks import Cases
from sharded_models import mlp, parallel, quantized, quantized_weights, same, x_of
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rtn_tensor import load, load_from_rank0, save

case = Cases(4)


def both(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallel(model, mesh["tp"])
    return fully_shard(model, mesh=mesh["dp"])


@case
def forward_and_backward(ranks, folder):
    x = x_of(64, 4)
    whole, model = quantized(mlp()), both(quantized(mlp()))
    assert len(quantized_weights(model)) == 2
    assert model.up.weight.to_local().shape == (48, 64)
    assert model.down.weight.to_local().shape == (32, 96)
    for _ in range(3):
        gradients = []
        for m in (model, whole):
            inputs = x.clone().requires_grad_()
            y = m(inputs)
            y.square().sum().backward()
            gradients.append(inputs.grad)
        same(y, whole(x))
        same(*gradients)


@case
def trained(ranks, folder):
    """A float layer below: gradients reach it through the sharded, quantized ones, and the ranks agree on
    it."""
    losses = []
    for wrap in (both, lambda model: model):
        torch.manual_seed(0)
        below, model = nn.Linear(64, 64), wrap(quantized(mlp()))
        optimizer = torch.optim.SGD(below.parameters(), lr=0.3)
        for _ in range(4):
            loss = model(below(x_of(64, 4))).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    same(*losses)


@case
def whole_state_dict_and_load(ranks, folder):
    whole = quantized(mlp())
    state = get_model_state_dict(both(quantized(mlp())), options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        for name in ("up.weight", "down.weight"):
            assert torch.equal(state[name].qdata, whole.get_parameter(name).qdata)
            assert torch.equal(state[name].scale, whole.get_parameter(name).scale)
        save(whole, f"{folder}/whole")
    dist.barrier()
    model = load(f"{folder}/whole", model=both(quantized(mlp().to("meta"))))
    same(model(x_of(64)), whole(x_of(64)))
    for source in (whole, mlp()):
        model = both(quantized(mlp().to("meta")))
        load_from_rank0(model, source.state_dict() if dist.get_rank() == 0 else None)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            for name in ("up.weight", "down.weight"):
                assert torch.equal(state[name].qdata, whole.get_parameter(name).qdata)
                assert torch.equal(state[name].scale, whole.get_parameter(name).scale)
        same(model(x_of(64)), whole(x_of(64)))
