"""auto-round's weights: the planes of GPTQ or of AWQ, under a config of its own."""

from collections.abc import Mapping
from typing import Any

from rtn_tensor.checkpoint.foreign import awq, gptq
from rtn_tensor.checkpoint.foreign.words import check_options, option
from rtn_tensor.checkpoint.sources import Source

OPTIONS = (
    *("quant_method", "bits", "group_size", "sym", "packing_format", "data_type", "extra_config", "backend"),
    *("autoround_version", "block_name_to_quantize", "to_quant_block_names", "quant_block_list", "iters"),
    *(
        "act_bits",
        "act_data_type",
        "act_dynamic",
        "act_group_size",
        "act_sym",
        "amp",
        "batch_size",
        "dataset",
    ),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps"),
    *(
        "low_gpu_mem_usage",
        "lr",
        "minmax_lr",
        "nsamples",
        "not_use_best_mse",
        "sampler",
        "scale_dtype",
        "seqlen",
    ),
    *(
        "super_bits",
        "super_group_size",
        "supported_types",
        "train_bs",
        "weight_config",
        "quant_lm_head",
        "model_dtype",
    ),
    *(
        "damp_percent",
        "desc_act",
        "true_sequential",
        "checkpoint_format",
        "static_groups",
        "batch_dim",
        "dynamic",
    ),
    *("enable_alg_ext", "enable_torch_compile", "momentum", "modules_to_not_convert", "rotation_config"),
)
GPTQ, AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of planes.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others say.
    """
    check_options(how, OPTIONS, where)
    option(how, "data_type", ("int", None), where)
    option(how, "rotation_config", (None,), where)
    packing = option(how, "packing_format", (GPTQ, AWQ), where)
    extra = how.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(about, dict) for about in extra.values()):
        raise ValueError(f"{where}: extra_config is {str(extra)[:100]}; it must be an object of objects")

    def of(module: str) -> Mapping[str, Any]:
        return {**how, **extra.get(module, {})}

    if packing == GPTQ:
        gptq.read_planes(found, of, True, where)
    else:
        awq.read_planes(found, of, where)
