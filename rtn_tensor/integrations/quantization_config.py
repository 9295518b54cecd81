"""How a model is quantized, as the `TorchAoConfig` of transformers and that of diffusers say it."""

import json
import re
from collections import OrderedDict
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import format_of
from rtn_tensor.tensor import RTNQuantizedTensor


def how_quantized(model: nn.Module) -> tuple[AOBaseConfig | None, list[str]]:
    """torchao's config of the quantized weights of `model`, None where there are none, and the names of the
    linears and embeddings that are float."""
    configs: OrderedDict[str, Any] = OrderedDict()
    floats: list[str] = []
    for fqn, w in model.named_parameters(remove_duplicate=False):
        # torchao names a module for its "weight", and any other parameter by its own name.
        key = fqn.removesuffix(".weight")
        if isinstance(w, RTNQuantizedTensor):
            configs[key] = RTNConfig(**format_of(w))
        elif (
            isinstance(model.get_submodule(fqn.rpartition(".")[0]), nn.Linear | nn.Embedding) and w.dim() > 1
        ):
            floats.append(key)
    distinct = set(configs.values())
    if len(distinct) > 1:
        return FqnToConfig(configs), floats
    return next(iter(distinct), None), floats


def in_config(quantization_config: Any) -> dict[str, Any] | None:
    """As config.json has it: torch.compile may look through the config of a model, and cannot through a
    TorchAoConfig."""
    return None if quantization_config is None else json.loads(json.dumps(quantization_config.to_dict()))


def is_ours(quantization_config: Any) -> bool:
    return bool(re.search("RTN(Int[48]Weight)?Config", str(quantization_config)))
