"""A weight used as any tensor is: arithmetic in place, out=, einsum, averages, optimizers, torch.nn.utils;
and what is refused."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape, bits=4, group_size=32, dtype=torch.float32):
    return RTNQuantizedTensor.from_float(gaussian(*(shape or (40, 100))).to(dtype), bits, group_size)


def model(bits=4):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8))
    quantize_(layers, rtn(bits, 32), lambda module, fqn: fqn in ("0", "2"))
    return layers


X = gaussian(5, 64, seed=1)


# -------------------------------------------------------------------------------- in place

IN_PLACE = {
    "add_": lambda w, t: w.add_(t),
    "add_ alpha": lambda w, t: w.add_(t, alpha=0.5),
    "add_ a number": lambda w, t: w.add_(0.25),
    "sub_": lambda w, t: w.sub_(t),
    "mul_": lambda w, t: w.mul_(t),
    "mul_ a column": lambda w, t: w.mul_(t[:, :1]),
    "mul_ a row": lambda w, t: w.mul_(t[0]),
    "mul_ 0": lambda w, t: w.mul_(0),
    "div_": lambda w, t: w.div_(t),
    "addmm_": lambda w, t: w.addmm_(t[:, :3], t[:3]),
    "addcmul_": lambda w, t: w.addcmul_(t, t, value=0.5),
    "addcdiv_": lambda w, t: w.addcdiv_(t, t.abs() + 1),
}


@DTYPES
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_quantizes_as_copy_does(name, dtype):
    w, t = weight(dtype=dtype), gaussian(40, 100, seed=1).to(dtype)
    expected = w.clone()
    expected.copy_(IN_PLACE[name](w.dequantize(), t))
    memory = w.qdata.data_ptr(), w.scale.data_ptr()
    assert IN_PLACE[name](w, t) is w
    assert torch.equal(w, expected)
    assert memory == (w.qdata.data_ptr(), w.scale.data_ptr())


def test_in_place_on_views_and_by_operators():
    w, t = weight(), gaussian(40, 100, seed=1)
    before = w.clone()
    added = w.clone().copy_(w.dequantize() + t)
    other = w.clone()
    other += t
    assert torch.equal(other, added)
    other = w.clone()
    other.t().add_(t.t())
    assert torch.equal(other, added)
    other = w.clone()
    other[3:9] += t[3:9]
    assert torch.equal(other[3:9], added[3:9])
    assert torch.equal(other[9:], before[9:])
    experts = weight(3, 40, 100)
    experts[1].sub_(t)
    assert torch.equal(experts[0], weight(3, 40, 100)[0])
    assert not torch.equal(experts[1], weight(3, 40, 100)[1])


def test_rows_that_stay_as_they_are_keep_their_bits():
    """To quantize what is quantized gives other numbers: what adds zeros, step after step, would move the
    weight away."""
    w, t = weight(), torch.zeros(40, 100)
    before = w.clone()
    for _ in range(3):
        assert torch.equal(w.add_(t), before)
    t[7] = 1
    w.add_(t)
    assert not torch.equal(w[7], before[7])
    assert torch.equal(w[:7], before[:7])
    assert torch.equal(w[8:], before[8:])


@DTYPES
def test_a_number_multiplies_the_scale(dtype):
    w = weight(dtype=dtype)
    expected = w.dequantize() / 4  # as RWKV divides its weights by 2^n
    q = w.qdata.clone()
    for _ in range(2):
        w.div_(4).mul_(2.0).mul_(2)
    assert torch.equal(w.div_(4).dequantize(), expected)
    assert torch.equal(w.qdata, q)


def test_in_place_refuses():
    w = weight(group_size=-1)
    w.fqn = "up.weight"
    before = w.clone()
    with pytest.raises(
        ValueError, match=r"up.weight: cannot add_ some columns .* share the scale; take " r"whole rows"
    ):
        w[:, :32].add_(1)
    with pytest.raises(
        TypeError, match=r"up.weight: add_ does not take a quantized operand; give it " r".dequantize\(\)"
    ):
        w.add_(w, alpha=0.1)
    with pytest.raises(
        TypeError, match=r"up.weight: mul_ does not take a quantized operand; give it " r".dequantize\(\)"
    ):
        torch.zeros(40, 100).mul_(w)
    with pytest.raises(RuntimeError, match="size of tensor"):
        w.add_(torch.zeros(3))
    assert torch.equal(w, before)


# -------------------------------------------------------------------------------- products


OUTS = {
    "mm": lambda x, w, out: torch.mm(x, w.t(), out=out),
    "matmul": lambda x, w, out: torch.matmul(x, w.t(), out=out),
    "addmm": lambda x, w, out: torch.addmm(torch.ones(96), x, w.t(), beta=2, out=out),
    "bmm": lambda x, w, out: torch.bmm(x[None], w.t()[None], out=out),
    "linear": lambda x, w, out: F.linear(x, w, torch.ones(96), out=out),
}


@pytest.mark.parametrize("name", OUTS)
def test_products_into_out(name):
    w, product = weight(96, 64), OUTS[name]
    expected = product(X, w.dequantize(), None)
    for out in (torch.empty(expected.shape), torch.empty(0)):
        assert product(X, w, out) is out
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"out is torch.float64 of shape .* but the product is torch.float32 .* make it so"
    ):
        product(X, w, torch.empty(expected.shape, dtype=torch.float64))
    named = weight(*expected.shape)
    named.fqn = "up"
    with pytest.raises(
        TypeError, match=r"up: a product cannot be written into a quantized tensor by out=; " r"copy_ it"
    ):
        product(X, w.dequantize(), named)


def test_tensordot_inner_and_jagged():
    w = weight(96, 64)
    expected = F.linear(X, w)
    assert torch.equal(torch.tensordot(X, w, dims=([1], [1])), expected)
    assert torch.equal(torch.inner(X, w), expected)
    jagged = torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)
    torch.testing.assert_close(F.linear(jagged, w).values(), F.linear(torch.cat([X, X[:2]]), w))


@pytest.mark.parametrize(("equation", "turned"), [("bi,oi->bo", False), ("bi,io->bo", True)])
def test_einsum_names_the_weight(equation, turned):
    w = weight(96, 64)
    w.fqn = "up.weight"
    with pytest.raises(
        NotImplementedError,
        match=r"up.weight: einsum\('bi,.*'\) comes to more than a " r"product.* weight.dequantize\(\)",
    ):
        torch.einsum(equation, X, w.t() if turned else w)


UNKNOWN = {
    "w + 1": lambda w: w + 1,
    "1 - w": lambda w: 1 - w,
    "w * 2": lambda w: w * 2,
    "x * w": lambda w: torch.ones(96, 64) * w,
    "w / 2": lambda w: w / 2,
    "-w": lambda w: -w,
    "w == w": lambda w: w == w,
    "w > 0": lambda w: w > 0,
    "sum": lambda w: w.sum(),
    "norm": lambda w: w.norm(),
    "foreach norm": lambda w: torch.nn.utils.get_total_norm([torch.ones(2), w]),
    "allclose": lambda w: torch.allclose(w, w),
    "isfinite": lambda w: torch.isfinite(w),
    "softmax": lambda w: w.softmax(-1),
    "repeat": lambda w: w.repeat(2, 1),
    "where": lambda w: torch.where(torch.ones(96, 64) > 0, w, 0.0),
    "mv": lambda w: torch.mv(w, X[0]),
    "mv out": lambda w: torch.mv(w, X[0], out=torch.empty(96)),
    "svd": lambda w: torch.linalg.svd(w),
    "bilinear": lambda w: F.bilinear(torch.randn(2, 64), torch.randn(2, 96), w.t()[None].contiguous()),
    "vmap": lambda w: torch.vmap(lambda row: row + 1)(w),
    "fill": lambda w: w.fill_(1),
    "init": lambda w: nn.init.xavier_uniform_(w),
    "item": lambda w: w[0, 0].item(),
    "numpy": lambda w: w.numpy(),
    "array": lambda w: __import__("numpy").asarray(w),
    "tolist": lambda w: w.tolist(),
    "full_like": lambda w: torch.full_like(w, 1.0),
    "foreach mul": lambda w: torch._foreach_mul_([w], 0.9),
    "cat": lambda w: torch.cat([w, torch.ones(1, 64)]),
    "weight_norm": lambda w: torch.nn.utils.parametrizations.weight_norm(holder(w)),
    "spectral_norm": lambda w: torch.nn.utils.parametrizations.spectral_norm(holder(w)),
    "orthogonal": lambda w: torch.nn.utils.parametrizations.orthogonal(holder(w)),
    "prune": lambda w: __import__("torch.nn.utils.prune", fromlist=["_"]).l1_unstructured(
        holder(w), "weight", 0.3
    ),
    "reset_parameters": lambda w: holder(w).reset_parameters(),
    "parameters_to_vector": lambda w: torch.nn.utils.parameters_to_vector([w, torch.ones(2)]),
}


def holder(w):
    layer = nn.Linear(64, 96)
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_refused_names_the_weight_and_the_way_out(name):
    w = weight(96, 64)
    w.fqn = "layers.3.up.weight"
    before = w.clone()
    with pytest.raises(
        (NotImplementedError, TypeError, ValueError),
        match=r"layers\.3\.up\.weight: " r"(?s:.)*(dequantize|float|cannot)",
    ) as caught:
        UNKNOWN[name](w)
    assert torch.equal(w, before)
    assert len(str(caught.value)) < 400


# ----------------------------------------------------------------- averages and optimizers


def train(layers, optimizer, steps=4, after=lambda: None):
    losses = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = (layers(X) - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        after()
    return losses


@pytest.mark.parametrize("average", [get_ema_multi_avg_fn(0.9), get_swa_multi_avg_fn()], ids=["ema", "swa"])
@pytest.mark.parametrize("buffers", [False, True])
def test_averages_keep_frozen_weights_to_the_bit(average, buffers):
    layers = model()
    averaged = AveragedModel(layers, multi_avg_fn=average, use_buffers=buffers)
    train(
        layers, torch.optim.Adam(layers.parameters(), 0.1), after=lambda: averaged.update_parameters(layers)
    )
    assert torch.equal(averaged.module[0].weight, layers[0].weight)
    assert not torch.equal(averaged.module[4].weight, layers[4].weight)
    assert torch.isfinite(averaged(X)).all()


def test_averages_of_different_quantized_weights_are_refused():
    layers, other = model(), model()
    other[0].weight.copy_(gaussian(96, 64, seed=3))
    averaged = AveragedModel(layers, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(layers)
    with pytest.raises(
        NotImplementedError,
        match=r"0.weight: an average \(lerp_\) of quantized weights .* " r"dequantize_\(model\)",
    ):
        averaged.update_parameters(other)
    averaged = AveragedModel(layers, avg_fn=get_ema_avg_fn(0.9))  # which multiplies by hand
    averaged.update_parameters(layers)
    with pytest.raises(NotImplementedError, match=r"0.weight: .* does not implement aten.mul.Tensor"):
        averaged.update_parameters(layers)


@pytest.mark.parametrize(
    "kind",
    ["SGD", "Adam", "AdamW", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop", "LBFGS"],
)
def test_optimizers_given_every_parameter(kind):
    layers = model()
    before = [layers[i].weight.clone() for i in (0, 2)]
    optimizer = getattr(torch.optim, kind)(layers.parameters(), lr=0.01)
    losses = train(layers, optimizer)
    assert losses[-1] < losses[0]
    assert all(torch.equal(layers[i].weight, w) for i, w in zip((0, 2), before, strict=True))
    optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    train(layers, optimizer, 1)


def test_adagrad_says_which_parameters_to_give():
    layers = model()
    with pytest.raises(
        NotImplementedError,
        match=r"0.weight: .* give an optimizer \(Adagrad asks for it\) only the " r"parameters that require",
    ):
        torch.optim.Adagrad(layers.parameters())
    losses = train(layers, torch.optim.Adagrad((p for p in layers.parameters() if p.requires_grad), 0.1))
    assert losses[-1] < losses[0]


def test_gradients_are_clipped():
    layers = model()
    layers(X).sum().backward()
    assert torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0) > 1
    torch.nn.utils.clip_grad_value_(layers.parameters(), 0.01)
    assert max(p.grad.abs().max() for p in layers.parameters() if p.grad is not None) <= 0.01


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    layers, x = model(), X.clone().requires_grad_()
    checkpoint(layers, x, use_reentrant=reentrant).sum().backward()
    assert x.grad.abs().max() > 0


# ------------------------------------------------- copies, pickles, processes, state dicts


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))], ids=["deepcopy", "pickle"]
)
def test_copies(way):
    layers = model()
    layers[0].weight.weight_loader = len
    other = way(layers)
    assert torch.equal(other(X), layers(X))
    assert isinstance(other[0].weight, nn.Parameter)
    assert other[0].weight.fqn == "0.weight"
    assert other[0].weight.weight_loader is len
    assert other[0].weight.qdata.data_ptr() != layers[0].weight.qdata.data_ptr()


def in_another_process(layers, results):
    results.put((layers[0].weight.bits, layers(X).tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_another_process_gets_the_model(shared):
    layers, context = model(), mp.get_context("spawn")
    if shared:
        layers.share_memory()
    results = context.Queue()
    process = context.Process(target=in_another_process, args=(layers, results))
    process.start()
    bits, y = results.get(timeout=120)
    assert bits == 4
    torch.testing.assert_close(torch.tensor(y), layers(X).detach())
    process.join()


def test_state_dict_hooks_and_assign():
    layers, plain = (
        model(),
        nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8)),
    )
    seen = []
    layers.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: seen.append(type(state["0.weight"]))
    )
    plain.register_load_state_dict_pre_hook(lambda module, state, *args: seen.append(type(state["0.weight"])))
    plain.load_state_dict(layers.state_dict(), assign=True)
    assert seen == [RTNQuantizedTensor, RTNQuantizedTensor]
    assert torch.equal(plain(X), layers(X))
    assert not plain[0].weight.requires_grad
    other = model(8)
    with pytest.raises(
        RuntimeError,
        match=r"0\.weight: cannot copy_ .* the formats differ; copy_ from "
        r"src.dequantize\(\) to requantize",
    ):
        other.load_state_dict(layers.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.weight\""):
        layers.load_state_dict({name: t for name, t in layers.state_dict().items() if name != "0.weight"})
    layers.load_state_dict(
        {name: t for name, t in other.state_dict().items() if name == "4.weight"}, strict=False
    )
    assert torch.equal(layers[4].weight, other[4].weight)
