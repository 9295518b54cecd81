"""What test_training runs on several gloo ranks, and the models and steps that it shares with a single process."""

import warnings

import peft
import torch
from tiny_llama import tiny_llama
from torch import nn
from torch.distributed.tensor import DTensor

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn

IDS = torch.tensor([[5, 77, 130, 9, 201, 64], [8, 9, 64, 3, 17, 300], [12, 1, 7, 31, 31, 2]])


def lora(model, **options):
    """`model` under a LoRA whose both matrices are random, so that each gets a gradient at the first step."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*without `get_apply_tensor_subclass`", UserWarning)  # it could not merge
        return peft.get_peft_model(model, config)


def tiny_qlora(bits, checkpointing=None):
    """A Llama of two blocks, every linear quantized but lm_head, under adapters of q_proj and down_proj."""
    model = tiny_llama().train()
    quantize_(model, rtn(bits, 32), lambda module, fqn: isinstance(module, nn.Linear) and fqn != "lm_head")
    model = lora(model, target_modules=["q_proj", "down_proj"])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if checkpointing == "reentrant":
            model.enable_input_require_grads()
    return model


def adapters_of(model):
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found
    assert all("lora_" in name for name in found)
    return found


def quantized_weights(model):
    """Every quantized parameter, as this rank has it."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    found = [w for w in local if isinstance(w, RTNQuantizedTensor)]
    assert found
    return found


def train(model, batches, trained=None):
    """The loss of every step."""
    optimizer = torch.optim.AdamW((trained or adapters_of(model)).values(), lr=5e-3)
    losses = []
    for ids in batches:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
