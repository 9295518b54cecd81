"""Fresh float weights into a live model, as after each step of reinforcement learning: in place, and nothing
compiled again.

Among ranks it is tested in sharded_training.py."""

import copy

import pytest
import torch
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn

IDS = torch.tensor([[5, 77, 130, 9, 31, 64], [8, 9, 64, 3, 17, 100]]) % 128


def llama(seed):
    return tiny_llama(dtype=torch.bfloat16, seed=seed)


def mixtral(seed):
    torch.manual_seed(seed)
    return tiny_moe("Mixtral", torch.bfloat16)


def quantized(model, bits):
    quantize_(model, rtn(bits, 32))
    return model


def memory(model):
    """(parameter, address) of all that its answers depend on."""
    planes = [(p.qdata, p.scale) if isinstance(p, RTNQuantizedTensor) else (p,) for p in model.parameters()]
    return [id(p) for p in model.parameters()], [t.data_ptr() for parts in planes for t in parts]


def by_copy(model, state):
    for name, p in model.named_parameters():
        p.copy_(state[name])


def by_load_state_dict(model, state):
    model.load_state_dict(state)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [llama, mixtral])
def test_a_live_compiled_model_answers_as_one_quantized_anew(make, bits):
    torch._dynamo.reset()
    model = quantized(make(0), bits)
    # inductor's turn is below; here it would take half a minute.
    live = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = live(IDS, use_cache=False).logits
        where = memory(model)
        for seed, refresh in enumerate((by_copy, by_load_state_dict), start=1):
            fresh = make(seed)
            refresh(model, copy.deepcopy(fresh).state_dict())
            assert memory(model) == where
            anew = quantized(fresh, bits)
            for name, w in anew.named_parameters():
                assert torch.equal(model.get_parameter(name), w), name
            with torch._dynamo.config.patch(error_on_recompile=True):
                after = live(IDS, use_cache=False).logits
            # The same graph over the same bits: not only close.
            model.load_state_dict(anew.state_dict())
            assert torch.equal(live(IDS, use_cache=False).logits, after)
            torch.testing.assert_close(
                after, anew(IDS, use_cache=False).logits, rtol=0.05, atol=0.05 * after.abs().max().item()
            )
            assert not torch.allclose(before, after, rtol=0.2)
            before = after


def test_one_expert():
    """Of a weight [E, N, K] one expert is written, and the others keep their bits."""
    w = RTNQuantizedTensor.from_float(torch.randn(4, 48, 96).bfloat16(), 4, 32)
    old, fresh = w.clone(), torch.randn(48, 96).bfloat16()
    w[2].copy_(fresh)
    assert torch.equal(w[2], RTNQuantizedTensor.from_float(fresh, 4, 32))
    for i in (0, 1, 3):
        assert torch.equal(w[i], old[i])


def test_weights_of_another_dtype():
    """Float32 from the trainer into a bf16 model: rounded once, from what was given."""
    w, fresh = RTNQuantizedTensor.from_float(torch.randn(48, 96).bfloat16(), 4, 32), torch.randn(48, 96)
    scale = w.scale.data_ptr()
    w.copy_(fresh)
    assert w.scale.data_ptr() == scale
    assert torch.equal(w, RTNQuantizedTensor.from_float(fresh, 4, 32, dtype=torch.bfloat16))


def test_a_step_of_training_into_the_model_that_answers():
    """The loop itself: the float model learns, the quantized one follows."""
    torch._dynamo.reset()
    trained = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    answers = quantized(copy.deepcopy(trained), 4)
    live = torch.compile(answers, fullgraph=True)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    x, errors = torch.randn(16, 64), []
    with torch.no_grad():
        live(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            with torch.no_grad():
                errors.append(live(x).square().mean().item())
            trained(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            answers.load_state_dict(trained.state_dict())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
