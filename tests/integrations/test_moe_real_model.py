"""A mixture of experts made of SmolLM2 (`benchmarks.real_model.upcycled`) on the State of the Union speeches:
its perplexity, quantized, is fake quantization's, whichever experts implementation of transformers' runs
it."""

import time

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.downloads import ModelUnavailable
from benchmarks.real_data import state_of_the_union
from benchmarks.real_model import upcycled
from rtn_tensor import RTNQuantizedTensor, load, rtn
from rtn_tensor.evaluation.perplexity import perplexity

pytestmark = pytest.mark.slow

GROUP_SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder():
    try:
        state_of_the_union()
        return upcycled()
    except ModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokens(folder):
    return torch.tensor(
        AutoTokenizer.from_pretrained(folder)(state_of_the_union()[:82_000])["input_ids"][:2048]
    )


def measured(model, tokens, implementation, what):
    model.set_experts_implementation(implementation)
    started = time.perf_counter()
    value = perplexity(model, tokens, 1024, 512)
    print(
        f"{what}, {implementation}: {value:.4f} over {len(tokens)} tokens, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return value


def fake_quantize_(model, bits):
    """Of an fp32 model of bf16 weights: replaces those of linears and experts by q * S, S in bf16, by the
    formula, in plain torch."""
    for fqn, module in model.named_modules():
        is_layer = isinstance(module, nn.Linear) and fqn != "lm_head"
        for name in (
            ["weight"] if is_layer else ["gate_up_proj", "down_proj"] if fqn.endswith(".experts") else []
        ):
            parts = []
            for w in module.get_parameter(name).data.split(GROUP_SIZE, dim=-1):
                scale = (2 * w.abs().amax(-1, keepdim=True) / (2**bits - 1)).bfloat16().float()
                parts.append(torch.round(w / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
            module.get_parameter(name).data = torch.cat(parts, dim=-1)


@pytest.mark.parametrize("bits", [8, 4])
def test_perplexity_is_that_of_fake_quantization(folder, tokens, bits):
    """In fp32 arithmetic, where next to no token has two experts so alike that rounding decides between
    them."""
    tokens = tokens[:1024]
    fake = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fake_quantize_(fake, bits)
    expected = measured(fake, tokens, "grouped_mm", f"fake-quantized to int{bits} g{GROUP_SIZE}")
    model = load(folder, rtn(bits, GROUP_SIZE, "absmax")).float().eval()
    experts = model.model.layers[29].mlp.experts
    assert isinstance(experts.gate_up_proj, RTNQuantizedTensor)
    assert model.config._experts_implementation == "rtn"
    for implementation in ("rtn", "eager", "grouped_mm"):
        assert measured(model, tokens, implementation, f"int{bits} in fp32") == pytest.approx(
            expected, rel=1e-5
        )
    # It copies the weights of every pair of a token and an expert: 2 GB per layer for 1024 tokens.
    few = tokens[:64]
    assert measured(model, few, "batched_mm", f"int{bits} in fp32") == pytest.approx(
        measured(model, few, "rtn", "the same"), rel=1e-5
    )


def test_bf16_perplexity(folder, tokens):
    """Here rounding sends some tokens elsewhere, and implementations round differently: they are up to 0.2 %
    apart, dense ones, too."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    before = measured(model, tokens, "grouped_mm", "bf16")
    assert 5 < before < 100  # it is a language model, on text that it understands
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.roll(1, 0)
    elsewhere = measured(model, tokens, "grouped_mm", "bf16, with the next experts")
    assert elsewhere != pytest.approx(before, rel=5e-3)  # or the routing would not be seen
    assert measured(load(folder, rtn(8, GROUP_SIZE)).eval(), tokens, "rtn", "int8") == pytest.approx(
        before, rel=5e-3
    )
    model = load(folder, rtn(4, GROUP_SIZE, "absmax")).eval()
    value = measured(model, tokens, "rtn", "int4")
    assert value > 1.05 * before  # or it was not quantized
    for implementation in ("eager", "grouped_mm"):
        assert measured(model, tokens, implementation, "int4") == pytest.approx(value, rel=5e-3)
