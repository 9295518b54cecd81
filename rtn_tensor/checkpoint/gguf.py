"""GGUF files, which transformers reads, dequantized."""

from pathlib import Path
from typing import Any

import torch
from torchao.core.config import AOBaseConfig

from rtn_tensor.checkpoint.files import check_regular
from rtn_tensor.integrations.transformers.folders import of_transformers
from rtn_tensor.integrations.transformers.models import default_filter
from rtn_tensor.quantize.api import quantize_
from rtn_tensor.quantize.selection import FilterFn, Rules


def load_gguf(
    path: Path,
    config: AOBaseConfig | Rules | None,
    device: Any,
    dtype: torch.dtype | None,
    filter_fn: FilterFn | None,
) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    check_regular(path)
    with of_transformers(path, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype or torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()
    if config is not None:
        quantize_(model, config, default_filter(model, config, filter_fn), device)
    return model if device is None else model.to(device)
