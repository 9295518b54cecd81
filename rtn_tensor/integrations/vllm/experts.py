# pyright: reportMissingImports=false
"""How the experts of vLLM's mixture-of-experts layers are loaded and run."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from rtn_tensor.config import RTNConfig
from rtn_tensor.integrations.experts import run
from rtn_tensor.integrations.options import activation_of, check_cut, check_router
from rtn_tensor.integrations.vllm.parameters import (
    add_planes,
    empty_parameter,
    put,
    quantized_loaded,
    take_planes,
)


def is_gpt_oss(layer: Any) -> bool:
    if layer.activation.value != "swigluoai":
        return False
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

    return isinstance(layer, GptOssRoutedExperts)


def load_stacked(layer: Any, param: Any, loaded_weight: Tensor) -> None:
    """A plane of all experts into a parameter of those that this rank has, of which it has a part of dim
    `param.cut`."""
    cut = param.cut
    size = param.shape[cut]
    if loaded_weight.shape[cut] != size:
        loaded_weight = loaded_weight.narrow(cut, layer.moe_config.tp_rank * size, size)
    for expert, plane in enumerate(loaded_weight):
        at = expert if layer.expert_map is None else int(layer.expert_map[expert])
        if at >= 0:
            param.data[at].copy_(plane)


class RTNExpertsMethod(FusedMoEMethodBase):
    """The experts of a layer: `w13_weight [E, 2 I, H]` and `w2_weight [E, H, I]`, biases where the model has
    them."""

    def __init__(self, parent: Any, configs: tuple[RTNConfig, RTNConfig], layer: Any, name: str):
        super().__init__(layer.moe_config)
        self.parent, self.name = parent, name
        self.configs: dict[str, RTNConfig] = dict(zip(("w13", "w2"), configs, strict=True))
        self.activation = activation_of(
            name, layer.activation.value, layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
        )
        check_router(name, layer.apply_router_weight_on_input, layer.top_k)
        self.saved = parent.options.default is None
        self.uses_meta_device = not self.saved
        # Its code would transpose planes that are called as it calls weights.
        self.loads_planes = self.saved and is_gpt_oss(layer)

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
            if self.saved:
                planes = add_planes(layer, self._begin(w), shape, config, params_dtype)
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
            if self.loads_planes:
                for parameter in planes.values():
                    parameter.cut = 1 if w == "w13" else 2
                    parameter.weight_loader = MethodType(load_stacked, layer)
        if self.uses_meta_device:
            initialize_online_processing(layer)

    def _fqn(self, w: str) -> str:
        return f"{self.name}.{'gate_up_proj' if w == 'w13' else 'down_proj'}"

    def _begin(self, w: str) -> str:
        return f"_{w}_weight" if self.loads_planes else f"{w}_weight"

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.parent.tell()
        for w, config in self.configs.items():
            fqn = self._fqn(w)
            if self.saved:
                q = take_planes(layer, self._begin(w), self.shapes[w][-1], config, self.dtype, fqn)
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
