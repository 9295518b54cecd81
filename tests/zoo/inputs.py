"""Inputs of any model of transformers, by the names of its forward's parameters."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def ids(*shape: int) -> Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(0))


def found(config: Any, *names: str, default: Any) -> Any:
    """The first of the fields `names` that the config has, or one of the configs in it."""
    inner = [v for v in vars(config).values() if hasattr(v, "to_dict")]
    for name in names:
        for c in (config, *inner):
            value = getattr(c, name, None)
            if value is not None and not isinstance(value, str | dict):
                return value
    return default


def whole(config: Any, *names: str, default: int) -> int:
    value = found(config, *names, default=default)
    return value if isinstance(value, int) and value > 0 else default


def sized(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def candidates(config: Any) -> dict[str, list]:
    """By the name of an input, what may be given there, in the order of trial."""
    c = found(config, "num_channels", "in_channels", "in_chans", default=3)
    c = c if isinstance(c, int) else 3
    h, w = sized(found(config, "image_size", "img_size", "input_size", default=64))
    sizes = list(dict.fromkeys([(h, w), (64, 64), (128, 128), (224, 224)]))
    mel = whole(
        config,
        "num_mel_bins",
        "feature_size",
        "n_mels",
        "input_feat_per_channel",
        "input_dim",
        "mel_bins",
        "num_mels",
        default=80,
    )
    frames = found(config, "num_frames", "frames_per_clip", default=4)
    frames = frames if isinstance(frames, int) else 4
    source = whole(config, "max_source_positions", default=64)
    length = whole(config, "max_length", "spectrogram_length", default=128)
    hidden = whole(config, "hidden_size", "d_model", "embed_dim", default=64)
    text = ids(2, 9)
    patch = found(config, "patch_size", default=8)
    patch = sized(patch)[0]
    times = found(config, "temporal_patch_size", default=1)
    times = times if isinstance(times, int) else times[0]
    h, w = (h, w) if h < 300 else (64, 64)
    lags = found(config, "lags_sequence", default=[0])
    past, ahead = (whole(config, n, default=8) for n in ("context_length", "prediction_length"))
    past += max(lags) if isinstance(lags, list) else 0
    flat = c * patch * patch * times
    grid = torch.tensor([[1, 4, 4]])
    return {
        "input_ids": [text],
        "decoder_input_ids": [text[:, :5]],
        "pixel_values": [numbers(2, c, *s) for s in sizes]
        + [numbers(2, frames, c, *s) for s in sizes[:2]]
        + [numbers(2, 1, c, *s) for s in sizes[:1]]
        + [numbers(16, flat), numbers(2, 2, c, 64, 64), numbers(2, 16, flat)],
        "pixel_values_videos": [numbers(1, frames, c, h, w)],
        "images": [numbers(2, c, h, w)],
        "image": [numbers(2, c, h, w)],
        "image_grid_thw": [grid],
        "grid_thw": [grid],
        "flattened_patches": [numbers(2, 16, flat + 2)],
        "input_features": [
            numbers(2, mel, 2 * source),
            numbers(2, 64, mel),
            numbers(2, mel, 64),
            numbers(2, mel, 3000),
            numbers(2, 1, 1024, mel),
            numbers(2, 64, 2 * mel),
        ],
        "input_values": [
            numbers(2, 1600),
            numbers(2, 1, 1600),
            numbers(2, length, mel),
            numbers(2, 64, mel),
            numbers(2, 16000),
            numbers(1, 1, 64, mel),
        ],
        "audio_values": [numbers(2, 1600)],
        "hidden_states": [
            numbers(2, 9, hidden),
            numbers(16, flat),
            numbers(2, hidden, 8, 8),
            numbers(2, mel, 64),
        ],
        "inputs_embeds": [numbers(2, 9, hidden)],
        "encoder_hidden_states": [numbers(2, 9, hidden)],
        "query_embeds": [numbers(2, 8, hidden)],
        "bbox": [torch.zeros(2, 9, 4, dtype=torch.int64)],
        "attention_mask": [torch.ones(2, 9, dtype=torch.int64)],
        "past_values": [
            numbers(2, found(config, "context_length", default=64)),
            numbers(
                2, found(config, "context_length", default=64), found(config, "num_input_channels", default=1)
            ),
        ],
        # Of forecasts: what is known of the time beside the values, and the values' continuation.
        "past_time_features": [numbers(2, past, found(config, "num_time_features", default=0))],
        "past_observed_mask": [torch.ones(2, past)],
        "future_values": [numbers(2, ahead)],
        "future_time_features": [numbers(2, ahead, found(config, "num_time_features", default=0))],
        "series": [numbers(2, past)],
        "task_inputs": [ids(2, 9)],
        "state": [numbers(2, whole(config, "max_state_dim", "state_dim", default=32))],
        "audio_codes": [
            ids(2, found(config, "num_quantizers", "num_codebooks", default=1), 9),
            ids(2, 9, found(config, "num_codebooks", default=1)) % 8,
        ],
        "visual_feats": [numbers(2, 4, found(config, "visual_feat_dim", default=64))],
        "visual_pos": [numbers(2, 4, 4)],
        "spectrogram": [numbers(2, 64, found(config, "model_in_dim", "num_mel_bins", default=80))],
        "codes": [ids(2, 9)],
        "qformer_input_ids": [text],
        "decoder_inputs_embeds": [numbers(2, 5, hidden)],
        "position_ids": [torch.arange(9).repeat(2, 1)],
        "input_boxes": [torch.tensor([[[2.0, 2.0, 20.0, 20.0]]] * 2)],
        "input_points": [torch.tensor([[[[4.0, 4.0]]]] * 2)],
        "decoder_input_values": [numbers(2, 8, found(config, "num_mel_bins", default=80))],
        "states": [numbers(2, 5, found(config, "state_dim", default=17))],
        "actions": [numbers(2, 5, found(config, "act_dim", default=4))],
        "rewards": [numbers(2, 5, 1)],
        "returns_to_go": [numbers(2, 5, 1)],
        "timesteps": [torch.arange(5).repeat(2, 1)],
        "pixel_attention_mask": [torch.ones(2, h // patch * (w // patch), dtype=torch.int64)],
        "spatial_shapes": [torch.tensor([[4, 4]] * 2)],
    }


def required(model: nn.Module) -> tuple[list[str], dict[str, inspect.Parameter]]:
    parameters = {
        n: p
        for n, p in inspect.signature(model.forward).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return [n for n, p in parameters.items() if p.default is p.empty], parameters


def trials(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What may be given to the model's forward, the likeliest first."""
    given = candidates(model.config)
    needed, parameters = required(model)
    if "past_time_features" in parameters:
        given["past_values"] = given["series"]
    if any(n not in given for n in needed):
        needed = [n for n in needed if n in given]
    main = getattr(model, "main_input_name", "input_ids")
    main = list(main) if isinstance(main, list | tuple) else [main]
    first = [n for n in dict.fromkeys([*main, *needed]) if n in parameters and n in given]
    sets = []
    if "decoder_input_ids" in parameters:
        sets.append([*first, "decoder_input_ids"])
    sets += [
        first,
        [*first, "input_ids", "input_features"],
        [*first, "input_features"],
        [*first, "input_values"],
        [*first, "input_ids"],
        [*first, "pixel_values"],
        [*first, "input_ids", "pixel_values"],
        ["input_ids"],
        ["pixel_values"],
        ["input_features"],
        [*first, "image_grid_thw"],
        ["input_ids", "bbox"],
        ["input_ids", "pixel_values", "bbox"],
        [*first, "decoder_input_values"],
        ["input_values", "input_ids"],
        ["input_features", "input_ids"],
        ["pixel_values", "input_boxes"],
        ["pixel_values", "pixel_attention_mask", "spatial_shapes"],
        ["input_ids", "pixel_values", "pixel_attention_mask", "spatial_shapes"],
        ["states", "actions", "rewards", "returns_to_go", "timesteps"],
        ["input_ids", "visual_feats", "visual_pos"],
        [*first, "input_points"],
        ["past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features"],
        ["input_ids", "qformer_input_ids", "decoder_input_ids"],
    ]
    seen = []
    for names in sets:
        names = list(dict.fromkeys(names))
        if not names or sorted(names) in seen or any(n not in parameters for n in names):
            continue
        seen.append(sorted(names))
        most = max(len(given[n]) for n in names)
        for i in range(most):
            # A cache of the text before is of no use here, and has rules of its own.
            more = {"use_cache": False} if "use_cache" in parameters else {}
            yield more | {n: given[n][i % len(given[n])] if len(given[n]) > 1 else given[n][0] for n in names}
