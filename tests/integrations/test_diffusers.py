"""Diffusion models: what diffusers does with a model, it does with a quantized one."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from rtn_tensor import (  # noqa: E402
    RTNQuantizedTensor,
    dequantize_,
    diffusion_blocks_only,
    fqn_config,
    load,
    quantize_,
    rtn,
    rtn_int4,
    save,
)
from rtn_tensor.cli import main  # noqa: E402

INT4 = rtn_int4(group_size=32)
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "use_linear_projection": True,
}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}
# Each with what of its linears the rules leave to be quantized, a block's names alone.
MODELS = {
    "FluxTransformer2DModel": (FLUX, "attn. ff. ff_context. proj_mlp proj_out"),
    "SD3Transformer2DModel": (
        HEADS
        | {
            "sample_size": 8,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 64,
        },
        "attn. ff. ff_context.",
    ),
    "QwenImageTransformer2DModel": (
        HEADS | {"joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)},
        "attn. img_mlp. txt_mlp.",
    ),
    "WanTransformer3DModel": (HEADS | {"ffn_dim": 128, "text_dim": 32}, "attn1. attn2. ffn."),
    "PixArtTransformer2DModel": (
        HEADS | {"cross_attention_dim": 64, "caption_channels": 32, "sample_size": 8},
        "attn1. attn2. ff.",
    ),
    "UNet2DConditionModel": (UNET, "attentions."),
}


def make(name="FluxTransformer2DModel", dtype=torch.bfloat16):
    torch.manual_seed(0)
    return getattr(diffusers, name)(**MODELS[name][0]).eval().to(dtype)


@pytest.fixture
def flux():
    return make()


def planes(model):
    return {fqn: w.planes for fqn, w in model.named_parameters() if isinstance(w, RTNQuantizedTensor)}


def assert_same(a, b):
    a, b = planes(a), planes(b)
    assert a
    assert a.keys() == b.keys()
    for fqn, each in a.items():
        for plane, t in each.items():
            assert torch.equal(t, b[fqn][plane]), (fqn, plane)


@torch.no_grad()
def output(model):
    random = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    return model(
        hidden_states=random(1, 16, 4),
        encoder_hidden_states=random(1, 8, 32),
        pooled_projections=random(1, 32),
        timestep=torch.tensor([1.0], dtype=torch.bfloat16),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
    ).sample


def rules(model):
    return [*diffusion_blocks_only(model), ("*.attn.*", rtn(bits=8, group_size=32)), ("*", INT4)]


@pytest.mark.parametrize("name", MODELS)
def test_rules_leave_the_products_of_blocks(name):
    model = make(name)
    report = quantize_(model, [*diffusion_blocks_only(model), ("*", INT4)])
    parts = tuple(MODELS[name][1].split())
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear):
            *_, last = fqn.rpartition(".0.") if ".0." in fqn else fqn.rpartition(".1.")
            in_blocks = any(f".{part}" in f"{fqn}." for part in parts) and "block" in fqn
            assert isinstance(module.weight, RTNQuantizedTensor) == in_blocks, fqn
    floats = {row.name: row.note for row in report.rows if row.bits is None}
    assert all(note for fqn, note in floats.items() if model.get_parameter(fqn).dim() > 1)


def test_rules_of_a_model_without_blocks():
    with pytest.raises(ValueError, match="Sequential has no linears in blocks, that is in a ModuleList"):
        diffusion_blocks_only(nn.Sequential(nn.Linear(64, 64)))


def test_save_pretrained_after_quantize(flux, tmp_path):
    quantize_(flux, rules(flux))
    flux.save_pretrained(tmp_path)
    got = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(got, flux)
    assert torch.equal(output(got), output(flux))
    assert_same(load(tmp_path), flux)


def test_save_pretrained_after_dequantize(flux, tmp_path):
    quantize_(flux, INT4)
    dequantize_(flux)
    flux.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    got = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(output(got), output(flux))


def test_from_pretrained_quantizes(flux, tmp_path):
    flux.save_pretrained(tmp_path / "float")
    read = partial(diffusers.FluxTransformer2DModel.from_pretrained, dtype=torch.bfloat16)
    got = read(tmp_path / "float", quantization_config=diffusers.TorchAoConfig(INT4))
    mixed = diffusers.TorchAoConfig(fqn_config(tmp_path / "float", rules(flux)))
    other = read(tmp_path / "float", quantization_config=mixed)
    expected, expected_other = copy.deepcopy(flux), copy.deepcopy(flux)
    quantize_(expected, INT4)
    quantize_(expected_other, rules(flux))
    for model, same in ((got, expected), (other, expected_other)):
        assert_same(model, same)
        model.save_pretrained(tmp_path / "quantized")
        assert_same(read(tmp_path / "quantized"), same)


def test_load_and_save(flux, tmp_path):
    flux.save_pretrained(tmp_path / "float")
    got = load(tmp_path / "float", rules(flux))
    assert type(got) is diffusers.FluxTransformer2DModel
    quantize_(flux, rules(flux))
    assert_same(got, flux)
    assert torch.equal(output(got), output(flux))
    save(got, tmp_path / "quantized")
    assert_same(load(tmp_path / "quantized"), flux)
    assert_same(diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "quantized"), flux)


def test_load_keeps_in_fp32_what_diffusers_does(tmp_path):
    model = make("WanTransformer3DModel", torch.float32)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    expected = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    got = load(tmp_path, INT4)
    floats = {fqn: w.dtype for fqn, w in got.named_parameters() if not isinstance(w, RTNQuantizedTensor)}
    assert torch.float32 in floats.values()
    assert floats == {fqn: w.dtype for fqn, w in expected.named_parameters() if fqn in floats}


def test_the_command_line(flux, tmp_path, capsys):
    flux.save_pretrained(tmp_path / "float")
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "q"), "--group-size", "32"]) == 0
    quantize_(flux, INT4)
    assert_same(load(tmp_path / "q"), flux)
    assert_same(diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "q"), flux)


def test_a_class_that_is_not_there(flux, tmp_path):
    flux.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("Flux9", "FluxPipeline", 3):
        (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        with pytest.raises(ValueError, match=f"has no model '{name}', which _class_name says"):
            load(tmp_path, INT4)


# ------------------------------------------------------------------------------- pipelines


NOT_THERE = {"tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def pipeline(transformer):
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,),
        latent_channels=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.to(torch.bfloat16),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=100, **small)).to(torch.bfloat16),
        transformer=transformer,
        **NOT_THERE,
    )


def picture(pipe):
    random = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=random(1, 8, 32),
        pooled_prompt_embeds=random(1, 32),
        height=8,
        width=8,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def test_a_pipeline(flux, tmp_path):
    import transformers

    pipeline(flux).save_pretrained(tmp_path / "float")
    quantized = diffusers.PipelineQuantizationConfig(
        quant_mapping={
            "transformer": diffusers.TorchAoConfig(INT4),
            "text_encoder": transformers.TorchAoConfig(rtn(bits=8, group_size=32)),
        }
    )
    read = partial(diffusers.FluxPipeline.from_pretrained, dtype=torch.bfloat16, **NOT_THERE)
    pipe = read(tmp_path / "float", quantization_config=quantized)
    quantize_(flux, INT4)
    assert_same(pipe.transformer, flux)
    assert {w.bits for w in pipe.text_encoder.parameters() if isinstance(w, RTNQuantizedTensor)} == {8}
    pipe.save_pretrained(tmp_path / "quantized")
    again = read(tmp_path / "quantized")
    assert_same(again.transformer, flux)
    assert_same(again.text_encoder, pipe.text_encoder)
    assert torch.equal(picture(again), picture(pipe))
    with pytest.raises(
        FileNotFoundError, match="it is a pipeline of diffusers; give the folder of one of its"
    ):
        load(tmp_path / "float", INT4)


def test_quantize_of_a_pipeline_names_its_parts(flux):
    with pytest.raises(TypeError, match=r"pipe\.transformer"):
        quantize_(pipeline(flux), INT4)
    with pytest.raises(TypeError, match=r"pipe\.transformer"):
        diffusion_blocks_only(pipeline(flux))


def lora(flux, folder):
    """Saves an adapter for `flux`, which changes what it gives."""
    from peft import LoraConfig

    model = copy.deepcopy(flux)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    model.save_lora_adapter(folder)


def test_lora(flux, tmp_path):
    pipe = pipeline(flux)
    lora(flux, tmp_path)
    quantize_(flux, rtn(bits=8, group_size=32))
    plain, planes_before = picture(pipe), copy.deepcopy(flux)
    pipe.transformer.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    adapted = picture(pipe)
    assert (adapted - plain).abs().max() > 0.01
    pipe.fuse_lora(components=["transformer"])
    assert isinstance(flux.transformer_blocks[0].attn.to_q.base_layer.weight, RTNQuantizedTensor)
    fused = picture(pipe)
    assert (fused - adapted).abs().mean() < 0.3 * (plain - adapted).abs().mean()
    pipe.unfuse_lora(components=["transformer"])
    pipe.transformer.unload_lora()
    assert (picture(pipe) - plain).abs().mean() < 0.3 * (plain - adapted).abs().mean()
    assert planes(flux).keys() == planes(planes_before).keys()


def test_an_adapter_is_trained(flux):
    from peft import LoraConfig

    quantize_(flux, INT4)
    flux.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with torch.enable_grad():
        output.__wrapped__(flux).float().square().mean().backward()
    trained = {fqn for fqn, w in flux.named_parameters() if w.grad is not None}
    assert trained
    assert all("lora_" in fqn for fqn in trained)


def test_group_offloading(flux):
    quantize_(flux, INT4)
    expected = output(flux)
    flux.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(output(flux), expected)
    assert planes(flux)


@torch.no_grad()
def test_group_offloading_moves_weights():
    """What group offloading does to a parameter as it comes and goes, between the CPU and meta in place of an
    accelerator."""
    from diffusers.hooks import group_offloading

    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantize_(model, INT4)
    w, x = model[0].weight, torch.randn(3, 64)
    expected, kept = model(x), w.clone()
    assert group_offloading._is_torchao_tensor(w)
    group_offloading._swap_torchao_tensor(w, w.to("meta"))
    assert w.device.type == w.qdata.device.type == w.scale.device.type == "meta"
    assert model(x.to("meta")).shape == expected.shape
    group_offloading._restore_torchao_tensor(w, kept)
    assert model[0].weight is w
    assert w.qdata.device.type == w.scale.device.type == "cpu"
    assert torch.equal(model(x), expected)
    group_offloading._swap_torchao_tensor(w, w.to("cpu", copy=True))
    assert w.device.type == "cpu"
    assert torch.equal(model(x), expected)


def test_offloading_of_models(flux):
    """diffusers asks for an accelerator, unless it is told a device: its hooks then move each model before
    its turn and after it, here from the CPU to the CPU."""
    quantize_(flux, INT4)
    pipe = pipeline(flux)
    expected = picture(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(picture(pipe), expected)
    assert len(pipe._all_hooks) >= 3
    pipe.maybe_free_model_hooks()
    assert torch.equal(picture(pipe), expected)
    assert planes(flux)


def test_compiled_blocks(flux):
    quantize_(flux, INT4)
    expected = output(flux)
    flux.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(output(flux), expected, rtol=0.05, atol=0.05)


def test_a_unet_says_that_its_convolutions_stay_float():
    report = quantize_(make("UNet2DConditionModel"), INT4)
    notes = {row.note for row in report.rows if row.bits is None}
    assert "weight of a Conv2d: no kernel" in notes
