"""Models that the sharded_* cases share."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn_int4


class MLP(nn.Module):
    def __init__(self, width=64, inner=128):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def layers(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(
        *(layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.GELU()))
    )


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
    assert (got - expected).abs().max() <= tolerance * max(1, expected.abs().max()), (
        (got - expected).abs().max()
    )


PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def parallel(model, mesh, **options):
    return parallelize_module(model, mesh, {name: style() for name, style in PLAN.items()}, **options)


def mlp(inner=192):
    torch.manual_seed(0)
    return MLP(inner=inner)


def quantized_weights(model):
    return [
        w
        for w in model.parameters()
        if isinstance(w.to_local() if isinstance(w, DTensor) else w, RTNQuantizedTensor)
    ]
