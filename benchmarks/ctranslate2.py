"""Whisper as CTranslate2 keeps it (version 6 of its file format), made a transformers folder."""

import json
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]
# CTranslate2's name of a module in a layer of the encoder or decoder -> transformers'. A name with commas
# stands for linears that CTranslate2 has stacked.
LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": "encoder_attn.k_proj,encoder_attn.v_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
OUTER = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
LEAVES = {"beta": "bias", "gamma": "weight", "encodings": "weight", "weight": "weight", "bias": "bias"}


def read(path: Path) -> dict[str, Tensor]:
    """Every variable of the file; settings, such as the number of heads, are variables without dimensions."""
    with path.open("rb") as file:
        version = _integer(file, "I")
        if version != 6:
            raise ValueError(
                f"{path.name}: version {version} of CTranslate2's format; version 6 is known here"
            )
        spec, _ = _string(file), _integer(file, "I")
        if spec != "WhisperSpec":
            raise ValueError(f"{path.name}: a {spec}; only a WhisperSpec is known here")
        variables = {}
        for _ in range(_integer(file, "I")):
            name = _string(file)
            shape = [_integer(file, "I") for _ in range(_integer(file, "B"))]
            dtype = DTYPES[_integer(file, "B")]
            data = bytearray(file.read(_integer(file, "I")))
            variables[name] = torch.frombuffer(data, dtype=dtype).reshape(shape)
        return variables


def convert_whisper(model: Path, data: Path, out: Path) -> None:
    """Writes CTranslate2's `model`, with the tokenizer and config in the folder `data`, as a transformers
    folder."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    variables = read(model)
    ids = json.loads((data / "config.json").read_text())
    tokenizer = WhisperTokenizer.from_pretrained(data)
    token = tokenizer.convert_tokens_to_ids
    start, end = (token(text) for text in ("<|startoftranscript|>", "<|endoftext|>"))

    def layers(side: str) -> int:
        return len(
            {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")} - {"layer_norm"}
        )

    vocabulary, hidden = variables["decoder/embeddings/weight"].shape
    heads, feed_forward = (
        int(variables["encoder/num_heads"]),
        len(variables["encoder/layer_0/ffn/linear_0/bias"]),
    )
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=hidden,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        dtype=torch.float16,
    )
    with torch.device("meta"):
        made = WhisperForConditionalGeneration(config)
    # The output layer is tied to the embedding, and not in the file.
    unlike = made.load_state_dict(weights(variables), strict=False, assign=True)
    made.tie_weights()
    left = [name for name, parameter in made.named_parameters() if parameter.is_meta]
    if left or unlike.unexpected_keys:
        raise ValueError(
            f"{model.name} is not a Whisper as transformers has it: no weights for {left}, and no place for "
            f"{unlike.unexpected_keys}"
        )
    made.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_length=config.max_target_positions,
        is_multilingual=True,
        lang_to_id={text: i for text, i in tokenizer.get_vocab().items() if i in set(ids["lang_ids"])},
        task_to_id={task: token(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=token("<|notimestamps|>"),
        prev_sot_token_id=token("<|startofprev|>"),
        suppress_tokens=ids["suppress_ids"],
        begin_suppress_tokens=ids["suppress_ids_begin"],
        alignment_heads=ids["alignment_heads"],
        return_timestamps=False,
    )
    made.save_pretrained(out)
    extractor = WhisperFeatureExtractor(
        feature_size=config.num_mel_bins, sampling_rate=16000, hop_length=160, n_fft=400, chunk_length=30
    )
    WhisperProcessor(extractor, tokenizer).save_pretrained(out)


def weights(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in variables.items():
        side, _, rest = name.partition("/")
        module, _, leaf = rest.rpartition("/")
        if leaf not in LEAVES:
            continue
        prefix = f"model.{side}."
        if module.startswith("layer_") and module != "layer_norm":
            layer, _, module = module.partition("/")
            prefix += f"layers.{layer.removeprefix('layer_')}."
            modules = LAYER[module].split(",")
        else:
            modules = [OUTER[module]]
        for module, part in zip(modules, value.chunk(len(modules)), strict=True):
            if leaf == "bias" and module.endswith("k_proj"):
                if part.any():  # Whisper's keys have no bias; CTranslate2 stacks zeros
                    raise ValueError(f"{name}: a bias of keys that is not zero")
                continue
            found[f"{prefix}{module}.{LEAVES[leaf]}"] = part.clone()
    return found


def _integer(file: BinaryIO, kind: str) -> int:
    (value,) = struct.unpack("<" + kind, file.read(struct.calcsize(kind)))
    return value


def _string(file: BinaryIO) -> str:
    return file.read(_integer(file, "H")).removesuffix(b"\0").decode()
