"""Checkpoints: `load` streams one into a model tensor by tensor, quantizing on the way; `load_from_rank0` a state dict among ranks; `save`
writes one.

On disk a quantized weight `a.b.weight` is its two planes, `a.b._weight_qdata` and `a.b._weight_scale`, and a line of JSON in the file's
metadata, as torchao flattens a tensor subclass; so transformers and torchao read what `save` writes.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from rtn_tensor import pretrained
from rtn_tensor.config import RTNConfig
from rtn_tensor.files import check_regular, parse_json, read_json
from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.moe import use
from rtn_tensor.policy import FilterFn, Rules
from rtn_tensor.quantize import Target, dequantize_, is_finite, quantize_, targets_of
from rtn_tensor.sharding import all_ranks, as_part, check_idle, held, place, ranks_of, together
from rtn_tensor.sources import Source, flattened, sources, state_sources
from rtn_tensor.streaming import Piece, check, check_finite, on_rank, pieces_by_name, same, some, stream
from rtn_tensor.tensor import RTNQuantizedTensor, hung_on

# What of a model's folder does not go with its quantized weights into another, by lower-case name, and why.
LEFT_OUT = (
    (("adapter_*",), "an adapter, which is not merged into the weights"),
    (
        ("optimizer.*", "scheduler.*", "rng_state*", "scaler.*", "training_args.*", "trainer_state.json", "*.distcp", "*.tfevents.*"),
        "of a training run",
    ),
    (("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.index.json"), "weights that are not quantized"),
    (
        ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.mlmodel", "*.pdparams", "*.nemo"),
        "another framework's weights, which are not quantized",
    ),
    (("quantize_config.json", "quant_config.json", "hf_quant_config.json"), "it describes another quantization"),
    ((".*",), "hidden"),
)
FILE_ENDS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")
OWN_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"

# ------------------------------------------------------------------------------------------- load


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(fqn, module, name, tensor) of all that a state_dict holds, shared ones at each of their places."""
    for prefix, module in model.named_modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, module, name, t


def _empty(t: Tensor, config: RTNConfig | None, transposed: bool, device: torch.device) -> Tensor:
    if config is None:
        return torch.empty(t.shape, dtype=t.dtype, device=device)
    format = {"bits": config.bits, "group_size": config.group_size, "scale_method": config.scale_method}
    w = RTNQuantizedTensor.empty(*(t.mT if transposed else t).shape, **format, dtype=t.dtype, device=device)
    return w.mT if transposed else w


def load(
    path: str | os.PathLike,
    config: AOBaseConfig | Rules | None = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    filter_fn: FilterFn | None = None,
    rename: Mapping[str, str] | None = None,
    fuse: Mapping[str, Sequence[str]] | None = None,
    progress: bool | None = None,
) -> Any:
    """A model with its weights from a checkpoint, quantized as they are read: the float model is never in memory.

    Above the finished model it takes at most 64 MiB, and what transformers computes of some tensors, where it does. Nothing of `model`
    changes before all has been read and checked. Without a config, tensors that have their dtype already are not copied on a CPU, but stay
    maps of the files: then only the scales of a quantized weight are read and looked at, and of a float one nothing, so that a NaN in it is
    not seen.

    Args:
        path: a transformers folder; or a folder or file of safetensors, of `pytorch_model*.bin`, or of what torch.save wrote. A GGUF file
            is read by transformers, which holds the float model meanwhile.
        config: as for `quantize_`; None for a checkpoint that is quantized already, or to stay float.
        model: the module to fill, best on the meta device, or a function that makes one (its parameters are then made on meta, its buffers
            are not). By default it is built from the folder's config.json by transformers, and comes in eval mode. Where it is sharded
            already (`fully_shard`, `parallelize_module`), each rank reads its own part of the files.
        device: where the weights go; by default where the model's are, or the CPU.
        dtype: of a model built from config.json; by default as that says. A given model has its own.
        filter_fn: as for `quantize_`. By default every nn.Linear but a transformers model's output layer, as in transformers, and
            experts.
        rename: regular expressions and what to put in their place in the checkpoint's names, in this order (`re.sub`).
        fuse: modules that stand for several of the checkpoint's, by the last part of their names: their rows follow one another, as in
            {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}.
        progress: whether to show a bar and a summary; by default where stderr is a terminal.

    Raises:
        FileNotFoundError: no checkpoint at `path`, or a part of it is missing.
        ValueError: a file is truncated or corrupt; a tensor is missing, has no place, another shape, an unknown dtype, a NaN or inf; a
            weight cannot be quantized as `config` says; another library quantized it; `model` has run under fully_shard. The message names
            the file and the tensor. What a transformers model has no place for is left out instead, with a warning, as by transformers.
        RuntimeError: another rank failed.
    """
    path = Path(path)
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype is {dtype!r}; give a torch.dtype, as torch.bfloat16, or none for that of the checkpoint")
    if not (model is None or callable(model)):
        raise TypeError(f"model is {model!r}; give a module, or a function that makes one; a device is given as device=")
    if path.suffix == ".gguf":
        return _load_gguf(path, config, device, dtype, filter_fn)
    if model is None:
        model = empty_model(path, dtype)
    elif not isinstance(model, nn.Module):
        with pretrained.parameters_on_meta():
            model = model()
    assert isinstance(model, nn.Module)
    if pretrained.is_pretrained(model) and (path / "config.json").is_file():
        pretrained.read_config(path)
    check_idle(model)
    pieces = _pieces(path, model, rename or {}, fuse or {})
    places, apart = _untied(list(_places(model)), pieces, pretrained.all_ties(model) if pretrained.is_pretrained(model) else {})
    state = {fqn: t for fqn, _, _, t in places}
    try:
        pieces, left_out = check(pieces, state, pretrained.ignored(model), strict=not pretrained.is_pretrained(model))
    except ValueError as error:
        if why := pretrained.foreign(path, (piece.source.name for piece in pieces)):
            raise ValueError(why) from error
        raise
    if left_out:
        warnings.warn(f"{path}: {type(model).__name__} has no place for, and load left out, {some(left_out)}", stacklevel=2)
    quantized = {p.target for p in pieces if p.source.quantized}  # one of them alone, say, which is meant
    if float_ones := [p.target for p in pieces if p.target in apart and quantized.isdisjoint([p.target, *apart[p.target]])]:
        warnings.warn(
            f"{path}: {some(float_ones)} are one weight in the model, and the files hold different values for them, so they are not tied, "
            "as in transformers; if that is meant, set tie_word_embeddings to false in config.json",
            stacklevel=2,
        )
    if left := [fqn for fqn, t in model.named_buffers() if t.is_meta and fqn not in state]:
        raise ValueError(f"{left[0]} was made on meta and is not in the checkpoint; give, as model, a function that makes it")
    if config is not None and any(p.source.quantized for p in pieces):
        raise ValueError(f"{path} is quantized already; load it without a config, or give the float checkpoint")
    targets = targets_of(model, config, _filter(model, config, filter_fn)) if config is not None else []
    configs = {t.fqn: t.config for t in targets}
    fqns: dict[int, list[str]] = defaultdict(list)
    for fqn, t in state.items():
        fqns[id(t)].append(fqn)
    with together(next((ranks_of(t) for t in state.values() if held(t) is not t), None)):
        new = _read(pieces, state, fqns, config, targets, device, lambda total: _bar(path.name, total, progress))
    _put(places, new, configs, fqns if config is not None else {}, apart)
    if pretrained.is_pretrained(model):
        ties: Any = model.all_tied_weights_keys
        for fqn, others in apart.items():
            if ties.get(fqn) in others:
                del ties[fqn]  # else transformers ties them anew
    if device is not None:
        model.to(device)  # the buffers that are not in the checkpoint
    use(model)
    pretrained.describe(model, dequantize_)
    return model


def _untied(
    places: list[tuple[str, nn.Module, str, Tensor]], pieces: list[Piece], ties: Mapping[str, str]
) -> tuple[list[tuple[str, nn.Module, str, Tensor]], dict[str, list[str]]]:
    """`places`, with tensors of their own where the checkpoint has different ones for names that share one; and, of each name there, those
    that it shares with no more. A name that the checkpoint lacks goes with that which `ties` ties it to, or with the first."""
    held_by: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        held_by[piece.target].append(piece)
    sharing: dict[int, list[str]] = defaultdict(list)
    for fqn, _, _, t in places:
        sharing[id(t)].append(fqn)
    new: dict[str, Tensor] = {}
    apart: dict[str, list[str]] = {}
    old = {fqn: t for fqn, _, _, t in places}
    for names in sharing.values():
        if sum(name in held_by for name in names) < 2:
            continue
        kinds: list[list[str]] = []
        for name in (name for name in names if name in held_by):
            if kind := next((kind for kind in kinds if same(held_by[kind[0]], held_by[name], old[name].dtype)), None):
                kind.append(name)
            else:
                kinds.append([name])
        for name in (name for name in names if name not in held_by):
            next((kind for kind in kinds if ties.get(name) in kind), kinds[0]).append(name)
        for kind in kinds[1:]:
            t = old[kind[0]]
            own = nn.Parameter(t.detach(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach()
            vars(own).update(hung_on(t))
            new |= dict.fromkeys(kind, own)
        if len(kinds) > 1:
            apart |= {name: [other for other in names if other not in kind] for kind in kinds for name in kind}
    return [(fqn, module, name, new.get(fqn, t)) for fqn, module, name, t in places], apart


def _pieces(path: Path, model: nn.Module, rename: Mapping[str, str], fuse: Mapping[str, Sequence[str]]) -> list[Piece]:
    """The tensors of a checkpoint, and where in `model` each would go."""
    found = sources(path, pretrained.renaming(model)) if pretrained.is_pretrained(model) else sources(path)
    if rename or fuse or not pretrained.is_pretrained(model):
        return pieces_by_name(found, rename, fuse)
    return [Piece(*place) for place in pretrained.placed(model, found)]


def without_place(path: Path, model: nn.Module) -> tuple[list[str], set[Path]]:
    """The names of the tensors in a folder that its `model` has no place for, and so leaves out; and the files of all that `load` reads."""
    state = dict.fromkeys(fqn for fqn, *_ in _places(model))
    pieces = _pieces(path, model, {}, {})
    return [piece.source.name for piece in pieces if piece.target not in state], {piece.source.file for piece in pieces}


def _read(
    pieces: list[Piece],
    state: Mapping[str, Tensor],
    fqns: Mapping[int, list[str]],
    config: AOBaseConfig | Rules | None,
    targets: list[Target],
    device: torch.device | str | None,
    bar: Callable[[int], Any],
) -> dict[int, dict[RTNConfig | None, Tensor]]:
    """What this rank holds of each tensor of the model, filled, by the old one's id and by what it is to be: one that is shared, and
    quantized at some of its places only, becomes two."""
    configs = {t.fqn: t.config for t in targets}
    transposed = {t.fqn for t in targets if t.transposed}
    new: dict[int, dict[RTNConfig | None, Tensor]] = defaultdict(dict)
    copied: list[Piece] = []
    for piece in pieces:
        old = state[piece.target]
        to = torch.device(device or ("cpu" if old.is_meta else old.device))
        if config is None and not piece.index and (piece.source.quantized or piece.source.dtype == old.dtype):
            t = piece.source.map()
            t = t if held(old) is old else piece.cut(t, place(old)).contiguous()
            if isinstance(t, RTNQuantizedTensor):  # of what is float nothing is read here
                check_finite(piece.source, t.scale)
            new[id(old)][None] = t.to(to)
            continue
        if here := on_rank(piece, old.shape, place(old)):
            copied.append(here)
        for c in {configs.get(fqn): None for fqn in fqns[id(old)]}:
            if c not in new[id(old)]:
                new[id(old)][c] = _empty(held(old), c, not transposed.isdisjoint(fqns[id(old)]), to)
    destinations = {p.target: list(new[id(state[p.target])].values()) for p in copied}
    total = sum(p.nbytes * len(destinations[p.target]) for p in copied)
    with bar(total) as meter:
        stream(copied, destinations, meter)
    return new


def _put(
    places: list[tuple[str, nn.Module, str, Tensor]],
    new: Mapping[int, Mapping[RTNConfig | None, Tensor]],
    configs: Mapping[str, RTNConfig],
    fqns: Mapping[int, list[str]],
    apart: Mapping[str, list[str]],
) -> None:
    """Puts what `_read` gives in the places of the old tensors; `fqns`, by their ids: where each lies, and `apart`, where those are that it
    shared with before: to tell what was untied."""
    parameters: dict[int, Tensor] = {}
    for fqn, module, name, old in places:
        t = new[id(old)][configs.get(fqn)]
        if name in module._buffers:
            module._buffers[name] = as_part(t, old)
        else:
            if id(t) not in parameters:
                floats = [other for other in fqns.get(id(old), []) if other not in configs] + list(apart.get(fqn, []))
                parameters[id(t)] = _parameter(as_part(t, old), old, fqn, floats)
            module._parameters[name] = parameters[id(t)]  # type: ignore[assignment]


def _parameter(t: Tensor, old: Tensor, fqn: str, floats: list[str]) -> nn.Parameter:
    """`t` as a parameter in the place of `old`, with what was hung on that; `floats`: where it stays float."""
    quantized = isinstance(held(t), RTNQuantizedTensor)
    new: Any = nn.Parameter(t, requires_grad=old.requires_grad and not quantized)
    vars(new).update(hung_on(old))
    if quantized:
        new.fqn = fqn  # for the errors of a later slice or product
        if floats:
            new.untied_from = floats
    return new


def _filter(model: nn.Module, config: AOBaseConfig | Rules, filter_fn: FilterFn | None) -> FilterFn | None:
    return filter_fn if filter_fn or isinstance(config, FqnToConfig) else pretrained.but_the_output(model)


def fqn_config(model: nn.Module | str | os.PathLike, rules: Rules, filter_fn: FilterFn | None = None) -> FqnToConfig:
    """torchao's config that says for each weight of `model` what `rules` make of it, for `TorchAoConfig(fqn_config(path, rules))`.

    transformers sorts the keys of the config that it saves. Here each is one weight's name in full, so that their order means nothing.

    Args:
        model: a module, or a transformers folder.
        rules: as for `load`.
        filter_fn: as for `load`.

    Raises as `load` does for rules.
    """
    module = model if isinstance(model, nn.Module) else empty_model(model)
    found = targets_of(module, rules, _filter(module, rules, filter_fn))
    # torchao names a module for its "weight", and any other parameter by its own name.
    return FqnToConfig(OrderedDict((t.fqn.removesuffix(".weight"), t.config) for t in found))


def empty_model(path: str | os.PathLike, dtype: torch.dtype | None = None) -> Any:
    """The model of a transformers folder, in eval mode, its parameters on meta; by default of the dtype that config.json names, or else the
    checkpoint has.

    Raises:
        FileNotFoundError: `path` is not such a folder.
        TypeError: `dtype` is not a float one.
        ValueError: its config.json cannot be read; its class is not one of transformers'; another library quantized it.
    """
    path, floats = Path(path), (*FLOAT_DTYPES, torch.float64)
    if dtype not in (None, *floats):
        raise TypeError(f"dtype is {dtype}; a model has one of {', '.join(map(str, floats))}")
    if not ((path / "config.json").exists() or (path / "config.json").is_symlink()):
        there = (
            "it is a file"
            if path.is_file()
            else "it holds an adapter; merge that into its model, and give the folder of that"
            if (path / "adapter_config.json").exists()
            else "it has no config.json"
            if path.exists()
            else "it is not there; a model of the hub is fetched by `hf download NAME --local-dir DIR`"
        )
        raise FileNotFoundError(f"{path} is not a model folder: {there}")
    if dtype is None:
        about = pretrained.read_config(path)
        named = str(about.get("dtype") or about.get("torch_dtype")).removeprefix("torch.")
        dtype = next((dtype for dtype in floats if str(dtype) == f"torch.{named}"), None)
    if dtype is None:
        dtype = next((source.dtype for source in sources(path).values() if source.dtype in floats), torch.float32)
    return pretrained.build(path, dtype)


@contextmanager
def _bar(what: str, total: int, show: bool | None) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    started = time.perf_counter()
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if show is None else not show) as bar:
        yield bar.update
    if not bar.disable:
        seconds = time.perf_counter() - started
        tqdm.write(f"{what}: {total / 1e6:,.0f} MB in {seconds:.1f} s, {total / 1e6 / seconds:,.0f} MB/s", file=sys.stderr)


def _load_gguf(path: Path, config: AOBaseConfig | Rules | None, device: Any, dtype: torch.dtype | None, filter_fn: FilterFn | None) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype or torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    if config is not None:
        quantize_(model, config, _filter(model, config, filter_fn), device)
    return model if device is None else model.to(device)


# ------------------------------------------------------------------------------------------- from rank 0


def _looked_through(state_dict: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of a state dict, on meta."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"rank 0 gave a {type(state_dict).__name__}; give it the state dict, the other ranks need none")
    tensors = {name: t for name, t in state_dict.items() if isinstance(t, Tensor)}
    for name, t in tensors.items():
        if held(t) is not t:
            raise ValueError(f"{name} is a part of a tensor; give whole ones, as get_model_state_dict does with full_state_dict=True")
        seen = t.scale if isinstance(t, RTNQuantizedTensor) else t
        if seen.dtype in (*FLOAT_DTYPES, torch.float64) and not is_finite(seen.detach()):
            raise ValueError(f"{name} holds NaN or inf; nothing was loaded")
    return {name: t.detach().to("meta") for name, t in tensors.items()}


def _kind(t: Tensor) -> str:
    if not isinstance(t, RTNQuantizedTensor):
        return "float"
    return f"bits={t.bits}, group_size={t.group_size}, scale_method={t.scale_method!r}{', transposed' if t.transposed else ''}"


def load_from_rank0(model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> None:
    """Fills `model` on all ranks from a whole state dict that only rank 0 has, as `set_model_state_dict(broadcast_from_rank0=True)` does,
    which can send no quantized weights.

    One tensor at a time is beside the model. Of a quantized one its planes are sent, bit for bit; a float one goes as it is, and where the
    model's is quantized, each rank quantizes its own part. What has memory is filled where it lies, even in a model that has run; what is
    on meta gets memory. All ranks of the default process group call it.

    Args:
        model: sharded by `fully_shard`, `parallelize_module` or both, or not; its weights quantized as those of the state dict are (by
            `quantize_` on meta, say).
        state_dict: on rank 0; what is no tensor in it is not sent. That of other ranks is not looked at.

    Raises:
        TypeError, ValueError: on rank 0 there is no state dict; a tensor is missing, has no place, another shape, other bits, group_size or
            scale_method, is quantized and the model's is not, is cut inside a group, is a DTensor, or holds NaN or inf. All ranks raise,
            and `model` is unchanged.
        RuntimeError: there is no process group; or another rank failed. One that runs out of memory, say, leaves `model` filled in part.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("load_from_rank0 needs a process group; call init_process_group, or in one process model.load_state_dict")
    ranks, mine = all_ranks(model), state_dict if torch.distributed.get_rank() == 0 else None
    box: list[Any] = [None]
    with together(ranks):
        if torch.distributed.get_rank() == 0:
            box = [_looked_through(mine)]
    torch.distributed.broadcast_object_list(box, src=0)
    with together(ranks):
        state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}  # FSDP2 reshards meanwhile
        found = {source.name: source for source in state_sources(box[0], Path("rank 0's state_dict"))}
        pieces, _ = check(pieces_by_name(found, {}, {}), state, pretrained.ignored(model))
        kinds = [(p.target, _kind(p.source.view()), _kind(held(state[p.target]))) for p in pieces if p.source.quantized]
        if unlike := [f"{name} has {got}, the model's has {own}" for name, got, own in kinds if got != own]:
            raise ValueError("quantize_ the model as rank 0's state_dict is; nothing was loaded:\n  " + "\n  ".join(unlike[:10]))
        parts = [_part_here(piece, state[piece.target]) for piece in pieces]
    new: dict[int, dict[RTNConfig | None, Tensor]] = {}
    for piece, part in zip(pieces, parts, strict=True):
        old = state[piece.target]
        to = _receive(piece.source, mine, part, held(old), ranks)
        if old.is_meta:
            new[id(old)] = {None: to}
    _put([place for place in _places(model) if id(place[-1]) in new], new, {}, {}, {})


def _part_here(piece: Piece, to: Tensor) -> Piece | None:
    """What of `piece`, a whole tensor on meta, this rank puts into its part of `to`; None where that has no rows."""
    part = on_rank(piece, piece.source.shape, place(to))
    if part is not None:
        part.cut(part.source.view(), part.part)
    return part


def _receive(source: Source, mine: Mapping[str, Any] | None, part: Piece | None, to: Tensor, ranks: Any) -> Tensor:
    """`to`, or memory in its stead, filled with the `part` of what rank 0 has as `mine`; `source` is a tensor of that, on meta."""
    with together(ranks, "the model may be filled in part"):
        if mine is None:
            whole = torch.empty_like(source.view(), device=ranks.device_type, memory_format=torch.contiguous_format)
        else:
            whole = mine[source.name].detach().to(ranks.device_type).contiguous()
        to = torch.empty_like(to, device=ranks.device_type) if to.is_meta else to
    torch.distributed.broadcast(whole, src=0)
    with together(ranks, "the model may be filled in part"):
        if part is not None:
            stream([replace(part, source=replace(part.source, view=lambda: whole))], {part.target: [to]}, lambda _: None)
    return to


# ------------------------------------------------------------------------------------------- save


def _to_write(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state_dict, those that are shared once; but each of those that are not shared any more with some that they were
    shared with, as who reads them cannot know with which."""
    places = list(_places(model))
    untied: dict[str, list[str]] = {fqn: vars(t)["untied_from"] for fqn, _, _, t in places if "untied_from" in vars(t)}
    apart = {*untied, *(name for names in untied.values() for name in names)}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for fqn, _, _, t in places:
        if id(t) not in seen:
            tensors[fqn] = t
        elif fqn in apart:
            tensors[fqn] = t.detach().clone()
        seen.add(id(t))
    return tensors


def _write(model: nn.Module, folder: Path, max_shard_size: str | int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors, metadata = flattened(_to_write(model))
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def save(model: Any, path: str | os.PathLike, max_shard_size: str | int = "5GB", force: bool = False) -> None:
    """Writes `model`, quantized or not, as a folder of safetensors that `load` reads back bit for bit; a transformers model with its
    config, so that transformers reads it, too.

    It is written under a temporary name beside `path` and renamed at the end, so a folder named `path` is always whole. What an earlier
    process was killed over is removed, or put back where it was the only one.

    Args:
        model: any module.
        path: the folder to make; a name that ends as a file's, as in "model.safetensors", is refused.
        max_shard_size: bytes, or as "5GB", from which on a file is split.
        force: replace the model folder that is at `path`, once the new one is whole.

    Raises:
        FileExistsError: there is something at `path`, and not `force`, or something other than a model folder.
        OSError: it could not be written (a full disk, say); nothing stays behind.
        ValueError: `path` is named as a file is.
    """
    if Path(path).suffix.lower() in FILE_ENDS:
        raise ValueError(f"save makes a folder, and {path} is named as a file is; leave out {Path(path).suffix}, or use torch.save")
    with new_folder(path, force) as folder:
        write(model, folder, max_shard_size)


def write(model: Any, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """What `save` does, into a folder that is there."""
    from safetensors import SafetensorError

    try:
        if pretrained.is_pretrained(model):
            with pretrained.described(model):
                model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            _write(model, folder, max_shard_size)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written ({error}); nothing was left there") from error


# ------------------------------------------------------------------------------------------- folders that are written


@contextmanager
def new_folder(path: str | os.PathLike, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Gives a folder beside `path` to write into, which becomes `path` at the end; after an error or a signal there is none.

    Args:
        path: the folder to make.
        force: replace the model folder that is at `path`, once the new one is whole.
        source: a folder that is read for it, of which nothing may be replaced.

    Raises:
        FileExistsError: there is something at `path`, at first or at the end, and not `force`, or something other than a model folder.
        ValueError: `path` and `source` are one, or one lies in the other.
        OSError: nothing can be written there.
    """
    path = Path(path)
    if path.name in ("", ".."):  # which no folder beside it can be named for
        path = path.resolve()
    if source is not None:
        _check_apart(path, source)
    _remove_stale(path)
    _check_replaceable(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{path.parent} is no folder; choose another place for {path.name}") from None
    partial, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("partial", "replaced"))
    lock = None
    try:
        try:
            partial.mkdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        lock = _locked(partial)
        with _signals_raise():
            yield partial
        readable = partial.stat().st_mode & 0o666  # by the umask; safetensors' own files are their owner's only
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(readable)
        if force and os.path.lexists(path):
            _check_replaceable(path, force)  # what is there may be another than at first
            path.rename(replaced)
        _take(path, partial)
        if replaced.exists():
            shutil.rmtree(replaced)
    finally:
        if replaced.exists() and not path.exists():  # between the two renames
            replaced.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks `folder` as long as this process lives or keeps it open; None where another has it, or there are no locks."""
    if os.name != "posix":
        return None
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return None
    return opened


def _remove_stale(path: Path) -> None:
    """Removes what processes that were killed have left of writing `path`; the folder that one was about to replace goes back where none
    is."""
    left = [file for file in path.parent.glob(".*") if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+\.(partial|replaced)", file.name)]
    for folder in sorted(left):  # of one process, the partial one first
        if not folder.is_dir() or folder.is_symlink():
            continue
        writing = folder.with_suffix(".partial")
        if any(other.is_dir() and not _is_free(other) for other in (writing, path, folder)):
            continue
        if folder.suffix == ".replaced" and not os.path.lexists(path):
            folder.rename(path)
        else:
            shutil.rmtree(folder)


def _is_free(folder: Path) -> bool:
    lock = _locked(folder)
    if lock is not None:
        os.close(lock)
    return lock is not None


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Where they would end the process at once, SIGTERM and SIGHUP raise SystemExit, so that what was begun is removed."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is signal.SIG_DFL}

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _take(path: Path, partial: Path) -> None:
    """Renames `partial` to `path`, where nothing may be."""
    try:
        if os.name == "posix":  # where a rename replaces an empty folder, and so that has to be our own
            path.mkdir()
    except FileExistsError:
        raise FileExistsError(f"{path} appeared while it was being written, and is left as it is; choose another name") from None
    try:
        partial.rename(path)
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def _check_replaceable(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if not force:
        raise FileExistsError(f"{path} exists; choose another name, or pass force=True to replace it")
    if why := _no_model_folder(path):
        raise FileExistsError(f"{path} {why}, and only a model's folder is replaced; choose another name, or remove it yourself")


def _no_model_folder(path: Path) -> str | None:
    """Why a folder looks like neither one that `save` wrote nor one of transformers', or holds more than such a one."""
    if path.is_symlink():
        return "is a symbolic link"
    if not path.is_dir():
        return "is no folder"
    entries = sorted(path.iterdir())
    if all(file.is_file() and re.fullmatch(OWN_FILES, file.name) for file in entries):  # of a module that is not transformers'
        return None
    try:
        about = read_json(path / "config.json")
    except (OSError, ValueError):
        return "holds no config.json of a model"
    if not {"model_type", "architectures"} & set(about):
        return "holds a config.json that is of no model"
    kept = _companion_folders(path)
    others = [entry.name for entry in entries if entry.is_dir() and entry not in kept]
    return f"holds {others[0]!r}, which is no part of a model's folder" if others else None


def _check_apart(path: Path, source: Path) -> None:
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"{path} is the model that is read; choose another name, as its other files are copied from there")
    if _holds(source, path):
        raise ValueError(f"{path} lies in {source}, the model that is read; choose a folder outside of it")
    links = [link for link in source.rglob("*") if link.is_symlink()] if path.exists() else []
    if inside := [part for part in (source, *links) if _holds(path, part)]:
        raise ValueError(f"{path} holds {inside[0]}, of the model that is read; choose a folder outside of it")


def _holds(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies in it, whatever names and links lead there."""
    real = Path(os.path.realpath(inner))
    return outer.exists() and any(place.exists() and place.samefile(outer) for place in (real, *real.parents))


# ------------------------------------------------------------------------------------------- what comes with a model


def companions(source: Path) -> tuple[list[Path], dict[Path, str]]:
    """The files of a transformers folder that go with its weights into another: tokenizer, processors, templates, sentence-transformers'
    modules, license, card; and the entries of it that do not, each with the reason."""
    folders = _companion_folders(source)
    kept = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    left_out: dict[Path, str] = {}
    for entry in sorted(source.iterdir()):
        why = next((why for patterns, why in LEFT_OUT if any(fnmatchcase(entry.name.lower(), p) for p in patterns)), None)
        if entry.is_dir():
            if entry not in folders:
                left_out[entry] = "neither modules.json names it nor does it hold a tokenizer, a processor or templates alone"
        elif not entry.is_file():
            left_out[entry] = "it is no file"
        elif why:
            left_out[entry] = why
        else:
            kept.append(entry)
    return kept, left_out


def _companion_folders(source: Path) -> list[Path]:
    """sentence-transformers' modules, some with weights of their own; and tokenizers, processors and chat templates, which have none."""
    modules, file = [], source / "modules.json"
    if file.exists():
        check_regular(file)
        try:
            modules = parse_json(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); copy or download it again") from None
    listed = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    names = {"additional_chat_templates", *(path.split("/")[0] for path in listed if isinstance(path, str))}
    folders = [entry for entry in sorted(source.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    return [folder for folder in folders if folder.name in names or _is_processor(folder)]


def _is_processor(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    if not names & {"tokenizer_config.json", "preprocessor_config.json", "processor_config.json"}:
        return False
    return not any(fnmatchcase(name.lower(), pattern) for name in names for patterns, _ in LEFT_OUT for pattern in patterns)
