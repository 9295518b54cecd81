"""Models that are named as on the Hugging Face hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+?))?(?:/([\w./-]+\.gguf))?")
OTHERS = ["*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "onnx/*", "original/*"]
IN_PICKLES = "*.bin"  # fetched where there is no safetensors file


def local(path: str | os.PathLike, on_download: Callable[[int, int], Any] | None = None) -> Path:
    """The folder or file of a model: `path`, or what huggingface_hub has of it in its cache, where `path` is
    none here but a name on the hub: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main" with a branch, tag or commit,
    or "Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf".

    What is missing there is downloaded, weights of other frameworks left out; before it, `on_download` is
    told how many files that are, and their bytes. The environment says the rest, as to all that uses
    huggingface_hub: HF_HOME, HF_TOKEN (or `hf auth login`), HF_ENDPOINT, HF_HUB_OFFLINE.

    Raises:
        FileNotFoundError: it is not on the hub, or not in the cache and the hub cannot be reached.
    """
    text = os.fspath(path)
    if "://" in text:
        raise FileNotFoundError(
            f"{text} is an address; give the name of a model on the hub, as in Qwen/Qwen3-0.6B, or a folder"
        )
    if os.path.lexists(text) or not (name := NAME.fullmatch(text)):
        return Path(text)
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, revision, file = name.groups()

    def fetched(fetch: Callable[..., Any], *args: str, **ignored: list[str]) -> Path:
        if on_download:
            missing = _missing(fetch, *args, revision=revision, **ignored)
            if missing:
                on_download(len(missing), sum(one.file_size or 0 for one in missing))
        return Path(fetch(*args, revision=revision, **ignored))

    try:
        if file:
            return fetched(hf_hub_download, repository, file)
        folder = fetched(snapshot_download, repository, ignore_patterns=[*OTHERS, IN_PICKLES])
        if not any(folder.rglob("*.safetensors")):
            folder = fetched(snapshot_download, repository, ignore_patterns=OTHERS)
        return folder
    except Exception as error:  # also of the HTTP library below it, which is another by version
        raise FileNotFoundError(
            f"{text} is neither here nor to be had from the hub: {_why(error, revision, file)}"
        ) from error


def _missing(fetch: Callable[..., Any], *args: str, **options: Any) -> list[Any]:
    """What `fetch` would download; nothing where the hub cannot be asked."""
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()  # of asking
    try:
        found = fetch(*args, dry_run=True, **options)
    except DryRunError:
        return []
    finally:
        if shown:
            enable_progress_bars()
    return [one for one in (found if isinstance(found, list) else [found]) if one.will_download]


def _why(error: Exception, revision: str | None, file: str | None) -> str:
    """What went wrong at the hub, and what to do."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(error, errors.GatedRepoError):
        return "it is gated; ask for access on its page there, then `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no model of this name is there for you to read; check the name, or, of a private model, "
            "`hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision}; check what comes after the @"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"it has no file {file}; check the file's name"
    if isinstance(error, errors.LocalEntryNotFoundError):
        lacks = "has only a part of it" if isinstance(error, errors.IncompleteSnapshotError) else "lacks it"
        if HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set, and the cache {lacks}; unset it to download"
        return f"the hub cannot be reached, and the cache {lacks}; check the network, then try again"
    return f"{' '.join(str(error).split())[:300]}; check the network, then try again"


def hub_name(name_or_path: str) -> str | None:
    """The name on the hub of a model that was read from there, or from the hub's cache."""
    if cached := re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", name_or_path):
        return f"{cached[1]}/{cached[2]}"
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) and not Path(name_or_path).exists()
    return name_or_path if is_name else None
