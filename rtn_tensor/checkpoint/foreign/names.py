"""Checkpoints that other libraries quantized, told by their configs, files and tensors' names."""

import re
from collections.abc import Iterable
from pathlib import Path

# What other libraries call the ways in which they quantize (quant_method), and how the names of their tensors
# end.
FOREIGN = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "fp8 with a scale for each block",
    "fbgemm_fp8": "FBGEMM's fp8",
    "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "NVIDIA's ModelOpt",
    "hqq": "HQQ",
    "mlx": "MLX",
    "quanto": "quanto",
    "auto-round": "AutoRound",
    "gguf": "GGUF",
    "torchao": "torchao",
}


FOREIGN_NAMES = {
    r"\.qzeros$": "GPTQ or AWQ",
    r"\.weight_scale_inv$": "fp8 with a scale for each block",
    r"\.weight_packed$": "compressed-tensors",
    r"_blocks$": "MXFP4",
    r"\.quant_state\.bitsandbytes__": "bitsandbytes",
    r"\.(weight|input)_scale$": "fp8",
    r"\.W_q$": "HQQ",
    r"\.biases$": "MLX",
}


FOREIGN_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA's ModelOpt",
}


def not_read(kind: str, where: str) -> str:
    return (
        f"{where}: the weights are quantized by {kind}, which load does not read; give the float model, or "
        "read this one by transformers' "
        "from_pretrained"
    )


def foreign(path: Path, names: Iterable[str]) -> str | None:
    """Of a checkpoint with tensors of such `names`: which other library quantized it, and what to do; None
    where it looks like none did."""
    for name in names:
        for pattern, kind in FOREIGN_NAMES.items():
            if re.search(pattern, name):
                return not_read(kind, f"{path} (as its {name} says)")
    found = [kind for name, kind in FOREIGN_FILES.items() if (path / name).is_file()]
    return not_read(found[0], str(path)) if found else None
