"""Folders that are written whole or not at all."""

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rtn_tensor.checkpoint.companions import companion_folders
from rtn_tensor.checkpoint.files import read_json

# Of files with weights, whose names no folder is meant to have.
FILE_ENDS = (
    *(".safetensors", ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".gguf", ".json", ".pkl", ".pickle"),
    *(".h5", ".msgpack", ".npz", ".onnx", ".tar", ".gz", ".zip"),
)


OWN_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"


@contextmanager
def new_folder(path: str | os.PathLike, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Gives a folder beside `path` to write into, which becomes `path` at the end; after an error or a signal
    there is none.

    Args:
        path: the folder to make.
        force: replace the model folder that is at `path`, once the new one is whole.
        source: a folder that is read for it, of which nothing may be replaced.

    Raises:
        FileExistsError: there is something at `path`, at first or at the end, and not `force`, or something
            other than a model folder.
        ValueError: `path` and `source` are one, or one lies in the other; `path` is named as a file is.
        OSError: nothing can be written there.
    """
    path = Path(path)
    if path.name in ("", ".."):  # which no folder beside it can be named for
        path = path.resolve()
    if path.suffix.lower() in FILE_ENDS:
        raise ValueError(
            f"{path} is named as a file is, and it is to be a folder; leave out {path.suffix} (torch.save "
            "writes one file)"
        )
    if source is not None:
        _check_apart(path, source)
    _remove_stale(path)
    _check_replaceable(path, force)
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        with _partial(path) as partial:
            yield partial
            # By the umask; safetensors' own files are their owner's only.
            readable = partial.stat().st_mode & 0o666
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
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Path]:
    """Gives a file to write, which becomes `path` at the end; after an error or a signal there is none.

    Raises:
        FileExistsError: there is something at `path`, at first or at the end, and not `force`, or something
            other than a file of this kind.
        OSError: nothing can be written there.
    """
    _remove_stale(path)
    _check_file_replaceable(path, force)
    with _partial(path) as partial:
        yield partial / path.name
        _check_file_replaceable(path, force)
        (partial / path.name).replace(path)


def _check_file_replaceable(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if not force:
        raise FileExistsError(f"{path} exists; choose another name, or pass force=True to replace it")
    if path.is_symlink() or not path.is_file():
        raise FileExistsError(
            f"{path} is no file, and only a file is replaced; choose another name, or remove it yourself"
        )


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, which is removed at the end if it is still there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(
            f"{path.parent} is no folder; choose another place for {path.name}"
        ) from None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    lock = None
    try:
        try:
            partial.mkdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        lock = _locked(partial)
        try:
            with _signals_raise():
                yield partial
        except OSError as error:
            if error.filename is None or partial not in ((there := Path(error.filename)), *there.parents):
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks `folder` as long as this process lives or keeps it open; None where another has
    it, or there are no locks."""
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
    """Removes what processes that were killed have left of writing `path`; the folder that one was about to
    replace goes back where none is."""
    left = [
        file
        for file in path.parent.glob(".*")
        if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+\.(partial|replaced)", file.name)
    ]
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
    """Where they would end the process at once, SIGTERM and SIGHUP raise SystemExit, so that what was begun
    is removed."""
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
        raise FileExistsError(
            f"{path} appeared while it was being written, and is left as it is; choose another name"
        ) from None
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
        raise FileExistsError(
            f"{path} {why}, and only a model's folder is replaced; choose another name, or remove it yourself"
        )


def _no_model_folder(path: Path) -> str | None:
    """Why a folder looks like neither one that `save` wrote nor one of transformers', or holds more than such
    a one."""
    if path.is_symlink():
        return "is a symbolic link"
    if not path.is_dir():
        return "is no folder"
    entries = sorted(path.iterdir())
    # Of a module that is not transformers'.
    if all(file.is_file() and re.fullmatch(OWN_FILES, file.name) for file in entries):
        return None
    try:
        about = read_json(path / "config.json")
    except (OSError, ValueError):
        return "holds no config.json of a model"
    if not {"model_type", "architectures"} & set(about):
        return "holds a config.json that is of no model"
    kept = companion_folders(path)
    others = [entry.name for entry in entries if entry.is_dir() and entry not in kept]
    return f"holds {others[0]!r}, which is no part of a model's folder" if others else None


def _check_apart(path: Path, source: Path) -> None:
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(
            f"{path} is the model that is read; choose another name, as its other files are copied from there"
        )
    if _holds(source, path):
        raise ValueError(f"{path} lies in {source}, the model that is read; choose a folder outside of it")
    links = [link for link in source.rglob("*") if link.is_symlink()] if path.exists() else []
    if inside := [part for part in (source, *links) if _holds(path, part)]:
        raise ValueError(
            f"{path} holds {inside[0]}, of the model that is read; choose a folder outside of it"
        )


def _holds(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies in it, whatever names and links lead there."""
    real = Path(os.path.realpath(inner))
    return outer.exists() and any(place.exists() and place.samefile(outer) for place in (real, *real.parents))
