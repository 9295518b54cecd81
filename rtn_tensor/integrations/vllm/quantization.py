# pyright: reportMissingImports=false
"""What vLLM asks, layer by layer, how to quantize."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from rtn_tensor.checkpoint.foreign.reading import READERS
from rtn_tensor.config import RTNConfig
from rtn_tensor.integrations.options import Options, has_own_output, is_saved, saved_formats
from rtn_tensor.integrations.vllm.experts import RTNExpertsMethod, is_gpt_oss
from rtn_tensor.integrations.vllm.foreign import (
    ForeignFolder,
    LoadedMapper,
    folder_of,
    foreign_folder,
    is_ours_at,
)
from rtn_tensor.integrations.vllm.linear import RTNLinearMethod

logger = init_logger(f"vllm.{__package__}")  # vLLM shows no others

# What its code calls the stacked weights of experts is another name than in files; here they keep the latter.
OF_GPT_OSS = r"\.experts\.(gate_up|down)_proj$"
ENGINE_KERNELS = {
    "rtn": "this library's",
    "vllm": "vLLM's for mixed precision: Machete or Marlin on CUDA, its own int4 on a CPU; --linear-backend "
    "names one",
}


class RTNQuantizationConfig(QuantizationConfig):
    """What vLLM asks, layer by layer, how to quantize, and whose kernels run. See
    `integrations.options.Options`, and `KERNELS`."""

    def __init__(self, options: Options | None = None, kernel: str = "rtn"):
        super().__init__()
        if kernel not in ENGINE_KERNELS:
            allowed = ", or ".join(f"{name!r} ({whose})" for name, whose in ENGINE_KERNELS.items())
            raise ValueError(f"quantization_config: kernel={kernel!r} is not supported; use {allowed}")
        self.given = options is not None
        self.options = Options.read({}) if options is None else options
        self.folder: ForeignFolder | None = None  # that another library quantized
        self.kernel = kernel
        self.tied = False
        self.embedding: RTNConfig | None = None
        # What files call the modules of an expert, gate, up and down; GPT-OSS has none. None: no experts.
        self.modules: Sequence[str] | None = None
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
        if is_saved(config) or config.get("quant_method") in READERS:
            return cls(Options(default=None))
        options = Options.read(config, own=("kernel",), unserved=())
        return cls(options, config.get("kernel", "rtn"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        # What another library quantized is vLLM's own affair, unless it is asked for this.
        asked = user_quant == "rtn" and hf_quant_cfg.get("quant_method") in READERS
        return "rtn" if asked or is_saved(hf_quant_cfg) else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        path = folder_of(model_name, revision)
        self.folder = foreign_folder(path)
        by = "this library" if self.folder is None else self.folder.how.kind
        if self.given and self.options.default is not None and (self.folder or is_ours_at(path)):
            raise ValueError(
                f"{model_name}: the weights are quantized by {by} already, and the quantization_config that "
                "was given asks for others; leave it out, to serve them so, or serve the float folder"
            )
        if self.folder is not None:
            self.options = Options(default=None, saved=dict(self.folder.formats))
            if hf_config is not None and "lm_head.weight" in self.folder.formats:
                hf_config.get_text_config().tie_word_embeddings = False
        elif self.options.default is None:
            gpt_oss = getattr(hf_config, "model_type", None) == "gpt_oss"
            self.options.saved = saved_formats(path, OF_GPT_OSS if gpt_oss else None)
            # Else vLLM takes the embedding in its stead.
            if hf_config is not None and has_own_output(path):
                hf_config.get_text_config().tie_word_embeddings = False
        self.tied = hf_config is not None and bool(hf_config.get_text_config().tie_word_embeddings)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        saved = hf_to_vllm_mapper.apply_dict(self.options.saved)
        names = {".experts.w13_weight": ".experts.gate_up_proj", ".experts.w2_weight": ".experts.down_proj"}
        of_files = WeightsMapper(orig_to_new_suffix=names)
        self.options.saved = of_files.apply_dict(saved)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Experts' planes are named as vLLM's own loader names experts' weights, and then what our parameters
        are called beyond that."""
        import regex  # vLLM's own

        self.tell()  # all layers are made, and loading begins
        names = {  # GPT-OSS's
            r"\.experts\._gate_up_proj_(qdata|scale|zero_point)$": r".experts.routed_experts._w13_weight_\1",
            r"\.experts\._down_proj_(qdata|scale|zero_point)$": r".experts.routed_experts._w2_weight_\1",
        }
        # Our own folder's experts, where they are modules of their own.
        names[r"\.experts\.(\d+)\.(\w+)\._weight_(qdata|scale|zero_point)$"] = r".experts.\1.\2.weight_\3"
        by_name = {regex.compile(old): new for old, new in names.items()}
        return LoadedMapper(orig_to_new_regex=by_name, folder=self.folder, modules=self.modules)

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
        each = [f"{prefix}.{i}" for i in range(layer.moe_config.num_logical_experts)]
        gate_up = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name]
        configs = self.options.of_experts(
            prefix,
            [f"{expert}.{part}" for expert in each for part in gate_up],
            [f"{expert}.{layer.ckpt_down_proj_name}" for expert in each],
        )
        if configs is None:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if (lora := get_current_vllm_config().lora_config) is not None:
            from vllm.lora.utils import is_in_target_modules

            if is_in_target_modules(prefix, lora.target_modules, self.packed_modules_mapping):
                raise ValueError(
                    f"{prefix}: LoRA over quantized experts is not supported; name the layers to adapt "
                    "without them, by lora_target_modules (as in ['q_proj', 'k_proj', 'v_proj', 'o_proj']), "
                    f"or name {prefix!r} in ignore to keep them float"
                )
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
        self.modules = () if is_gpt_oss(layer) else (*gate_up, layer.ckpt_down_proj_name)
        return RTNExpertsMethod(self, configs, layer, prefix)

    def tell(self) -> None:
        """Says once, when all layers are made, what is quantized.

        Raises:
            ValueError: as `Options.check`.
        """
        if not self.told:
            self.told = True
            if (stages := get_pp_group()).world_size > 1:  # this rank has only some layers
                matched: list[Any] = [None] * stages.world_size
                torch.distributed.all_gather_object(matched, self.options.matched, stages.cpu_group)
                self.options.matched.update(*matched)
            self.options.check()
            logger.info(self.options.summary())
