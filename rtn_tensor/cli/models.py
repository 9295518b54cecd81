"""The models, tokenizers and texts that subcommands are given."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rtn_tensor.checkpoint import hub
from rtn_tensor.checkpoint.files import check_regular
from rtn_tensor.checkpoint.load import load
from rtn_tensor.cli.screen import is_terminal, named, say
from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.integrations.transformers.folders import check_model_folder, read_config
from rtn_tensor.integrations.transformers.models import but_the_output, ends
from rtn_tensor.quantize.activations import set_activations_

CHARACTERS = 40  # more than a token has on average in any text
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


@cache  # a name on the hub is asked for once a command, and not by each that reads there
def local(path: str) -> Path:
    """As `checkpoint.hub.local`; says what is downloaded, with huggingface_hub's bars on a terminal."""

    def on_download(files: int, size: int) -> None:
        from huggingface_hub.utils import enable_progress_bars
        from rich.filesize import decimal

        say(f"Downloading {path}: {files} {'file' if files == 1 else 'files'}, {decimal(size)}")
        if is_terminal(sys.stderr):
            enable_progress_bars()

    return hub.local(path, on_download)


def load_model(path: str, activations: str | None = None) -> Any:
    place = local(path)
    if place.suffix != ".gguf":
        check_model_folder(place)  # before it is said to be loaded
    say(f"Loading {path}")
    model = load(place)
    if activations is not None:
        set_activations_(model, activations)
    return model


def tokenizer_of(path: str) -> Any:
    from transformers import AutoTokenizer

    place, inside = local(path), {}
    if place.suffix == ".gguf":
        check_regular(place)
        place, inside = place.parent, {"gguf_file": place.name}
    else:
        check_model_folder(place)
        read_config(place)  # else a damaged one would be told as a tokenizer that cannot be read
    try:
        # None would ask on stdout whether to run what the folder brings along.
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **inside)
    except Exception as error:  # the kinds of tokenizers fail in as many ways, of no common class
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path}: its tokenizer needs code of its own (auto_map), which is never run here; call "
                "generate from Python"
            ) from error
        raise ValueError(
            f"{path} has no tokenizer that can be read; copy the model's tokenizer files there "
            f"({named(error)})"
        ) from error


def ids_of(tokenizer: Any, text: str, most: int | None) -> torch.Tensor:
    """The first tokens [T] of a text, all of them where `most` is None."""
    # The rest of a long text would take longer than the model: 11 s of 12 MB.
    some = text if most is None else text[: CHARACTERS * most]
    return torch.tensor(tokenizer(some, verbose=False)["input_ids"], dtype=torch.long)[:most]


def read_text(path: str, wanted: str = "--text takes a UTF-8 text file") -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise ValueError(f"cannot read {path} ({why}); {wanted}") from error


def selects(model: Any, embedding: bool) -> Any:
    """A filter_fn: linears, but lm_head and the input embedding only where `embedding` says so."""
    outer, otherwise = ends(model), but_the_output(model)
    return lambda module, name: (embedding and module in outer) or otherwise(module, name)
