# pyright: reportMissingImports=false
"""How vLLM's linear layers and embeddings are loaded and run."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.scalar_type import scalar_types

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import ASYMMETRIC, SCALES_OF_8_BITS
from rtn_tensor.integrations.options import check_cut, format_text
from rtn_tensor.integrations.vllm.parameters import (
    add_packed,
    add_planes,
    put,
    quantized_loaded,
    take_planes,
)

TYPES = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}  # q - qmin, without a sign


class RTNLinearMethod(LinearMethodBase):
    """A linear layer of any kind, an embedding, or an lm_head, whose `weight [N, K]` becomes an
    `RTNQuantizedTensor`, or, for a kernel of vLLM's, what it makes of `weight_packed` and `weight_scale`."""

    def __init__(self, parent: Any, config: RTNConfig, name: str):
        self.parent, self.config, self.name = parent, config, name  # parent: RTNQuantizationConfig
        self.kernel: MPLinearKernel | None = None  # ours
        self.saved = parent.options.default is None
        # Float weights come to be for one layer at a time, when all of its own are there.
        self.uses_meta_device = not self.saved

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        check_cut(self.name, self.config, input_size, input_size_per_partition)
        shape = n, k = sum(output_partition_sizes), input_size_per_partition
        self.parent.options.note(self.name, self.config, n * k, n, params_dtype.itemsize)
        self.in_features, self.dtype = k, params_dtype
        self.weight_loader = extra_weight_attrs["weight_loader"]
        if self.parent.kernel == "vllm":
            self.kernel = self._vllm_kernel((input_size, output_size), (k, n), params_dtype)
        if not self.saved:
            data = torch.empty(shape, dtype=params_dtype, device="meta")
            layer.register_parameter(
                "weight",
                ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=self.weight_loader),
            )
            initialize_online_processing(layer)
            return
        for plane, parameter in add_planes(layer, "_weight", shape, self.config, params_dtype).items():
            # By all columns, so by all ranks that have some of them.
            shared = plane != "qdata" and self.config.group_size == -1
            set_weight_attrs(
                parameter, {"output_dim": 0, **({} if shared else {"input_dim": 1}), **extra_weight_attrs}
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.parent.tell()
        fqn = f"{self.name}.weight"
        if self.saved:
            w = take_planes(layer, "_weight", self.in_features, self.config, self.dtype, fqn)
        else:
            w = quantized_loaded(layer, layer.weight.data, self.config, fqn)
        if self.kernel is None:
            put(layer, "weight", w, fqn, output_dim=0, input_dim=1, weight_loader=self.weight_loader)
        else:
            layer._parameters.pop("weight", None)
            add_packed(layer, w, self.weight_loader)
            self.kernel.process_weights_after_loading(layer)
        layer._already_called_process_weights_after_loading = True

    def _vllm_kernel(
        self, full: tuple[int, int], of_rank: tuple[int, int], dtype: torch.dtype
    ) -> MPLinearKernel:
        """vLLM's kernel for a weight of `full` (in_features, out_features), of which this rank has `of_rank`.

        Raises:
            ValueError: it has none; the message has each one's reason.
        """
        size = self.config.group_size
        problem = MPLinearLayerConfig(full, of_rank, TYPES[self.config.bits], dtype, size, zero_points=False)
        try:
            if self.config.scale_method in ASYMMETRIC:
                raise ValueError("they get no zero points")
            if self.config.scale_method in SCALES_OF_8_BITS:
                raise ValueError("they take scales of 16 bits")
            if self.config.activations is not None:
                raise ValueError("they leave activations as they are")
            if dtype == torch.float32:
                raise ValueError("they take dtype='bfloat16' and 'float16'")
            if of_rank[0] % (unit := 32 // self.config.bits if size == -1 else size):
                raise ValueError(f"its {of_rank[0]} columns are no multiple of {unit}")
            return choose_mp_linear_kernel(problem)(
                problem, "weight_packed", "weight_scale", "weight_zero_point"
            )
        except ValueError as error:
            what = format_text(self.config)
            raise ValueError(
                f"{self.name}: vLLM has no kernel for this layer in {what}; name it in ignore, give it "
                "another format, or drop "
                f"kernel='vllm'. {error}"
            ) from None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return (
            F.linear(x, layer.weight, bias)
            if self.kernel is None
            else self.kernel.apply_weights(layer, x, bias)
        )

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return F.embedding(input_, layer.weight)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        # Which has a method like this one, and so can serve as lm_head; its weight is another once it is
        # loaded.
        return embed_tokens
