"""Quantize the transformer of a diffusion pipeline: in memory, or as diffusers loads it; save it, add a LoRA.

python tutorials/12_quantize_a_diffusion_model.py

It needs diffusers and PEFT: pip install diffusers peft
"""

import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
    TorchAoConfig,
)
from peft import LoraConfig

from rtn_tensor import diffusion_blocks_only, fqn_config, quantize_, rtn_int4, rtn_int8

torch.manual_seed(0)
# A pipeline as FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev") gives it, but tiny, random and
# without encoders of text: their outputs are given below.
without = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4}
transformer = FluxTransformer2DModel(
    patch_size=1,
    in_channels=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    axes_dims_rope=(8, 8, 16),
    **sizes,
)
vae = AutoencoderKL(latent_channels=1, shift_factor=0.1, scaling_factor=1.5)
pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, transformer=transformer, **without).to(
    torch.bfloat16
)
pipe.set_progress_bar_config(disable=True)
embeds = torch.randn(1, 8, 64, dtype=torch.bfloat16)


def draw(pipe):
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=embeds[:, 0],
        height=16,
        width=16,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


expected = draw(pipe)
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    pipe.save_pretrained(folder / "float")

    # In memory: attention and feed-forward in int4; what embeds patches, time step and prompt, and what
    # modulates the blocks, stays float, as little of it is large and errors in it reach everything.
    print(quantize_(pipe.transformer, [*diffusion_blocks_only(pipe.transformer), ("*", rtn_int4())]))
    difference = (draw(pipe) - expected).abs().mean() / expected.abs().mean()
    print(f"int4: the latents differ by {difference:.1%}")
    pipe.transformer.save_pretrained(folder / "int4")  # from_pretrained reads it back, quantized

    # Or as diffusers reads the float folder: one config for a part, by the same rules.
    parts = folder / "float" / "transformer"
    rules = [*diffusion_blocks_only(transformer), ("*", rtn_int8())]
    config = PipelineQuantizationConfig(
        quant_mapping={"transformer": TorchAoConfig(fqn_config(parts, rules))}
    )
    pipe = FluxPipeline.from_pretrained(
        folder / "float", quantization_config=config, dtype=torch.bfloat16, **without
    )
    difference = (draw(pipe) - expected).abs().mean() / expected.abs().mean()
    print(f"int8: the latents differ by {difference:.1%}")

    # An adapter goes on top; load_lora_weights, fuse_lora and unfuse_lora work as on a float model.
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    trained = [name for name, p in pipe.transformer.named_parameters() if p.requires_grad]
    print(f"{len(trained)} matrices of the adapter are trained")
