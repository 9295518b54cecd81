"""The config by which transformers' own loading quantizes a model as rules say."""

import os
from collections import OrderedDict

from torch import nn
from torchao.quantization import FqnToConfig

from rtn_tensor.integrations.transformers.folders import empty_model
from rtn_tensor.integrations.transformers.models import default_filter
from rtn_tensor.quantize.kinds import FilterFn
from rtn_tensor.quantize.selection import Rules
from rtn_tensor.quantize.targets import targets_of


def fqn_config(
    model: nn.Module | str | os.PathLike, rules: Rules, filter_fn: FilterFn | None = None
) -> FqnToConfig:
    """torchao's config that says for each weight of `model` what `rules` make of it, for
    `TorchAoConfig(fqn_config(path, rules))`.

    transformers sorts the keys of the config that it saves. Here each is one weight's name in full, so that
    their order means nothing.

    Args:
        model: a module, or a transformers folder.
        rules: as for `load`.
        filter_fn: as for `load`.

    Raises as `load` does for rules.
    """
    module = model if isinstance(model, nn.Module) else empty_model(model)
    found = targets_of(module, rules, default_filter(module, rules, filter_fn))
    # torchao names a module for its "weight", and any other parameter by its own name.
    return FqnToConfig(OrderedDict((t.fqn.removesuffix(".weight"), t.config) for t in found))
