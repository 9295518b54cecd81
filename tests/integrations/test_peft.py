"""Adapters of PEFT over quantized weights: merged, saved and loaded."""

import pytest
import torch
from adapters import (
    BITS,
    DOORS,
    IDS,
    adapted,
    assert_untouched,
    by_quantize_,
    by_transformers,
    logits,
    lora,
    planes,
    train,
)
from peft_version import skip_if_transformers_refuses_it
from tiny_llama import tiny_llama
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from rtn_tensor import RTNQuantizedTensor, dequantize_, quantize_, rtn, rtn_int4, rtn_int8

peft = pytest.importorskip("peft")

# PEFT still asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@BITS
@DOORS
@pytest.mark.parametrize("method", ["absmax", "signed", "minmax", "search8"])
def test_merge(folder, tmp_path, door, bits, method):
    """A merged weight is quantized anew, in the format that it had; the others keep their bits."""
    model = adapted(door(folder, rtn(bits, 64, method)), lora(init_lora_weights=False))
    expected = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            w = module.base_layer.weight.dequantize() + module.get_delta_weight("default").detach()
            expected[f"{name}.weight"] = RTNQuantizedTensor.from_float(w, bits, 64, method)
    assert len(expected) == 4
    untouched = door(folder, rtn(bits, 64, method))
    merged = model.merge_and_unload()
    assert type(merged) is type(untouched)
    for name, p in untouched.named_parameters():
        assert torch.equal(merged.get_parameter(name), expected.get(name, p)), name
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_merge_into_int8_is_close(folder):
    model = adapted(by_transformers(folder, rtn_int8(32)), lora(init_lora_weights=False))
    before = logits(model)
    after = logits(model.merge_and_unload())
    assert (after - before).norm() < 0.05 * before.norm()


def test_what_peft_refuses_to_merge(folder):
    model = adapted(by_transformers(folder, FqnToConfig({"re:.*_proj": rtn_int4(64)})))
    with pytest.raises(ValueError, match="Custom filter_fn and FqnToConfig were both specified"):
        model.merge_and_unload()


OTHERS = {
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "AdaLora": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 10}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 50}),
    "VBLoRA": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 16}),
    "RandLora": ("RandLoraConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "RoAd": ("RoadConfig", {"group_size": 32}),
    "RoAd-4": ("RoadConfig", {"group_size": 32, "variant": "road_4"}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "C3A": ("C3AConfig", {"block_size": 32}),
    "Deft": ("DeftConfig", {"r": 4}),
    "UniLora": ("UniLoraConfig", {"r": 4, "theta_d_length": 64}),
    "GraLora": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 50}),
    "PVeRA": ("PveraConfig", {"r": 8}),
    "VeRA": ("VeraConfig", {"r": 8}),
    "Adamss": ("AdamssConfig", {"r": 16, "num_subspaces": 2}),
    "Peanut": ("PeanutConfig", {"r": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "OFT": ("OFTConfig", {"oft_block_size": 8}),
    "MiSS": ("MissConfig", {"r": 4}),
    "MiSS-bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "SHiRA": ("ShiraConfig", {"r": 4}),
    "TargetParameters": ("LoraConfig", {"r": 4, "target_parameters": ["up_proj.weight"]}),
}


def other(name):
    kind, options = OTHERS[name]
    return getattr(peft, kind)(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)


def trained_adapter(model, config):
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    before = planes(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    for _ in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_untouched(model, before)
    return model


# BOFT builds an extension for CUDA, SHiRA and FRoD a sparse tensor, and what IA3 has multiplied by may be
# near 0.
noisy = pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n",
    "ignore:Sparse invariant checks",
    "ignore:Unmerge result",
)


@noisy
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@pytest.mark.parametrize("name", OTHERS)
def test_adapters_that_merge_in_place(folder, name, safe):
    """They compute with `weight.data`: a merged weight is what the same adapter makes of the dequantized one,
    quantized anew."""
    model = trained_adapter(by_quantize_(folder, rtn_int8(32)), other(name))
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).norm() > 0.005 * expected.norm()
    plain = by_quantize_(folder, rtn_int8(32))
    dequantize_(plain)  # before the adapter is attached: PEFT remembers what it found
    torch.manual_seed(0)
    plain = peft.get_peft_model(plain, other(name))
    adapter = {key: t for key, t in model.state_dict().items() if not isinstance(t, RTNQuantizedTensor)}
    assert not plain.load_state_dict(adapter, strict=False).unexpected_keys
    plain = plain.merge_and_unload(safe_merge=safe)
    assert (logits(plain) - expected).norm() < 1e-3 * expected.norm()
    merged = model.merge_and_unload(safe_merge=safe)
    assert len(planes(merged)) == 14
    for fqn, p in merged.named_parameters():
        w = plain.get_parameter(fqn)
        if isinstance(p, RTNQuantizedTensor):
            step = p.scale.abs().repeat_interleave(32, -1)[:, : w.shape[-1]]
            assert ((p.dequantize() - w).abs() <= 0.501 * step + 1e-4 * w.abs().max()).all(), fqn
        else:
            assert torch.equal(p, w), fqn
    assert (logits(merged) - expected).norm() < 0.15 * expected.norm()


@noisy
@pytest.mark.parametrize("name", OTHERS)
def test_adapters_unmerge(folder, name):
    """To within the steps that the merged weight had, which are as large as what was added."""
    model = trained_adapter(by_quantize_(folder, rtn_int8(32)), other(name))
    with model.disable_adapter():
        base = logits(model)
    expected = logits(model)
    effect = (expected - base).norm()
    model.merge_adapter()
    model.unmerge_adapter()
    assert (logits(model) - expected).norm() < 0.15 * expected.norm()
    with model.disable_adapter():
        assert (logits(model) - base).norm() < 0.2 * max(base.norm(), effect)


@pytest.mark.parametrize("name", ["HRA", "RoAd", "IA3", "Deft", "LoHa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_merge_into_half_precision(folder, name, dtype):
    config = TorchAoConfig(rtn_int8(-1))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    model = trained_adapter(model, other(name))
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert {w.scale.dtype for w in merged.parameters() if isinstance(w, RTNQuantizedTensor)} == {dtype}
    assert (logits(merged) - expected).norm() < 0.1 * expected.norm()


# Those that begin from the weight, or compute with it in each forward: (config, options, whether attaching it
# is already an error).
REFUSED = {
    "DeLoRA": ("DeloraConfig", {"r": 4}, True),
    "PSOFT": ("PsoftConfig", {"r": 4}, True),
    "TinyLora": ("TinyLoraConfig", {}, True),
    "FRoD": ("FrodConfig", {"progressbar": False}, True),
    "OSF": ("OSFConfig", {"effective_rank": 4}, True),
    "Supertuning": ("SupertuningConfig", {}, True),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}, True),
    "HiRA": ("HiraConfig", {"r": 4}, False),
    "GLoRA": ("GloraConfig", {"r": 4}, False),
}


@noisy
@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused_before_training(folder, name):
    """By the weight's name and the rule that leaves it float; with that rule they train, and merge."""
    kind, options, at_once = REFUSED[name]
    targets = ["q_proj", "down_proj"]
    config = getattr(peft, kind)(target_modules=targets, task_type="CAUSAL_LM", **options)
    message = r"(q_proj|down_proj)\.weight: .*\.dequantize\(\).* stays float by the rule"
    refuses = pytest.raises(NotImplementedError, match=message)
    if at_once:
        with refuses:
            peft.get_peft_model(by_quantize_(folder, rtn_int4(64)), config)
    else:
        model = peft.get_peft_model(by_quantize_(folder, rtn_int4(64)), config)
        with refuses:
            model(input_ids=IDS, labels=IDS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(
        model, [*((f"re:.*{target}.weight", None) for target in targets), ("model.layers.*", rtn_int8(32))]
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    assert sum(isinstance(p, RTNQuantizedTensor) for p in model.parameters()) == 10
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = logits(model)
    torch.testing.assert_close(
        logits(model.merge_and_unload()), expected, rtol=0, atol=2e-3 * expected.abs().max().item()
    )


def test_modules_to_save_of_a_quantized_layer_warns(folder):
    """PEFT would train a copy of it, and a quantized weight is not trained."""
    config = lora(modules_to_save=["up_proj"])
    with pytest.warns(
        UserWarning,
        match=r"up_proj.weight is quantized and will not be trained .* stays " r"float by the rule",
    ):
        adapted(by_quantize_(folder, rtn_int4(64)), config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(model, [("*.up_proj", None), ("model.layers.*", rtn_int4(64))])
    model = adapted(model, config)
    model(IDS, labels=IDS).loss.backward()
    assert (
        model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.modules_to_save.default.weight")
        .grad.abs()
        .max()
        > 0
    )


def test_xlora(folder, tmp_path):
    for name in "01":
        adapted(AutoModelForCausalLM.from_pretrained(folder), lora(init_lora_weights=False)).save_pretrained(
            tmp_path / name
        )
    model = by_quantize_(folder, rtn_int4(64))
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=96, xlora_depth=2, adapters={n: str(tmp_path / n) for n in "01"}
    )
    model = peft.get_peft_model(model, config)
    before = planes(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained
    assert all("internal_xlora_classifier" in name for name in trained)
    assert_untouched(model, before)


def test_corda_is_refused_by_name(folder):
    """It takes from the weight what the adapter begins with."""
    from peft.tuners.lora.corda import preprocess_corda

    model = by_quantize_(folder, rtn_int4(64))
    config = lora(
        init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="kpm")
    )
    preprocess_corda(model, config, run_model=lambda: [model(IDS[:1]) for _ in range(2)])
    with pytest.raises(
        NotImplementedError, match=r"q_proj.weight: .*\.dequantize\(\).* stays float by the " r"rule"
    ):
        peft.get_peft_model(model, config)


def test_two_adapters_merge_as_one(folder):
    """PEFT merges one adapter into a tensor of torchao's kind, and fails over the second (UnboundLocalError);
    joined first, they merge."""
    model = adapted(by_transformers(folder, rtn_int8(32)), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert (logits(model.merge_and_unload()) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_prepare_for_kbit_training(dtype, tied, everything):
    """It sets each parameter's `.data` to a float32 copy: the integers stay, and products are of float32."""
    model = tiny_llama(tied=tied, dtype=dtype)
    kinds = (nn.Linear, nn.Embedding) if everything else nn.Linear
    quantize_(
        model,
        rtn_int4(64),
        lambda module, fqn: isinstance(module, kinds) and (everything or fqn != "lm_head"),
    )
    old = {
        name: (p.qdata.clone(), p.scale.float())
        for name, p in model.named_parameters()
        if isinstance(p, RTNQuantizedTensor)
    }
    assert len(old) == 14 + everything * (1 if tied else 2)
    before = logits(model).float()
    model = peft.prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, (qdata, scale) in old.items():
        w = model.get_parameter(name)
        assert torch.equal(w.qdata, qdata)
        assert torch.equal(w.scale, scale)
    assert (logits(model) - before).norm() < (0.06 if dtype is torch.bfloat16 else 0.01) * before.norm()
    first, last = train(adapted(model))
    assert last < 0.9 * first


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@DOORS
def test_prepare_for_kbit_training_by_every_door(folder, door):
    model = peft.prepare_model_for_kbit_training(door(folder, rtn_int4(64)))
    first, last = train(adapted(model))
    assert last < 0.9 * first


@BITS
@DOORS
def test_adapter_there_and_back(folder, tmp_path, door, bits):
    """Onto a copy of the model, whatever the door."""
    model = adapted(door(folder, rtn(bits, 64)))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(by_transformers(folder, rtn(bits, 64)), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(door(folder, rtn(bits, 64))))


def test_adapter_of_transformers_there_and_back(folder, tmp_path):
    model = by_transformers(folder, rtn_int4(64))
    skip_if_transformers_refuses_it()
    model.add_adapter(lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").glob("*.safetensors")) == [
        "adapter_model.safetensors"
    ]
    again = by_transformers(folder, rtn_int4(64))
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
