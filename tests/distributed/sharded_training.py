"""What test_training runs on several gloo ranks, and the models and steps that it shares with a single
process."""

import copy
import functools
import warnings

import peft
import torch
import torch.distributed as dist
from ranks import Cases
from sharded_models import layers, mlp, parallel, quantized, quantized_weights, same, x_of
from tiny_llama import tiny_llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.real_data import state_of_the_union
from benchmarks.real_model import smollm2
from rtn_tensor import RTNQuantizedTensor, quantize_, rtn

IDS = torch.tensor(
    [[5, 77, 130, 9, 201, 64], [8, 9, 64, 3, 17, 300], [12, 1, 7, 31, 31, 2], [6, 6, 19, 20, 21, 22]]
)

case = Cases(2)


# ------------------------------------------------------------------------ models and steps


def lora(model, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        # It could not merge.
        warnings.filterwarnings("ignore", "(?s).*without `get_apply_tensor_subclass`", UserWarning)
        return peft.get_peft_model(model, config)


def checkpointed(model, how):
    """The model with activation checkpointing: transformers', reentrant or not, or torch's wrapper around
    each block."""
    if how == "wrapper":
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=checkpoint_wrapper,
            check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
        )
    elif how is not None:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    return model


def quantized_llama(model, bits, group_size):
    quantize_(
        model, rtn(bits, group_size), lambda module, fqn: isinstance(module, nn.Linear) and fqn != "lm_head"
    )
    return model


def tiny_qlora(bits, how=None):
    """A Llama of two blocks, every linear quantized but lm_head, under adapters of q_proj and down_proj."""
    model = lora(quantized_llama(tiny_llama().train(), bits, 32), target_modules=["q_proj", "down_proj"])
    return checkpointed(model, how)


def smollm2_qlora(dtype):
    """The real model under adapters of every linear, and four batches [2, 128] of text."""
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = lora(quantized_llama(model, 4, 64), target_modules="all-linear")
    ids = AutoTokenizer.from_pretrained(folder)(state_of_the_union()[:10_000], return_tensors="pt").input_ids[
        0
    ]
    return model, [*ids[: 4 * 256].view(4, 2, 128)]


def adapters_of(model):
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found
    assert all("lora_" in name for name in found)
    return found


def planes(model):
    """Copies of what this rank has."""
    local = [w.to_local() if isinstance(w, DTensor) else w for w in quantized_weights(model)]
    assert local
    return [(w.qdata.clone(), w.scale.clone()) for w in local]


def assert_untouched(model, before):
    for (qdata, scale), (old_qdata, old_scale) in zip(planes(model), before, strict=True):
        assert torch.equal(qdata, old_qdata)
        assert torch.equal(scale, old_scale)


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


# ----------------------------------------------------------------------- QLoRA under FSDP2


def shard(model, **options):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def compare(model, alone, batches, ranks, tolerance):
    """Each rank trains `model` on its own rows: the mean of their losses is the loss of `alone` on all
    rows."""
    before = planes(model)
    mine = torch.tensor(train(model, [ids.chunk(ranks)[dist.get_rank()] for ids in batches]))
    dist.all_reduce(mine)
    expected = torch.tensor(train(alone, batches))
    same(mine / ranks, expected, tolerance)
    assert_untouched(model, before)
    return expected


@case
def qlora(ranks, folder):
    for how in (None, "reentrant", "not reentrant", "wrapper"):
        for options in [{}, {"reshard_after_forward": False}] if how is None else [{}]:
            model, alone = shard(tiny_qlora(4, how), **options), tiny_qlora(4)
            losses = compare(model, alone, [IDS] * 6, ranks, 1e-5)
            assert losses[-1] < 0.95 * losses[0]
            adapters = adapters_of(alone)
            for name, p in adapters_of(model).items():
                same(p.full_tensor(), adapters[name.replace("_checkpoint_wrapped_module.", "")], 1e-4)


@case
def qlora_int8_offloaded(ranks, folder):
    compare(
        shard(tiny_qlora(8), offload_policy=CPUOffloadPolicy(pin_memory=False)),
        tiny_qlora(8),
        [IDS] * 4,
        ranks,
        1e-5,
    )


@case
def qlora_mixed_precision(ranks, folder):
    """Products in bf16 over adapters in float32, as a single process has it under autocast."""
    model = shard(tiny_qlora(4), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    compare(model, tiny_qlora(4), [IDS] * 4, ranks, 2e-2)
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}


@case
def adapters_saved(ranks, folder):
    """Gathered without the base; onto a whole model they give its answers."""
    model, alone = shard(tiny_qlora(4)), tiny_qlora(4)
    train(model, [IDS.chunk(ranks)[dist.get_rank()]] * 3)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    y = model(IDS).logits
    if dist.get_rank() == 0:
        assert state.keys() == adapters_of(alone).keys()
        alone.load_state_dict(state, strict=False)
        same(y, alone(IDS).logits)


# --------------------------------------------------------- fresh weights into a live model

# A float DTensor into the quantized one: cut by the same placements, by rank 0 or by each rank for itself, or
# whole.
WAYS = {
    "sent by rank 0": lambda w, f: distribute_tensor(f, w.device_mesh, w.placements),
    "cut by each": lambda w, f: distribute_tensor(f, w.device_mesh, w.placements, src_data_rank=None),
    "whole": lambda w, f: DTensor.from_local(f, w.device_mesh, [Replicate()]),
}


def memory(model):
    local = [p.to_local() for p in model.parameters()]
    return [
        t.data_ptr()
        for p in local
        for t in ((p.qdata, p.scale) if isinstance(p, RTNQuantizedTensor) else (p,))
    ]


def refreshed(model, make, x, tolerance):
    """Every way gives the answers of a model quantized anew, in the same memory, and compiles nothing."""
    model(x)
    for i, (way, cut) in enumerate(WAYS.items()):
        fresh = make()
        with torch.no_grad():
            for p in fresh.parameters():
                p.mul_(-1.5 - i)
            before = memory(model)
            for w, f in zip(model.parameters(), fresh.parameters(), strict=True):
                w.copy_(cut(w, f.detach()))
        assert memory(model) == before, way
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(model(x), quantized(copy.deepcopy(fresh))(x), tolerance)


@case
def refresh_fsdp(ranks, folder):
    """Rows that the ranks divide, and rows that they do not."""
    for sizes in ((64, 96, 48), (64, 97, 33)):
        torch._dynamo.reset()
        model = nn.Sequential(*(torch.compile(layer, fullgraph=True) for layer in quantized(layers(*sizes))))
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        refreshed(model, functools.partial(layers, *sizes), x_of(64), 1e-5)


@case
def refresh_tensor_parallel(ranks, folder):
    torch._dynamo.reset()
    model = parallel(quantized(mlp()), init_device_mesh("cpu", (ranks,)))
    refreshed(torch.compile(model, fullgraph=True), mlp, x_of(64), 1e-5)
