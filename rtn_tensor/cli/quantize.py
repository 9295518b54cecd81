"""`rtn-tensor quantize`, `export` and `plan`."""

import argparse
import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from rtn_tensor.checkpoint.card import own_card
from rtn_tensor.checkpoint.companions import companions, copy_companions
from rtn_tensor.checkpoint.export import GGUF, check_destination, destination, prepare
from rtn_tensor.checkpoint.files import parse_json
from rtn_tensor.checkpoint.hub import hub_name
from rtn_tensor.checkpoint.load import is_kept, load, without_place
from rtn_tensor.checkpoint.save import write
from rtn_tensor.cli import recipe
from rtn_tensor.cli.models import ids_of, load_model, local, read_text, selects, tokenizer_of
from rtn_tensor.cli.screen import progress, say
from rtn_tensor.cli.summary import summary
from rtn_tensor.config import RTNConfig, rtn
from rtn_tensor.formats import SCALES_OF_8_BITS
from rtn_tensor.integrations.transformers.folders import check_model_folder, empty_model, read_config
from rtn_tensor.integrations.transformers.language_model import language_model_only
from rtn_tensor.integrations.transformers.models import ends
from rtn_tensor.quantize.allocation import OPTIONS, plan
from rtn_tensor.quantize.estimate import estimate
from rtn_tensor.quantize.plan import Plan
from rtn_tensor.quantize.refine import Refinement, refine_
from rtn_tensor.quantize.report import Report, report
from rtn_tensor.quantize.selection import find, parse_rule, rules_from_json, rules_to_json
from rtn_tensor.quantize.written import check_tokens
from rtn_tensor.tensor import RTNQuantizedTensor

OURS = "rtn"  # the format that save writes
REFINED_ON = 16384  # tokens of a given text at most
Rules = list[tuple[str, RTNConfig | None]]

# By the names that vLLM and llm-compressor have for them: bits of weights and of activations.
SCHEMES = {
    "W4A16": (4, None, None),
    "W4A16_ASYM": (4, "minmax", None),
    "W8A16": (8, None, None),
    "W4A8": (4, None, "int8"),
    "W8A8": (8, None, "int8"),
}


def _rest(args: argparse.Namespace) -> RTNConfig:
    """The format of what no rule names."""
    given = [name for name in ("scheme", "bits", "bits_per_weight") if getattr(args, name)]
    if args.bits_per_weight:  # the plan says these, too
        given += [name for name in ("group_size", "scale_method", "activations") if getattr(args, name)]
    if len(given) > 1:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{named} each say what format weights get; leave one out")
    bits, method, activations = SCHEMES[args.scheme] if args.scheme else (args.bits or 4, None, None)
    return rtn(bits, args.group_size, args.scale_method or method, args.activations or activations)


def _from_file(args: argparse.Namespace, rest: RTNConfig) -> Rules:
    """The rules of the file that --rules names."""
    if not args.rules:
        return []
    text = read_text(args.rules, "--rules takes a JSON file")
    try:
        given = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{args.rules} is no JSON ({error}); --rules takes a list of [pattern, format]"
        ) from None
    try:
        return rules_from_json(given, rest)
    except ValueError as error:
        raise ValueError(f"{args.rules}: {error}") from None


def _sequences(tokenizer: Any, text: str) -> torch.Tensor:
    """The first tokens of `text`, [S, 256]."""
    ids = ids_of(tokenizer, text, REFINED_ON)
    if ids.numel() < 256:
        raise ValueError(f"--refine-on has {ids.numel()} tokens; give a text of 256 or more, best thousands")
    return ids[: ids.numel() // 256 * 256].view(-1, 256)


def run_quantize(args: argparse.Namespace) -> tuple[Any, str]:
    rest = _rest(args)
    in_file = _from_file(args, rest)
    rules: Any = [(pattern, None) for pattern in args.skip]
    rules += [*(parse_rule(text, rest) for text in args.rule), *in_file, ("*", rest)]
    if args.refine_on and not args.refine:
        raise ValueError("--refine-on FILE is for --refine; add that, or leave it out")
    if args.push_to_hub and args.format == GGUF:
        raise ValueError(
            "--push-to-hub uploads a folder, and --format gguf writes a file; upload that by hand"
        )
    if not args.dry_run:  # before anything is downloaded
        _check_free(args)
        _check_login(args.push_to_hub)
    text = read_text(args.refine_on, "--refine-on takes a UTF-8 text file") if args.refine_on else ""
    source = local(args.src)
    tokens = _sequences(tokenizer_of(args.src), text) if args.refine_on else None
    model = empty_model(source)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"{args.src} is already quantized; give the float model")
    if args.language_model_only:
        rules = [*language_model_only(model), *rules]
    if args.refine or args.bits_per_weight:  # before the weights are read
        check_tokens(model, tokens, 1, 2, "--refine-on", "--refine-on FILE, or call refine_ from Python")
    asked = any(getattr(args, name) for name in (*recipe.OF_FORMAT, "rules", "refine"))
    kept = not asked and is_kept(source, model)
    expected = None if kept else _expected(args, source, rules)
    if args.bits_per_weight:
        rules = [*rules[:-1], *_plan(args, rules[:-1])]
        expected = _expected(args, source, rules)
    if args.dry_run:
        if expected is None:
            raise ValueError(
                f"{args.src} would keep the integers and scales that it has; leave out --dry-run"
            )
        return expected.to_dict(), _shown(expected, args.verbose)
    with destination(args.dst, args.format, args.force, source) as place:
        beside, left_out = companions(source)
        unused, read = without_place(source, model)
        say(f"Loading {args.src}{f': {_sizes(expected)}' if expected else ''}")
        with warnings.catch_warnings():
            # It is said below, of all that is left out.
            warnings.filterwarnings("ignore", ".*(has no place for|is of an adapter)", UserWarning)
            if kept:
                load(source, None, model)
                say("No format is asked for, and each weight keeps the integers and scales that it has")
            else:
                load(source, rules, model, filter_fn=selects(model, args.embedding))
        if args.refine:
            say(
                "Refining"
                + (f" on {args.refine_on}" if args.refine_on else ": the model writes some text first")
            )
            result = refine_(model, source=source, tokens=tokens, progress=progress("Refining"))
        else:
            result = report(model)
        if args.format == OURS:
            say(f"Writing {args.dst}")
            write(model, place)
            text = own_card(model, Path(args.dst).name, source, hub_name(args.src), result.bits_per_weight)
            (place / "README.md").write_text(text, encoding="utf-8")
            copy_companions(beside, source, place)  # but its config, which is the quantized model's
            data, text = result.to_dict(), _shown(result, args.verbose)
        else:
            data, text = _write_exported(model, place, args)
            if isinstance(result, Refinement):
                data, text = result.to_dict() | data, f"{text}\n{result.summary}"
        if args.format != GGUF:
            recipe.beside(place, recipe.written(args, in_file, None if kept else rest))
    for name, count in Counter(map(_any_layer, unused)).items():
        say(
            f"Left out {name}{f' ({count} such)' if count > 1 else ''}: {type(model).__name__} has no place "
            "for it"
        )
    for entry, why in left_out.items():
        if entry not in read and not entry.name.endswith(".index.json"):
            say(f"Left out {entry.name}{'/' if entry.is_dir() else ''}: {why}")
    if args.format == OURS and (share := _of_the_embedding(model)):
        say(f"The embedding stays float and is {share:.0%} of the result; --embedding quantizes it, too")
    if args.push_to_hub:
        say(f"Pushed to {_push(args.dst, args.push_to_hub)}")
    return data, text


def _expected(args: argparse.Namespace, source: Path, rules: Rules) -> Report:
    """What quantizing will make of the model, by its shapes alone.

    Raises:
        ValueError: the format of --format cannot hold it.
    """
    empty = empty_model(source)
    expected = estimate(empty, rules, selects(empty, args.embedding))
    if args.format != OURS:
        try:
            prepare(empty, Path(args.dst).name, args.format, args.like)
        except ValueError as error:
            raise ValueError(f"--format {args.format}: {error}") from error
    return expected


def _of_the_embedding(model: Any) -> float | None:
    """The part of the model's bytes that a float embedding takes, where that is most of them."""
    w = getattr(ends(model)[0], "weight", None)
    if w is None or isinstance(w, RTNQuantizedTensor):
        return None
    share = w.nbytes / sum(p.nbytes for p in model.parameters())
    return share if share > 0.5 else None


def _plan(args: argparse.Namespace, rules: Rules) -> Plan:
    """Rules for what `rules`, which come first, do not name, under the budget of bits."""
    say(f"Loading {args.src}")
    model = load(local(args.src))
    chosen = selects(model, args.embedding)
    # Engines know no scales of 8 bits.
    options = [o for o in OPTIONS if args.format == OURS or o.scale_method not in SCALES_OF_8_BITS]
    say("Planning: the model writes some text first")
    return plan(
        model,
        args.bits_per_weight,
        options=options,
        filter_fn=lambda module, name: chosen(module, name) and find(rules, name, f"{name}.weight") is None,
        progress=progress("Planning"),
    )


def run_plan(args: argparse.Namespace) -> tuple[Any, str]:
    for path in filter(None, (args.output, args.draw)):
        if os.path.lexists(path) and not args.force:
            raise FileExistsError(f"{path} exists; choose another name, or replace it with --force")
    floats: Rules = [(pattern, None) for pattern in args.skip]
    if args.language_model_only:
        floats = [*language_model_only(args.src), *floats]
    made = _plan(args, floats)
    rules = rules_to_json([*floats, *made])
    if args.output:
        Path(args.output).write_text(json.dumps(rules, indent=0) + "\n", encoding="utf-8")
    if args.draw:
        made.draw(args.draw)
    about = {name: getattr(made, name) for name in ("bits_per_weight", "divergence", "measured", "tokens")}
    return about | {"rules": rules}, str(made)


def _sizes(found: Report) -> str:
    from rich.filesize import decimal

    before, after = (decimal(size) for size in (found.bytes_before, found.bytes_after))
    return f"{before} -> {after}, {found.bits_per_weight:.2f} bits per weight"


def _shown(found: Report, verbose: bool) -> str:
    more = found.summary if isinstance(found, Refinement) else ""
    return str(found) if verbose else f"{summary(found)}{more and f'{chr(10)}{more}'}"


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
    source = local(args.src)
    check_model_folder(source)
    if not read_config(source).get("quantization_config"):
        raise ValueError(
            f"{args.src} is float; `rtn-tensor quantize {args.src} {args.dst} --format {args.format}` "
            "quantizes it, too"
        )
    with destination(args.dst, args.format, args.force, source) as place:
        return _write_exported(load_model(args.src), place, args)


def _any_layer(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _check_login(name: str | None) -> None:
    """Before the work of minutes that is to be pushed."""
    from huggingface_hub import get_token

    if name and not get_token():
        raise ValueError(f"--push-to-hub {name} needs a login; `hf auth login`, or set HF_TOKEN")


def _push(folder: str, name: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Quantized by rtn-tensor"
        )
        return str(repository)
    except Exception as error:  # also of the HTTP library below it, which is another by version
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} is written, and could not be pushed to {name} ({why}); after `hf auth login`, "
            f"`hf upload {name} {folder}` tries again"
        ) from error
