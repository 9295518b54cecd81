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

from rtn_tensor.checkpoint.sources import IN_FILES
from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import format_of, pack_gptq, unpack
from rtn_tensor.integrations.options import KeptConfig
from rtn_tensor.quantize.targets import is_finite, too_large
from rtn_tensor.reference import narrowed, widened
from rtn_tensor.tensor import RTNQuantizedTensor


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: str | None = None) -> Any:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def add_planes(
    layer: nn.Module, name: str, shape: tuple[int, ...], config: RTNConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Empty parameters for the planes of a weight, for a quantized folder's to be loaded into, each by its
    name and under `name` and what it is called in files, as in `name`_qdata."""
    scale_dtype = config.scale_dtype if isinstance(config, KeptConfig) else dtype
    w = RTNQuantizedTensor.empty(*shape, **format_of(config), dtype=dtype, scale_dtype=scale_dtype)
    planes: dict[str, Any] = {}
    # So that what is never loaded is not silently garbage.
    w.scale.copy_(narrowed(torch.full(w.scale.shape, torch.nan), w.scale.dtype))
    for plane, data in w.planes.items():
        planes[plane] = nn.Parameter(data, requires_grad=False)
        layer.register_parameter(f"{name}_{IN_FILES[plane]}", planes[plane])
    return planes


def take_planes(
    layer: Any, name: str, k: int, config: RTNConfig, dtype: torch.dtype, fqn: str
) -> RTNQuantizedTensor:
    """The weight of `dtype` whose planes were loaded, in their place."""
    loaded = {plane: layer._parameters.pop(f"{name}_{end}", None) for plane, end in IN_FILES.items()}
    planes = {plane: parameter.data for plane, parameter in loaded.items() if parameter is not None}
    if not is_finite(widened(planes["scale"])):
        why = "is NaN or inf" if isinstance(config, KeptConfig) else f"is NaN, or does not fit {dtype}"
        way_out = (
            "repair the checkpoint" if isinstance(config, KeptConfig) else "serve it with dtype='bfloat16'"
        )
        raise ValueError(f"{fqn}: a scale {why}, or was not loaded; {way_out}")
    return RTNQuantizedTensor(**planes, **format_of(config), in_features=k, float_dtype=dtype)


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
    if why := too_large(w, config.scale_method):
        raise ValueError(f"{fqn} {why}")
    return RTNQuantizedTensor.from_float(w, **format_of(config))


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
