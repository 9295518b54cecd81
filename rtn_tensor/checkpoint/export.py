"""`export` writes a quantized model in a format that other engines read."""

import copy
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtn_tensor.checkpoint.card import card
from rtn_tensor.checkpoint.companions import companions, copy_companions
from rtn_tensor.checkpoint.export_plan import FORMATS, ExportReport, Plan, plan, plan_gguf
from rtn_tensor.checkpoint.folders import new_file, new_folder
from rtn_tensor.checkpoint.foreign import gguf
from rtn_tensor.checkpoint.hub import hub_name
from rtn_tensor.checkpoint.shards import write_shards
from rtn_tensor.integrations.transformers.models import ends, is_pretrained
from rtn_tensor.quantize.selection import check_module
from rtn_tensor.wording import with_article

SHARD_BYTES = 5_000_000_000
GGUF = "gguf"  # the one format that is a file


def export(
    model: Any,
    path: str | os.PathLike,
    format: str = "compressed-tensors",  # noqa: A002
    *,
    like: str | os.PathLike | None = None,
    force: bool = False,
) -> ExportReport:
    """Writes a quantized transformers model in a format that other engines read, with the integers and scales
    that it has; what the format cannot hold so is an error before anything is written.

    The tokenizer, the chat template and what else lies beside the model's weights go along where the model
    was read from a folder, and a model card (README.md) is written. As by `save`, `path` is whole or not
    there.

    Args:
        model: what `quantize_`, `load` or transformers made.
        path: the folder to make; for "gguf" the file, which ends in .gguf.
        format: "compressed-tensors", which vLLM, SGLang and transformers read; "gptq", version 1 and
            symmetric, which vLLM, SGLang and GPTQModel read; or "gguf", Q4_0 and Q8_0, which llama.cpp,
            Ollama and LM Studio read.
        like: for "gguf" a GGUF file of the same model, best of llama.cpp's convert_hf_to_gguf.py with
            --outtype bf16: the metadata and the tokenizer are taken from it, and each of its tensors is
            replaced, or looked at, whether it is the same.
        force: replace the model folder, or the GGUF file, that is at `path`, once the new one is whole.

    Returns:
        What each weight became, what changed on the way, and which engines read it.

    Raises:
        FileExistsError: there is something at `path`, and not `force`, or something other than a model
            folder.
        OSError: it could not be written (a full disk, say); nothing stays behind.
        ValueError: an unknown format; no weight is quantized; a weight does not fit the format. The message
            names it and what can be done.
        TypeError: `model` is no model of transformers.
    """
    check_module(model)
    if not is_pretrained(model):
        raise TypeError(
            f"model is {with_article(type(model).__name__)}, and engines read models of transformers only; "
            "give such a one (of PEFT's, what merge_and_unload() gives), or use save for this library alone"
        )
    check_destination(path, format, like)
    made = prepare(model, Path(path).name, format, like)
    with destination(path, format, force, made.source) as place:
        made.write(place)
    return made.report


def check_destination(path: str | os.PathLike, format_name: str, like: str | os.PathLike | None) -> None:
    """Raises ValueError unless `path` is named as what is written in the format is, and `like` is given where
    it must be."""
    path = Path(path)
    if format_name not in (names := (*FORMATS, GGUF)):
        raise ValueError(f"format={format_name!r} is not known; use one of {', '.join(map(repr, names))}")
    if like is None and format_name == GGUF:
        raise ValueError(
            "format='gguf' needs like, a GGUF file of the same model, from which the tokenizer and the "
            "metadata "
            "are taken; llama.cpp's convert_hf_to_gguf.py makes one, with --outtype bf16"
        )
    if like is not None and format_name != GGUF:
        raise ValueError(f"like={os.fspath(like)!r} is for format='gguf'; leave it out for {format_name!r}")
    if format_name == GGUF and path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf, as the file that format='gguf' writes; name it so")
    if like is not None and path.exists() and Path(like).exists() and path.samefile(like):
        raise ValueError(f"{path} is the file that is read; choose another name")


def destination(
    path: str | os.PathLike, format_name: str, force: bool, source: Path | None
) -> AbstractContextManager[Path]:
    """`new_file` or `new_folder`, as the format is."""
    if format_name == GGUF:
        return new_file(Path(path), force)
    return new_folder(path, force, source)


@dataclass(frozen=True)
class Prepared:
    """What is to be written of a model in a format, all of it checked.

    Attributes:
        write: writes it into the folder, or as the file, that it is given.
        report: of what is written.
        source: the folder that the model was read from, of which files go along; None where there is none.
    """

    write: Callable[[Path], None]
    report: ExportReport
    source: Path | None


def prepare(model: Any, name: str, format_name: str, like: str | os.PathLike | None) -> Prepared:
    """Plans what `export` is to write of a model of transformers; `name` is that of its folder. Of a model on
    meta it is what the shapes and formats tell, and nothing can be written.

    Raises:
        FileNotFoundError, ValueError: as `export`.
    """
    if like is not None:
        graft, tensors, bits, report = plan_gguf(model, Path(like))

        def write_file(file: Path) -> None:
            with _naming(file):
                gguf.write(file, tensors, graft, bits)

        return Prepared(write_file, report, None)
    made = plan(model, format_name)
    read_from = str(model.name_or_path or "")
    source = Path(read_from) if read_from and (Path(read_from) / "config.json").is_file() else None
    about = format_name, made.formats, made.report.bits_per_weight, made.engines, made.report.changes
    text = card(name, type(model).__name__, source, hub_name(read_from), *about)

    def write_folder(folder: Path) -> None:
        with _naming(folder):
            _write(model, folder, made, FORMATS[format_name].copies_of_config)
            (folder / "README.md").write_text(text, encoding="utf-8")
            if source is not None:
                copy_companions(companions(source)[0], source, folder)

    return Prepared(write_folder, made.report, source)


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Names `place` in errors of writing that name no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(place)) from error


def _write(model: Any, folder: Path, made: Plan, copies_of_config: Sequence[str]) -> None:
    write_shards(folder, made.tensors, SHARD_BYTES)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = made.config
    first, last = (getattr(module, "weight", None) for module in ends(model))
    if last is not None and first is not last:
        for part in (config, config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
    config.save_pretrained(folder)
    for name in copies_of_config:
        (folder / name).write_text(json.dumps(made.config, indent=2))
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
