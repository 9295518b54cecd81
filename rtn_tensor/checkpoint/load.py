"""`load` streams a checkpoint into a model, tensor by tensor, quantizing on the way."""

import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from rtn_tensor.checkpoint.fill import (
    Piece,
    check,
    check_finite,
    on_rank,
    pieces_by_name,
    put,
    same,
    some,
    stream,
)
from rtn_tensor.checkpoint.foreign.blocks import File
from rtn_tensor.checkpoint.foreign.names import foreign
from rtn_tensor.checkpoint.foreign.reading import Description, put_together
from rtn_tensor.checkpoint.gguf import READ, empty_of_gguf, load_by_transformers, pieces_of
from rtn_tensor.checkpoint.hub import hub_name, local
from rtn_tensor.checkpoint.kept import kept_targets
from rtn_tensor.checkpoint.sources import sources
from rtn_tensor.config import RTNConfig
from rtn_tensor.distributed import check_idle, held, place, ranks_of, together
from rtn_tensor.formats import format_of
from rtn_tensor.integrations import on_quantized
from rtn_tensor.integrations.transformers.description import all_ties
from rtn_tensor.integrations.transformers.folders import empty_model, parameters_on_meta, read_config
from rtn_tensor.integrations.transformers.models import default_filter, ignored, is_pretrained
from rtn_tensor.integrations.transformers.names import placed, renaming
from rtn_tensor.quantize.kinds import FilterFn
from rtn_tensor.quantize.selection import Rules, tensors_of
from rtn_tensor.quantize.targets import Target, targets_of
from rtn_tensor.reference import widened
from rtn_tensor.tensor.attributes import user_attributes
from rtn_tensor.tensor.quantized import RTNQuantizedTensor


def _empty(
    t: Tensor,
    config: RTNConfig | None,
    transposed: bool,
    device: torch.device,
    scale_dtype: torch.dtype | None,
) -> Tensor:
    if config is None:
        return torch.empty(t.shape, dtype=t.dtype, device=device)
    w = RTNQuantizedTensor.empty(
        *(t.mT if transposed else t).shape,
        **format_of(config),
        dtype=t.dtype,
        device=device,
        scale_dtype=scale_dtype,
    )
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
    """A model with its weights from a checkpoint, quantized as they are read: the float model is never in
    memory.

    Above the finished model it takes at most 64 MiB, and what transformers computes of some tensors, where it
    does. Nothing of `model` changes before all has been read and checked. Without a config, tensors that have
    their dtype already are not copied on a CPU, but stay maps of the files: then only the scales of a
    quantized weight are read and looked at, and of a float one nothing, so that a NaN in it is not seen.

    Args:
        path: a transformers folder; or a folder or file of safetensors, of `pytorch_model*.bin`, or of what
            torch.save wrote; or a GGUF file, which transformers reads, holding the float model meanwhile,
            where its architecture is one that is not known here. Where there is nothing of this name, the
            name of a model on the hub, as "owner/name" or "owner/name@revision", which huggingface_hub
            downloads into its cache.
        config: as for `quantize_`; None for a checkpoint that is quantized already, or to stay float.
        model: the module to fill, best on the meta device, or a function that makes one (its parameters are
            then made on meta, its buffers are not). By default it is built from the folder's config.json by
            transformers, and comes in eval mode. Where it is sharded already (`fully_shard`,
            `parallelize_module`), each rank reads its own part of the files.
        device: where the weights go; by default where the model's are, or the CPU.
        dtype: of a model built from config.json; by default as that says. A given model has its own.
        filter_fn: as for `quantize_`. By default what that selects by default, but a transformers model's
            output layer, as in transformers.
        rename: regular expressions and what to put in their place in the checkpoint's names, in this order
            (`re.sub`).
        fuse: modules that stand for several of the checkpoint's, by the last part of their names: their rows
            follow one another, as in {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj":
            ["gate_proj", "up_proj"]}.
        progress: whether to show a bar and a summary; by default where stderr is a terminal.

    Raises:
        FileNotFoundError: no checkpoint at `path`, or a part of it is missing.
        ValueError: a file is truncated or corrupt; a tensor is missing, has no place, another shape, an
            unknown dtype, a NaN or inf; a weight cannot be quantized as `config` says; another library
            quantized it; `model` has run under fully_shard. The message names the file and the tensor. What a
            transformers model has no place for is left out instead, with a warning, as by transformers.
        RuntimeError: another rank failed.
    """
    path = local(path)
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(
            f"dtype is {dtype!r}; give a torch.dtype, as torch.bfloat16, or none for that of the checkpoint"
        )
    if not (model is None or callable(model)):
        raise TypeError(
            f"model is {model!r}; give a module, or a function that makes one; a device is given as device="
        )
    file = File(path) if path.suffix == ".gguf" else None
    if file is not None and model is None:
        if file.architecture not in READ:
            return load_by_transformers(path, config, device, dtype, filter_fn)
        model = empty_of_gguf(path, dtype)
    elif model is None:
        model = empty_model(path, dtype)
    elif not isinstance(model, nn.Module):
        with parameters_on_meta():
            model = model()
    assert isinstance(model, nn.Module)
    if is_pretrained(model) and (path / "config.json").is_file():
        read_config(path)
    check_idle(model)
    pieces, how = _pieces(file or path, model, rename or {}, fuse or {})
    places, apart = _with_own_tensors(
        list(tensors_of(model, buffers=True)), pieces, all_ties(model) if is_pretrained(model) else {}
    )
    state = {fqn: t for fqn, _, _, t in places}
    try:
        pieces, left_out = check(pieces, state, ignored(model), strict=not is_pretrained(model))
    except ValueError as error:
        if why := foreign(path, (piece.source.name for piece in pieces)):
            raise ValueError(why) from error
        raise
    if (adapter := path / "adapter_config.json").is_file():
        warnings.warn(
            f"{adapter} is of an adapter, which is not merged into the weights beside it, and load left it "
            "out; to have it, merge it by PEFT, or put it over the model that load gives",
            stacklevel=2,
        )
    if left_out:
        if why := foreign(path, left_out):  # else what it belongs to would be taken for plain numbers
            raise ValueError(why)
        warnings.warn(
            f"{path}: {type(model).__name__} has no place for, and load left out, {some(left_out)}",
            stacklevel=2,
        )
    quantized = {p.target for p in pieces if p.source.quantized}  # one of them alone, say, which is meant
    if float_ones := [
        p.target for p in pieces if p.target in apart and quantized.isdisjoint([p.target, *apart[p.target]])
    ]:
        warnings.warn(
            f"{path}: {some(float_ones)} are one weight in the model, and the files hold different values "
            "for them, so they are not tied, "
            "as in transformers; if that is meant, set tie_word_embeddings to false in config.json",
            stacklevel=2,
        )
    if left := [fqn for fqn, t in model.named_buffers() if t.is_meta and fqn not in state]:
        raise ValueError(
            f"{left[0]} was made on meta and is not in the checkpoint; give, as model, a "
            "function that makes it"
        )
    if config is not None and any(p.source.quantized for p in pieces):
        raise ValueError(
            f"{path} is quantized already; load it without a config, or give the float checkpoint"
        )
    fqns: dict[int, list[str]] = defaultdict(list)
    for fqn, t in state.items():
        fqns[id(t)].append(fqn)
    scale_dtypes: dict[str, torch.dtype] = {}
    if config is not None:
        targets = targets_of(model, config, default_filter(model, config, filter_fn))
    else:
        targets, scale_dtypes = kept_targets(model, pieces, places, fqns)
    configs = {t.fqn: t.config for t in targets}
    if how is not None:
        lost = [
            p for p in pieces if p.source.rows is not None and (config is not None or p.target not in configs)
        ]
        _say_what_is_lost(path, how, lost, config)
    with together(next((ranks_of(t) for t in state.values() if held(t) is not t), None)):
        new = _read_into(
            pieces,
            state,
            fqns,
            config,
            targets,
            scale_dtypes,
            device,
            lambda total: _bar(hub_name(str(path)) or path.name, total, progress),
        )
    put(places, new, configs, fqns if config is not None else {}, apart)
    if is_pretrained(model):
        ties: Any = model.all_tied_weights_keys
        for fqn, others in apart.items():
            if ties.get(fqn) in others:
                del ties[fqn]  # else transformers ties them anew
    if device is not None:
        model.to(device)  # the buffers that are not in the checkpoint
    on_quantized(model)
    return model


def _say_what_is_lost(
    path: Path, how: Description, computed: list[Piece], config: AOBaseConfig | Rules | None
) -> None:
    if not computed:
        return
    names = some([piece.source.name for piece in computed])
    then = (
        f"stay float, {names}; to quantize them anew, give a config"
        if config is None
        else "quantized anew as the config says, whose error comes on top of that which they have"
    )
    warnings.warn(
        f"{path}: the weights are quantized by {how.kind}; they are dequantized as they are read, and {then}",
        stacklevel=3,
    )


def _with_own_tensors(
    places: list[tuple[str, nn.Module, str, Tensor]], pieces: list[Piece], ties: Mapping[str, str]
) -> tuple[list[tuple[str, nn.Module, str, Tensor]], dict[str, list[str]]]:
    """`places`, with tensors of their own where the checkpoint has different ones for names that share one;
    and, of each name there, those that it shares with no more. A name that the checkpoint lacks goes with
    that which `ties` ties it to, or with the first."""
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
            if kind := next(
                (kind for kind in kinds if same(held_by[kind[0]], held_by[name], old[name].dtype)), None
            ):
                kind.append(name)
            else:
                kinds.append([name])
        for name in (name for name in names if name not in held_by):
            next((kind for kind in kinds if ties.get(name) in kind), kinds[0]).append(name)
        for kind in kinds[1:]:
            t = old[kind[0]]
            own = nn.Parameter(t.detach(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach()
            vars(own).update(user_attributes(t))
            new |= dict.fromkeys(kind, own)
        if len(kinds) > 1:
            apart |= {
                name: [other for other in names if other not in kind] for kind in kinds for name in kind
            }
    return [(fqn, module, name, new.get(fqn, t)) for fqn, module, name, t in places], apart


def _pieces(
    path: Path | File, model: nn.Module, rename: Mapping[str, str], fuse: Mapping[str, Sequence[str]]
) -> tuple[list[Piece], Description | None]:
    """The tensors of a checkpoint, and where in `model` each would go; and which other library quantized
    it."""
    if isinstance(path, File):
        if rename or fuse or not is_pretrained(model):
            raise ValueError(
                f"{path.path}: a GGUF file fills models of transformers only, by the names that llama.cpp "
                "has; leave rename and fuse out, and give such a model or none"
            )
        return pieces_of(path, model), Description("gguf", {}, str(path.path))
    found = sources(path, renaming(model)) if is_pretrained(model) else sources(path)
    found, how = put_together(path, found)
    if rename or fuse or not is_pretrained(model):
        return pieces_by_name(found, rename, fuse), how
    return [Piece(*place) for place in placed(model, found)], how


def reader(path: Path, model: nn.Module) -> Callable[[str], Tensor]:
    """A function that reads one weight of a float checkpoint, by its name in `model`, a transformers model
    that was made of the same folder, in the dtype that the model has it in.

    Raises:
        FileNotFoundError, ValueError: as `load`; the checkpoint is quantized, or does not fit the model.
    """
    state = {fqn: t for fqn, _, _, t in tensors_of(model, buffers=True)}
    pieces, _ = check(_pieces(path, model, {}, {})[0], state, ignored(model), strict=False)
    if quantized := [p.source for p in pieces if p.source.quantized]:
        raise quantized[0].error("is quantized; give the float checkpoint that the model was made of")
    fills: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        fills[id(state[piece.target])].append(piece)
    found = {fqn: (fills[id(t)], t.shape, t.dtype, t.device) for fqn, t in state.items()}

    def read(fqn: str) -> Tensor:
        some_pieces, shape, dtype, device = found[fqn]
        to = torch.empty(shape, dtype=dtype, device=device)
        stream(
            some_pieces, dict.fromkeys((piece.target for piece in some_pieces), [to]), lambda name, size: None
        )
        return to

    return read


def is_kept(path: Path, model: nn.Module) -> bool:
    """Whether `load` without a config keeps the integers of a weight that another library quantized."""
    pieces, _ = _pieces(path, model, {}, {})
    state = {fqn for fqn, *_ in tensors_of(model, buffers=True)}
    return any(p.source.rows is not None and p.source.rows.kept and p.target in state for p in pieces)


def without_place(path: Path, model: nn.Module) -> tuple[list[str], set[Path]]:
    """The names of the tensors in a folder that its `model` has no place for, and so leaves out; and the
    files of all that `load` reads."""
    state = dict.fromkeys(fqn for fqn, *_ in tensors_of(model, buffers=True))
    pieces, _ = _pieces(path, model, {}, {})
    return [piece.source.name for piece in pieces if piece.target not in state], {
        piece.source.file for piece in pieces
    }


def _read_into(
    pieces: list[Piece],
    state: Mapping[str, Tensor],
    fqns: Mapping[int, list[str]],
    config: AOBaseConfig | Rules | None,
    targets: list[Target],
    scale_dtypes: Mapping[str, torch.dtype],
    device: torch.device | str | None,
    bar: Callable[[int], Any],
) -> dict[int, dict[RTNConfig | None, Tensor]]:
    """What this rank holds of each tensor of the model, filled, by the old one's id and by what it is to be:
    one that is shared, and quantized at some of its places only, becomes two."""
    configs = {t.fqn: t.config for t in targets}
    transposed = {t.fqn for t in targets if t.transposed}
    new: dict[int, dict[RTNConfig | None, Tensor]] = defaultdict(dict)
    copied: list[Piece] = []
    for piece in pieces:
        old = state[piece.target]
        to = torch.device(device or ("cpu" if old.is_meta else old.device))
        as_it_is = piece.source.quantized or (piece.source.dtype == old.dtype and piece.source.rows is None)
        if config is None and not piece.index and as_it_is:
            t = piece.source.private()
            t = t if held(old) is old else piece.cut(t, place(old)).contiguous()
            if isinstance(t, RTNQuantizedTensor):  # of what is float nothing is read here
                check_finite(piece.source, widened(t.scale))
            new[id(old)][None] = t.to(to)
            continue
        if here := on_rank(piece, old.shape, place(old)):
            copied.append(here)
        for c in {configs.get(fqn): None for fqn in fqns[id(old)]}:
            if c not in new[id(old)]:
                turned = not transposed.isdisjoint(fqns[id(old)])
                new[id(old)][c] = _empty(held(old), c, turned, to, scale_dtypes.get(piece.target))
    destinations = {p.target: list(new[id(state[p.target])].values()) for p in copied}
    total = sum(p.nbytes * len(destinations[p.target]) for p in copied)
    with bar(total) as meter:
        stream(copied, destinations, meter)
    return new


@contextmanager
def _bar(what: str, total: int, show: bool | None) -> Iterator[Callable[[str, int], Any]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    console = Console(stderr=True)
    one, rest = Column(no_wrap=True), Column(no_wrap=True, ratio=1)
    columns = (
        BarColumn(16),
        DownloadColumn(table_column=one),
        TransferSpeedColumn(one),
        TimeRemainingColumn(table_column=one),
    )
    layer = TextColumn("{task.fields[layer]}", markup=False, table_column=rest)
    started = time.perf_counter()
    shown = total > 0 and (console.is_terminal if show is None else show)  # else it is all taken as it lies
    with Progress(*columns, layer, console=console, expand=True, disable=not shown, transient=True) as bar:
        task = bar.add_task(what, total=total, layer="")
        yield lambda name, size: bar.update(task, advance=size, layer=name)
    if shown:
        seconds = time.perf_counter() - started
        said = f"{what}: {total / 1e6:,.0f} MB in {seconds:.1f} s, {total / 1e6 / seconds:,.0f} MB/s"
        print(said, file=sys.stderr)
