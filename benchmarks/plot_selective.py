"""Draws perplexity against bits a weight, from what `benchmarks.selective --json` wrote, and the map of a plan.

python -m benchmarks.plot_selective benchmarks/results/selective.json benchmarks/results/selective.svg [--plan selective_plan.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "rtn-tensor"  # the same file from the same numbers
import matplotlib.pyplot as plt  # noqa: E402


def draw(data: dict, out: Path) -> None:
    rows = {name: (row["bits_per_weight"], row["perplexity"]) for name, row in data["rows"].items() if row.get("bits_per_weight", 8) < 6}
    figure, axis = plt.subplots(figsize=(7, 4.5))
    line = sorted(point for name, point in rows.items() if name.startswith("plan") and "," not in name)
    axis.plot(*zip(*line, strict=True), marker="o", markersize=5, label="plan")
    axis.axhline(data["rows"]["bf16"]["perplexity"], linestyle="--", color="gray", label="bf16")
    others = {name: point for name, point in rows.items() if point not in line}
    axis.plot(*zip(*others.values(), strict=True), "x", color="tab:red", label="uniform, by hand, other sensitivities")
    for name, point in others.items():
        axis.annotate(name, point, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axis.set(xlabel="bits a weight, scales included", ylabel=f"perplexity, {data['tokens']} tokens")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_selective", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--plan", metavar="PNG", type=Path, help="draw the plan at 4.5 bits, too")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.svg)
    if args.plan:
        from benchmarks.real_model import smollm2
        from benchmarks.selective import made
        from rtn_tensor import plan

        rules = plan(made(smollm2()), 4.5)
        print(rules)
        rules.draw(args.plan)


if __name__ == "__main__":
    main()
