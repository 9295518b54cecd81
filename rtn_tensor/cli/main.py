"""Runs a subcommand of `rtn-tensor`: signals, warnings, errors, and what is printed at the end."""

import errno
import io
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rtn_tensor.cli.arguments import parser
from rtn_tensor.cli.kernels import run_explain, run_tune
from rtn_tensor.cli.measure import run_evaluate
from rtn_tensor.cli.quantize import run_quantize
from rtn_tensor.cli.recipe import arguments
from rtn_tensor.cli.screen import FORESEEN, discard, named, say
from rtn_tensor.cli.talk import run_serve


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0; 1 after a one-line error; 130 or 143, as in a shell,
    after Ctrl-C or SIGTERM. argparse exits with 2."""
    if sys.stdout is None:
        return _fail(
            "stdout is closed, so that nothing can be printed; redirect it to a file or to /dev/null"
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A text may have letters that the locale's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _signals():
            return _run(argv)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        say(f"rtn-tensor: stopped by {signal.Signals(number).name}")
        return 128 + number


@contextmanager
def _signals() -> Iterator[None]:
    """Meanwhile whatever asks the process to end does so as Ctrl-C does, so that what is half done is
    undone."""
    last = -math.inf

    def stop(number: int, frame: Any) -> None:
        nonlocal last
        if time.monotonic() - last > 1:  # a second one at once would stop the undoing
            last = time.monotonic()
            raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # where Python lets no one handle signals
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    # nohup's is kept.
    before = {
        number: was for number, was in before.items() if was in (signal.SIG_DFL, signal.default_int_handler)
    }
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        if last == -math.inf:  # else the process is about to end, which takes Python a moment
            for number, was in before.items():
                signal.signal(number, was)


def _run(argv: list[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
    except SystemExit:
        _print("")  # what --help wrote
        raise
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")
            warnings.filterwarnings("default", module="rtn_tensor")
            warnings.showwarning = lambda message, *_, **__: say(
                f"rtn-tensor: warning: {' '.join(str(message).split())}"
            )
            if args.run not in (run_explain, run_tune):
                _silence_transformers()
            if args.run is run_quantize and args.recipe:
                command, *given = sys.argv[1:] if argv is None else argv
                args = parser().parse_args([command, *arguments(args.recipe), *given])
            data, text = args.run(args)
    except BrokenPipeError:  # who reads what is written piece by piece has all he wants
        discard(sys.stdout)
        return 0
    except ImportError as error:
        extra = {run_evaluate: "evaluate", run_serve: "serve"}.get(args.run, "cli")
        return _fail(f"{error}; pip install 'rtn-tensor[{extra}]' brings it")
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        return _fail(_why(error))
    if not args.json and not text:  # it was printed as it came
        return 0
    return _print(f"{json.dumps(_plain(data)) if args.json else text}\n")


def _print(text: str) -> int:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader (head, say) has all it wants
        discard(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        return _fail(f"stdout cannot be written to ({error.strerror}); redirect it elsewhere")
    return 0


# What to do where a file cannot be read or written.
ADVICE = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "write to another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "have its permissions changed, or choose another",
    errno.EPERM: "have its permissions changed, or choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "give a folder's name",
    errno.EISDIR: "give a file's name",
}


def _why(error: Exception) -> str:
    """One line."""
    text = named(error)
    if isinstance(error, OSError) and error.errno and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}" + (
            f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        )
    if not isinstance(error, FORESEEN):
        text += f"; `{sys.executable} -X dev -m rtn_tensor` and the same words show where"
    return " ".join(text.split())


def _plain(data: Any) -> Any:
    """For JSON, which has no NaN and no infinity."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _fail(why: str) -> int:
    say("rtn-tensor: error: " + " ".join(why.split()))
    return 1


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # also huggingface_hub's; `cli.models.local` shows those of downloads
