"""Zero-shot tasks, scored by lm-evaluation-harness, and what a model keeps of another's score.

Each option of an item is scored by its log-likelihood given the context, with no example before it and no
chat template:

    acc         the option of the greatest log-likelihood is the right one acc_norm    the same after dividing
    each option's log-likelihood by its length in characters, without the space before it acc         of a
    task with one continuation, as LAMBADA's last word: each of its tokens is the most likely one (greedy
    match) perplexity  exp(-mean log-likelihood), over the continuations of such a task, or over the tokens of
    a text

https://github.com/EleutherAI/lm-evaluation-harness
"""

import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from rtn_tensor.checkpoint.files import parse_json
from rtn_tensor.evaluation.perplexity import PROBE, check_ahead, check_causal, check_tokens
from rtn_tensor.text_table import table

NAMES = {"lambada": "lambada_openai"}  # where the harness's own name differs
METRICS = ("acc_norm", "acc", "perplexity")  # the first that a task has goes into the average


@dataclass(frozen=True)
class Score:
    """One metric of a task, with the items it is made of, so that two models' can be compared item by
    item."""

    task: str
    metric: str  # one of METRICS
    items: tuple[float, ...]  # of an accuracy 0 or 1, of a perplexity a log-likelihood in nats

    @property
    def value(self) -> float:
        mean = fmean(self.items)
        return torch.tensor(-mean, dtype=torch.float64).exp().item() if self.metric == "perplexity" else mean

    @property
    def stderr(self) -> float:
        """Standard error of `value` over a draw of the items; of a perplexity to first order. NaN of one
        item, or of an infinite one."""
        error = _stderr(self.items)
        return self.value * error if self.metric == "perplexity" else error

    def recovery(self, reference: "Score") -> tuple[float, float]:
        """What is kept of the reference's score: `(ratio, its standard error)`, where 1 is all of it.

        The ratio is accuracy over accuracy, or the reference's perplexity over this one. Both models scored
        the same items, so the error is of their paired differences, to first order: it is far smaller than
        the two errors together. Both are NaN where the reference's accuracy is 0.

        Raises:
            ValueError: the scores are not of the same metric of as many items of the same task.
        """
        mine, other = (
            (self.task, self.metric, len(self.items)),
            (reference.task, reference.metric, len(reference.items)),
        )
        if mine != other:
            raise ValueError(
                f"{mine[0]} {mine[1]} over {mine[2]} items cannot be compared with {other[0]} "
                f"{other[1]} over {other[2]}; score both models by the same task and limit"
            )
        pairs = list(zip(self.items, reference.items, strict=True))
        if self.metric == "perplexity":
            ratio = reference.value / self.value
            return ratio, ratio * _stderr([a - b for a, b in pairs])
        if not reference.value:
            return math.nan, math.nan
        ratio = self.value / reference.value
        return ratio, _stderr([a - ratio * b for a, b in pairs]) / reference.value


def _stderr(items: Sequence[float]) -> float:
    return (
        stdev(items) / math.sqrt(len(items))
        if len(items) > 1 and all(map(math.isfinite, items))
        else math.nan
    )


def text_score(name: str, losses: torch.Tensor) -> Score:
    """The perplexity of a text, from `evaluate.token_losses` [S]. Its standard error takes the tokens for
    independent."""
    return Score(name, "perplexity", tuple((-losses).tolist()))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    data: str | Path | None = None,
    batch_size: int = 8,
) -> list[Score]:
    """Scores of a model in tasks of lm-evaluation-harness, all its metrics that are among METRICS; progress
    goes to stderr.

    Args:
        model: a transformers causal language model, quantized or not; put into eval mode.
        tokenizer: its tokenizer.
        tasks: names of the harness, as hellaswag, arc_easy, arc_challenge, piqa, winogrande; `lambada` is its
            lambada_openai.
        limit: score only the first so many items of each task.
        data: a folder with a file TASK.jsonl for each task, whose lines are rows as those of the dataset that
            the harness would fetch from the hub. None: it does fetch them.
        batch_size: options scored at once. The longest go first, so that memory runs out at once or never.

    Raises:
        ValueError: no task, or no such, one without any of METRICS, a limit or a batch_size below 1; a model
            that is not causal, or has not all tokens of the tokenizer.
        FileNotFoundError: `data` lacks a task's file.
        ConnectionError: a dataset is to come from the hub, which is not reached.
        ImportError: the harness is not installed.
    """
    names, members = check_tasks(tasks, limit, data, batch_size)
    from jinja2 import UndefinedError
    from lm_eval import evaluate  # pyright: ignore[reportMissingImports]  (an extra)
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    check_causal(model)
    check_ahead(model, torch.arange(PROBE, device=next(model.parameters()).device))
    # A group is the harness's way to change some fields of its tasks.
    try:
        loaded = _manager().load({"group": "rtn", "task": members})
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; the rows of a task can be read from a folder, too (--data, or data=)"
        ) from error
    for task, name in names.items():
        listed = [entry["metric"] for entry in loaded["tasks"][name].config.metric_list or ()]
        if not set(METRICS) & set(listed):
            raise ValueError(
                f"{task} is scored by {', '.join(listed)}; only tasks with {', '.join(METRICS)} "
                "are understood here"
            )
    wrapped: Any = HFLM  # its decorator hides its parameters
    # The model's own dtype would round log-likelihoods to two or three digits.
    scorer = wrapped(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32
    )
    try:
        found: Any = evaluate(scorer, {"tasks": loaded["tasks"]}, limit=limit, bootstrap_iters=0)
    except IndexError:
        check_tokens(model, torch.arange(len(tokenizer)))
        raise
    except (UndefinedError, KeyError) as error:
        if data is None:
            raise
        raise ValueError(
            f"{data}: rows lack what their task needs ({error}); write them as the hub's dataset has them"
        ) from error
    samples = found["samples"]
    scores = []
    for task, name in names.items():
        metrics = [metric for metric in METRICS if metric in samples[name][0]]
        scores += [
            Score(task, metric, tuple(float(sample[metric]) for sample in samples[name]))
            for metric in metrics
        ]
    return scores


def check_tasks(
    tasks: Sequence[str], limit: int | None = None, data: str | Path | None = None, batch_size: int = 8
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The harness's names of `tasks`, and what it is to be told of each; `run_tasks` takes and raises the
    same, but needs a model."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks={tasks!r}; give a list of names, one or more, as ['hellaswag', 'piqa']")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit={limit!r}; it must be at least 1, or None for all items")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}; it must be at least 1")
    import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]  (an extra)

    manager = _manager()
    names = {task: NAMES.get(task, task) for task in tasks}
    for task, name in names.items():
        if name not in manager.all_subtasks:
            near = difflib.get_close_matches(task, [*NAMES, *manager.all_subtasks])
            raise ValueError(
                "lm-evaluation-harness has no task "
                f"{task!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "; `lm_eval ls tasks` lists them")
            )
    return names, [
        {"task": name, "num_fewshot": 0, **(_local(Path(data), task) if data else {})}
        for task, name in names.items()
    ]


@functools.cache
def _manager() -> Any:
    """It reads some thousands of files."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager()


def _local(data: Path, task: str) -> dict[str, Any]:
    file = data / f"{task}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; write the task's rows there, or leave the folder "
            "out to fetch them from the hub"
        )
    _check_rows(file)
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        **splits,
    }


def _check_rows(file: Path) -> None:
    """Raises ValueError where a line of `file` is no JSON object, or there is none."""
    count = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                count += 1
                if not isinstance(parse_json(line), dict):
                    raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(
            f"{file}, line {count or 1}: {error}; each line is a row of the dataset, as JSON"
        ) from None
    if not count:
        raise ValueError(f"{file} is empty; each line is a row of the dataset, as JSON")


def main_scores(scores: Sequence[Score]) -> list[Score]:
    """One score a task: its first metric among METRICS. A task that has no accuracy has none here."""
    best: dict[str, Score] = {}
    for score in sorted(scores, key=lambda score: METRICS.index(score.metric)):
        if score.metric != "perplexity":
            best.setdefault(score.task, score)
    return [score for score in scores if best.get(score.task) is score]


def average_recovery(scores: Sequence[Score], references: Sequence[Score]) -> tuple[float, float]:
    """The mean recovery over the tasks' main accuracies, and its standard error; a task in which the
    reference has 0 is left out. NaN where none is left."""
    kept = _recoveries(scores, references)
    if not kept:
        return math.nan, math.nan
    return fmean(ratio for ratio, _ in kept), math.hypot(*(error for _, error in kept)) / len(kept)


def _recoveries(scores: Sequence[Score], references: Sequence[Score]) -> list[tuple[float, float]]:
    return [
        a.recovery(b) for a, b in zip(main_scores(scores), main_scores(references), strict=True) if b.value
    ]


def rows(scores: Sequence[Score], references: Sequence[Score] | None = None) -> list[dict]:
    """What `show` prints, for JSON: a row per score, with the reference's and the recovery where there is a
    reference. NaN is None."""
    result = []
    for i, score in enumerate(scores):
        row = {
            "task": score.task,
            "metric": score.metric,
            "n": len(score.items),
            "value": score.value,
            "stderr": score.stderr,
        }
        if references:
            ratio, error = score.recovery(references[i])
            row |= {"reference": references[i].value, "recovery": ratio, "recovery_stderr": error}
        result.append(
            {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in row.items()}
        )
    return result


def show(scores: Sequence[Score], references: Sequence[Score] | None = None) -> str:
    """A table of `rows`; accuracies and recoveries in percent, each with its standard error after it."""

    def cell(row: dict, key: str, error: str | None) -> str:
        percent = 1 if row["metric"] == "perplexity" and key != "recovery" else 100
        numbers = [row[key], row[error]] if error else [row[key]]
        return " +- ".join("?" if number is None else f"{percent * number:.2f}" for number in numbers)

    columns = [("value", "stderr")] + (
        [("reference", None), ("recovery", "recovery_stderr")] if references else []
    )
    lines = [
        [r["task"], r["metric"], str(r["n"]), *(cell(r, *column) for column in columns)]
        for r in rows(scores, references)
    ]
    text = table(["task", "metric", "n", *(key for key, _ in columns)], lines)
    if references and (kept := _recoveries(scores, references)):
        ratio, error = average_recovery(scores, references)
        text += (
            f"\nrecovery, mean over {len(kept)} tasks (acc_norm, else acc): {100 * ratio:.2f} +- "
            f"{100 * error:.2f} %"
        )
    return text
