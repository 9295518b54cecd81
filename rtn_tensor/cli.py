"""The command `rtn-tensor`: quantize, export, inspect, perplexity, evaluate, generate, explain, tune."""

import argparse
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

import torch

from rtn_tensor.checkpoint.export import GGUF
from rtn_tensor.checkpoint.export_plan import FORMATS as OTHER_FORMATS
from rtn_tensor.commands import (
    DTYPE_NAMES,
    FORESEEN,
    OURS,
    discard,
    named,
    run_evaluate,
    run_explain,
    run_export,
    run_generate,
    run_inspect,
    run_perplexity,
    run_quantize,
    run_tune,
    say,
)
from rtn_tensor.formats import ACTIVATIONS, FORMATS, SCALE_METHODS
from rtn_tensor.kernels.problem import device_of
from rtn_tensor.tuning import TOKENS

OTHERWISE = "what a quantized model rounds its activations to (default: as it was saved)"

# -------------------------------------------------------------------------------- arguments


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; rename it, or type it in UTF-8") from None
    return text


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give that of a file or folder")
    return _text(text)


def _tasks(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task; give one or more, as in lambada,piqa")
    return names


def _positive(text: str) -> int:
    if not (text.isdecimal() and len(text) < 20) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _device_argument(text: str) -> torch.device:
    try:
        return device_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> tuple[int, int]:
    try:
        n, k = map(int, text.split("x"))
    except ValueError:
        n = k = 0
    if min(n, k) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no weight's size; write out_features x in_features, as in 4096x14336"
        )
    return n, k


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # The defaults of flags and lists say nothing.
        return super()._get_help_string(action) if action.default else action.help


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rtn-tensor",
        description="Round-to-nearest int4 and int8 weights: no data, no calibration, seconds.",
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=_Help)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    def add_format(sub: argparse.ArgumentParser, default: int | None = 4, more: str = "") -> None:
        sub.add_argument("--bits", type=int, choices=FORMATS, default=default, help=f"bits per weight{more}")
        sub.add_argument(
            "--group-size",
            type=int,
            help="weights that share a scale: a multiple of 32, or -1 for a whole row (default: 64 at 4 "
            "bits, 128 at 8)",
        )

    def add_activations(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument("--activations", choices=[name for name in ACTIVATIONS if name], help=what)

    def add_destination(sub: argparse.ArgumentParser, formats: list[str]) -> None:
        sub.add_argument(
            "--format",
            choices=formats,
            default=formats[0],
            help="rtn is this library's own; "
            * (formats[0] == OURS)
            + "vLLM, SGLang and transformers read compressed-tensors; vLLM, SGLang and GPTQModel gptq; "
            "llama.cpp, Ollama and LM Studio gguf",
        )
        sub.add_argument(
            "--like",
            metavar="FILE",
            type=_path,
            help="for gguf, a GGUF file of the same model, which gives the tokenizer and the metadata",
        )
        sub.add_argument("--force", action="store_true", help="replace dst, once the new one is whole")

    sub = command("quantize", run_quantize, "Quantize a transformers folder into another.")
    sub.add_argument("src", type=_path, help="folder of the model, with its config.json")
    sub.add_argument(
        "dst", type=_path, help="folder to write, or .gguf file; must not exist, unless --force is given"
    )
    add_format(sub, None, " (default: 4; those of GPTQ and the like are kept as they are)")
    sub.add_argument(
        "--scale-method",
        choices=SCALE_METHODS,
        help="how a group's scale is found (default: search at 4 bits, absmax at 8)",
    )
    add_activations(sub, "what products round their activations to (default: they stay as they are)")
    sub.add_argument(
        "--skip",
        metavar="PATTERN",
        action="append",
        default=[],
        help="layers to keep float, as in 'model.layers.0.*'; may repeat",
    )
    sub.add_argument(
        "--rule",
        metavar="PATTERN=FORMAT",
        action="append",
        default=[],
        help="a format of their own for some layers, as in '*.down_proj=8', '*.0.*=4,32,signed' or "
        "'lm_head=float'; may repeat, and the "
        "first that matches counts",
    )
    sub.add_argument(
        "--rules", metavar="FILE", type=_path, help='JSON of such rules, as in [["*.down_proj", {"bits": 8}]]'
    )
    sub.add_argument("--embedding", action="store_true", help="quantize the embedding and lm_head too")
    sub.add_argument(
        "--refine",
        action="store_true",
        help="round so that errors make up for one another, on text that the model writes itself; minutes",
    )
    sub.add_argument(
        "--refine-on",
        metavar="FILE",
        type=_path,
        help="with --refine, a UTF-8 text to use in place of its own",
    )
    add_destination(sub, [OURS, *OTHER_FORMATS, GGUF])

    sub = command(
        "export",
        run_export,
        "Write a quantized model for other engines, with the same integers and scales.",
    )
    sub.add_argument("src", type=_path, help="folder of a quantized model")
    sub.add_argument(
        "dst", type=_path, help="folder, or .gguf file, to write; must not exist, unless --force is given"
    )
    add_destination(sub, [*OTHER_FORMATS, GGUF])

    sub = command("inspect", run_inspect, "List every weight of a model: shape, bits, bytes.")
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")

    sub = command("perplexity", run_perplexity, "Measure a model's perplexity on a text, by sliding window.")
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")
    sub.add_argument("--text", metavar="FILE", type=_path, required=True, help="UTF-8 text")
    sub.add_argument("--window", type=int, default=1024, help="tokens the model sees at once")
    sub.add_argument("--stride", type=int, default=512, help="tokens from one window to the next")
    sub.add_argument("--max-tokens", type=_positive, help="use only the first tokens of the text")
    add_activations(sub, OTHERWISE)

    sub = command(
        "evaluate",
        run_evaluate,
        "Score a model in zero-shot tasks, alone or beside another, by lm-evaluation-harness.",
    )
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")
    sub.add_argument(
        "--tasks",
        metavar="LIST",
        type=_tasks,
        default="lambada,hellaswag,arc_easy,arc_challenge,piqa,winogrande",
        help="comma-separated names of the harness, or perplexity",
    )
    sub.add_argument(
        "--against",
        metavar="FOLDER",
        type=_path,
        help="a model of which to give the recovery rate, scored on the same items",
    )
    sub.add_argument("--limit", metavar="N", type=_positive, help="use only the first items of each task")
    sub.add_argument(
        "--data",
        metavar="FOLDER",
        type=_path,
        help="folder of TASK.jsonl, the rows of each dataset; else they come from the hub",
    )
    sub.add_argument("--batch-size", metavar="B", type=_positive, default=8, help="options scored at once")
    sub.add_argument(
        "--text",
        metavar="FILE",
        type=_path,
        help="UTF-8 text, for perplexity: windows of 1024 tokens, 512 apart",
    )
    sub.add_argument(
        "--max-tokens", metavar="T", type=_positive, help="use only the first tokens of the text"
    )
    add_activations(sub, f"{OTHERWISE}; of path, not of --against")

    sub = command("generate", run_generate, "Continue a prompt, greedily.")
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")
    sub.add_argument("prompt", type=_text, help="text; the user's turn, if the model has a chat template")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="stop after this many")
    sub.add_argument(
        "--compile", action="store_true", help="compile the decoding step first, which takes about a minute"
    )
    add_activations(sub, OTHERWISE)

    sub = command("explain", run_explain, "Say which kernel runs a layer, and why each other does not.")
    add_format(sub)
    add_activations(sub, "what the weight rounds its activations to")
    sub.add_argument("--op", default="linear", help="linear, linear_dx, grouped, embedding, quantize, ...")
    sub.add_argument("--device", type=_device_argument, default="cpu", help="device of the weight")
    sub.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16", help="dtype of the activations")
    sub.add_argument("--m", type=int, default=1, help="rows of activations")
    sub.add_argument("--n", type=int, default=4096, help="out_features")
    sub.add_argument("--k", type=int, default=4096, help="in_features")

    sub = command(
        "tune",
        run_tune,
        "Measure how the GPU's kernels are best launched, for a model or sizes of weights, and remember it.",
    )
    sub.add_argument(
        "--model",
        metavar="FOLDER",
        type=_path,
        action="append",
        default=[],
        help="folder of a float model: all its linear layers; may repeat",
    )
    sub.add_argument(
        "--size",
        metavar="NxK",
        type=_size,
        action="append",
        default=[],
        help="out_features x in_features; may repeat",
    )
    add_format(sub)
    sub.add_argument(
        "--tokens", metavar="M", type=_positive, nargs="+", default=TOKENS, help="rows of activations"
    )
    sub.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16", help="dtype of the activations")
    sub.add_argument("--device", default="cuda", help="GPU to measure on")
    return top


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
            data, text = args.run(args)
    except ImportError as error:
        extra = "evaluate" if args.run is run_evaluate else "cli"
        return _fail(f"{error}; pip install 'rtn-tensor[{extra}]' brings it")
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        return _fail(_why(error))
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
    logging.disable_progress_bar()
