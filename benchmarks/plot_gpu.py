"""Draws the speed-up over cuBLAS bf16 against the rows of x, by both clocks, from what `benchmarks/gpu.py` wrote; and the roofline.

    python -m benchmarks.plot_gpu benchmarks/results/gpu-NAME.json FILE.svg

The roofline is the time that cuBLAS took over the least that the product can take: its packed weight at the speed of a copy, or its
operations at the speed of a large dense product, whichever is longer, both as measured on that GPU.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "rtn-tensor"  # the same file from the same numbers
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.gpu_peers import CUBLAS, KERNELS  # noqa: E402

CLOCKS = {"graph": "CUDA graph, weights from memory", "do_bench": "do_bench, launch included"}


def roofline(row: dict, clock: str, kernel: str, ceilings: dict) -> float:
    """The speed-up that `kernel`'s weight allows at most, over cuBLAS's `row`."""
    n, k, m = row["N"], row["K"], row["M"]
    least = max(KERNELS[kernel].bytes(n, k) / ceilings["copy_bytes_per_s"], 2 * m * n * k / ceilings["matmul_flop_per_s"])
    return row[clock]["seconds"] / least


def draw(data: dict, out: Path) -> None:
    rows = [r for r in data["linear"] if "M" in r]
    shapes = list(dict.fromkeys((r["N"], r["K"]) for r in rows))
    names = list(dict.fromkeys(r["kernel"] for r in rows if r["kernel"] != CUBLAS))
    figure, axes = plt.subplots(len(shapes), len(CLOCKS), figsize=(5.5 * len(CLOCKS), 3.6 * len(shapes)), squeeze=False)
    for line, shape in zip(axes, shapes, strict=True):
        mine = [r for r in rows if (r["N"], r["K"]) == shape]
        for axis, clock in zip(line, CLOCKS, strict=True):
            dense = sorted((r for r in mine if r["kernel"] == CUBLAS and "seconds" in r.get(clock, {})), key=lambda r: r["M"])
            for kernel, color in (("rtn int4 g128", "C0"), ("rtn int8 g128", "C1")):
                if dense and data["ceilings"]:
                    roof = [roofline(r, clock, kernel, data["ceilings"]) for r in dense]
                    axis.plot([r["M"] for r in dense], roof, color=color, linestyle=":", label=f"roofline {kernel[4:8]}")
            for i, name in enumerate(names):
                points = sorted(
                    (r["M"], r[clock]["over_cublas"]) for r in mine if r["kernel"] == name and "over_cublas" in r.get(clock, {})
                )
                if points:
                    ours = name.startswith("rtn")
                    style = {"marker": "o" if ours else None, "linestyle": "-" if ours else "--", "color": f"C{i % 10}"}
                    axis.plot(*zip(*points, strict=True), markersize=4, label=name, **style)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(
                title=f"weight [{shape[0]}, {shape[1]}], {CLOCKS[clock]}",
                xlabel="rows of x",
                ylabel="times as fast as cuBLAS bf16",
                xscale="log",
                yscale="log",
                ylim=(0.2, 5),
            )
            tokens = sorted({r["M"] for r in mine})
            axis.set_xticks(tokens, [str(m) for m in tokens])
            axis.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.title.set_fontsize(9)
            axis.legend(fontsize=6, loc="lower left")
    about = data["machine"]
    versions = about["versions"]
    figure.suptitle(f"{about['gpu']}, torch {versions['torch']}, Triton {versions['triton']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.svg)


if __name__ == "__main__":
    main()
