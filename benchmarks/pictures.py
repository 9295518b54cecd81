"""Draws every picture of README and docs from `benchmarks/results/`, in one style, 600 pixels wide.

    python -m benchmarks.pictures [NAME ...] [--results benchmarks/results] [--to docs/pictures]

The same numbers give the same file, byte for byte. What `benchmarks/gpu.py` and `benchmarks/serving_load.py`
wrote is drawn as soon as a `gpu-*.json` or `serving-load*.json` is there.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.gpu_peers import CUBLAS, KERNELS
from benchmarks.picture_style import (
    ABSMAX,
    DENSE,
    INT4,
    INT8,
    PEER,
    PLAN,
    REFINED,
    SIGNED,
    STYLE,
    apart,
    figure,
    machine,
    ticks,
)
from rtn_tensor.formats import FORMATS

ROOT = Path(__file__).resolve().parents[1]

# -------------------------------------------------------------------------------- accuracy

# bits per weight: a 16-bit scale per group, and for HQQ a zero point, too.
PEERS = {"GPTQ g64": 4 + 16 / 64, "HQQ g64": 4 + 32 / 64}


def formats(data: dict) -> Figure:
    """Size against perplexity for all formats."""
    found = {
        row["weights"]: (row["bits_per_weight"] or PEERS.get(row["weights"]), score["value"])
        for row in data["rows"]
        for score in row["scores"]
        if score["task"] == "wikipedia"
    }
    made, axis = figure(3.9)
    bf16 = found.pop("bf16")[1]
    del found["bf16 with AMX"]
    axis.axhline(bf16, color=DENSE, linestyle="--", linewidth=1.2, label="bf16, 16 bits")
    lines = {
        "absmax": ("int4 absmax, the paper's formula", ABSMAX, "o-"),
        "signed": ("int4 signed", SIGNED, "o-"),
        "search": ("int4 search", INT4, "o-"),
        "plan": ("plan, some layers at int8", PLAN, "s-"),
        "int4 refined": ("int4 refined, on its own text", REFINED, "o-"),
        "int8": ("int8", INT8, "D"),
        "GPTQ": ("GPTQ, calibrated", PEER, "^"),
        "HQQ": ("HQQ, asymmetric", PEER, "v"),
    }
    for key, (label, color, style) in lines.items():
        wanted = {*key.split()}
        points = sorted(
            point
            for name, point in found.items()
            if wanted <= (words := {*name.replace(",", "").split()})
            and all((word in words) == (word in wanted) for word in ("refined", "search8"))
        )
        peer = {"markerfacecolor": "none", "markersize": 10, "markeredgewidth": 1.8} if color == PEER else {}
        axis.plot(*zip(*points, strict=True), style, color=color, label=label, **peer)
    ticks(axis, x=[4.25, 4.5, 5, 6, 7, 8])
    axis.set(xlabel="bits per weight, scales included", ylabel="perplexity, Wikipedia (lower is better)")
    axis.set_title(f"{data['model']}, linear layers, {data['tokens']['wikipedia']} tokens")
    axis.legend(loc="upper right")
    return made


METHODS = {"absmax": ABSMAX, "signed": SIGNED, "search": INT4}


def selective(data: dict) -> Figure:
    """Perplexity by bits per weight, of uniform formats, of choices by hand and of plans."""
    rows = {
        name: (row["bits_per_weight"], row["perplexity"])
        for name, row in data["rows"].items()
        if row.get("bits_per_weight", 8) < 6
    }
    made, axis = figure(4.6)
    axis.axhline(
        data["rows"]["bf16"]["perplexity"], linestyle="--", color=DENSE, linewidth=1.2, label="bf16, 16 bits"
    )
    for method, color in METHODS.items():
        line = sorted(
            point for name, point in rows.items() if name.startswith("int4") and name.endswith(method)
        )
        axis.plot(*zip(*line, strict=True), "o-", color=color, label=f"int4 {method}, groups of 64 and 32")
    line = sorted(point for name, point in rows.items() if name.startswith("plan") and "," not in name)
    axis.plot(*zip(*line, strict=True), "s-", color=PLAN, label="plan")
    by_hand = {name: point for name, point in rows.items() if not name.startswith(("plan", "int4"))}
    axis.plot(
        *zip(*by_hand.values(), strict=True),
        "x",
        color=INT8,
        markeredgewidth=2,
        label="these at int8, the rest int4 search",
    )
    below: list[tuple[float, float]] = []
    for name, (x, y) in sorted(by_hand.items(), key=lambda item: item[1][1]):
        short = name.replace(" at int8 g64", "").removeprefix("all ").replace(" of experts", "")
        # Labels of points near one another stand in one column, each as high as that below it needs.
        column = max(other for other, _ in by_hand.values() if abs(other - x) < 0.1)
        at = max([y, *(other + 0.33 for near, other in below if near == column)])
        below.append((column, at))
        axis.annotate(short, (column, at), xytext=(6, -3), textcoords="offset points", fontsize=8.5)
    axis.set(
        xlabel="bits per weight, scales included", ylabel=f"perplexity, {data['tokens']} tokens of Wikipedia"
    )
    axis.set_xlim(right=max(x for x, _ in rows.values()) + 0.2)
    made.legend(loc="outside lower center", ncols=2)
    return made


def plan(data: dict) -> Figure:
    """A plan's heat map: of each layer and kind of module the format, over what 4 bits would cost there."""
    cells = data["cells"]
    layers, kinds = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("layer", "kind"))
    costs = {(cell["layer"], cell["kind"]): cell["divergence_at_4_bits"] for cell in cells}
    # By the square root, or one weight would leave the others blank.
    shown = [[max(costs.get((layer, kind), 0.0), 0.0) ** 0.5 for kind in kinds] for layer in layers]
    made, axis = figure(1.2 + 0.2 * len(layers))
    mesh = axis.pcolormesh(shown, cmap="YlOrBr", edgecolors="white", linewidth=0.5)
    for cell in cells:
        x, y = kinds.index(cell["kind"]) + 0.5, layers.index(cell["layer"]) + 0.5
        dark = shown[int(y)][int(x)] > 0.6 * max(map(max, shown))
        text = f"{cell['bits']}:{cell['group_size']}{'+' if cell['scale_method'] == 'search' else ''}"
        style = {"weight": "bold" if cell["bits"] == 8 else "normal", "color": "white" if dark else "black"}
        axis.text(x, y, text, ha="center", va="center", fontsize=8.5, **style)
    axis.set_xticks([i + 0.5 for i in range(len(kinds))], kinds)
    axis.set_yticks([i + 0.5 for i in range(len(layers))], layers)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.invert_yaxis()
    axis.set(
        ylabel="layer",
        title=f"{data['bits_per_weight']:.2f} bits per weight: bits:group size, + for searched scales",
    )
    made.colorbar(
        mesh,
        label="square root of the divergence that 4 bits cost here, nats per token",
        fraction=0.05,
        pad=0.02,
    )
    return made


# ----------------------------------------------------------------------------------- speed


def linear(data: dict) -> Figure:
    """Speed-up over dense against the rows of x, one line per kernel."""
    rows = data["rows"]
    shapes = list(dict.fromkeys((row["dtype"], row["N"], row["K"]) for row in rows))
    made, axes = figure(2.5 * -(-len(shapes) // 2) + 0.9, -(-len(shapes) // 2), min(2, len(shapes)))
    colors = {
        "dense": DENSE,
        "rtn int4 g128": INT4,
        "rtn int4 g128, int8 activations": SIGNED,
        "rtn int8 g128": INT8,
        "aten int4 g128": "#8b5fbf",
        "OpenVINO": "#c05f8a",
        "ONNX Runtime": "#b0812f",
    }
    rows = [row for row in rows if row["kernel"] in colors]
    for axis, shape in zip(axes.flat, shapes, strict=False):
        mine = [row for row in rows if (row["dtype"], row["N"], row["K"]) == shape]
        for name in dict.fromkeys(row["kernel"] for row in mine):
            line = sorted((row["M"], row["over_dense"]) for row in mine if row["kernel"] == name)
            style = (
                {"marker": "o", "markersize": 4}
                if name.startswith("rtn")
                else {"linestyle": "--", "linewidth": 1.2}
            )
            axis.plot(*zip(*line, strict=True), color=colors[name], label=name, **style)
        ticks(axis, apart({row["M"] for row in mine}), [0.25, 0.5, 1, 2, 4, 8])
        axis.set_title(f"{shape[0]}, weight [{shape[1]}, {shape[2]}]")
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as dense")
    for axis in axes[-1]:
        axis.set_xlabel("rows of x")
    made.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    made.suptitle(machine(data), fontsize=9)
    return made


def loading(data: dict) -> Figure:
    """Anonymous memory over time while a checkpoint is loaded."""
    made, axis = figure(3.6)
    for row, color in zip(data["rows"], (INT4, DENSE, INT8), strict=False):
        seconds, anonymous, _ = zip(*row["samples"], strict=True)
        axis.plot(seconds, [value / 1e6 for value in anonymous], color=color, label=row["way"], linewidth=1.8)
    axis.axhline(
        data["bytes"] / 1e6, color=DENSE, linestyle="--", linewidth=1.2, label="the float model's weights"
    )
    axis.set(
        xlabel="seconds",
        ylabel="MB of anonymous memory",
        title=f"A Llama of {data['bytes'] / 1e9:.2f} GB in bf16, to int4",
    )
    axis.set_ylim(0)
    made.legend(loc="outside lower center", ncols=2)
    made.suptitle(machine(data), fontsize=9)
    return made


CLOCKS = {"graph": "CUDA graph, weights from memory", "do_bench": "do_bench, launch included"}


def roofline(row: dict, clock: str, kernel: str, ceilings: dict) -> float:
    """The speed-up that `kernel`'s weight allows at most, over cuBLAS's `row`.

    It is the time that cuBLAS took over the least that the product can take: its packed weight at the speed
    of a copy, or its operations at the speed of a large dense product, whichever is longer.
    """
    n, k, m = row["N"], row["K"], row["M"]
    least = max(
        KERNELS[kernel].bytes(n, k) / ceilings["copy_bytes_per_s"],
        2 * m * n * k / ceilings["matmul_flop_per_s"],
    )
    return row[clock]["seconds"] / least


def gpu(data: dict) -> Figure:
    """Speed-up over cuBLAS bf16 against the rows of x, by both clocks of `benchmarks/gpu.py`, and the
    roofline."""
    rows = [row for row in data["linear"] if "M" in row]
    panels = [
        (shape, clock) for shape in dict.fromkeys((row["N"], row["K"]) for row in rows) for clock in CLOCKS
    ]
    names = list(dict.fromkeys(row["kernel"] for row in rows if row["kernel"] != CUBLAS))
    made, axes = figure(2.9 * len(panels), len(panels), 1)
    for axis, (shape, clock) in zip(axes.flat, panels, strict=True):
        mine = [row for row in rows if (row["N"], row["K"]) == shape]
        dense = sorted(
            (row for row in mine if row["kernel"] == CUBLAS and "seconds" in row.get(clock, {})),
            key=lambda row: row["M"],
        )
        for kernel, color in (("rtn int4 g128", INT4), ("rtn int8 g128", INT8)):
            if dense and data["ceilings"]:
                roof = [roofline(row, clock, kernel, data["ceilings"]) for row in dense]
                axis.plot(
                    [row["M"] for row in dense],
                    roof,
                    color=color,
                    linestyle=":",
                    label=f"roofline {kernel[4:8]}",
                )
        for i, name in enumerate(names):
            points = sorted(
                (row["M"], row[clock]["over_cublas"])
                for row in mine
                if row["kernel"] == name and "over_cublas" in row.get(clock, {})
            )
            if points:
                color = {"rtn int4 g128": INT4, "rtn int8 g128": INT8}.get(name, f"C{i % 10}")
                style = (
                    {"marker": "o", "markersize": 4}
                    if name.startswith("rtn")
                    else {"linestyle": "--", "linewidth": 1.2}
                )
                axis.plot(*zip(*points, strict=True), color=color, label=name, **style)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(
            title=f"weight [{shape[0]}, {shape[1]}], {CLOCKS[clock]}",
            xlabel="rows of x",
            ylabel="times as fast as cuBLAS bf16",
        )
        ticks(axis, apart({row["M"] for row in mine}), [0.25, 0.5, 1, 2, 4])
        axis.set_ylim(0.2, 5)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    about = data["machine"]
    made.suptitle(
        f"{about['gpu']}, torch {about['versions']['torch']}, Triton {about['versions']['triton']}",
        fontsize=9,
    )
    return made


def serving_load(data: dict) -> Figure:
    """Requests per second, and the times of tokens, by how many users a server has."""
    colors = {"bf16": DENSE, "int8": INT8, "int4": INT4, "int4, int8 activations": SIGNED}
    made, axes = figure(3.4, 1, 3)
    titles = {
        "requests_per_second": "requests per second",
        "first_token": "first token, s",
        "next_token": "each token after it, ms",
    }
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        for weights in data["servers"]:
            rows = [row for row in data["rows"] if row["weights"] == weights]
            users, times = [row["users"] for row in rows], 1e3 if name == "next_token" else 1
            style = {"color": colors.get(weights, PEER), "markersize": 4}
            if name == "requests_per_second":
                axis.plot(users, [row[name] for row in rows], "o-", label=weights, **style)
            else:
                axis.plot(users, [times * row[f"{name}_p50"] for row in rows], "o-", **style)
                axis.plot(users, [times * row[f"{name}_p99"] for row in rows], "o:", linewidth=1, **style)
        ticks(axis, sorted({row["users"] for row in data["rows"]}))
        axis.set(title=title, xlabel="users", ylim=0)
    axes.flat[1].plot([], [], "-", color=DENSE, label="median")
    axes.flat[1].plot([], [], ":", color=DENSE, label="99th percentile")
    axes.flat[1].legend(loc="upper left")
    made.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    about = data["machine"]
    made.suptitle(f"{data['model']}, {about['cpu']}, {about['cores']} cores", fontsize=9)
    return made


# ---------------------------------------------------------------------------------- layout


def layout(_: dict | None = None) -> Figure:
    """Where the integers of a row lie: its first 16-byte chunk, of each bit width."""
    made, axes = figure(1.35 * len(FORMATS) + 0.2, len(FORMATS), 1)
    for axis, bits in zip(axes.flat, FORMATS, strict=True):
        fields = 16 // bits
        for word in range(8):
            for i in range(fields):
                x, color = word + i / fields, (ABSMAX, "white")[i % 2]
                axis.add_patch(
                    plt.Rectangle((x, 0), 1 / fields, 1, facecolor=color, edgecolor=DENSE, linewidth=0.6)
                )
                axis.text(x + 0.5 / fields, 0.5, str(8 * i + word), ha="center", va="center", fontsize=9)
            axis.add_patch(plt.Rectangle((word, 0), 1, 1, facecolor="none", edgecolor="black", linewidth=1.4))
            axis.text(word + 0.5, -0.12, f"word {word}", ha="center", va="top", fontsize=9)
        axis.set(xlim=(-0.02, 8.02), ylim=(-0.5, 1.05))
        axis.set_title(
            f"int{bits}: 16 bytes hold columns 0 to {128 // bits - 1}, {fields} in a word, lowest bits left"
        )
        axis.axis("off")
    return made


PICTURES: dict[str, tuple[Callable[..., Figure], str | None]] = {  # name -> what draws it, from which results
    "formats": (formats, "accuracy.json"),
    "selective": (selective, "selective.json"),
    "selective_moe": (selective, "selective_moe.json"),
    "plan": (plan, "plan.json"),
    "cpu_linear": (linear, "cpu_linear.json"),
    "loading": (loading, "memory.json"),
    "layout": (layout, None),
}
LATER: dict[str, Callable[..., Figure]] = {"gpu-*.json": gpu, "serving-load*.json": serving_load}


def known(results: Path) -> dict[str, tuple[Callable[..., Figure], str | None]]:
    """`PICTURES`, and those of the results that are not there on every machine."""
    later = {path.stem: (draw, path.name) for names, draw in LATER.items() for path in results.glob(names)}
    return PICTURES | dict(sorted(later.items()))


def write(draw: Callable[..., Figure], results: Path | None, to: Path) -> None:
    with matplotlib.rc_context(STYLE):
        made = draw(json.loads(results.read_text()) if results else None)
        made.savefig(to, metadata={"Date": None})
        plt.close(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(PICTURES)}, or that of a file {' or '.join(LATER)}; all by default",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    parser.add_argument("--to", type=Path, default=ROOT / "docs/pictures", metavar="FOLDER")
    args = parser.parse_args()
    pictures = known(args.results)
    if unknown := set(args.names) - set(pictures):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(pictures)}")
    args.to.mkdir(parents=True, exist_ok=True)
    for name in args.names or pictures:
        draw, results = pictures[name]
        write(draw, args.results / results if results else None, args.to / f"{name}.svg")


if __name__ == "__main__":
    main()
