"""Quantized models with adapters of PEFT, and what tests ask of them."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from rtn_tensor import RTNQuantizedTensor, load, quantize_

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 77, 130, 9, 201, 64], [8, 9, 64, 3, 17, 300]])
BITS = pytest.mark.parametrize("bits", [4, 8])


def by_transformers(folder, config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config))


def by_load(folder, config):
    return load(folder, config)


def by_quantize_(folder, config):
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(model, config, lambda module, fqn: isinstance(module, nn.Linear) and fqn != "lm_head")
    return model


DOORS = pytest.mark.parametrize("door", [by_transformers, by_load, by_quantize_])


def lora(**kwargs):
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **kwargs
    )


def adapted(model, config=None):
    return peft.get_peft_model(model, config or lora())


def planes(model):
    """Copies of all that is quantized."""
    found = [p for p in model.parameters() if isinstance(p, RTNQuantizedTensor)]
    assert len(found) == 14
    return [(w.qdata.clone(), w.scale.clone()) for w in found]


def assert_untouched(model, before):
    for (qdata, scale), (old_qdata, old_scale) in zip(planes(model), before, strict=True):
        assert torch.equal(qdata, old_qdata)
        assert torch.equal(scale, old_scale)


def train(model, steps=6):
    """The first loss and the last."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def losses(trained):
    found = [line["loss"] for line in trained.state.log_history if "loss" in line]
    return found[0], found[-1]
