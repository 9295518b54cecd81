# pyright: reportMissingImports=false
"""How the experts of vLLM's mixture-of-experts layers are loaded and run."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import LARGEST_OF_8_BITS, SCALES_OF_8_BITS, format_of
from rtn_tensor.integrations.experts import run
from rtn_tensor.integrations.options import activation_of, check_cut, check_router
from rtn_tensor.integrations.vllm.parameters import (
    add_planes,
    empty_parameter,
    put,
    quantized_loaded,
    take_planes,
)
from rtn_tensor.quantize.targets import is_finite, is_saturated
from rtn_tensor.reference import widened
from rtn_tensor.tensor import RTNQuantizedTensor


class RTNExpertsMethod(FusedMoEMethodBase):
    """The experts of a layer: `w13_weight [E, 2 I, H]` and `w2_weight [E, H, I]`, biases where the model has
    them.

    GPT-OSS's code copies into its parameters without asking their loaders, past vLLM's layerwise loading.
    There they are quantized from the start, and what is copied into them is on the way; such a model cannot
    be reloaded.
    """

    def __init__(self, parent: Any, configs: tuple[RTNConfig, RTNConfig], layer: Any, name: str):
        super().__init__(layer.moe_config)
        self.parent, self.name = parent, name
        self.configs: dict[str, RTNConfig] = dict(zip(("w13", "w2"), configs, strict=True))
        self.activation = activation_of(
            name, layer.activation.value, layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
        )
        check_router(name, layer.apply_router_weight_on_input, layer.top_k)
        self.saved = parent.options.default is None
        self.at_once = layer.activation.value == "swigluoai"
        self.uses_meta_device = not self.saved and not self.at_once

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        i = intermediate_size_per_partition
        check_cut(f"{self.name}.down_proj", self.configs["w2"], i * self.moe.tp_size, i)
        self.shapes = {"w13": (num_experts, 2 * i, hidden_size), "w2": (num_experts, hidden_size, i)}
        self.dtype, self.weight_loader = params_dtype, extra_weight_attrs["weight_loader"]
        for w, shape in self.shapes.items():
            config = self.configs[w]
            self.parent.options.note(
                self.name, config, shape[0] * shape[1] * shape[2], shape[0] * shape[1], params_dtype.itemsize
            )
            device = "meta" if self.uses_meta_device else None
            if self.at_once:
                put(
                    layer,
                    f"{w}_weight",
                    RTNQuantizedTensor.empty(*shape, **format_of(config), dtype=params_dtype),
                    self._fqn(w),
                )
                parameters = [getattr(layer, f"{w}_weight")]
            elif self.saved:
                planes = add_planes(layer, f"{w}_weight", shape, config, params_dtype)
                kind = "CHANNEL" if config.group_size == -1 else "GROUP"
                parameters = list(planes.values())
                for of_groups in parameters[1:]:  # the scale, and the zero where there is one
                    of_groups.quant_method = FusedMoeWeightScaleSupported[kind].value
            else:
                parameters = [empty_parameter(shape, params_dtype, device)]
                layer.register_parameter(f"{w}_weight", parameters[0])
            if self.moe.has_bias:
                parameters.append(empty_parameter(shape[:2], params_dtype, device))
                layer.register_parameter(f"{w}_bias", parameters[-1])
            for parameter in parameters:
                set_weight_attrs(parameter, extra_weight_attrs)
        if self.uses_meta_device:
            initialize_online_processing(layer)

    def _fqn(self, w: str) -> str:
        return f"{self.name}.{'gate_up_proj' if w == 'w13' else 'down_proj'}"

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.parent.tell()
        for w, config in self.configs.items():
            fqn = self._fqn(w)
            if self.at_once:
                if not is_finite(widened(getattr(layer, f"{w}_weight").scale)):
                    raise ValueError(
                        f"{fqn} holds NaN or inf, or nothing was loaded; repair the checkpoint, "
                        "or name the layer in ignore"
                    )
                if is_saturated(getattr(layer, f"{w}_weight")):
                    raise ValueError(
                        f"{fqn} has weights of {LARGEST_OF_8_BITS:g} or more, past 8-bit scales; "
                        f"use {SCALES_OF_8_BITS[config.scale_method]!r} for it"
                    )
                continue
            if self.saved:
                q = take_planes(layer, f"{w}_weight", self.shapes[w][-1], config, self.dtype, fqn)
            else:
                q = quantized_loaded(layer, getattr(layer, f"{w}_weight").data, config, fqn)
            put(layer, f"{w}_weight", q, fqn, weight_loader=self.weight_loader)
        layer._already_called_process_weights_after_loading = True

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None  # it describes weights to vLLM's own kernels

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        tokens, top_k = topk_ids.shape
        experts = topk_ids.reshape(-1).long()
        if layer.expert_map is not None:
            experts = layer.expert_map[experts]  # -1: another rank's
        router: Tensor | None = topk_weights.reshape(-1)
        if layer.apply_router_weight_on_input:
            x, router = x * topk_weights.to(x.dtype), None  # of one expert per token
        up_bias, down_bias = (getattr(layer, f"{w}_bias", None) for w in ("w13", "w2"))
        y = run(
            x, layer.w13_weight, layer.w2_weight, up_bias, down_bias, experts, router, top_k, self.activation
        )
        return y.view(tokens, top_k, y.shape[-1]).sum(1)
