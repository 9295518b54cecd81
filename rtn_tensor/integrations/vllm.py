# pyright: reportMissingImports=false
"""vLLM's `--quantization rtn`: weights quantized while they load, or as a quantized folder has them, and run
by this library's kernels.

vLLM loads this module, and calls `register`, in every process of its own (entry point
`vllm.general_plugins`); nothing here imports it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.scalar_type import scalar_types

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import FORMATS, groups, pack_gptq, unpack
from rtn_tensor.integrations.experts import run
from rtn_tensor.integrations.options import (
    Options,
    activation_of,
    check_cut,
    check_router,
    format_text,
    has_own_output,
    is_saved,
    saved_formats,
)
from rtn_tensor.quantize.targets import is_finite
from rtn_tensor.tensor import RTNQuantizedTensor

logger = init_logger(f"vllm.{__name__}")  # vLLM shows no others

ENGINE_KERNELS = {
    "rtn": "this library's",
    "vllm": "vLLM's for mixed precision: Machete or Marlin on CUDA, its own int4 on a CPU; --linear-backend "
    "names one",
}
TYPES = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}  # q - qmin, without a sign


def register() -> None:
    """Makes "rtn" one of vLLM's quantization methods; called again, it does nothing new."""
    register_quantization_config("rtn")(RTNQuantizationConfig)


class RTNQuantizationConfig(QuantizationConfig):
    """What vLLM asks, layer by layer, how to quantize, and whose kernels run. See
    `integrations.options.Options`, and `KERNELS`."""

    def __init__(self, options: Options | None = None, kernel: str = "rtn"):
        super().__init__()
        if kernel not in ENGINE_KERNELS:
            allowed = ", or ".join(f"{name!r} ({whose})" for name, whose in ENGINE_KERNELS.items())
            raise ValueError(f"quantization_config: kernel={kernel!r} is not supported; use {allowed}")
        self.options = Options.read({}) if options is None else options
        self.kernel = kernel
        self.tied = False
        self.embedding: RTNConfig | None = None
        # What the model calls its experts' weights where they are fused.
        self.experts_names = ("gate_up_proj", "down_proj")
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
        if is_saved(config):
            return cls(Options(default=None))
        return cls(Options.read(config, own=("kernel",)), config.get("kernel", "rtn"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return "rtn" if is_saved(hf_quant_cfg) else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        if self.options.default is None:
            self.options.saved = saved_formats(model_name)
            # Else vLLM takes the embedding in its stead.
            if hf_config is not None and has_own_output(model_name):
                hf_config.get_text_config().tie_word_embeddings = False
        self.tied = hf_config is not None and bool(hf_config.get_text_config().tie_word_embeddings)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.options.saved = hf_to_vllm_mapper.apply_dict(self.options.saved)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Experts' planes are named as vLLM's own loader names fused experts, and then what our parameters
        are called beyond that."""
        import regex  # vLLM's own

        self.tell()  # all layers are made, and loading begins
        up, down = self.experts_names
        names = {
            r"\.experts\._gate_up_proj_(qdata|scale)$": rf".experts.{up}_\1",
            r"\.experts\._down_proj_(qdata|scale)$": rf".experts.{down}_\1",
        }
        return WeightsMapper(orig_to_new_regex={regex.compile(old): new for old, new in names.items()})

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):  # an lm_head, too; Llama gives its embedding no name
            return self._embedding_method(layer, prefix or "model.embed_tokens")
        if not isinstance(layer, LinearBase):
            return None
        sizes = layer.input_size, layer.output_size, layer.params_dtype.itemsize
        config = self.options.of_linear(prefix, self.packed_modules_mapping, *sizes)
        return UnquantizedLinearMethod() if config is None else RTNLinearMethod(self, config, prefix)

    def _embedding_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        config = self.options.of(prefix, by_default=False)
        if not isinstance(layer, ParallelLMHead):
            self.embedding = config
        elif self.tied and config != self.embedding:
            if config is not None and self.options.default is not None:
                raise ValueError(
                    f"{prefix} is the embedding, too, in this model; name the embedding in a "
                    "rule like this one, or neither"
                )
            config = self.embedding
        if config is not None and self.kernel == "vllm" and not isinstance(layer, ParallelLMHead):
            raise ValueError(
                f"{prefix}: vLLM has no kernel for a quantized embedding; leave it float, or "
                "drop kernel='vllm'"
            )
        return None if config is None else RTNLinearMethod(self, config, prefix)

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase:
        configs = self.options.of_experts(prefix)
        if configs is None:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if self.kernel == "vllm":
            raise ValueError(
                f"{prefix}: kernel='vllm' is not supported for experts; drop it, as this library's kernels "
                f"run them, or name {prefix!r} in "
                "ignore to keep them float"
            )
        if self.options.default is None and layer.is_fused_checkpoint_transposed:
            raise ValueError(
                f"{prefix}: quantized experts of this model cannot be loaded; serve the float "
                "folder, with quantization='rtn'"
            )
        if layer.ckpt_gate_proj_name == "w1":
            self.experts_names = ("w13", "w2")
        return RTNExpertsMethod(self, configs, layer, prefix)

    def tell(self) -> None:
        """Says once, when all layers are made, what is quantized.

        Raises:
            ValueError: as `Options.check`.
        """
        if not self.told:
            self.told = True
            if get_pp_group().world_size == 1:  # else this rank has only some layers
                self.options.check()
            logger.info(self.options.summary())


# ------------------------------------------------------------------------------ parameters


def _empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: str | None = None) -> Any:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _plane_shapes(shape: tuple[int, ...], config: RTNConfig) -> dict[str, tuple[int, ...]]:
    *rows, k = shape
    return {
        "qdata": (*rows, FORMATS[config.bits].row_bytes(k)),
        "scale": (*rows, groups(k, config.group_size)),
    }


def _add_planes(
    layer: nn.Module, name: str, shape: tuple[int, ...], config: RTNConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Empty parameters for the two planes of a weight, for a quantized folder's to be loaded into:
    `name`_qdata and `name`_scale."""
    planes = {}
    for plane, plane_shape in _plane_shapes(shape, config).items():
        planes[plane] = _empty_parameter(plane_shape, torch.uint8 if plane == "qdata" else dtype)
        layer.register_parameter(f"{name}_{plane}", planes[plane])
    return planes


def _take_planes(layer: Any, name: str, k: int, config: RTNConfig, fqn: str) -> RTNQuantizedTensor:
    qdata, scale = (layer._parameters.pop(f"{name}_{plane}").data for plane in ("qdata", "scale"))
    if not is_finite(scale):
        raise ValueError(f"{fqn}: a scale does not fit {scale.dtype}; serve it with dtype='bfloat16'")
    return RTNQuantizedTensor(qdata, scale, config.bits, config.group_size, config.scale_method, k)


def _of_float(layer: nn.Module, w: Tensor, config: RTNConfig, fqn: str) -> RTNQuantizedTensor:
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


def _put(layer: Any, name: str, w: RTNQuantizedTensor, fqn: str, **attributes: Any) -> None:
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


# --------------------------------------------------------------- linear layers, embeddings


class RTNLinearMethod(LinearMethodBase):
    """A linear layer of any kind, an embedding, or an lm_head, whose `weight [N, K]` becomes an
    `RTNQuantizedTensor`, or, for a kernel of vLLM's, what it makes of `weight_packed` and `weight_scale`."""

    def __init__(self, parent: RTNQuantizationConfig, config: RTNConfig, name: str):
        self.parent, self.config, self.name = parent, config, name
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
        self.in_features, self.weight_loader = k, extra_weight_attrs["weight_loader"]
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
        for plane, parameter in _add_planes(layer, "_weight", shape, self.config, params_dtype).items():
            # By all columns, so by all ranks that have some of them.
            shared = plane == "scale" and self.config.group_size == -1
            set_weight_attrs(
                parameter, {"output_dim": 0, **({} if shared else {"input_dim": 1}), **extra_weight_attrs}
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.parent.tell()
        fqn = f"{self.name}.weight"
        if self.saved:
            w = _take_planes(layer, "_weight", self.in_features, self.config, fqn)
        else:
            w = _of_float(layer, layer.weight.data, self.config, fqn)
        if self.kernel is None:
            _put(layer, "weight", w, fqn, output_dim=0, input_dim=1, weight_loader=self.weight_loader)
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


# --------------------------------------------------------------------------------- experts


class RTNExpertsMethod(FusedMoEMethodBase):
    """The experts of a layer: `w13_weight [E, 2 I, H]` and `w2_weight [E, H, I]`, biases where the model has
    them.

    GPT-OSS's code copies into its parameters without asking their loaders, past vLLM's layerwise loading.
    There they are quantized from the start, and what is copied into them is on the way; such a model cannot
    be reloaded.
    """

    def __init__(
        self, parent: RTNQuantizationConfig, configs: tuple[RTNConfig, RTNConfig], layer: Any, name: str
    ):
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
        self.weight_loader = extra_weight_attrs["weight_loader"]
        for w, shape in self.shapes.items():
            config = self.configs[w]
            self.parent.options.note(
                self.name, config, shape[0] * shape[1] * shape[2], shape[0] * shape[1], params_dtype.itemsize
            )
            device = "meta" if self.uses_meta_device else None
            if self.at_once:
                asked = {
                    "bits": config.bits,
                    "group_size": config.group_size,
                    "scale_method": config.scale_method,
                }
                _put(
                    layer,
                    f"{w}_weight",
                    RTNQuantizedTensor.empty(*shape, **asked, dtype=params_dtype),
                    self._fqn(w),
                )
                parameters = [getattr(layer, f"{w}_weight")]
            elif self.saved:
                planes = _add_planes(layer, f"{w}_weight", shape, config, params_dtype)
                kind = "CHANNEL" if config.group_size == -1 else "GROUP"
                planes["scale"].quant_method = FusedMoeWeightScaleSupported[kind].value
                parameters = list(planes.values())
            else:
                parameters = [_empty_parameter(shape, params_dtype, device)]
                layer.register_parameter(f"{w}_weight", parameters[0])
            if self.moe.has_bias:
                parameters.append(_empty_parameter(shape[:2], params_dtype, device))
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
                if not is_finite(getattr(layer, f"{w}_weight").scale):
                    raise ValueError(
                        f"{fqn} holds NaN or inf, or nothing was loaded; repair the checkpoint, "
                        "or name the layer in ignore"
                    )
                continue
            if self.saved:
                q = _take_planes(layer, f"{w}_weight", self.shapes[w][-1], config, fqn)
            else:
                q = _of_float(layer, getattr(layer, f"{w}_weight").data, config, fqn)
            _put(layer, f"{w}_weight", q, fqn, weight_loader=self.weight_loader)
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
