"""Scores of zero-shot tasks, against forward passes of one option at a time and against numbers worked out by
hand."""

import json
import math
import random

import pytest
import torch
from expecttest import assert_expected_inline
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer

from rtn_tensor import ops, quantize_, rtn_int4
from rtn_tensor.evaluation.perplexity import token_losses
from rtn_tensor.evaluation.tasks import (
    Score,
    average_recovery,
    main_scores,
    rows,
    run_tasks,
    show,
    text_score,
)

WORDS = TEXT.replace(".", "").replace(",", "").split()


# ------------------------------------------------------------------------- scores, by hand


def test_an_accuracy():
    score = Score("t", "acc", (1.0, 0.0, 1.0, 1.0))
    assert score.value == 0.75
    # The sample's standard deviation, over sqrt(n).
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3) / 2)


def test_a_perplexity():
    score = Score("t", "perplexity", (-1.0, -2.0, -3.0))
    assert score.value == pytest.approx(math.exp(2))
    assert score.stderr == pytest.approx(math.exp(2) * 1 / math.sqrt(3))


def test_one_item_has_no_error():
    assert math.isnan(Score("t", "acc", (1.0,)).stderr)


def test_losses_that_are_not_finite():
    """One hopeless score must not take the others with it."""
    for items in ([1.0, math.nan], [1.0, math.inf], [900.0, 901.0]):
        score = text_score("perplexity", torch.tensor(items))
        assert not math.isfinite(score.value)
        assert (
            show([score, Score("t", "acc", (1.0, 0.0))], [score, Score("t", "acc", (1.0, 0.0))]).count(
                "100.00"
            )
            == 2
        )


def test_a_task_in_which_the_reference_has_nothing():
    scores = [Score("a", "acc", (1.0, 0.0)), Score("b", "acc", (1.0, 0.0))]
    references = [Score("a", "acc", (0.0, 0.0)), Score("b", "acc", (1.0, 1.0))]
    assert average_recovery(scores, references)[0] == 0.5
    assert "recovery, mean over 1 tasks" in show(scores, references)


def test_recovery_of_an_accuracy_is_paired():
    reference = Score("t", "acc", (1.0, 1.0, 1.0, 0.0, 1.0))
    assert reference.recovery(reference) == (1.0, 0.0)
    ratio, error = Score("t", "acc", (1.0, 1.0, 0.0, 0.0, 1.0)).recovery(reference)
    assert ratio == pytest.approx(0.75)
    # Residuals x - 0.75 y: 0.25, 0.25, -0.75, 0, 0.25, whose mean is 0.
    assert error == pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 4 / 5) / 0.8)


def test_recovery_error_is_what_resampling_gives():
    rng = random.Random(0)
    reference = [float(rng.random() < 0.6) for _ in range(400)]
    kept = [1 - b if rng.random() < 0.1 else b for b in reference]
    _, error = Score("t", "acc", tuple(kept)).recovery(Score("t", "acc", tuple(reference)))
    ratios = torch.tensor([math.nan] * 4000)
    for i in range(len(ratios)):
        drawn = rng.choices(range(400), k=400)
        ratios[i] = sum(kept[j] for j in drawn) / sum(reference[j] for j in drawn)
    assert error == pytest.approx(ratios.std().item(), rel=0.05)


def test_recovery_of_a_perplexity():
    mine, reference = (
        Score("t", "perplexity", (-2.0, -2.5, -3.0)),
        Score("t", "perplexity", (-1.0, -2.0, -3.0)),
    )
    ratio, error = mine.recovery(reference)
    assert ratio == pytest.approx(reference.value / mine.value) == pytest.approx(math.exp(-0.5))
    assert error == pytest.approx(ratio * 0.5 / math.sqrt(3))  # of the differences -1, -0.5, 0


def test_scores_of_other_items_are_not_compared():
    with pytest.raises(
        ValueError,
        match=r"^t acc over 2 items cannot be compared with t acc over 3; score both models by the same task and limit$",
    ):
        Score("t", "acc", (1.0, 0.0)).recovery(Score("t", "acc", (1.0, 0.0, 1.0)))


def test_nothing_is_kept_of_nothing():
    mine, reference = Score("t", "acc", (1.0, 0.0)), Score("t", "acc", (0.0, 0.0))
    assert all(map(math.isnan, mine.recovery(reference)))
    assert rows([mine], [reference])[0]["recovery"] is None
    assert show([mine], [reference]).splitlines()[2].endswith("?")


def test_the_average_takes_one_accuracy_a_task():
    scores = [
        Score("text", "perplexity", (-1.0, -2.0)),
        Score("a", "acc_norm", (1.0, 0.0)),
        Score("a", "acc", (1.0, 1.0)),
        Score("b", "acc", (0.0, 1.0)),
        Score("b", "perplexity", (-1.0, -2.0)),
    ]
    assert [(s.task, s.metric) for s in main_scores(scores)] == [("a", "acc_norm"), ("b", "acc")]
    references = [
        Score(s.task, s.metric, (1.0, 1.0) if s.metric != "perplexity" else s.items) for s in scores
    ]
    ratio, error = average_recovery(scores, references)
    assert ratio == 0.5
    assert error == pytest.approx(math.hypot(0.5, 0.5) / 2)
    assert [row["n"] for row in rows(scores, references)] == [2] * 5
    assert_expected_inline(
        show(scores, references),
        """\
task  metric      n           value  reference        recovery
----  ----------  -  --------------  ---------  --------------
text  perplexity  2    4.48 +- 2.24       4.48  100.00 +- 0.00
a     acc_norm    2  50.00 +- 50.00     100.00  50.00 +- 50.00
a     acc         2  100.00 +- 0.00     100.00  100.00 +- 0.00
b     acc         2  50.00 +- 50.00     100.00  50.00 +- 50.00
b     perplexity  2    4.48 +- 2.24       4.48  100.00 +- 0.00
recovery, mean over 2 tasks (acc_norm, else acc): 50.00 +- 35.36 %""",
    )
    assert_expected_inline(
        show(scores[:2]),
        """\
task  metric      n           value
----  ----------  -  --------------
text  perplexity  2    4.48 +- 2.24
a     acc_norm    2  50.00 +- 50.00""",
    )


# ------------------------------------------------------------- the harness, by brute force


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Items of the datasets' own columns, with options of unequal length."""
    rng = random.Random(1)

    def words(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    items = {
        "piqa": [
            {"goal": words(2, 9), "sol1": words(1, 6), "sol2": words(1, 6), "label": rng.randrange(2)}
            for _ in range(12)
        ],
        "arc_easy": [
            {
                "question": words(2, 9),
                "choices": {"text": [words(1, 6) for _ in "ABCD"], "label": list("ABCD")},
                "answerKey": rng.choice("ABCD"),
            }
            for _ in range(12)
        ],
        "winogrande": [
            {
                "sentence": f"{words(2, 5)} _ {words(2, 5)}",
                "option1": words(1, 1),
                "option2": words(2, 2),
                "answer": rng.choice("12"),
            }
            for _ in range(12)
        ],
        "lambada": [{"text": words(5, 12)} for _ in range(12)],
    }
    folder = tmp_path_factory.mktemp("data")
    for task, lines in items.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options(task, row):
    """(context, continuation) of each option and the index of the right one, as the harness's own task files
    have them."""
    if task == "piqa":
        return [(f"Question: {row['goal']}\nAnswer:", f" {row[key]}") for key in ("sol1", "sol2")], row[
            "label"
        ]
    if task == "arc_easy":
        texts = row["choices"]["text"]
        return [(f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts], "ABCD".index(
            row["answerKey"]
        )
    if task == "winogrande":  # the options are in the context, and what follows is scored
        before, after = row["sentence"].split("_")
        return [(before + row[key], f" {after.strip()}") for key in ("option1", "option2")], int(
            row["answer"]
        ) - 1
    before, _, last = row["text"].rpartition(" ")
    return [(before, f" {last}")], 0


@torch.no_grad()
def likelihood(model, tokenizer, context, continuation):
    """(log-likelihood, whether greedy decoding would write it), one token a forward pass."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    total, greedy = 0.0, True
    for i in range(start, len(ids)):
        logits = model(torch.tensor([ids[:i]])).logits[0, -1].double()
        total += logits.log_softmax(-1)[ids[i]].item()
        greedy &= logits.argmax().item() == ids[i]
    return total, greedy


@pytest.fixture
def harness():
    return pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed; pip install 'rtn-tensor[evaluate]'"
    )


@pytest.fixture
def products(monkeypatch):
    """Shapes of the activations that a quantized product has seen."""
    seen, linear = [], ops.linear

    def counted(x, *args):
        seen.append(x.shape)
        return linear(x, *args)

    monkeypatch.setattr(ops, "linear", counted)
    return seen


@pytest.mark.filterwarnings("default")  # the harness's and its dependencies' own
@pytest.mark.parametrize("quantized", [False, True])
def test_scores_by_brute_force(harness, data, tokenizer, quantized, products):
    model = tiny_llama()
    if quantized:
        quantize_(model, rtn_int4(group_size=32))
    tasks = ["lambada", "piqa", "arc_easy", "winogrande"]
    scores = {
        (score.task, score.metric): score.items
        for score in run_tasks(model, tokenizer, tasks, data=data, batch_size=5)
    }
    assert bool(products) == quantized
    expected = {}
    for task in tasks:
        for line in (data / f"{task}.jsonl").read_text().splitlines():
            choices, right = options(task, json.loads(line))
            found = [likelihood(model, tokenizer, *choice) for choice in choices]
            likelihoods = torch.tensor([value for value, _ in found])
            lengths = torch.tensor([len(continuation) - 1 for _, continuation in choices])
            if task == "lambada":
                one = {"acc": float(found[0][1]), "perplexity": found[0][0]}
            else:
                one = {
                    "acc": float(likelihoods.argmax() == right),
                    "acc_norm": float((likelihoods / lengths).argmax() == right),
                }
            for metric, value in one.items():
                expected.setdefault((task, metric), []).append(value)
    del expected["winogrande", "acc_norm"]  # the same text is scored under both options
    assert scores.keys() == expected.keys()
    for key, items in scores.items():
        assert items == pytest.approx(expected[key], rel=1e-4), key
    assert (
        scores["piqa", "acc"] != scores["piqa", "acc_norm"]
        or scores["arc_easy", "acc"] != scores["arc_easy", "acc_norm"]
    )


@pytest.mark.filterwarnings("default")
def test_limit_takes_the_first_items(harness, data, tokenizer):
    model = tiny_llama()
    whole, few = (run_tasks(model, tokenizer, ["lambada"], limit, data) for limit in (None, 5))
    assert few[1].metric == "perplexity"
    assert few[1].items == pytest.approx(whole[1].items[:5], rel=1e-4)


def test_a_text():
    model, ids = tiny_llama(), torch.arange(100)
    losses = token_losses(model, ids, 64, 32)
    score = text_score("speeches", losses)
    assert (score.task, score.metric, len(score.items)) == ("speeches", "perplexity", 99)
    assert score.value == pytest.approx(losses.double().mean().exp().item())


@pytest.mark.filterwarnings("default")
def test_what_is_refused(harness, data, tokenizer, tmp_path):
    model = tiny_llama()
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1", "answer": "#### 2"}) + "\n")
    messages = []
    for tasks, options in (
        (["hellaswog"], {}),
        (["piqa"], {"limit": 0}),
        (["hellaswag"], {"data": data}),
        (["gsm8k"], {"data": tmp_path}),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            run_tasks(model, tokenizer, tasks, **options)
        messages.append(str(caught.value).replace(str(data), "FOLDER"))
    assert_expected_inline(
        "\n".join(messages),
        """\
lm-evaluation-harness has no task 'hellaswog'; did you mean hellaswag or hellaswag_vi or hellaswag_uk?
limit=0; it must be at least 1, or None for all items
FOLDER/hellaswag.jsonl does not exist; write the task's rows there, or leave the folder out to fetch them from the hub
gsm8k is scored by exact_match; only tasks with acc_norm, acc, perplexity are understood here""",
    )
