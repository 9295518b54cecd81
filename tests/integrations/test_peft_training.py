"""Adapters of PEFT over quantized weights, trained by hand and by transformers' Trainer."""

import pytest
import torch
from adapters import (
    BITS,
    DOORS,
    IDS,
    adapted,
    assert_untouched,
    by_load,
    by_quantize_,
    by_transformers,
    logits,
    lora,
    losses,
    planes,
    train,
)
from peft_version import skip_if_transformers_refuses_it
from tiny_llama import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments

from rtn_tensor import dequantize_, quantize_, rtn, rtn_int4

peft = pytest.importorskip("peft")

# PEFT still asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


# -------------------------------------------------------------------------------- training


@BITS
@DOORS
@pytest.mark.parametrize("method", [None, "minmax", "search8"])
def test_lora_trains_over_frozen_weights(folder, door, bits, method):
    model = adapted(door(folder, rtn(bits, 64, method)))
    before = planes(model)
    first, last = train(model)
    assert last < 0.9 * first
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_over_half_precision(folder, dtype):
    config = TorchAoConfig(rtn_int4(64))
    model = adapted(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype))
    # PEFT keeps adapters exact.
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    before = planes(model)
    first, last = train(model)
    assert last < 0.9 * first
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["absmax", "minmax", "search8"])
def test_gradients_are_those_of_the_dequantized_model(folder, method):
    """The adapters of a model whose weights are q * S in plain float get the same gradients."""
    quantized = adapted(by_transformers(folder, rtn_int4(64, method)), lora(init_lora_weights=False))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(
        plain, rtn_int4(64, method), lambda module, fqn: isinstance(module, nn.Linear) and fqn != "lm_head"
    )
    dequantize_(plain)
    plain = peft.get_peft_model(plain, lora())
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(quantized))
    for model in (quantized, plain):
        model(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in quantized.named_parameters() if p.grad is not None}
    assert len(gradients) == 8
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        expected = plain.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_4"])
def test_initializations_from_the_weight_name_it(folder, init):
    """They fail as they are attached, before anything is trained."""
    model = by_quantize_(folder, rtn_int4(64))
    with pytest.raises(
        NotImplementedError,
        match=r"q_proj.weight: .* call it on .dequantize\(\).* stays " r"float by the rule",
    ):
        peft.get_peft_model(model, lora(init_lora_weights=init))


# ------------------------------------------------------------------- transformers' Trainer


def trainer(model, folder, **kwargs):
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    options = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True} | kwargs
    return Trainer(model, TrainingArguments(str(folder / "trainer"), **options), train_dataset=data)


@BITS
@DOORS
def test_trainer(folder, door, bits):
    """transformers goes by the name of the config: of its own door's models it trains adapters that PEFT put
    there over int8 alone."""
    model = adapted(door(folder, rtn(bits, 64)))
    if door is by_transformers and bits == 4:
        with pytest.raises(ValueError, match="that quantization method do not support training"):
            trainer(model, folder)
        return
    before = planes(model)
    trained = trainer(model, folder)
    trained.train()
    first, last = losses(trained)
    assert last < 0.9 * first
    assert_untouched(model, before)


@BITS
def test_trainer_over_an_adapter_that_transformers_put_there(folder, bits):
    model = by_transformers(folder, rtn(bits, 64))
    skip_if_transformers_refuses_it()
    model.add_adapter(lora())
    before = planes(model)
    trained = trainer(model, folder)
    trained.train()
    first, last = losses(trained)
    assert last < 0.9 * first
    assert_untouched(model, before)
    trained.save_model(folder / "adapter")
    again = by_transformers(folder, rtn(bits, 64))
    again.load_adapter(folder / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_trainer_goes_on_from_its_checkpoint(folder):
    def fresh():
        torch.manual_seed(0)
        return adapted(by_load(folder, rtn_int4(64)))

    whole = trainer(fresh(), folder / "whole")
    whole.train()
    trainer(fresh(), folder / "parts", max_steps=6, save_strategy="steps", save_steps=3).train()
    assert not list((folder / "parts").rglob("model*.safetensors"))  # the base is not written each time
    rest = trainer(fresh(), folder / "parts")
    rest.train(resume_from_checkpoint=str(folder / "parts" / "trainer" / "checkpoint-3"))
    assert rest.state.global_step == 6
    assert torch.equal(logits(rest.model), logits(whole.model))
