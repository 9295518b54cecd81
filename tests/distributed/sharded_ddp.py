"""What test_distributed runs of DistributedDataParallel."""

import os
from unittest.mock import patch

import accelerate
import torch
import torch.distributed as dist
from ranks import Cases
from sharded_models import MLP, layers, quantized, same, x_of
from sharded_training import IDS, adapters_of, assert_untouched, planes, tiny_qlora, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn

case = Cases(2)

WAYS = (
    {},
    {"broadcast_buffers": False},
    {"init_sync": False},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
)


@case
def qlora(ranks, folder):
    """Each rank learns from its own rows as one process does from all of them, and the base keeps its
    bits."""
    alone = tiny_qlora(4)
    expected = torch.tensor(train(alone, [IDS] * 4))
    for options in WAYS:
        model = tiny_qlora(4)
        before = planes(model)
        mine = torch.tensor(
            train(DistributedDataParallel(model, **options), [IDS.chunk(ranks)[dist.get_rank()]] * 4)
        )
        dist.all_reduce(mine)
        same(mine / ranks, expected)
        assert_untouched(model, before)
        for name, p in adapters_of(model).items():
            same(p, adapters_of(alone)[name], 1e-4)


class Mixed(nn.Module):
    """Formats, dtypes, a transposed weight, experts, a plain weight and a buffer, of which every rank has
    others."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.int4 = quantized(layers(100, 64), rtn(4, 32))
        self.int8 = quantized(layers(64, 96).bfloat16(), rtn(8, -1, "signed"))
        self.plain = nn.Linear(96, 8)
        self.experts = nn.Parameter(
            RTNQuantizedTensor.from_float(torch.randn(3, 40, 64)), requires_grad=False
        )
        self.turned = nn.Parameter(
            RTNQuantizedTensor.from_float(torch.randn(3, 40, 64)).mT, requires_grad=False
        )
        self.columns = nn.Parameter(
            RTNQuantizedTensor.from_float(torch.randn(40, 128), 4, 32)[:, 32:96], requires_grad=False
        )
        self.register_buffer("buffer", torch.randn(5))
        self.register_buffer("weight", RTNQuantizedTensor.from_float(torch.randn(40, 64)))

    def forward(self, x):
        return self.plain(self.int8(self.int4(x).bfloat16()).float())


@case
def rank_0_decides(ranks, folder):
    """The same state on every rank, to the bit, in the same memory."""
    model = Mixed(dist.get_rank())
    memory = [w.qdata.data_ptr() for w in model.state_dict().values() if isinstance(w, RTNQuantizedTensor)]
    wrapped = DistributedDataParallel(model)
    expected = Mixed(0)
    for name, t in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    assert memory == [
        w.qdata.data_ptr() for w in model.state_dict().values() if isinstance(w, RTNQuantizedTensor)
    ]
    for _ in range(2):  # the second forward sends the buffers again
        y = wrapped(x_of(100))
    same(y, expected(x_of(100)))
    y.sum().backward()
    assert model.plain.weight.grad is not None


@case
def prepared_by_accelerate(ranks, folder):
    rank = str(dist.get_rank())
    with patch.dict(
        os.environ,
        {"WORLD_SIZE": str(ranks), "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(ranks)},
    ):
        accelerator = accelerate.Accelerator(cpu=True)
    model = tiny_qlora(4)
    before = planes(model)
    prepared = accelerator.prepare(model)
    assert isinstance(prepared, DistributedDataParallel)
    train(prepared, [IDS.chunk(ranks)[dist.get_rank()]] * 2)
    assert_untouched(model, before)


@case
def compiled(ranks, folder):
    torch._dynamo.reset()
    model = MLP()
    quantize_(model.up, rtn(4, 32))
    wrapped = DistributedDataParallel(model)
    y = torch.compile(wrapped)(x_of(64))
    same(y, model(x_of(64)))
    y.sum().backward()
    assert model.down.weight.grad is not None
