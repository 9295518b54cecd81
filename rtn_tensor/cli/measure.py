"""`rtn-tensor inspect`, `perplexity`, `evaluate` and `compare`."""

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from rtn_tensor.checkpoint.sources import sources
from rtn_tensor.cli.models import ids_of, load_model, local, read_text, tokenizer_of
from rtn_tensor.cli.screen import is_terminal, progress, say
from rtn_tensor.cli.summary import summary
from rtn_tensor.evaluation.comparison import compare
from rtn_tensor.evaluation.decoding import positions
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
from rtn_tensor.integrations.transformers.folders import empty_model
from rtn_tensor.quantize.report import report
from rtn_tensor.text_table import table

PREFILL, NEW, TIMES = 256, 32, 3  # tokens that are read and written to time a model, and how often


def run_inspect(args: argparse.Namespace) -> tuple[Any, str]:
    result = report(load_model(args.path))
    return result.to_dict(), str(result) if args.verbose else summary(result)


def run_perplexity(args: argparse.Namespace) -> tuple[Any, str]:
    text, tokenizer = read_text(args.text), tokenizer_of(args.path)
    model = load_model(args.path, args.activations)
    ids = ids_of(tokenizer, text, args.max_tokens)
    value = perplexity(model, ids, args.window, args.stride, progress=progress("Scoring"))
    return {
        "perplexity": value,
        "tokens": ids.numel(),
        "window": args.window,
        "stride": args.stride,
    }, f"{value:.3f}"


def run_evaluate(args: argparse.Namespace) -> tuple[Any, str]:
    if ("perplexity" in args.tasks) != bool(args.text):
        raise ValueError("the task perplexity and --text FILE go together; add the one that is missing")
    text = read_text(args.text) if args.text else ""
    others = [task for task in args.tasks if task != "perplexity"]
    if others:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        check_tasks(others, args.limit, args.data, args.batch_size)
        if not is_terminal(sys.stderr):
            from datasets import disable_progress_bars

            disable_progress_bars()
    paths = [args.path, *([args.against] if args.against else [])]
    for path in paths:  # before the first is scored, which takes long
        check_causal(empty_model(local(path)))
        sources(local(path))
    tokenizers = [tokenizer_of(path) for path in paths]
    ids = [ids_of(tokenizer, text, args.max_tokens) for tokenizer in tokenizers] if args.text else []
    if args.text and args.against and not torch.equal(*ids):
        raise ValueError(
            f"{args.path} and {args.against} make other tokens of the text, so that their "
            "perplexities cannot be compared"
        )

    def scores(i: int) -> list[Score]:
        model, done = load_model(paths[i], None if i else args.activations), []
        if args.text:
            done.append(text_score("perplexity", token_losses(model, ids[i], progress=progress("Scoring"))))
        return done + (
            run_tasks(model, tokenizers[i], others, args.limit, args.data, args.batch_size) if others else []
        )

    found = scores(0)
    references = scores(1) if args.against else None
    result: dict[str, Any] = {"scores": rows(found, references)}
    if references:
        result["average_recovery"], result["average_recovery_stderr"] = average_recovery(found, references)
    return result, show(found, references)


def run_compare(args: argparse.Namespace) -> tuple[Any, str]:
    if args.draw and os.path.lexists(args.draw) and not args.force:
        raise FileExistsError(f"{args.draw} exists; choose another name, or replace it with --force")
    paths = [args.path, args.reference]
    for path in paths:  # before the first is loaded
        check_causal(empty_model(local(path)))
        sources(local(path))
    text = read_text(args.text)
    ids, other = (ids_of(tokenizer_of(path), text, args.max_tokens) for path in paths)
    if not torch.equal(ids, other):
        raise ValueError(
            f"{args.path} and {args.reference} make other tokens of the text, so that they cannot be compared"
        )
    model, reference = load_model(args.path, args.activations), load_model(args.reference)
    found = compare(model, reference, ids, args.window, progress=progress("Comparing"))
    say("Measuring the speed of both")
    about = [_about(model, ids, found.perplexity), _about(reference, ids, found.reference_perplexity)]
    if args.draw:
        _draw(args.draw, paths, about)
    lines = [[what, *(f"{each[key]:,.{digits}f}" for each in about)] for key, (what, digits) in ABOUT.items()]
    shown = table(["", *paths], lines)
    shown += (
        f"\n\ndivergence {found.divergence:.4f} nats per token, the same first token for "
        f"{100 * found.agreement:.1f} % of {found.tokens} tokens"
    )
    same = {"divergence": found.divergence, "agreement": found.agreement, "tokens": found.tokens}
    return same | {"models": [{"path": path} | each for path, each in zip(paths, about, strict=True)]}, shown


# What is said of each model, and with how many digits after the point.
ABOUT = {
    "bytes": ("bytes", 0),
    "bits_per_weight": ("bits per weight", 2),
    "perplexity": ("perplexity", 3),
    "prefill": ("tokens read per second", 1),
    "decode": ("tokens written per second", 1),
}


def _about(model: Any, ids: torch.Tensor, loss: float) -> dict[str, float]:
    size = report(model)
    most = positions(model) or PREFILL + NEW + 1
    ids = ids[None, : max(1, min(PREFILL, most - NEW - 1))].to(model.device)
    read = _seconds(model, ids, 1)
    written = _seconds(model, ids, 1 + NEW) - read
    return {
        "bytes": size.bytes_after,
        "bits_per_weight": size.bits_per_weight,
        "perplexity": loss,
        "prefill": ids.shape[1] / read,
        "decode": NEW / written,
    }


@torch.inference_mode()
def _seconds(model: Any, ids: torch.Tensor, new: int) -> float:
    """That it takes to read `ids` and write so many tokens: the median."""

    def once() -> float:
        started = time.perf_counter()
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
        written.tolist()  # waits for an accelerator
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(TIMES))


def _draw(path: str, names: Sequence[str], about: Sequence[dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(ABOUT), 3), layout="constrained")
    for axes, (key, (what, digits)) in zip(figure.subplots(1, len(ABOUT)), ABOUT.items(), strict=True):
        bars = axes.bar(range(len(names)), [each[key] for each in about], color=["C0", "C7"])
        axes.bar_label(bars, [f"{each[key]:,.{digits}f}" for each in about])
        axes.set_xticks(range(len(names)), [os.path.basename(name.rstrip("/")) for name in names])
        axes.set(title=what)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=110)
