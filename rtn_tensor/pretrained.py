"""transformers folders: the empty model that one describes, where each of its tensors goes, and how a quantized model is written as one."""

import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchao.quantization import FqnToConfig

from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import FORMATS, check_format
from rtn_tensor.policy import FilterFn, products
from rtn_tensor.sources import check_attributes, plane_names
from rtn_tensor.tensor import RTNQuantizedTensor


def _from_planes(qdata: Tensor, scale: Tensor, **attributes: Any) -> RTNQuantizedTensor:
    """A weight of a file, whose attributes nobody has looked at yet.

    Raises:
        TypeError, ValueError: the planes are not those of a weight with such attributes, nor a rank's part of them.
    """
    check_attributes(attributes)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        attributes["in_features"] = _columns_here(qdata, scale, attributes)
    return RTNQuantizedTensor(qdata, scale, **attributes)


def _columns_here(qdata: Tensor, scale: Tensor, attributes: Mapping[str, Any]) -> Any:
    """The columns of a rank's planes. transformers' tensor parallelism cuts each plane into as many parts, and gives the attributes of the
    whole.

    Raises:
        ValueError: a part of the one plane is not of the same columns as that of the other.
    """
    k, bits, group_size = (attributes[name] for name in ("in_features", "bits", "group_size"))
    check_format(bits, group_size, attributes["scale_method"])
    if type(k) is not int or not qdata.dim() or qdata.shape[-1] in (0, FORMATS[bits].row_bytes(k)):
        return k  # which the tensor checks
    columns = qdata.shape[-1] * 8 // bits
    fits = FORMATS[bits].row_bytes(k) * 8 == k * bits and k % columns == 0 and group_size != -1 and columns % group_size == 0
    if not fits or scale.shape[-1:] != (columns // group_size,):
        raise ValueError(
            f"a quantized weight of {k} columns cannot be cut into {columns} a rank, inside a group of {group_size}; quantize with a "
            "group_size that divides the columns of a rank, or load on another number of ranks"
        )
    return columns


# torchao's reader and writer accept the classes in these two, and offer no function to add one. They need numpy, as safetensors and
# transformers do, but torch does not.
if find_spec("numpy") is not None:
    from torchao.prototype.safetensors import safetensors_utils

    safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(RTNQuantizedTensor.__name__)
    safetensors_utils.ALLOWED_CLASSES[RTNQuantizedTensor.__name__] = _from_planes


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is transformers'."""
    transformers = sys.modules.get("transformers")  # where it was not imported, no model is its own
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


# ------------------------------------------------------------------------------------------- the empty model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made here have their parameters on meta; their buffers, which a checkpoint need not hold, are real."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:  # torch's annotation forgets the parameter
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


def build(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model that `path`/config.json describes, of its own class, with its parameters on meta.

    Raises:
        ValueError: its class is not one of transformers'.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)  # None would ask on stdout
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} needs code of its own (auto_map in config.json), which is never run here; look through it, make the model with "
            "transformers, and give it to load(path, model=...)"
        ) from error
    name = (config.architectures or ["none"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"{path}: transformers has no class {name}, which config.json names; give the model to fill")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with parameters_on_meta():
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    # fp16 is too narrow for some layers (T5's `wo`).
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, parameter in model.named_parameters():
            if re.search(pattern.replace(".", r"\.").replace("*", ".*"), name):
                parameter.data = parameter.data.to(kept)
    model.config.dtype = dtype
    model.name_or_path = str(path)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def ends(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output layer of a transformers model; a vision model has neither."""
    try:
        first = model.get_input_embeddings()
    except NotImplementedError:
        first = None
    return first, model.get_output_embeddings()


def but_the_output(model: nn.Module) -> FilterFn:
    """transformers' choice of weights, and experts: every linear but the output layer, and but what it keeps in fp32."""
    outer = ends(model) if is_pretrained(model) else ()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    by_default = products(model)

    def selects(module: nn.Module, fqn: str) -> bool:
        return by_default(module, fqn) and module not in outer and kept.isdisjoint(fqn.split("."))

    return selects


def ignored(model: nn.Module) -> Sequence[str]:
    """Patterns of names that a checkpoint of such a model may hold in vain."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # Buffers that older checkpoints hold, and newer models compute (transformers' from_pretrained has the same two).
    held = {"position_ids": r"(^|\.)position_ids$", "rotary_emb.inv_freq": r"rotary_emb\.inv_freq"}
    names = [name for name, _ in model.named_buffers()]
    return sorted(patterns | {pattern for end, pattern in held.items() if any(name.endswith(end) for name in names)})


def _table(model: Any) -> tuple[list[Any], list[Any]]:
    """transformers' own of old names in checkpoints, and of layers that it fuses."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    return [entry for entry in table if not isinstance(entry, WeightConverter)], converters


def renaming(model: Any) -> Callable[[str], str]:
    """The model's name of what a checkpoint may have under an old one, by transformers' table; layers that it fuses keep theirs."""
    from transformers.core_model_loading import rename_source_key

    renamings, _ = _table(model)
    return lambda name: rename_source_key(name, renamings, [])[0]


def renamed(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int | slice, ...]]]:
    """Where each tensor of a checkpoint goes, by transformers' own table of old names and of layers that it fuses: its name in the model,
    and the index of its part of that.

    Raises:
        ValueError: transformers would compute with a tensor, not only place it.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, dot_natural_key, rename_source_key

    renamings, converters = _table(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    places: dict[str, tuple[str, tuple[int | slice, ...]]] = {}
    fused: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = name, None
        if pattern is None:
            places[name] = new, ()
        else:
            fused[new][pattern].append(name)
    for new, parts in fused.items():
        some = next(iter(parts))
        operations: list[Any] = by_pattern[some].operations
        kinds = [type(op) for op in operations]
        experts, rows = MergeModulelist in kinds, Concatenate in kinds
        along = {MergeModulelist: 0, Concatenate: 1 if experts else 0}
        if any(kind not in along or op.dim != along[kind] for kind, op in zip(kinds, operations, strict=True)):
            raise ValueError(
                f"{parts[some][0]}: transformers computes {new} from it ({', '.join(kind.__name__ for kind in kinds)}), and load only "
                "places tensors; use from_pretrained(quantization_config=TorchAoConfig(config))"
            )
        start = 0
        for pattern in by_pattern[some].source_patterns:
            for i, name in enumerate(parts[pattern]):
                stop = start + shapes[name][0]
                places[name] = new, (*((i,) if experts else ()), *((slice(start, stop),) if rows else ()))
            start = stop
    return places


# ------------------------------------------------------------------------------------------- what transformers is told


@cache
def _quantizer_class() -> type:
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    class RTNHfQuantizer(TorchAoHfQuantizer):
        @property
        def is_trainable(self) -> bool:  # adapters over it are; transformers' own goes by the name of the config, and says no of int4
            return True

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict, dict]:
            # torchao would write a tensor once for every place that shares it.
            tensors, metadata = super().get_state_dict_and_metadata(model)
            names: dict[int, str] = {}
            for fqn, w in model.named_parameters(remove_duplicate=False):
                if names.setdefault(id(w), fqn) != fqn and isinstance(w, RTNQuantizedTensor):
                    for plane in plane_names(fqn):
                        del tensors[plane]
            return tensors, metadata

    return RTNHfQuantizer


def _quantization_config(model: nn.Module) -> Any:
    """The `TorchAoConfig` that describes the quantized `model`, or None for a float one."""
    from transformers import TorchAoConfig

    configs: OrderedDict[str, Any] = OrderedDict()
    floats: list[str] = []
    for fqn, w in model.named_parameters(remove_duplicate=False):
        # torchao names a module for its "weight", and any other parameter by its own name.
        key = fqn.removesuffix(".weight")
        if isinstance(w, RTNQuantizedTensor):
            configs[key] = RTNConfig(w.bits, w.group_size, w.scale_method)
        elif isinstance(model.get_submodule(fqn.rpartition(".")[0]), nn.Linear | nn.Embedding) and w.dim() > 1:
            floats.append(key)
    if not configs:
        return None
    distinct = set(configs.values())
    quant_type = distinct.pop() if len(distinct) == 1 else FqnToConfig(configs)
    embedding = isinstance(getattr(ends(model)[0], "weight", None), RTNQuantizedTensor)
    return TorchAoConfig(quant_type, modules_to_not_convert=floats, include_input_output_embeddings=embedding)


def _description(model: Any) -> list[tuple[Any, str, Any]]:
    """The attributes (owner, name, value) by which transformers knows how `model` is quantized; None: to be removed."""
    from transformers.integrations.torchao import TorchAoDeserialize

    quantization_config = _quantization_config(model)
    quantizer = None if quantization_config is None else _quantizer_class()(quantization_config, pre_quantized=True)
    settings: list[tuple[Any, str, Any]] = []
    ours = re.search("RTN(Int[48]Weight)?Config", str(getattr(model.config, "quantization_config", "")))
    if quantizer is not None or ours:  # which it may have been, and dequantized since
        settings += [(model, "hf_quantizer", quantizer), (model.config, "quantization_config", quantization_config)]
    # Of a model that was read quantized, transformers remembers how, and refuses to write it: it cannot go back that way.
    if conversions := getattr(model, "_weight_conversions", None):
        kept = [c for c in conversions if not any(isinstance(op, TorchAoDeserialize) for op in getattr(c, "operations", ()))]
        settings.append((model, "_weight_conversions", kept))
    first, last = (getattr(end, "weight", None) for end in ends(model))
    if first is not None and last is not None and any(isinstance(w, RTNQuantizedTensor) for w in (first, last)):
        settings.append((model.config, "tie_word_embeddings", first is last))  # else whoever reads it ties them anew
    return settings


def _set(settings: list[tuple[Any, str, Any]]) -> None:
    """Sets attributes, or removes those whose value is None: transformers asks whether they are there."""
    for owner, name, value in settings:
        if value is not None:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)


def describe(model: Any) -> None:
    """Tells transformers how `model` is quantized, so that its own `save_pretrained` and `Trainer` take it; nothing, of another's model."""
    if is_pretrained(model):
        _set(_description(model))


@contextmanager
def described(model: Any) -> Iterator[None]:
    """`describe`, undone at the end."""
    settings = _description(model)
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in settings]
    try:
        _set(settings)
        yield
    finally:
        _set(before)
