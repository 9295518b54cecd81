# pyright: reportMissingImports=false
"""SGLang's `--quantization rtn`: weights quantized as they are copied into the model, and run by this
library's kernels.

`integrations.plugins` loads this module, and calls `register`, in every process of SGLang's own. SGLang has
no layerwise loading: the parameters are
`RTNQuantizedTensor`s from the start, and what its loaders copy into parts of them is quantized on the way, so
that beside the model only the tensor being read is float.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.server_args import add_quantization_method_choices
from sglang.srt.utils import set_weight_attrs
from torch import Tensor, nn

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import format_of
from rtn_tensor.integrations.experts import run
from rtn_tensor.integrations.options import Options, activation_of, check_cut, check_router
from rtn_tensor.quantize.targets import is_finite
from rtn_tensor.tensor import RTNQuantizedTensor

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes "rtn" one of SGLang's quantization methods; called again, it does nothing new."""
    for methods in ("BASE_QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS", "QUANTIZATION_METHODS"):
        if "rtn" not in getattr(quantization, methods):
            getattr(quantization, methods)["rtn"] = RTNQuantizationConfig
            if methods == "QUANTIZATION_METHODS":
                add_quantization_method_choices(["rtn"])


class RTNQuantizationConfig(QuantizationConfig):
    """What SGLang asks, layer by layer, how to quantize. See `rtn_tensor.integrations.options.Options`."""

    def __init__(self, options: Options | None = None):
        super().__init__()
        self.options = Options.read({}) if options is None else options
        self.told = False

    def get_name(self) -> str:
        return "rtn"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RTNQuantizationConfig":
        return cls(Options.read(config))

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, FusedMoE):
            configs = self.options.of_experts(prefix)
            return None if configs is None else RTNExpertsMethod(self, configs, prefix)
        if not isinstance(layer, LinearBase):
            return None  # embeddings and lm_head stay float
        sizes = layer.input_size, layer.output_size, layer.params_dtype.itemsize
        config = self.options.of_linear(prefix, self.packed_modules_mapping, *sizes)
        return UnquantizedLinearMethod() if config is None else RTNLinearMethod(self, config, prefix)

    def tell(self) -> None:
        """Says once, when all layers are made, what was quantized. Raises ValueError as `Options.check`."""
        if not self.told:
            self.told = True
            self.options.check()
            logger.info(self.options.summary())


def _add(
    layer: nn.Module,
    name: str,
    shape: tuple[int, ...],
    config: RTNConfig,
    dtype: torch.dtype,
    fqn: str,
    attributes: dict,
) -> None:
    w = RTNQuantizedTensor.empty(*shape, **format_of(config), dtype=dtype)
    w.scale.fill_(torch.nan)  # a row that is never loaded is not silently garbage
    parameter: Any = nn.Parameter(w, requires_grad=False)
    parameter.fqn = fqn  # for errors
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)


def _check_loaded(w: Tensor, fqn: str) -> None:
    assert isinstance(w, RTNQuantizedTensor)
    if not is_finite(w.scale):
        raise ValueError(
            f"{fqn} holds NaN or inf, or not all of it was loaded; repair the checkpoint, or "
            "name the layer in ignore"
        )


class RTNLinearMethod(LinearMethodBase):
    """A linear layer of any kind, whose `weight [N, K]` is an `RTNQuantizedTensor`."""

    def __init__(self, parent: RTNQuantizationConfig, config: RTNConfig, name: str):
        self.parent, self.config, self.name = parent, config, name

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
        n, k = sum(output_partition_sizes), input_size_per_partition
        self.parent.options.note(self.name, self.config, n * k, n, params_dtype.itemsize)
        attributes = {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}
        _add(layer, "weight", (n, k), self.config, params_dtype, f"{self.name}.weight", attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.parent.tell()
        _check_loaded(layer.weight, f"{self.name}.weight")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


class RTNExpertsMethod(FusedMoEMethodBase):
    """The experts of a layer: `w13_weight [E, 2 I, H]` and `w2_weight [E, H, I]`."""

    def __init__(self, parent: RTNQuantizationConfig, configs: tuple[RTNConfig, RTNConfig], name: str):
        self.parent, self.name = parent, name
        self.configs: dict[str, RTNConfig] = dict(zip(("w13", "w2"), configs, strict=True))

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **extra_weight_attrs: Any,
    ) -> None:
        i, about = intermediate_size_per_partition, layer.moe_runner_config
        alpha, limit, beta = about.gemm1_alpha, about.gemm1_clamp_limit, about.gemm1_beta
        unsupported = {
            "biases": with_bias,
            "no gate": not about.is_gated,
            "no_combine": about.no_combine,
            "only one of gemm1_alpha and gemm1_clamp_limit": (alpha is None) != (limit is None),
            "gemm1_beta but no gemm1_alpha": alpha is None and beta is not None,
            "gemm1_alpha and swiglu_limit": alpha is not None and about.swiglu_limit is not None,
        }
        if found := [what for what, has in unsupported.items() if has]:
            raise ValueError(
                f"{self.name}: experts with {', '.join(found)} are not supported; name {self.name!r} in "
                "ignore to keep them float"
            )
        check_router(self.name, about.apply_router_weight_on_input, about.top_k)
        if alpha is None or about.activation != "silu":
            self.activation = activation_of(self.name, about.activation, about.swiglu_limit, None, None)
        else:  # what SGLang calls silu is then GPT-OSS's
            kind = "swigluoai" if about.gate_up_interleaved else "swigluoai_uninterleave"
            self.activation = activation_of(self.name, kind, limit, alpha, 1.0 if beta is None else beta)
        check_cut(f"{self.name}.down_proj", self.configs["w2"], i * layer.moe_tp_size, i)
        for w, shape in {
            "w13": (num_experts, 2 * i, hidden_size),
            "w2": (num_experts, hidden_size, i),
        }.items():
            config = self.configs[w]
            self.parent.options.note(
                self.name, config, shape[0] * shape[1] * shape[2], shape[0] * shape[1], params_dtype.itemsize
            )
            _add(
                layer,
                f"{w}_weight",
                shape,
                config,
                params_dtype,
                f"{self.name}.{w}_weight",
                extra_weight_attrs,
            )

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        self.about = moe_runner_config

    def process_weights_after_loading(self, layer: Any) -> None:
        self.parent.tell()
        for w in self.configs:
            _check_loaded(getattr(layer, f"{w}_weight"), f"{self.name}.{w}_weight")

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        tokens, top_k = topk.topk_ids.shape
        router: Tensor | None = topk.topk_weights.reshape(-1)
        if self.about.apply_router_weight_on_input:
            x, router = x * topk.topk_weights.to(x.dtype), None  # of one expert per token
        y = run(
            x,
            layer.w13_weight,
            layer.w2_weight,
            None,
            None,
            topk.topk_ids.reshape(-1).long(),
            router,
            top_k,
            self.activation,
        )
        y = y.view(tokens, top_k, y.shape[-1]).sum(1)
        return StandardCombineInput(hidden_states=y * (self.about.routed_scaling_factor or 1.0))
