"""What goes wrong in `refine_`, and what it says meanwhile."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from mild_model import CONFIG, SMALL, mild
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe

from rtn_tensor import quantize_, refine_, rtn_int4


@pytest.fixture(scope="module")
def model():
    return mild()


def unchanged(model, before):
    return all(p is before[name] for name, p in model.named_parameters())


def test_what_is_wrong_is_said_before_anything_is_changed(model):
    model = copy.deepcopy(model)
    before = dict(model.named_parameters())
    ids = torch.randint(99, (2, 32))
    for error, message, arguments in [
        (TypeError, "config is missing; give rtn_int4", ()),
        (TypeError, "config is an int", (4,)),
        (ValueError, "tokens and batches are both given", (CONFIG, None, ids, [{}])),
        (
            TypeError,
            "batches is a list; give a list of the model's keyword arguments",
            (CONFIG, None, None, [ids]),
        ),
        (TypeError, "batches is a list", (CONFIG, None, None, [])),
        (ValueError, "tokens is a list; give int64 tokens", (CONFIG, None, [[1, 2]])),
        (ValueError, r"tokens is torch.float32 \[2, 3\]", (CONFIG, None, torch.zeros(2, 3))),
    ]:
        names = ("config", "filter_fn", "tokens", "batches")
        with pytest.raises(error, match=message):
            refine_(model, **dict(zip(names, arguments, strict=False)))
    with pytest.raises(ValueError, match="sequences=0, length=256"):
        refine_(model, CONFIG, sequences=0)
    with pytest.raises(ValueError, match="training mode"):
        refine_(copy.deepcopy(model).train(), CONFIG)
    with pytest.raises(ValueError, match="is on meta, and refine_ needs it whole"):
        refine_(tiny_llama().to("meta"), CONFIG)
    assert unchanged(model, before)
    refine_(model, CONFIG, **SMALL)
    with pytest.raises(ValueError, match="already quantized"):
        refine_(model, CONFIG)


def test_inputs_that_are_not_finite_are_named_and_the_model_is_as_it_was():
    model = tiny_moe("Mixtral")
    config = model.config.to_dict()

    def broken(module, args):
        return (torch.full_like(args[0], torch.inf),)

    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(broken)
    before = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.o_proj.weight: its inputs hold NaN or inf"
    ):
        refine_(model, CONFIG, tokens=torch.randint(99, (2, 32)))
    hook.remove()
    assert unchanged(model, before)
    assert model.config.to_dict() == config
    assert not any(module._forward_pre_hooks for module in model.modules())
    quantize_(model, CONFIG)
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_an_error_in_the_model_comes_through_and_no_thread_is_left(model):
    model = copy.deepcopy(model)
    before, threads = dict(model.named_parameters()), threading.active_count()

    def fails(module, args):
        raise RuntimeError("of its own")

    model.model.layers[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="of its own"):
        refine_(model, CONFIG, tokens=torch.randint(99, (400, 32)))
    assert unchanged(model, before)
    assert threading.active_count() == threads


def test_an_interrupt_leaves_the_model_as_it_was(model):
    model = copy.deepcopy(model)
    before, threads = dict(model.named_parameters()), threading.active_count()

    def bar(modules):
        yield from modules[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine_(model, CONFIG, tokens=torch.randint(99, (400, 32)), progress=bar)
    assert unchanged(model, before)
    assert threading.active_count() == threads


def test_a_large_divergence_is_warned_of(model):
    model = tiny_llama()
    with pytest.warns(
        UserWarning, match=r"differ from the float model's by .* nats per token on 512 more of its own"
    ):
        result = refine_(model, rtn_int4(-1), sequences=1)
    assert result.divergence > 0.3
    assert f"divergence from the float model: {result.divergence:.4f} nats per token" in str(result)


def test_progress(model):
    seen = []

    def bar(modules):
        for module in modules:
            yield module
            seen.append(module)

    refine_(copy.deepcopy(model), CONFIG, **SMALL, progress=bar)
    assert seen[: SMALL["length"] - 1] == list(range(1, SMALL["length"]))  # the tokens that it writes
    assert len(seen[SMALL["length"] - 1 :]) == 15


def test_functional_products_see_the_refined_weight(model):
    model = copy.deepcopy(model)
    refine_(model, CONFIG, **SMALL)
    w, x = model.model.layers[0].mlp.up_proj.weight, torch.randn(3, 96)
    torch.testing.assert_close(F.linear(x, w), x @ w.dequantize().T)
