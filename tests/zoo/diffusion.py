"""Tiny random transformers and UNets of diffusers, through what the product does with a module that is not
transformers'. `PYTHONPATH=tests python -m zoo.diffusion` writes the list that the test goes by, and its part of
docs/models.md."""

import copy
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn
from zoo.inputs import ids, numbers
from zoo.sweep import (
    CONFIG,
    DIFFUSION,
    MOST,
    Inputs,
    answer,
    answers,
    assert_close,
    assert_equal,
    forward,
    layers,
    left_float,
    missing,
    reason,
    write_page,
)
from zoo.tiny_configs import limit

from rtn_tensor import RTNQuantizedTensor, load, quantize_, save

UNET = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 16}
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
PATCHES = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "sample_size": 16}
# Beside what the names of their sizes say.
SPECIAL = {
    "UNet2DConditionModel": UNET | {"down_block_types": DOWN, "up_block_types": UP, "attention_head_dim": 8},
    "UNet2DModel": UNET
    | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet3DConditionModel": UNET
    | {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "attention_head_dim": 8,
    },
    "FluxTransformer2DModel": {"axes_dims_rope": (4, 6, 6), "in_channels": 4},
    "SD3Transformer2DModel": {"sample_size": 16, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 16},
    "QwenImageTransformer2DModel": {"axes_dims_rope": (4, 6, 6), "in_channels": 16, "out_channels": 4},
    "PixArtTransformer2DModel": PATCHES
    | {"out_channels": 8, "caption_channels": 64, "num_embeds_ada_norm": 1000, "use_additional_conditions": False},
    "DiTTransformer2DModel": PATCHES | {"num_embeds_ada_norm": 1000},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "sample_size": 16, "mlp_ratio": 2.0},
    "LatteTransformer3DModel": PATCHES | {"caption_channels": 64, "cross_attention_dim": 64, "num_layers": 2, "video_length": 2},
    "Transformer2DModel": {"in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 64},
    "LuminaNextDiT2DModel": {"num_kv_heads": 2, "in_channels": 4},
    **dict.fromkeys(
        ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        {"sample_width": 16, "sample_height": 16, "sample_frames": 5, "max_text_seq_length": 7},
    ),
    "UNetSpatioTemporalConditionModel": {"projection_class_embeddings_input_dim": 192},
    "DreamLiteTransformer2DModel": {"in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 64},
    "TransformerTemporalModel": {"in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 64},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2, "text_emb_dim": 64,
        "caption_channels": [64, 64], "llama_layers": [0, 1]},
    "OmniGenTransformer2DModel": {"pad_token_id": 0, "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        "num_key_value_heads": 4},
    "PRXTransformer2DModel": {"axes_dim": [8, 8]},
}  # fmt: skip


def names() -> list[str]:
    """The transformers and UNets of diffusers that are one model."""
    found = [
        n for n in dir(diffusers) if ("Transformer" in n or "UNet" in n or "DiT" in n) and "Vae" not in n
    ]
    kinds = {n: getattr(diffusers, n) for n in found if "ControlNet" not in n}
    return sorted(n for n, k in kinds.items() if inspect.isclass(k) and issubclass(k, diffusers.ModelMixin))


HEAD = 16  # of the channels of a tiny head
AXES = re.compile(r"(rope_)?axes?_dims?(_rope)?|axes_dims?_rope|rope_axes_dim|rope_dim(_list)?")


def of_axes(count: int) -> list[int]:
    """How many channels of a head each of so many axes turns: even numbers."""
    each = HEAD // 2 // count
    return [HEAD - 2 * each * (count - 1), *[2 * each] * (count - 1)]


def make(name: str) -> nn.Module:
    kind = getattr(diffusers, name)
    sizes: dict[str, Any] = {}
    for field, parameter in inspect.signature(kind.__init__).parameters.items():
        value, most = parameter.default, limit(field)
        if type(value) is int and most is not None and value > most:
            sizes[field] = most
        elif isinstance(value, tuple | list) and AXES.fullmatch(field):
            sizes[field] = type(value)(of_axes(len(value)))
        elif isinstance(value, tuple | list) and field == "block_out_channels":
            sizes[field] = tuple(min(v, 64) for v in value)
        elif isinstance(value, tuple | list) and re.fullmatch(r"vace_layers|injection_layer_ids", field):
            sizes[field] = type(value)([0])
    return kind(**sizes | SPECIAL.get(name, {}))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in make(name).parameters())
    if size > MOST:
        raise MemoryError(f"it has {size / 1e6:.0f} million parameters, however it is shrunk")
    model = make(name).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in model.parameters():
            if not w.isfinite().all():
                w.zero_()
            w.add_(torch.randn(w.shape, generator=generator), alpha=0.02)
    return model


def trials(model: nn.Module) -> Iterator[dict]:
    """What may be given to the model's forward, by the names of its parameters."""
    known = inspect.signature(model.forward).parameters
    config = model.config
    channels = next((config[n] for n in ("in_channels", "in_visual_dim", "io_channels") if n in config), 4)
    channels = channels if isinstance(channels, int) else 4
    text = [
        config[n]
        for n in ("joint_attention_dim", "text_dim", "caption_channels", "text_embed_dim")
        if n in config
    ]
    text += [config[n] for n in ("cross_attention_dim", "cap_feat_dim", "context_in_dim") if n in config] + [
        64
    ]
    width = next(n for n in text if isinstance(n, int))
    pooled = numbers(2, config.get("pooled_projection_dim") or 64)
    pooled = pooled[:, : config.get("projection_class_embeddings_input_dim") or pooled.shape[1]]
    axes = next((len(v) for n, v in config.items() if AXES.fullmatch(n)), 3)
    others = {
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_hidden_states": numbers(2, 7, width),
        "pooled_projections": pooled,
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.int64),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "img_ids": torch.zeros(16, axes),
        "txt_ids": torch.zeros(7, axes),
        "guidance": torch.tensor([1.0, 1.0]),
        "class_labels": torch.tensor([1, 2]),
        "proj_embedding": numbers(2, 64),
        "original_size": torch.full((2, 2), 16.0),
        "target_size": torch.full((2, 2), 16.0),
        "crop_coords": torch.zeros(2, 2),
        "timestep_r": torch.tensor([1.0, 2.0]),
        "r_timestep": torch.tensor([1.0, 2.0]),
        "image_rotary_emb": (numbers(64, 16), numbers(64, 16)),
        "position_ids": ids(2, 9),
        "encoder_mask": torch.ones(2, 7, dtype=torch.int64),
        "mask": torch.ones(2, 7, dtype=torch.int64),
        "added_time_ids": numbers(2, 3),
        "control_hidden_states": numbers(2, config.get("vace_in_channels") or channels, 2, 16, 16),
        "timestep_ratio": torch.tensor([0.1, 0.2]),
        "clip_text_pooled": numbers(2, 1, config.get("clip_text_pooled_in_channels") or 64),
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }
    given = {n: v for n, v in others.items() if n in known}
    needed = {n: v for n, v in given.items() if known[n].default is inspect.Parameter.empty}
    usual = {n: v for n, v in given.items() if n in ("timestep", "encoder_hidden_states", "class_labels")}
    groups = [
        ("pooled_projections", "img_ids", "txt_ids"),
        ("pooled_projections", "img_ids", "txt_ids", "guidance"),
        ("encoder_hidden_states_mask", "img_shapes"),
        ("num_frames", "height", "width", "encoder_attention_mask"),
        ("pooled_projections", "guidance", "encoder_attention_mask"),
        ("global_hidden_states", "rotary_embedding"),
    ]
    wishes = [needed | usual | {n: given[n] for n in group if n in given} for group in groups]
    shapes = [(2, channels, 16, 16), (2, 16, channels), (2, channels, 2, 16, 16), (2, 2, channels, 16, 16)]
    shapes += [(2, channels, 16), (2, channels)]
    for first in ("sample", "hidden_states"):
        if first in known:
            for more in (needed, needed | usual, *wishes, given):
                for shape in shapes:
                    yield {first: numbers(*shape)} | more
                    yield {first: numbers(*shape)} | more | {"timestep": torch.tensor([3, 7])}


def check(name: str, model: nn.Module, inputs: Inputs, folder: Path) -> list[str]:
    """As `zoo.sweep.check`."""
    (folder / "float").mkdir()
    save_file(model.state_dict(), folder / "float" / "model.safetensors")
    quantized = copy.deepcopy(model)
    report = quantize_(quantized, CONFIG)
    got = answer(quantized, inputs)
    save(quantized, folder / "own")
    again = load(folder / "own", model=make(name).eval())
    assert_equal(again, quantized)
    assert_close(answers(again, inputs), got)
    # `load` leaves float what the class keeps in fp32, too.
    loaded = load(folder / "float", CONFIG, make(name).eval())
    chosen = [fqn for fqn, w in loaded.named_parameters() if isinstance(w, RTNQuantizedTensor)]
    assert chosen
    quantize_(model, [(fqn, CONFIG) for fqn in chosen], lambda module, fqn: True)
    assert_equal(loaded, model)
    return left_float(quantized, report)


def find(name: str) -> dict:
    try:
        model = build(name)
    except Exception as error:
        return {"class": name, "not built": reason(error)}
    for i, inputs in enumerate(trials(model)):
        try:
            assert forward(model, inputs)
        except Exception:
            continue
        return {"class": name, "trial": i}
    return {"class": name, "layers": missing(model, next(iter(trials(model)), {}))}


def run(entry: dict, folder: Path) -> list[str]:
    model = build(entry["class"])
    inputs = next(x for i, x in enumerate(trials(model)) if i == entry["trial"]) if "trial" in entry else None
    return check(entry["class"], model, layers(model) if inputs is None else {"": inputs}, folder)


def main() -> None:
    found = []
    for name in names():
        entry = find(name)
        if "not built" not in entry:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    entry |= {"float": left} if (left := run(entry, Path(folder))) else {}
                except Exception as error:
                    print(f"{name}: FAILS: {type(error).__name__}: {str(error)[:300]}", flush=True)
        print(json.dumps(entry), flush=True)
        found.append(entry)
    DIFFUSION.write_text("".join(json.dumps(e) + "\n" for e in found), encoding="utf-8", newline="\n")
    write_page()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
