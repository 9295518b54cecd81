"""`load_from_rank0`: a whole state dict that only rank 0 has, into sharded models."""

import contextlib
import copy
import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import Cases
from sharded_models import layers, mlp, parallel, quantized, same, sharded, x_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rtn_tensor import RTNQuantizedTensor, load_from_rank0, rtn_int4, rtn_int8
from rtn_tensor.checkpoint import fill

case = Cases(2, 3)


def tensor_parallel(model):
    return parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))


# Rows that no number of ranks divides, and fewer than there are ranks; columns that are cut.
KINDS = [(lambda: layers(64, 97, 33, 1), sharded), (mlp, tensor_parallel)]


def on_rank0(model):
    return model.state_dict() if dist.get_rank() == 0 else None


def bits_of(t):
    """All that `t` is made of."""
    t = t.to_local() if isinstance(t, DTensor) else t
    return [t.qdata.clone(), t.scale.clone()] if isinstance(t, RTNQuantizedTensor) else [t.detach().clone()]


def equal(got, expected):
    """Every tensor of one model's state dict and of another's, bit for bit."""
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, t in got.items():
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        assert type(whole) is type(expected[name]), name
        assert all(map(torch.equal, bits_of(whole), bits_of(expected[name]))), name


@contextlib.contextmanager
def unchanged(model):
    before = {name: (t, bits_of(t)) for name, t in model.state_dict(keep_vars=True).items()}
    yield
    for name, t in model.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert all(map(torch.equal, bits_of(t), before[name][1])), name


@case
def bit_for_bit(ranks, folder):
    """Into memory that is there, or from meta; quantized state dicts as their planes, and float ones
    quantized by each rank."""
    for make, shard in KINDS:
        for config in (rtn_int4(group_size=32), rtn_int8(group_size=32, scale_method="signed")):
            whole = quantized(make(), config)
            for source in (whole, make()):
                for from_meta in (False, True):
                    model = shard(quantized(make().to("meta"), config))
                    if not from_meta:
                        model.to_empty(device="cpu")
                    before = list(model.parameters())
                    load_from_rank0(model, on_rank0(source))
                    assert from_meta or all(a is b for a, b in zip(before, model.parameters(), strict=True))
                    equal(model, whole)
                    same(model(x_of(64)), whole(x_of(64)))


class Mixed(nn.Module):
    """Parameters of every kind: cut, whole on every rank, shared, of three dims; buffers of floats and of
    integers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64)
        self.again = self.last
        self.experts = nn.Parameter(torch.randn(3, 32, 64))
        self.register_buffer("table", torch.randn(5, 3).mT)  # not contiguous

    def forward(self, x):
        return self.again(self.norm(self.first(x)))


@case
def whatever_a_model_holds(ranks, folder):
    rules = [
        ("experts", rtn_int4(group_size=64)),
        ("first", rtn_int8(group_size=-1)),
        ("last", rtn_int4(group_size=32)),
    ]
    whole = quantized(Mixed(), rules).eval()
    with torch.no_grad():
        whole.norm.running_mean.uniform_()
        whole.norm.num_batches_tracked.fill_(7)
    for from_meta, shard in itertools.product((False, True), (sharded, nn.Module.eval)):
        model = quantized(Mixed().to("meta"), rules).eval()
        if not from_meta:
            model.to_empty(device="cpu")
        model = shard(model)
        load_from_rank0(model, on_rank0(whole))
        equal(model, whole)
        assert model.again is model.last
        same(model(x_of(64)), whole(x_of(64)))


@case
def one_tensor_at_a_time(ranks, folder):
    """A weight that a rank receives is gone before it receives another."""
    whole = quantized(layers(64, 97, 33, 64))
    received, kept = [], []
    broadcast = dist.broadcast

    def watched(t, src):
        if isinstance(t, RTNQuantizedTensor):  # of others gloo's thread may hold on a moment longer
            kept.extend(other() for other in received if other() is not None)
            received.append(weakref.ref(t))
        broadcast(t, src)

    dist.broadcast = watched
    try:
        load_from_rank0(sharded(quantized(layers(64, 97, 33, 64).to("meta"))), on_rank0(whole))
    finally:
        dist.broadcast = broadcast
    assert len(received) == 3
    assert not kept or dist.get_rank() == 0


@case
def into_a_live_model(ranks, folder):
    """After a forward pass, where FSDP2 has gathered the weights and keeps them."""
    fresh = layers(64, 97, 48)
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(-1.5)
    for options in ({}, {"reshard_after_forward": False}):
        for source in (quantized(layers(64, 97, 48)), fresh):
            model = sharded(quantized(layers(64, 97, 48)), **options)
            model(x_of(64))
            load_from_rank0(model, on_rank0(source))
            expected = source if source is not fresh else quantized(copy.deepcopy(fresh))
            equal(model, expected)
            same(model(x_of(64)), expected(x_of(64)))


@case
def torchs_own_of_floats(ranks, folder):
    """`set_model_state_dict(broadcast_from_rank0=True)` sends a float state dict into quantized weights."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for make, shard in KINDS:
        model = shard(quantized(make().to("meta"))).to_empty(device="cpu")
        set_model_state_dict(model, on_rank0(make()) or {}, options=options)
        equal(model, quantized(make()))


def unfit_states():
    good = quantized(mlp()).state_dict()
    other = lambda **options: quantized(mlp(), rtn_int4(**{"group_size": 32} | options)).state_dict()  # noqa: E731
    lacking = {name: t for name, t in good.items() if name != "down.bias"}
    with_nan = mlp().state_dict()
    with_nan["down.weight"][-1, -1] = float("nan")
    yield lacking, ValueError, r"the checkpoint lacks down.bias \[64\]"
    yield good | {"more": torch.ones(2)}, ValueError, "rank 0's state_dict: more has no place in the model"
    yield (
        good | {"up.bias": torch.ones(2)},
        ValueError,
        r"up.bias has shape \[2\], the model's up.bias \[192\]",
    )
    kind = "bits=4, group_size=32, scale_method='search'"
    for state, got in (
        (other(group_size=64), "bits=4, group_size=64, scale_method='search'"),
        (other(scale_method="signed"), "bits=4, group_size=32, scale_method='signed'"),
        (
            quantized(mlp(), rtn_int8(group_size=32)).state_dict(),
            "bits=8, group_size=32, scale_method='absmax'",
        ),
    ):
        yield (
            state,
            ValueError,
            f"quantize_ the model as rank 0's .*\n  up.weight has {got}, scales of torch.float32, the model's "
            f"has {kind}, scales of torch.float32\n  down.weight has",
        )
    yield (
        quantized(mlp().bfloat16()).state_dict(),
        ValueError,
        "up.weight has .*, scales of torch.bfloat16, the model's has .*, scales of torch.float32",
    )
    damaged = {name: t.clone() for name, t in quantized(mlp(), rtn_int4(32, "search8")).state_dict().items()}
    damaged["down.weight"].scale[-1, -1] = 0x7F  # NaN, in 8 bits
    yield damaged, ValueError, "down.weight holds NaN or inf; nothing was loaded"
    yield with_nan, ValueError, "down.weight holds NaN or inf; nothing was loaded"
    yield (
        good | get_model_state_dict(tensor_parallel(quantized(mlp()))),
        ValueError,
        "up.weight is a part of a tensor; give whole ones",
    )
    yield None, TypeError, "rank 0 gave a NoneType; give it the state dict, the other ranks need none"


@case
def unfit(ranks, folder):
    """All ranks raise, before anything is changed."""
    model = tensor_parallel(quantized(mlp()))
    for state, kind, message in unfit_states():
        # Seen by rank 0 alone.
        if dist.get_rank() and (kind is TypeError or "part of" in message or "NaN" in message):
            kind, message = RuntimeError, "another rank failed here, and says why; nothing was changed"
        with unchanged(model), pytest.raises(kind, match=message):
            load_from_rank0(model, state if dist.get_rank() == 0 else {"another": 1})
    plain = tensor_parallel(mlp())
    with unchanged(plain), pytest.raises(ValueError, match="up.weight has bits=4, .*, the model's has float"):
        load_from_rank0(plain, on_rank0(quantized(mlp())))


@case
def cut_inside_a_group(ranks, folder):
    """Each rank has quantized its own columns, with a scale per row; such can be made of floats, and of no
    other quantized weight."""
    config = rtn_int4(group_size=-1)
    plain, model = mlp(48 * ranks), quantized(tensor_parallel(mlp(48 * ranks)), config)
    with torch.no_grad():
        plain.down.weight.mul_(-1.5)
    # Of three ranks the last one's columns would do, and it raises, too.
    message = r"rank 0's state_dict: down.weight cannot slice columns \d+:\d+; .* must be multiples of 32|another rank failed"
    with unchanged(model), pytest.raises((ValueError, RuntimeError), match=message):
        load_from_rank0(model, on_rank0(quantized(mlp(48 * ranks), config)))
    load_from_rank0(model, on_rank0(plain))
    own = quantized(tensor_parallel(plain), config)
    assert all(map(torch.equal, bits_of(model.down.weight), bits_of(own.down.weight)))


@case
def under_activation_checkpointing(ranks, folder):
    """torch's wrapper leaves its name out of state dicts."""
    for config in (rtn_int4(group_size=32), None):
        whole, model = layers(64, 97, 33), layers(64, 97, 33).to("meta")
        if config:
            quantized(whole), quantized(model)
        apply_activation_checkpointing(model, check_fn=lambda layer: isinstance(layer, nn.Linear))
        fully_shard(model)
        load_from_rank0(model, on_rank0(whole))
        equal(model, whole)


@case
def a_rank_that_fails(ranks, folder):
    """Whichever it is, and whenever: all raise, and go on to their next collective."""
    whole = quantized(layers(64, 97, 33))
    real = fill._copy
    for failing in (0, ranks - 1):
        for at in (0, 3):
            model = sharded(quantized(layers(64, 97, 33).to("meta"))).to_empty(device="cpu")
            calls = []

            def failing_copy(piece, *args, calls=calls, at=at):
                if len(calls) == at:
                    raise MemoryError("no more")
                calls.append(piece)
                return real(piece, *args)

            mine = failing == dist.get_rank()
            fill._copy = failing_copy if mine else real
            try:
                with pytest.raises(
                    *((MemoryError,) if mine else (RuntimeError,)),
                    match="no more" if mine else "may be filled in part",
                ):
                    load_from_rank0(model, on_rank0(whole))
            finally:
                fill._copy = real
            load_from_rank0(model, on_rank0(whole))
            equal(model, whole)
