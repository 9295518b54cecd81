"""transformers folders: the empty model that one describes, where each of its tensors goes, and how a quantized model is written as one."""

import copy
import json
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchao.quantization import FqnToConfig

from rtn_tensor.config import RTNConfig
from rtn_tensor.files import read_json
from rtn_tensor.formats import FORMATS, check_format
from rtn_tensor.policy import FilterFn, products
from rtn_tensor.sharding import held
from rtn_tensor.sources import Source, check_attributes, flattened
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


# What other libraries call the ways in which they quantize (quant_method), and how the names of their tensors end.
FOREIGN = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "fp8 with a scale for each block",
    "fbgemm_fp8": "FBGEMM's fp8",
    "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "NVIDIA's ModelOpt",
    "hqq": "HQQ",
    "quanto": "quanto",
    "auto-round": "AutoRound",
}
FOREIGN_NAMES = {
    r"\.qzeros$": "GPTQ or AWQ",
    r"\.weight_scale_inv$": "fp8 with a scale for each block",
    r"\.weight_packed$": "compressed-tensors",
    r"_blocks$": "MXFP4",
    r"\.quant_state\.bitsandbytes__": "bitsandbytes",
    r"\.(weight|input)_scale$": "fp8",
    r"\.W_q$": "HQQ",
}
MOST_PARAMETERS, MOST_LAYERS = 200_000, 10_000  # of a model that config.json describes: it is made before its weights are looked at
FOREIGN_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "NVIDIA's ModelOpt"}


def _foreign(kind: str, where: str) -> str:
    return (
        f"{where}: the weights are quantized by {kind}, which load does not read; give the float model, or read this one by transformers' "
        "from_pretrained"
    )


def foreign(path: Path, names: Iterable[str]) -> str | None:
    """Of a checkpoint with tensors of such `names`: which other library quantized it, and what to do; None where it looks like none did."""
    for name in names:
        for pattern, kind in FOREIGN_NAMES.items():
            if re.search(pattern, name):
                return _foreign(kind, f"{path} (as its {name} says)")
    found = [kind for name, kind in FOREIGN_FILES.items() if (path / name).is_file()]
    return _foreign(found[0], str(path)) if found else None


def read_config(path: Path) -> dict[str, Any]:
    """A transformers folder's config.json, of a model whose weights are float or ours, and which runs no code of the folder's.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is of another kind of model.
    """
    config = read_json(file := path / "config.json")
    for about in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ("quantization_config", "compression_config"):
            if not (how := about.get(key)):
                continue
            if not isinstance(how, dict):
                raise ValueError(f"{file}: {key} is {str(how)[:100]}; it must be an object, or not there")
            method = how.get("quant_method", "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(how) else None)
            if method != "torchao":
                raise ValueError(_foreign(FOREIGN.get(str(method), str(method)), f"{file} ({key})"))
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
            if "/" in str(about.get(key)):
                raise ValueError(f"{file}: {key} is {str(about[key])[:100]!r}, code from elsewhere, which is not run; remove that line")
        for key, value in about.items():
            if key.endswith(("layers", "n_layer")) and type(value) is int and value > MOST_LAYERS:
                raise ValueError(f"{file}: {key} is {value}, more than any model has; mend or replace it")
    return config


@contextmanager
def parameters_on_meta(at_most: int | None = None) -> Iterator[None]:
    """Modules made here have their parameters on meta; their buffers, which a checkpoint need not hold, are real.

    Raises:
        ValueError: there are more parameters than `at_most`.
    """
    made = 0

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:  # torch's annotation forgets the parameter
        nonlocal made
        made += 1
        if at_most is not None and made > at_most:
            raise ValueError(f"it has more than {at_most} parameters, more than any model")
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _class(path: Path, about: Mapping[str, Any]) -> Any:
    """transformers' class of the model that a folder's config.json describes."""
    import transformers

    file, names = path / "config.json", about.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"{file}: architectures is {str(names)[:100]}; it must be a list with the name of transformers' class")
    kind = getattr(transformers, names[0], None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    if about.get("auto_map"):
        raise ValueError(
            f"{file}: {names[0]} is code of the folder's own (auto_map), which is never run here; read it, and make the model yourself: "
            "AutoModel.from_config(config, trust_remote_code=True), and load(path, model=it)"
        )
    raise ValueError(f"{path}: transformers has no class {names[0]}, which config.json names; give the model to fill")


@contextmanager
def _of_transformers(file: Path, what: str) -> Iterator[None]:
    """Names the file from which transformers makes `what`: it raises errors of any kind, and names none."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or "no reason is given"
        raise ValueError(f"{file}: transformers makes no {what} of it ({type(error).__name__}: {why[:500]}); mend or replace it") from error


def build(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model that `path`/config.json describes, of its own class, with its parameters on meta.

    Raises:
        FileNotFoundError, ValueError: that file cannot be read; its class is not one of transformers', or its weights are of another
            library's format.
    """
    import transformers

    about = read_config(path)
    kind = _class(path, about)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _of_transformers(path / "config.json", "model"), parameters_on_meta(MOST_PARAMETERS):
            config: Any = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            if not about.get("quantization_config") and "quantization_config" in vars(config):
                del config.quantization_config  # null or {}: transformers asks only whether it is there
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
    file = path / "generation_config.json"
    if model.can_generate() and (file.exists() or file.is_symlink()):
        read_json(file)
        with _of_transformers(file, "generation config"):
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
    state = model.state_dict()

    def new(name: str) -> str:
        name = rename_source_key(name, renamings, [])[0]
        module, _, last = name.rpartition(".")
        if (plane := re.fullmatch("_(.+)_(qdata|scale)", last)) is None:
            return name
        # transformers adds or removes the prefix of a base model by the name of the weight.
        weight = rename_source_key(f"{module}.{plane[1]}", [], [], model.base_model_prefix, state)[0]
        return f"{weight.removesuffix(plane[1])}{last}"

    return new


def placed(model: Any, found: Mapping[str, Source]) -> list[tuple[Source, str, tuple[int | slice, ...]]]:
    """Where each tensor of a checkpoint goes, by transformers' own table of old names and of layers that it fuses: the tensor, its name in
    the model, and the index of its part of that. Where transformers computes with tensors, they are what it makes of them, when asked for.

    Raises:
        ValueError: transformers cannot make of some tensors what its table says.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, dot_natural_key, rename_source_key

    renamings, converters = _table(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    places: list[tuple[Source, str, tuple[int | slice, ...]]] = []
    fused: dict[str, dict[str, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(found, key=dot_natural_key):
        if found[name].quantized:  # under the model's own name
            places.append((found[name], name, ()))
            continue
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = name, None
        if pattern is None:
            places.append((found[name], new, ()))
        else:
            fused[new][pattern].append(found[name])
    computed: dict[str, dict[str, list[Source]]] = {}
    for new, parts in fused.items():
        converter = by_pattern[next(iter(parts))]
        kinds = [type(op) for op in converter.operations]
        experts, rows = MergeModulelist in kinds, Concatenate in kinds
        along = {MergeModulelist: 0, Concatenate: 1 if experts else 0}
        if any(kind not in along or op.dim != along[kind] for kind, op in zip(kinds, converter.operations, strict=True)):
            computed[new] = parts
            continue
        start = 0
        for pattern in converter.source_patterns:
            for i, source in enumerate(parts[pattern]):
                stop = start + source.shape[0]
                places.append((source, new, (*((i,) if experts else ()), *((slice(start, stop),) if rows else ()))))
            start = stop
    places += [(source, target, ()) for target, source in _computed(model, by_pattern, computed)]
    filled = {target for _, target, _ in places}
    where = next(iter(found.values())).file if found else Path()
    # transformers does not write these, and makes them anew.
    own = [name for name in model._keys_to_ignore_on_save or () if name in state and name not in filled]
    return places + [(_initial(model, name, state[name], where), name, ()) for name in own]


def _initial(model: Any, name: str, t: Tensor, file: Path) -> Source:
    """What the model itself puts into its tensor `t` of this name, which the checkpoint in `file` lacks."""

    def view() -> Tensor:
        module, _, last = name.rpartition(".")
        new = copy.deepcopy(model.get_submodule(module)).to_empty(device="cpu")
        model._init_weights(new)
        return getattr(new, last).detach()

    return Source(file, name, tuple(t.shape), t.dtype, view, view)


def _computed(model: Any, by_pattern: Mapping[str, Any], groups: Mapping[str, Mapping[str, list[Source]]]) -> Iterator[tuple[str, Source]]:
    """What transformers computes of each group of tensors, and its name. It is computed again each time, but for the last group's."""

    def convert(new: str, tensor: Callable[[Source], Tensor]) -> dict[str, Tensor]:
        parts = groups[new]
        some = next(iter(parts))
        converter = copy.deepcopy(by_pattern[some])
        for pattern, sources in parts.items():
            for source in sources:
                converter.add_tensor(new, source.name, pattern, tensor(source))
        try:
            made = converter.convert(new, model=model, config=model.config)
        except (
            RuntimeError,
            ValueError,
            AttributeError,
            IndexError,
            TypeError,
        ) as error:  # of transformers' operations, on what a file holds
            kinds = ", ".join(type(op).__name__ for op in converter.operations)
            raise parts[some][0].error(f"cannot become {new} by transformers' {kinds}: {error}") from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    last = lru_cache(maxsize=1)(lambda new: convert(new, lambda source: source.view()))
    for new, parts in groups.items():
        first = next(iter(parts.values()))[0]
        for target, t in convert(new, lambda source: torch.empty(source.shape, dtype=source.dtype, device="meta")).items():
            view: Callable[[], Tensor] = lambda new=new, target=target: last(new)[target]  # noqa: E731
            yield target, Source(first.file, first.name, tuple(t.shape), t.dtype, lambda view=view: view().clone(), view)


# ------------------------------------------------------------------------------------------- what transformers is told


class _Ties(dict):
    """`_tied_weights_keys` of a model of which some ties are undone: those that hold; `all` is what its class ties."""

    all: Any


def _submodels(model: Any) -> Iterator[tuple[str, Any]]:
    """`model` and the models of transformers in it, and their names."""
    for prefix, module in model.named_modules():
        if is_pretrained(module):
            yield prefix, module


def _ties(model: Any) -> dict[str, str]:
    """What transformers ties to what in a new model of this class and config, without the models in it."""
    kept = model._tied_weights_keys
    if not isinstance(kept, _Ties):
        return model.get_expanded_tied_weights_keys()
    try:
        model._tied_weights_keys = kept.all
        return model.get_expanded_tied_weights_keys()
    finally:
        model._tied_weights_keys = kept


def all_ties(model: Any) -> dict[str, str]:
    """What transformers ties to what in a new model of this class and config, by names."""
    found = {}
    for prefix, submodel in _submodels(model):
        dot = f"{prefix}." if prefix else ""
        found |= {f"{dot}{name}": f"{dot}{source}" for name, source in _ties(submodel).items()}
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for named in (model.named_parameters, model.named_buffers) for name, t in named(remove_duplicate=False)}


def _untied(model: Any) -> set[str]:
    """The names that a new model ties, and that are not, or not all, one tensor in `model`."""
    tensors, ties = _tensors(model), all_ties(model)

    def root(name: str) -> str:
        return root(ties[name]) if ties.get(name, name) != name else name

    groups: dict[str, set[str]] = defaultdict(set)
    for name, source in ties.items():
        groups[root(name)] |= {name, source}
    return {name for names in groups.values() if len({id(tensors.get(name)) for name in names}) > 1 for name in names}


def _to_write(model: Any) -> dict[str, Tensor]:
    """The tensors of a state_dict that a file must hold for a new model of this class to be filled by it: one of those that are tied, and
    each of those that are not tied any more."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    tensors, untied = _tensors(model), _untied(model)
    state = model.state_dict()
    first: dict[int, str] = {}
    floats: dict[str, Tensor] = {}
    quantized: dict[str, Tensor] = {}
    for name, t in state.items():
        if name in (model._keys_to_ignore_on_save or ()):
            continue
        again = first.setdefault(id(tensors.get(name, t)), name) != name
        if isinstance(held(t), RTNQuantizedTensor):
            if held(t) is not t:
                raise ValueError(
                    f"{name} is a rank's part of a quantized weight; gather the whole model first, or use torch.distributed.checkpoint"
                )
            if not again or name in untied:
                quantized[name] = t
        else:
            floats[name] = t.clone() if again and name in untied else t
    found = remove_tied_weights_from_state_dict(floats, model) | quantized
    return {name: found[name] for name in state if name in found}


def _under_old_names(model: Any, tensors: Mapping[str, Tensor], conversions: list[Any] | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What transformers would write of `tensors`, quantized ones as their planes, and the metadata that says so.

    transformers writes tensors as they were in the checkpoint that a model is of: under their old names, and undoing what it computes.
    With planes it cannot compute, and so they, and floats that would be computed together with them, are only renamed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        apply_converters,
        apply_renamings,
        revert_weight_conversion,
    )

    if conversions is None:
        conversions = [entry for entry in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(entry, PrefixChange)]
    reverse = [entry.reverse_transform() for entry in conversions[::-1]]
    renamings = [entry for entry in reverse if not isinstance(entry, WeightConverter)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        target, pattern = apply_converters(name, converters)
        groups[target if pattern is not None else name].append(name)
    kept = {name for names in groups.values() if any(isinstance(tensors[n], RTNQuantizedTensor) for n in names) for name in names}
    with _set_for_now([(model, "_weight_conversions", conversions)]):
        written = revert_weight_conversion(model, {name: t for name, t in tensors.items() if name not in kept})
    flat, metadata = flattened(tensors)
    new, (_, reading) = renaming(model), _table(model)
    for name, t in flattened({name: tensors[name] for name in tensors if name in kept})[0].items():
        ways = (apply_renamings(name, renamings), name)
        fits = [way for way in ways if new(way) == name and apply_converters(name, reading)[1] is None]
        if not fits:
            raise ValueError(f"{name} would be read under another name by transformers; leave its weight float")
        written[fits[0]] = t
    return written, metadata


@cache
def _quantizer_class() -> type:
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    class RTNHfQuantizer(TorchAoHfQuantizer):
        """What transformers asks about a model that `quantize_` or `load` quantized.

        Attributes:
            conversions: the model's `_weight_conversions`, in whose place it has none: what is written is converted here.
            undo: `dequantize_`.
        """

        __module__, __qualname__ = __name__, "RTNHfQuantizer"
        conversions: list[Any] | None = None
        undo: Callable[[Any], Any]

        @property
        def is_trainable(self) -> bool:  # adapters over it are; transformers' own goes by the name of the config, and says no of int4
            return True

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict, dict]:
            # It is a part of another model, maybe, whose config says nothing of it, or is its own config, too.
            _set([(submodel.config, "quantization_config", None) for _, submodel in _submodels(model)])
            _set([(model.config, "quantization_config", _in_config(_quantization_config(model)))])
            return _under_old_names(model, _to_write(model), self.conversions)

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            self.undo(model)
            return model.to(dtype) if isinstance(dtype, torch.dtype) and dtype != model.dtype else model

    return RTNHfQuantizer


def __getattr__(name: str) -> Any:
    """Of the class that is made only where transformers is there, so that it can be pickled."""
    if name == "RTNHfQuantizer":
        return _quantizer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


def _in_config(quantization_config: Any) -> dict[str, Any] | None:
    """As config.json has it: torch.compile may look through the config of a model, and cannot through a TorchAoConfig."""
    return None if quantization_config is None else json.loads(json.dumps(quantization_config.to_dict()))


def _description(model: Any, undo: Callable[[Any], Any] | None) -> list[tuple[Any, str, Any]]:
    """The attributes (owner, name, value) by which transformers knows how `model`, or what in it is its own, is quantized; None: to be
    removed."""
    settings: list[tuple[Any, str, Any]] = []
    whole: list[str] = []
    for prefix, submodel in _submodels(model):
        settings += _of_one(submodel, undo)
        if not any(f"{prefix}.".startswith(outer) for outer in whole):  # no part of another; its config may be that of the other, too
            whole.append(f"{prefix}." if prefix else "")
            config = _in_config(_quantization_config(submodel))
            if config is not None or _is_ours(getattr(submodel.config, "quantization_config", None)):
                settings.append((submodel.config, "quantization_config", config))
    return settings


def _is_ours(quantization_config: Any) -> bool:
    return bool(re.search("RTN(Int[48]Weight)?Config", str(quantization_config)))


def _of_one(model: Any, undo: Callable[[Any], Any] | None) -> list[tuple[Any, str, Any]]:
    """`_description`, of `model` without its config and without the models in it."""
    from transformers.integrations.torchao import TorchAoDeserialize

    settings: list[tuple[Any, str, Any]] = []
    before: Any = getattr(model, "hf_quantizer", None)
    known = type(before).__name__ == "RTNHfQuantizer"
    conversions = before.conversions if known else vars(model).get("_weight_conversions")
    if conversions is not None:
        # Of a model that was read quantized, transformers remembers how, and refuses to write it: it cannot go back that way.
        deserializes = lambda entry: any(isinstance(op, TorchAoDeserialize) for op in getattr(entry, "operations", ()))  # noqa: E731
        conversions = [entry for entry in conversions if not deserializes(entry)]
    if (quantization_config := _quantization_config(model)) is not None:
        quantizer = _quantizer_class()(quantization_config, pre_quantized=True)
        quantizer.conversions = conversions
        quantizer.undo = undo
        settings += [(model, "hf_quantizer", quantizer), (model, "_weight_conversions", [])]
    elif known or before is not None and _is_ours(before.quantization_config.to_dict()):  # and it was dequantized since
        settings += [(model, "hf_quantizer", None), (model, "_weight_conversions", conversions)]
    tensors, ties = _tensors(model), _ties(model)
    kept = {name: source for name, source in ties.items() if tensors.get(name) is tensors.get(source)}
    own = model._tied_weights_keys
    if len(kept) < len(ties) or isinstance(own, _Ties):
        left = _Ties(kept)
        left.all = own.all if isinstance(own, _Ties) else own
        together = {
            name: source
            for name, source in vars(model).get("all_tied_weights_keys", {}).items()
            if tensors.get(name) is tensors.get(source)
        }
        settings += [(model, "_tied_weights_keys", left), (model, "all_tied_weights_keys", together)]
    return settings


def _set(settings: list[tuple[Any, str, Any]]) -> None:
    """Sets attributes, or removes those whose value is None: transformers asks whether they are there."""
    for owner, name, value in settings:
        if value is not None:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)


@contextmanager
def _set_for_now(settings: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """`_set`, undone at the end."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in settings]
    try:
        _set(settings)
        yield
    finally:
        _set(before[::-1])


def describe(model: Any, undo: Callable[[Any], Any]) -> None:
    """Tells transformers how `model`, or what in it is its own, is quantized, so that `save_pretrained`, `tie_weights` and `Trainer`
    take it; `undo` is `dequantize_`."""
    _set(_description(model, undo))


def described(model: Any) -> Any:
    """`describe`, undone at the end."""
    return _set_for_now(_description(model, None))
