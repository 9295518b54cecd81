"""The command `rtn-tensor`: quantize, inspect, perplexity, evaluate, generate, explain, tune."""

import argparse
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtn_tensor.checkpoint.companions import companions
from rtn_tensor.checkpoint.files import parse_json
from rtn_tensor.checkpoint.folders import new_folder
from rtn_tensor.checkpoint.load import load, without_place
from rtn_tensor.checkpoint.save import write
from rtn_tensor.checkpoint.sources import sources
from rtn_tensor.config import rtn
from rtn_tensor.evaluation.generation import generate
from rtn_tensor.evaluation.perplexity import check_causal, perplexity, token_losses
from rtn_tensor.evaluation.tasks import Score, average_recovery, check_tasks, rows, run_tasks, show, text_score
from rtn_tensor.formats import FLOAT_DTYPES, FORMATS, SCALE_METHODS
from rtn_tensor.integrations.transformers.folders import empty_model
from rtn_tensor.integrations.transformers.models import but_the_output, ends
from rtn_tensor.kernels.problem import device_of
from rtn_tensor.kernels.registry import explain
from rtn_tensor.quantize.report import report
from rtn_tensor.quantize.selection import parse_rule, rules_from_json
from rtn_tensor.text_table import table
from rtn_tensor.tuning import TOKENS, tune, tuned_folder

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def _say(text: str) -> None:
    """Prints a line on stderr; what a file's name or content could do to a terminal is escaped."""
    if sys.stderr is None:
        return
    try:
        print("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), file=sys.stderr, flush=True)
    except OSError:  # whoever read it is gone, which is no reason to stop
        _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """Sends what is still to be written to a stream nowhere; else Python fails once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _progress(unit: str) -> Any:
    from tqdm import tqdm

    return lambda items: tqdm(items, unit=unit, disable=None)  # None: no bar where stderr is not a terminal


def _load(path: str) -> Any:
    _say(f"Loading {path}")
    return load(path)


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ValueError(f"{path} is no folder with a tokenizer; give the model's folder")
    try:
        # None would ask on stdout whether to run what the folder brings along.
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the kinds of tokenizers fail in as many ways, of no common class
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path}: its tokenizer needs code of its own (auto_map), which is never run here; call generate from Python"
            ) from error
        raise ValueError(f"{path} has no tokenizer that can be read; copy the model's tokenizer files there ({_named(error)})") from error


def _ids(tokenizer: Any, text: str, most: int | None) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)[:most]


def _read(path: str, wanted: str = "--text takes a UTF-8 text file") -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise ValueError(f"cannot read {path} ({why}); {wanted}") from error


# ------------------------------------------------------------------------------------------- arguments


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


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 20) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _device(text: str) -> torch.device:
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
        raise argparse.ArgumentTypeError(f"{text!r} is no weight's size; write out_features x in_features, as in 4096x14336")
    return n, k


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # The defaults of flags and lists say nothing.
        return super()._get_help_string(action) if action.default else action.help


def _selects(model: Any, embedding: bool) -> Any:
    """A filter_fn: linears, but lm_head and the input embedding only where `embedding` says so."""
    outer, otherwise = ends(model), but_the_output(model)
    return lambda module, name: (embedding and module in outer) or otherwise(module, name)


def _rules(args: argparse.Namespace) -> Any:
    """What the options say, as rules: layers that are skipped, single rules, the file's, and the format of the rest."""
    rest = rtn(args.bits, args.group_size, args.scale_method)
    rules: list[Any] = [(pattern, None) for pattern in args.skip] + [parse_rule(text, rest) for text in args.rule]
    if args.rules:
        text = _read(args.rules, "--rules takes a JSON file")
        try:
            given = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{args.rules} is no JSON ({error}); --rules takes a list of [pattern, format]") from None
        try:
            rules += rules_from_json(given, rest)
        except ValueError as error:
            raise ValueError(f"{args.rules}: {error}") from None
    return [*rules, ("*", rest)]


def _quantize(args: argparse.Namespace) -> tuple[Any, str]:
    rules = _rules(args)
    source, destination = Path(args.src), Path(args.dst)
    if os.path.lexists(destination) and not args.force:
        raise FileExistsError(f"{destination} exists; choose another name, or replace it with --force")
    model = empty_model(source)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"{source} is already quantized; give the float model")
    with new_folder(destination, args.force, source) as folder:
        kept, left_out = companions(source)
        unused, read = without_place(source, model)
        _say(f"Loading {source}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*has no place for", UserWarning)  # it is said below, of all that is left out
            load(source, rules, model, filter_fn=_selects(model, args.embedding))
        _say(f"Writing {destination}")
        write(model, folder)
        result = report(model)
        for file in kept:
            to = folder / file.relative_to(source)
            if not to.exists():  # its config is the quantized model's
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
    for name, count in Counter(map(_any_layer, unused)).items():
        _say(f"Left out {name}{f' ({count} such)' if count > 1 else ''}: {type(model).__name__} has no place for it")
    for entry, why in left_out.items():
        if entry not in read and not entry.name.endswith(".index.json"):
            _say(f"Left out {entry.name}{'/' if entry.is_dir() else ''}: {why}")
    return result.to_dict(), str(result)


def _any_layer(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _inspect(args: argparse.Namespace) -> tuple[Any, str]:
    result = report(_load(args.path))
    return result.to_dict(), str(result)


def _perplexity(args: argparse.Namespace) -> tuple[Any, str]:
    text, tokenizer = _read(args.text), _tokenizer(args.path)
    model = _load(args.path)
    ids = _ids(tokenizer, text, args.max_tokens)
    value = perplexity(model, ids, args.window, args.stride, progress=_progress("window"))
    return {"perplexity": value, "tokens": ids.numel(), "window": args.window, "stride": args.stride}, f"{value:.3f}"


def _evaluate(args: argparse.Namespace) -> tuple[Any, str]:
    if ("perplexity" in args.tasks) != bool(args.text):
        raise ValueError("the task perplexity and --text FILE go together; add the one that is missing")
    text = _read(args.text) if args.text else ""
    others = [task for task in args.tasks if task != "perplexity"]
    if others:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        check_tasks(others, args.limit, args.data, args.batch_size)
        if not sys.stderr.isatty():
            from datasets import disable_progress_bars

            disable_progress_bars()
    paths = [args.path, *([args.against] if args.against else [])]
    for path in paths:  # before the first is scored, which takes long
        check_causal(empty_model(path))
        sources(path)
    tokenizers = [_tokenizer(path) for path in paths]
    ids = [_ids(tokenizer, text, args.max_tokens) for tokenizer in tokenizers] if args.text else []
    if args.text and args.against and not torch.equal(*ids):
        raise ValueError(f"{args.path} and {args.against} make other tokens of the text, so that their perplexities cannot be compared")

    def scores(i: int) -> list[Score]:
        model, done = _load(paths[i]), []
        if args.text:
            done.append(text_score("perplexity", token_losses(model, ids[i], progress=_progress("window"))))
        return done + (run_tasks(model, tokenizers[i], others, args.limit, args.data, args.batch_size) if others else [])

    found = scores(0)
    references = scores(1) if args.against else None
    result: dict[str, Any] = {"scores": rows(found, references)}
    if references:
        result["average_recovery"], result["average_recovery_stderr"] = average_recovery(found, references)
    return result, show(found, references)


def _generate(args: argparse.Namespace) -> tuple[Any, str]:
    model = _load(args.path)
    result = generate(model, _tokenizer(args.path), args.prompt, args.max_new_tokens, args.compile)
    return {"text": result.text, "tokens": result.tokens, "seconds": result.seconds}, result.text


def _explain(args: argparse.Namespace) -> tuple[Any, str]:
    result = explain(
        op=args.op,
        device=args.device,
        dtype=DTYPES[args.dtype],
        bits=args.bits,
        group_size=args.group_size,
        M=args.m,
        N=args.n,
        K=args.k,
    )
    return result.to_dict(), str(result)


def _tune(args: argparse.Namespace) -> tuple[Any, str]:
    sizes = list(args.size)
    for path in args.model:
        selects = _selects(model := empty_model(path), False)
        sizes += [tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear) and selects(m, name)]
    if not sizes:
        raise ValueError("nothing to tune for; name a model's folder with --model, or sizes with --size")
    rows = tune(dict.fromkeys(sizes), args.bits, args.group_size, DTYPES[args.dtype], args.tokens, args.device, progress=_progress("shape"))
    cells = [
        [
            f"[{row['shape']['N']}, {row['shape']['K']}]",
            str(row["shape"]["M"]),
            f"{row['microseconds']:.1f}",
            f"{row['rule_microseconds']:.1f}",
        ]
        for row in rows
    ]
    return rows, table(["weight", "tokens", "us", "us before"], cells) + f"\nwritten to {tuned_folder()}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rtn-tensor", description="Round-to-nearest int4 and int8 weights: no data, no calibration, seconds."
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=_Help)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    def add_format(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--bits", type=int, choices=FORMATS, default=4, help="bits a weight")
        sub.add_argument("--group-size", type=int, default=128, help="weights that share a scale: a multiple of 32, or -1 for a whole row")

    sub = command("quantize", _quantize, "Quantize a transformers folder into another.")
    sub.add_argument("src", type=_path, help="folder of the model, with its config.json")
    sub.add_argument("dst", type=_path, help="folder to write; must not exist, but with --force")
    add_format(sub)
    sub.add_argument("--scale-method", choices=SCALE_METHODS, default="absmax", help="how a group's scale is found")
    sub.add_argument(
        "--skip", metavar="PATTERN", action="append", default=[], help="layers to keep float, as in 'model.layers.0.*'; may repeat"
    )
    sub.add_argument(
        "--rule",
        metavar="PATTERN=FORMAT",
        action="append",
        default=[],
        help="a format of their own for some layers, as in '*.down_proj=8', '*.0.*=4,32,signed' or 'lm_head=float'; may repeat, and the "
        "first that matches counts",
    )
    sub.add_argument("--rules", metavar="FILE", type=_path, help='JSON of such rules, as in [["*.down_proj", {"bits": 8}]]')
    sub.add_argument("--embedding", action="store_true", help="quantize the embedding and lm_head too")
    sub.add_argument("--force", action="store_true", help="replace dst, once the new folder is whole")

    sub = command("inspect", _inspect, "List every weight of a model: shape, bits, bytes.")
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")

    sub = command("perplexity", _perplexity, "Measure a model's perplexity on a text, by sliding window.")
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")
    sub.add_argument("--text", metavar="FILE", type=_path, required=True, help="UTF-8 text")
    sub.add_argument("--window", type=int, default=1024, help="tokens the model sees at once")
    sub.add_argument("--stride", type=int, default=512, help="tokens from one window to the next")
    sub.add_argument("--max-tokens", type=_count, help="use only the first tokens of the text")

    sub = command("evaluate", _evaluate, "Score a model in zero-shot tasks, alone or beside another, by lm-evaluation-harness.")
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")
    sub.add_argument(
        "--tasks",
        metavar="LIST",
        type=_tasks,
        default="lambada,hellaswag,arc_easy,arc_challenge,piqa,winogrande",
        help="comma-separated names of the harness, or perplexity",
    )
    sub.add_argument("--against", metavar="FOLDER", type=_path, help="a model of which to give the recovery rate, scored on the same items")
    sub.add_argument("--limit", metavar="N", type=_count, help="use only the first items of each task")
    sub.add_argument(
        "--data", metavar="FOLDER", type=_path, help="folder of TASK.jsonl, the rows of each dataset; else they come from the hub"
    )
    sub.add_argument("--batch-size", metavar="B", type=_count, default=8, help="options scored at once")
    sub.add_argument("--text", metavar="FILE", type=_path, help="UTF-8 text, for perplexity: windows of 1024 tokens, 512 apart")
    sub.add_argument("--max-tokens", metavar="T", type=_count, help="use only the first tokens of the text")

    sub = command("generate", _generate, "Continue a prompt, greedily.")
    sub.add_argument("path", type=_path, help="folder of the model, quantized or not")
    sub.add_argument("prompt", type=_text, help="text; the user's turn, if the model has a chat template")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="stop after this many")
    sub.add_argument("--compile", action="store_true", help="compile the decoding step first, which takes about a minute")

    sub = command("explain", _explain, "Say which kernel runs a layer, and why each other does not.")
    add_format(sub)
    sub.add_argument("--op", default="linear", help="linear, linear_dx, grouped, embedding, quantize, ...")
    sub.add_argument("--device", type=_device, default="cpu", help="device of the weight")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the activations")
    sub.add_argument("--m", type=int, default=1, help="rows of activations")
    sub.add_argument("--n", type=int, default=4096, help="out_features")
    sub.add_argument("--k", type=int, default=4096, help="in_features")

    sub = command("tune", _tune, "Measure how the GPU's kernels are best launched, for a model or sizes of weights, and remember it.")
    sub.add_argument(
        "--model",
        metavar="FOLDER",
        type=_path,
        action="append",
        default=[],
        help="folder of a float model: all its linear layers; may repeat",
    )
    sub.add_argument("--size", metavar="NxK", type=_size, action="append", default=[], help="out_features x in_features; may repeat")
    add_format(sub)
    sub.add_argument("--tokens", metavar="M", type=_count, nargs="+", default=TOKENS, help="rows of activations")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the activations")
    sub.add_argument("--device", default="cuda", help="GPU to measure on")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0; 1 after a one-line error; 130 or 143, as in a shell, after Ctrl-C or SIGTERM. argparse
    exits with 2."""
    if sys.stdout is None:
        return _fail("stdout is closed, so that nothing can be printed; redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a text may have letters that the locale's encoding does not
    try:
        with _signals():
            return _run(argv)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        _say(f"rtn-tensor: stopped by {signal.Signals(number).name}")
        return 128 + number


@contextmanager
def _signals() -> Iterator[None]:
    """Meanwhile whatever asks the process to end does so as Ctrl-C does, so that what is half done is undone."""
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
    before = {number: was for number, was in before.items() if was in (signal.SIG_DFL, signal.default_int_handler)}  # nohup's is kept
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
            warnings.showwarning = lambda message, *_, **__: _say(f"rtn-tensor: warning: {' '.join(str(message).split())}")
            if args.run not in (_explain, _tune):
                _silence_transformers()
            data, text = args.run(args)
    except ImportError as error:
        return _fail(f"{error}; pip install 'rtn-tensor[{'evaluate' if args.run is _evaluate else 'cli'}]' brings it")
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        return _fail(_why(error))
    return _print(f"{json.dumps(_plain(data)) if args.json else text}\n")


def _print(text: str) -> int:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader (head, say) has all it wants
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
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


FORESEEN = OSError, ValueError, TypeError  # kinds whose messages are for a user


def _why(error: Exception) -> str:
    """One line."""
    text = _named(error)
    if isinstance(error, OSError) and error.errno and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}" + (f"; {ADVICE[error.errno]}" if error.errno in ADVICE else "")
    if not isinstance(error, FORESEEN):
        text += f"; `{sys.executable} -X dev -m rtn_tensor` and the same words show where"
    return " ".join(text.split())


def _named(error: Exception) -> str:
    """The error's own words; with its class, where those are not for a user."""
    text = str(error)
    return text if text and isinstance(error, FORESEEN) else f"{type(error).__name__}{f': {text}' if text else ''}"


def _plain(data: Any) -> Any:
    """For JSON, which has no NaN and no infinity."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _fail(why: str) -> int:
    _say("rtn-tensor: error: " + " ".join(why.split()))
    return 1


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
