"""Perplexity of a model, and its divergence from bf16, by how bits are spent: uniformly, by hand (layers,
kinds of modules), by plans.

    python -m benchmarks.selective [--model smollm2|upcycled] [--only NAME ...] [--json FILE] [--threads 2]
    python -m benchmarks.selective --plan FILE

`upcycled` is a mixture of experts made of SmolLM2-135M. Every linear layer but lm_head, and experts, are
quantized; the weights are dequantized again before the text is read, as only their values matter here. 8192
tokens of the Wikipedia text in windows of 1024 that do not overlap. Each choice by hand has a plan of its
size. The file is written after each row, and rows that it has are kept. `--plan` writes the map of the plan
for 4.5 bits per weight, and measures nothing else.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from benchmarks.real_data import wikipedia
from benchmarks.real_model import smollm2, upcycled
from rtn_tensor import (
    RTNQuantizedTensor,
    bits_per_weight,
    dequantize_,
    plan,
    quantize_,
    report,
    rtn_int4,
    rtn_int8,
    select_layers,
    select_modules,
)
from rtn_tensor.formats import SCALE_METHODS
from rtn_tensor.quantize.allocation import OPTIONS
from rtn_tensor.quantize.plan import Plan, spend
from rtn_tensor.quantize.selection import bits_of

TOKENS, WINDOW = 8192, 1024
ELSEWHERE = 40_000  # tokens from here on, that are not measured, are what a plan from text is made of
REST = [("lm_head", None), ("*", rtn_int4(64, "search"))]
LAYERS = {"first": {"first": 3}, "middle": {"indices": [13, 14, 15]}, "last": {"last": 3}}
KINDS = {
    "smollm2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "upcycled": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
BUDGETS = [4.25, 4.5, 5.0]  # and those of the choices by hand


def made(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


@torch.no_grad()
def measured(model, ids: torch.Tensor, reference: list[torch.Tensor]) -> tuple[float, float]:
    """Perplexity, and the mean divergence of the next-token distributions from the `reference`, bf16's
    logarithms by window, in nats; an empty `reference` is filled."""
    loss = divergence = 0.0
    windows = ids.split(WINDOW)
    for i, window in enumerate(windows):
        found = model(window[None], use_cache=False).logits[0].float().log_softmax(-1)
        loss += float(F.nll_loss(found[:-1], window[1:], reduction="sum"))
        if len(reference) == i:
            reference.append(found.bfloat16())
        expected = reference[i].float()
        divergence += float((expected.exp() * (expected - found)).sum())
    return math.exp(loss / (len(ids) - len(windows))), divergence / len(ids)


def by_weight_error(model, planned: Plan, budget: float) -> list:
    """The choice of least squared error of the weights, under the same budget and over the same options."""
    costs, sizes = [], []
    for name, _ in planned:
        w = model.get_parameter(name).detach()
        scale = 1 / float(w.float().square().mean())
        quantized = {option: _error(w, option) * scale for option in OPTIONS}
        costs.append(quantized)
        sizes.append({option: float(bits_of(w.shape, option)) for option in OPTIONS})
    count = sum(model.get_parameter(name).numel() for name, _ in planned)
    return [
        (name, option) for (name, _), option in zip(planned, spend(costs, sizes, budget * count), strict=True)
    ]


def _error(w: torch.Tensor, option) -> float:
    rounded = RTNQuantizedTensor.from_float(
        w, option.bits, option.group_size, option.scale_method
    ).dequantize()
    return float((rounded.float() - w.float()).square().sum())


def choices(model, kinds: list[str], ids: torch.Tensor) -> dict:
    """By name, a function that gives rules; None stays bf16."""
    plans: dict[str, Plan] = {}

    def planned(source: str, budget: float) -> Plan:
        if source not in plans:  # the sensitivity is the same for every budget
            started = time.perf_counter()
            text = {
                "own": None,
                "random": torch.randint(
                    0, model.config.vocab_size, (16, 256), generator=torch.Generator().manual_seed(0)
                ),
                "text": ids[ELSEWHERE : ELSEWHERE + 4096].view(16, 256),
            }
            plans[source] = plan(model, budget, text=text[source])
            print(f"  sensitivity on {source} tokens: {time.perf_counter() - started:.0f} s", flush=True)
        return plans[source].at(budget)

    rows: dict = {"bf16": None, "int8 g128": lambda: [("lm_head", None), ("*", rtn_int8())]}
    for size in (64, 32):
        for method in SCALE_METHODS:
            rows[f"int4 g{size} {method}"] = lambda size=size, method=method: [
                ("lm_head", None),
                ("*", rtn_int4(size, method)),
            ]
    by_hand = {
        f"{name} 3 layers": select_layers(model, **which, config=rtn_int8(64)) + REST
        for name, which in LAYERS.items()
    }
    by_hand |= {f"all {kind}": select_modules(model, [kind], rtn_int8(64)) + REST for kind in kinds}
    sizes = {math.floor(1000 * bits_per_weight(model, rules) + 1e-6) / 1000 for rules in by_hand.values()}
    for budget in sorted(sizes.union(BUDGETS)):
        rows[f"plan {budget}"] = lambda budget=budget: planned("own", budget)
    rows |= {name: lambda rules=rules: rules for name, rules in by_hand.items()}
    for source in ("random", "text"):
        rows[f"plan 4.5, {source} tokens"] = lambda source=source: planned(source, 4.5)
    rows["plan 4.5, weight error"] = lambda: by_weight_error(model, planned("own", 4.5), 4.5)
    return rows


def map_of(planned: Plan) -> dict:
    _, _, cells = planned.cells()
    formats = [
        {
            "layer": layer,
            "kind": kind.removesuffix(".weight").rpartition(".")[2],
            "bits": config.bits,
            "group_size": config.group_size,
            "scale_method": config.scale_method,
            "divergence_at_4_bits": cost,
        }
        for (layer, kind), (config, cost) in cells.items()
    ]
    return {
        "bits_per_weight": planned.bits_per_weight,
        "divergence": planned.divergence,
        "tokens": planned.tokens,
        "cells": formats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selective", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=KINDS, default="smollm2")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="measure only these rows")
    parser.add_argument("--json", type=Path, help="write results here, and keep what it has")
    parser.add_argument(
        "--plan",
        metavar="FILE",
        type=Path,
        help="write only the map of the plan for 4.5 bits per weight, as JSON",
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    path = {"smollm2": smollm2, "upcycled": upcycled}[args.model]()
    if args.plan:
        planned = plan(made(path), 4.5)
        print(planned)
        args.plan.write_text(json.dumps({"model": args.model, "machine": machine()} | map_of(planned)) + "\n")
        return
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(wikipedia(), verbose=False)["input_ids"])
    data = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"rows": {}}
    model, reference = made(path), []
    measured(model, ids[:TOKENS], reference)
    for name, rules in choices(model, KINDS[args.model], ids).items():
        if name in data["rows"] or (args.only and name not in args.only):
            continue
        row, other = {}, made(path)
        if rules is not None:
            rules = rules()
            row["bits_per_weight"] = bits_per_weight(other, rules)
            quantize_(other, rules)
            if isinstance(rules, Plan):
                row["expected_divergence"] = rules.divergence
            dequantize_(other)
            assert not any(r.bits for r in report(other).rows)
        row["perplexity"], row["divergence"] = measured(other, ids[:TOKENS], reference)
        data["rows"][name] = row
        print(
            f"{name:>26}  {row.get('bits_per_weight', 16):6.3f}  {row['perplexity']:.3f}  "
            f"{row['divergence']:.4f}",
            flush=True,
        )
        if args.json:
            data |= {"model": args.model, "tokens": TOKENS, "window": WINDOW, "machine": machine()}
            args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
