"""What a compressed-tensors config says of each weight."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from rtn_tensor.checkpoint.foreign.words import check_options, option
from rtn_tensor.checkpoint.sources import Source

FORMATS_READ = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mixed-precision", "dense", None),
)
OPTIONS = (
    *("quant_method", "format", "config_groups", "ignore", "quantization_status", "kv_cache_scheme"),
    *("global_compression_ratio", "sparsity_config", "transform_config", "version", "run_compressed"),
    *("provider", "autoround_version"),  # of auto-round
)
GROUP_OPTIONS = ("targets", "weights", "input_activations", "output_activations", "format")
WEIGHT_OPTIONS = (
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)


def schemes_of(how: Mapping[str, Any], where: str) -> list[tuple[list[str], Mapping[str, Any]]]:
    """The targets of each config group, and what it says of weights.

    Raises:
        ValueError: an option that is not read, or a group that is none.
    """
    check_options(how, OPTIONS, where)
    option(how, "format", FORMATS_READ, where)
    option(how, "transform_config", (None, {}), where)
    option(how, "quantization_status", ("compressed", None), where)
    sparsity = how.get("sparsity_config") or {}
    option(sparsity if isinstance(sparsity, dict) else {"format": sparsity}, "format", ("dense", None), where)
    found = how.get("config_groups")
    if not isinstance(found, dict):
        raise ValueError(f"{where}: config_groups is {str(found)[:100]}; it must be an object of groups")
    schemes: list[tuple[list[str], Mapping[str, Any]]] = []
    for key, group in found.items():
        of_group = f"{where}, {key}"
        about = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(group, dict) or not isinstance(about, dict | type(None)):
            raise ValueError(
                f"{of_group} is {str(group)[:100]}; it must be an object with weights and targets"
            )
        check_options(group, GROUP_OPTIONS, of_group)
        option(group, "format", FORMATS_READ, of_group)
        targets = group.get("targets", ["Linear"])
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"{of_group}: targets is {str(targets)[:100]}; it must be a list of names")
        for target in targets:
            if target.startswith("re:"):
                try:
                    re.compile(target[3:])
                except re.error as error:
                    raise ValueError(
                        f"{of_group}: targets has {target!r}, which is no regular expression: {error}"
                    ) from None
        if about is not None:
            check_options(about, WEIGHT_OPTIONS, of_group)
            option(about, "type", ("int", "float"), of_group)
            option(about, "dynamic", (False, None), of_group)
            schemes.append((targets, about))
    return schemes


def by_scheme(
    schemes: list[tuple[list[str], Mapping[str, Any]]],
    module: str,
    source: Source,
    make: Callable[[Mapping[str, Any]], Source],
) -> Source:
    """What `make` makes of that which the config says of the weight of `module`: a name in full counts for
    more than a pattern, and that for more than the name of a class.

    Where none fits, the config may name modules as the model does, and the file otherwise (LLaVA): then it is
    the one group, by bits and groups, that the planes are of.
    """

    def rank(target: str) -> int:
        if target == module:
            return 0
        if target.startswith("re:"):
            return 1 if re.match(target[3:], module) else 3
        return 2 if "." not in target and target[:1].isupper() else 3

    ranked = [(min(map(rank, targets), default=3), i) for i, (targets, _) in enumerate(schemes)]
    best = min(ranked, default=(3, 0))
    if best[0] < 3:
        return make(schemes[best[1]][1])
    fitting: dict[tuple[Any, ...], Source] = {}
    for _, about in schemes:
        with suppress(ValueError):
            fitting[tuple(map(str, map(about.get, ("num_bits", "strategy", "group_size"))))] = make(about)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    raise source.error(
        f"is quantized, and no config group of config.json has {module} among its targets, and not one alone "
        "fits its planes; mend config.json, or download the checkpoint again"
    )
