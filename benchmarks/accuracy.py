"""What SmolLM2-135M keeps of its accuracy: zero-shot tasks and perplexity on two texts, beside bf16's, item
by item.

    python -m benchmarks.accuracy [--peer NAME=FOLDER ...] [--only NAME ...] [--limit 100] [--json FILE]
    [--threads 2]

Every linear layer but lm_head is quantized. A peer is a transformers folder of the same model by another
method, as `benchmarks.accuracy_peers` makes them; it is measured as it is. Needs the extra `evaluate`,
pyarrow and mwparserfromhell.
"""

import argparse
import json
import time
import warnings
from functools import cache

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import add_kept_json, add_threads, machine
from benchmarks.real_data import state_of_the_union, task_data, wikipedia
from benchmarks.real_model import smollm2
from rtn_tensor import bits_per_weight, plan, quantize_, refine_, rtn_int4, rtn_int8
from rtn_tensor.evaluation.perplexity import token_losses
from rtn_tensor.evaluation.tasks import Score, average_recovery, rows, run_tasks, show, text_score
from rtn_tensor.formats import SCALE_METHODS
from rtn_tensor.quantize.plan import Plan

UNIFORM = {
    "int8 g128": rtn_int8(group_size=128),
    **{f"int4 g{size} {method}": rtn_int4(size, method) for size in (64, 32) for method in SCALE_METHODS},
}
PLANS = {"plan 4.25": 4.25, "plan 4.5": 4.5, "plan 5.0": 5.0}
REFINED = ("int4 g64 search", "int4 g32 search", "int4 g32 search8", "plan 4.5", "plan 5.0")
TASKS = ["lambada", "hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande"]
TEXTS = {"wikipedia": (wikipedia, 8192), "sotu": (state_of_the_union, 4096)}  # the first so many tokens
WINDOW, STRIDE = 1024, 512


@cache
def planned() -> Plan:
    return plan(AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval())


def rules(name: str) -> list | None:
    """None of what is measured as it is."""
    if name in PLANS:
        return planned().at(PLANS[name])
    return [("lm_head", None), ("*", UNIFORM[name])] if name in UNIFORM else None


def refined(name: str) -> str:
    return f"{name.removesuffix(' search')} refined"


def measure(model, tokenizer, limit: int) -> list[Score]:
    scores = []
    for name, (text, tokens) in TEXTS.items():
        ids = torch.tensor(tokenizer(text()[: 20 * tokens], verbose=False)["input_ids"])[:tokens]
        scores.append(text_score(name, token_losses(model, ids, WINDOW, STRIDE)))
        print(f"      {name}: {scores[-1].value:.3f}", flush=True)
    return scores + (run_tasks(model, tokenizer, TASKS, limit, task_data()) if limit else [])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--peer",
        metavar="NAME=FOLDER",
        action="append",
        default=[],
        help="also measure this folder; may repeat",
    )
    parser.add_argument(
        "--only", metavar="NAME", action="append", default=[], help="of ours, only bf16 and these; may repeat"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=100,
        metavar="N",
        help="items a task; 0: perplexities only (default: 100)",
    )
    add_threads(parser)
    add_kept_json(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    known = (*UNIFORM, *PLANS, *map(refined, REFINED))
    ours = ["bf16", *(name for name in known if not args.only or name in args.only)]
    plain = {refined(name): name for name in REFINED}
    folders = dict.fromkeys(ours, str(smollm2())) | dict(peer.split("=", 1) for peer in args.peer)
    about = {"machine": machine(), "model": "SmolLM2-135M-Instruct"}
    about |= {
        "tokens": {name: tokens for name, (_, tokens) in TEXTS.items()},
        "window": WINDOW,
        "stride": STRIDE,
    }
    kept = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    results, reference = {row["weights"]: row for row in kept}, None
    for name, folder in folders.items():
        started = time.perf_counter()
        print(f"\n{name}", flush=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        bits = None
        if config := rules(plain.get(name, name)):
            bits = bits_per_weight(model, config)
            (refine_ if name in plain else quantize_)(model, config)
        scores = measure(model, tokenizer, args.limit)
        reference = reference or scores
        print(show(scores, reference), flush=True)
        row = {
            "weights": name,
            "bits_per_weight": bits,
            "limit": args.limit,
            "cpu": about["machine"]["cpu"],
            "scores": rows(scores, reference),
        }
        row["seconds"] = time.perf_counter() - started
        if args.limit:
            row["average_recovery"], row["average_recovery_stderr"] = average_recovery(scores, reference)
        results[name] = row
        if args.json:
            args.json.write_text(json.dumps(about | {"rows": list(results.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
