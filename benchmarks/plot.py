"""Draws the speed-up over dense against the rows of x, one line a kernel, from what `benchmarks.cpu_linear --json` wrote.

python -m benchmarks.plot benchmarks/results/cpu_linear.json benchmarks/results/cpu_linear.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "rtn-tensor"  # the same file from the same numbers
import matplotlib.pyplot as plt  # noqa: E402


def draw(data: dict, out: Path) -> None:
    rows = data["rows"]
    shapes = list(dict.fromkeys((r["dtype"], r["N"], r["K"]) for r in rows))
    columns = min(2, len(shapes))
    figure, axes = plt.subplots(
        -(-len(shapes) // columns), columns, figsize=(5.5 * columns, 3.6 * -(-len(shapes) // columns)), squeeze=False
    )
    for axis, shape in zip(axes.flat, shapes, strict=False):
        mine = [r for r in rows if (r["dtype"], r["N"], r["K"]) == shape]
        for name in dict.fromkeys(r["kernel"] for r in mine):
            line = sorted((r["M"], r["over_dense"]) for r in mine if r["kernel"] == name)
            ours = name.startswith("rtn")
            axis.plot(*zip(*line, strict=True), marker="o" if ours else None, linestyle="-" if ours else "--", markersize=4, label=name)
        axis.set(
            title=f"{shape[0]}, weight [{shape[1]}, {shape[2]}]",
            xlabel="rows of x",
            ylabel="times as fast as dense",
            xscale="log",
            yscale="log",
        )
        axis.set_xticks(sorted({r["M"] for r in mine}), [str(m) for m in sorted({r["M"] for r in mine})])
        axis.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7, loc="upper right")
    about = data["machine"]
    figure.suptitle(f"{about['cpu']}, {about['threads']} threads, {about['instruction_set']}, torch {about['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.svg)


if __name__ == "__main__":
    main()
