"""What each subcommand of `rtn-tensor` does; each gives its result, as data and as text."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtn_tensor.checkpoint.companions import companions, copy_companions
from rtn_tensor.checkpoint.export import check_destination, destination, prepare
from rtn_tensor.checkpoint.files import parse_json
from rtn_tensor.checkpoint.load import is_kept, load, without_place
from rtn_tensor.checkpoint.save import write
from rtn_tensor.checkpoint.sources import sources
from rtn_tensor.config import rtn
from rtn_tensor.evaluation.generation import generate
from rtn_tensor.evaluation.perplexity import check_causal, perplexity, token_losses
from rtn_tensor.evaluation.tasks import (
    Score,
    average_recovery,
    check_tasks,
    rows,
    run_tasks,
    show,
    text_score,
)
from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.integrations.transformers.folders import check_model_folder, empty_model, read_config
from rtn_tensor.integrations.transformers.models import but_the_output, ends
from rtn_tensor.kernels.registry import explain
from rtn_tensor.quantize.activations import set_activations_
from rtn_tensor.quantize.refine import Refinement, refine_
from rtn_tensor.quantize.report import report
from rtn_tensor.quantize.selection import parse_rule, rules_from_json
from rtn_tensor.quantize.written import check_tokens
from rtn_tensor.text_table import table
from rtn_tensor.tuning import tune, tuned_folder

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
OURS = "rtn"  # the format that save writes
REFINED_ON = 16384  # tokens of a given text at most
FORESEEN = OSError, ValueError, TypeError  # kinds whose messages are for a user


def say(text: str) -> None:
    """Prints a line on stderr; what a file's name or content could do to a terminal is escaped."""
    if sys.stderr is None:
        return
    try:
        print(
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text),
            file=sys.stderr,
            flush=True,
        )
    except OSError:  # whoever read it is gone, which is no reason to stop
        discard(sys.stderr)


def progress(unit: str) -> Any:
    from tqdm import tqdm

    return lambda items: tqdm(items, unit=unit, disable=None)  # None: no bar where stderr is not a terminal


def _load_model(path: str, activations: str | None = None) -> Any:
    if not path.endswith(".gguf"):
        check_model_folder(Path(path))  # before it is said to be loaded
    say(f"Loading {path}")
    model = load(path)
    if activations is not None:
        set_activations_(model, activations)
    return model


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    check_model_folder(Path(path))
    read_config(Path(path))  # else a damaged one would be told as a tokenizer that cannot be read
    try:
        # None would ask on stdout whether to run what the folder brings along.
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
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


def _ids(tokenizer: Any, text: str, most: int | None) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)[:most]


def _read_text(path: str, wanted: str = "--text takes a UTF-8 text file") -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise ValueError(f"cannot read {path} ({why}); {wanted}") from error


def _selects(model: Any, embedding: bool) -> Any:
    """A filter_fn: linears, but lm_head and the input embedding only where `embedding` says so."""
    outer, otherwise = ends(model), but_the_output(model)
    return lambda module, name: (embedding and module in outer) or otherwise(module, name)


# Options of quantize that ask for a format.
_FORMATS = ("bits", "group_size", "scale_method", "activations", "skip", "rule", "rules", "embedding")


def _rules(args: argparse.Namespace) -> Any:
    """What the options say, as rules: layers that are skipped, single rules, the file's, and the format of
    the rest."""
    rest = rtn(args.bits or 4, args.group_size, args.scale_method, args.activations)
    rules: list[Any] = [(pattern, None) for pattern in args.skip] + [
        parse_rule(text, rest) for text in args.rule
    ]
    if args.rules:
        text = _read_text(args.rules, "--rules takes a JSON file")
        try:
            given = parse_json(text)
        except ValueError as error:
            raise ValueError(
                f"{args.rules} is no JSON ({error}); --rules takes a list of [pattern, format]"
            ) from None
        try:
            rules += rules_from_json(given, rest)
        except ValueError as error:
            raise ValueError(f"{args.rules}: {error}") from None
    return [*rules, ("*", rest)]


def _sequences(tokenizer: Any, text: str) -> torch.Tensor:
    """The first tokens of `text`, [S, 256]."""
    ids = _ids(tokenizer, text[: 20 * REFINED_ON], REFINED_ON)
    if ids.numel() < 256:
        raise ValueError(f"--refine-on has {ids.numel()} tokens; give a text of 256 or more, best thousands")
    return ids[: ids.numel() // 256 * 256].view(-1, 256)


def run_quantize(args: argparse.Namespace) -> tuple[Any, str]:
    rules = _rules(args)
    source = Path(args.src)
    if args.refine_on and not args.refine:
        raise ValueError("--refine-on FILE is for --refine; add that, or leave it out")
    tokens = None
    if args.refine_on:
        text = _read_text(args.refine_on, "--refine-on takes a UTF-8 text file")
        tokens = _sequences(_tokenizer(args.src), text)
    _check_free(args)
    model = empty_model(source)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"{source} is already quantized; give the float model")
    if args.refine:  # before the weights are read
        check_tokens(model, tokens, 1, 2, "--refine-on", "--refine-on FILE, or call refine_ from Python")
    with destination(args.dst, args.format, args.force, source) as place:
        kept, left_out = companions(source)
        unused, read = without_place(source, model)
        say(f"Loading {source}")
        with warnings.catch_warnings():
            # It is said below, of all that is left out.
            warnings.filterwarnings("ignore", ".*(has no place for|is of an adapter)", UserWarning)
            if (
                not any(getattr(args, name) for name in _FORMATS)
                and not args.refine
                and is_kept(source, model)
            ):
                load(source, None, model)
                say("No format is asked for, and each weight keeps the integers and scales that it has")
            else:
                load(source, rules, model, filter_fn=_selects(model, args.embedding))
        if args.refine:
            say(
                "Refining"
                + (f" on {args.refine_on}" if args.refine_on else ": the model writes some text first")
            )
            result = refine_(model, source=source, tokens=tokens, progress=progress("module"))
        else:
            result = report(model)
        if args.format == OURS:
            say(f"Writing {args.dst}")
            write(model, place)
            copy_companions(kept, source, place)  # but its config, which is the quantized model's
            data, text = result.to_dict(), str(result)
        else:
            data, text = _write_exported(model, place, args)
            if isinstance(result, Refinement):
                data, text = result.to_dict() | data, f"{text}\n{result.summary}"
    for name, count in Counter(map(_any_layer, unused)).items():
        say(
            f"Left out {name}{f' ({count} such)' if count > 1 else ''}: {type(model).__name__} has no place "
            "for it"
        )
    for entry, why in left_out.items():
        if entry not in read and not entry.name.endswith(".index.json"):
            say(f"Left out {entry.name}{'/' if entry.is_dir() else ''}: {why}")
    return data, text


def _check_free(args: argparse.Namespace) -> None:
    if args.format != OURS:
        check_destination(args.dst, args.format, args.like)
    elif args.like:
        raise ValueError("--like FILE is for --format gguf; add that, or leave it out")
    if os.path.lexists(args.dst) and not args.force:
        raise FileExistsError(f"{args.dst} exists; choose another name, or replace it with --force")


def _write_exported(model: Any, place: Path, args: argparse.Namespace) -> tuple[Any, str]:
    prepared = prepare(model, Path(args.dst).name, args.format, args.like)
    say(f"Writing {args.dst}")
    prepared.write(place)
    return prepared.report.to_dict(), str(prepared.report)


def run_export(args: argparse.Namespace) -> tuple[Any, str]:
    _check_free(args)
    check_model_folder(Path(args.src))
    if not read_config(Path(args.src)).get("quantization_config"):
        raise ValueError(
            f"{args.src} is float; `rtn-tensor quantize {args.src} {args.dst} --format {args.format}` "
            "quantizes it, too"
        )
    with destination(args.dst, args.format, args.force, Path(args.src)) as place:
        return _write_exported(_load_model(args.src), place, args)


def _any_layer(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def run_inspect(args: argparse.Namespace) -> tuple[Any, str]:
    result = report(_load_model(args.path))
    return result.to_dict(), str(result)


def run_perplexity(args: argparse.Namespace) -> tuple[Any, str]:
    text, tokenizer = _read_text(args.text), _tokenizer(args.path)
    model = _load_model(args.path, args.activations)
    ids = _ids(tokenizer, text, args.max_tokens)
    value = perplexity(model, ids, args.window, args.stride, progress=progress("window"))
    return {
        "perplexity": value,
        "tokens": ids.numel(),
        "window": args.window,
        "stride": args.stride,
    }, f"{value:.3f}"


def run_evaluate(args: argparse.Namespace) -> tuple[Any, str]:
    if ("perplexity" in args.tasks) != bool(args.text):
        raise ValueError("the task perplexity and --text FILE go together; add the one that is missing")
    text = _read_text(args.text) if args.text else ""
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
        raise ValueError(
            f"{args.path} and {args.against} make other tokens of the text, so that their "
            "perplexities cannot be compared"
        )

    def scores(i: int) -> list[Score]:
        model, done = _load_model(paths[i], None if i else args.activations), []
        if args.text:
            done.append(text_score("perplexity", token_losses(model, ids[i], progress=progress("window"))))
        return done + (
            run_tasks(model, tokenizers[i], others, args.limit, args.data, args.batch_size) if others else []
        )

    found = scores(0)
    references = scores(1) if args.against else None
    result: dict[str, Any] = {"scores": rows(found, references)}
    if references:
        result["average_recovery"], result["average_recovery_stderr"] = average_recovery(found, references)
    return result, show(found, references)


def run_generate(args: argparse.Namespace) -> tuple[Any, str]:
    tokenizer = _tokenizer(args.path)  # before the model, which takes longer
    model = _load_model(args.path, args.activations)
    result = generate(model, tokenizer, args.prompt, args.max_new_tokens, args.compile)
    return {"text": result.text, "tokens": result.tokens, "seconds": result.seconds}, result.text


def run_explain(args: argparse.Namespace) -> tuple[Any, str]:
    result = explain(
        op=args.op,
        device=args.device,
        dtype=DTYPE_NAMES[args.dtype],
        bits=args.bits,
        group_size=args.group_size,
        activations=args.activations,
        M=args.m,
        N=args.n,
        K=args.k,
    )
    return result.to_dict(), str(result)


def run_tune(args: argparse.Namespace) -> tuple[Any, str]:
    sizes = list(args.size)
    for path in args.model:
        selects = _selects(model := empty_model(path), False)
        sizes += [
            tuple(m.weight.shape)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and selects(m, name)
        ]
    if not sizes:
        raise ValueError("nothing to tune for; name a model's folder with --model, or sizes with --size")
    rows = tune(
        dict.fromkeys(sizes),
        args.bits,
        args.group_size,
        DTYPE_NAMES[args.dtype],
        args.tokens,
        args.device,
        progress=progress("shape"),
    )
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


def discard(stream: Any) -> None:
    """Sends what is still to be written to a stream nowhere; else Python fails once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def named(error: Exception) -> str:
    """The error's own words; with its class, where those are not for a user."""
    text = str(error)
    return (
        text
        if text and isinstance(error, FORESEEN)
        else f"{type(error).__name__}{f': {text}' if text else ''}"
    )
