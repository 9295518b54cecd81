# pyright: reportMissingImports=false
"""The parameters of a layer while vLLM loads it, and what becomes of them."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import FORMATS, groups, pack_gptq, unpack
from rtn_tensor.quantize.targets import is_finite
from rtn_tensor.tensor import RTNQuantizedTensor


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: str | None = None) -> Any:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _plane_shapes(shape: tuple[int, ...], config: RTNConfig) -> dict[str, tuple[int, ...]]:
    *rows, k = shape
    return {
        "qdata": (*rows, FORMATS[config.bits].row_bytes(k)),
        "scale": (*rows, groups(k, config.group_size)),
    }


def add_planes(
    layer: nn.Module, name: str, shape: tuple[int, ...], config: RTNConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Empty parameters for the two planes of a weight, for a quantized folder's to be loaded into:
    `name`_qdata and `name`_scale."""
    planes = {}
    for plane, plane_shape in _plane_shapes(shape, config).items():
        planes[plane] = empty_parameter(plane_shape, torch.uint8 if plane == "qdata" else dtype)
        layer.register_parameter(f"{name}_{plane}", planes[plane])
    return planes


def take_planes(layer: Any, name: str, k: int, config: RTNConfig, fqn: str) -> RTNQuantizedTensor:
    qdata, scale = (layer._parameters.pop(f"{name}_{plane}").data for plane in ("qdata", "scale"))
    if not is_finite(scale):
        raise ValueError(f"{fqn}: a scale does not fit {scale.dtype}; serve it with dtype='bfloat16'")
    return RTNQuantizedTensor(qdata, scale, config.bits, config.group_size, config.scale_method, k)


def quantized_loaded(layer: nn.Module, w: Tensor, config: RTNConfig, fqn: str) -> RTNQuantizedTensor:
    if (
        not get_layerwise_info(layer).load_numel
        and get_current_vllm_config().load_config.load_format != "dummy"
    ):
        raise ValueError(
            f"{fqn}: nothing was loaded, or not by its weight_loader, as this model's own code may do; name "
            "the layer in ignore"
        )
    if not is_finite(w):
        raise ValueError(f"{fqn} holds NaN or inf; repair the checkpoint, or name the layer in ignore")
    return RTNQuantizedTensor.from_float(w, config.bits, config.group_size, config.scale_method)


def put(layer: Any, name: str, w: RTNQuantizedTensor, fqn: str, **attributes: Any) -> None:
    """`w` as the parameter `name`, with what vLLM's loaders ask of one: fresh float weights copied into it
    are quantized."""
    parameter: Any = nn.Parameter(w, requires_grad=False)
    parameter.fqn = fqn  # for errors
    set_weight_attrs(parameter, attributes)
    layer._parameters.pop(name, None)
    layer.register_parameter(name, parameter)


def add_packed(layer: nn.Module, w: RTNQuantizedTensor, weight_loader: Any) -> None:
    """`w [N, K]` as the parameters that vLLM's kernels make theirs of: `weight_packed [N, K * bits / 32]`
    int32, `weight_scale [N, G]`."""
    packed = pack_gptq(unpack(w.qdata, w.bits, w.in_features), w.bits)
    about = {"output_dim": 0, "weight_loader": weight_loader}
    weight = PackedvLLMParameter(data=packed, input_dim=1, packed_dim=1, packed_factor=32 // w.bits, **about)
    layer.register_parameter("weight_packed", weight)
    if w.group_size == -1:
        layer.register_parameter("weight_scale", ChannelQuantScaleParameter(data=w.scale, **about))
    else:
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=w.scale, input_dim=1, **about))
