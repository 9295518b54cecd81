"""auto-round's weights: the planes of GPTQ or of AWQ, under a config of its own."""

from collections.abc import Mapping
from typing import Any

from rtn_tensor.checkpoint.foreign import awq, gptq
from rtn_tensor.checkpoint.foreign.words import ABOUT_THE_SEARCH, check_options, option, warn_of_activations
from rtn_tensor.checkpoint.sources import Source

OPTIONS = (
    *("quant_method", "bits", "group_size", "sym", "packing_format", "data_type", "extra_config"),
    *("desc_act", "checkpoint_format", "dynamic", "rotation_config", "rotation_configs"),
    *ABOUT_THE_SEARCH,
)
GPTQ, AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"


def read(found: dict[str, Source], how: Mapping[str, Any], where: str) -> None:
    """Puts weights in the place of planes.

    Raises:
        ValueError: an option that is not read; a plane is missing, or not as the others say.
    """
    check_options(how, OPTIONS, where)
    warn_of_activations(how, where)
    option(how, "data_type", ("int", None), where)
    for key in ("rotation_config", "rotation_configs", "dynamic"):
        option(how, key, (None, {}, []), where)
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
