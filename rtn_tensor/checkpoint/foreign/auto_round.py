"""auto-round's weights: the planes of GPTQ, AWQ, fp8 or compressed-tensors, under a config of its own."""

from collections.abc import Mapping
from typing import Any

from rtn_tensor.checkpoint.foreign import awq, compressed_tensors, fp8, gptq
from rtn_tensor.checkpoint.foreign.words import ABOUT_THE_SEARCH, check_options, option, warn_of_activations
from rtn_tensor.checkpoint.sources import Source

OPTIONS = (
    *("quant_method", "bits", "group_size", "sym", "packing_format", "data_type", "extra_config"),
    *("desc_act", "checkpoint_format", "dynamic", "rotation_config", "rotation_configs"),
    *("activation_scheme", "fmt", "weight_block_size"),
    *ABOUT_THE_SEARCH,
)
GPTQ, AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
PACKINGS = {  # of each data_type
    "int": (GPTQ, AWQ),
    "fp": ("auto_round:fp8", "auto_round:fp8_static"),
    "mx_fp": ("auto_round:llm_compressor",),
    "nv_fp": ("auto_round:llm_compressor",),
}


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of planes.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others say.
    """
    check_options(how, OPTIONS, where)
    warn_of_activations(how, where)
    kind = option(how, "data_type", (*PACKINGS, None), where) or "int"
    for key in ("rotation_config", "rotation_configs", "dynamic"):
        option(how, key, (None, {}, []), where)
    packing = option(how, "packing_format", PACKINGS[kind], where)
    if kind == "fp":
        fp8.read(found, {key: value for key, value in how.items() if key in fp8.OPTIONS}, where)
        return
    if kind != "int":  # of which the planes say all
        compressed_tensors.read(found, {"config_groups": {}}, where)
        return
    extra = how.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(about, dict) for about in extra.values()):
        raise ValueError(f"{where}: extra_config is {str(extra)[:100]}; it must be an object of objects")

    def of(module: str) -> Mapping[str, Any]:
        return {**how, **extra.get(module, {})}

    if packing == GPTQ:
        gptq.read_planes(found, of, True, where)
    else:
        awq.read_planes(found, of, where)
