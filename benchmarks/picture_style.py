"""The style of every picture of README and docs."""

from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "svg.hashsalt": "rtn-tensor",  # the same file from the same numbers
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
WIDTH = 6.25  # inches of 96 pixels: 600 pixels
DENSE, INT4, INT8, PLAN, SIGNED, ABSMAX, PEER, REFINED = (
    "#555555",
    "#1f6fb2",
    "#d9822b",
    "#2a8f57",
    "#6aa6d6",
    "#a9cbe8",
    "#8b5fbf",
    "#c0392b",
)


def figure(height: float, *shape: int) -> tuple[Figure, Any]:
    made, axes = plt.subplots(*(shape or (1, 1)), figsize=(WIDTH, height), squeeze=not shape)
    return made, axes


def ticks(axis: Axes, x: Iterable[float] = (), y: Iterable[float] = ()) -> None:
    """Logarithmic scales with these numbers written out."""
    for which, values in (("x", list(x)), ("y", list(y))):
        if values:
            getattr(axis, f"set_{which}scale")("log")
            getattr(axis, f"set_{which}ticks")(values, [f"{value:g}" for value in values])
    axis.minorticks_off()


def apart(values: Iterable[float]) -> list[float]:
    """Those of them whose numbers have room beside one another on a logarithmic scale."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value >= 4 * kept[-1]:
            kept.append(value)
    return kept


def machine(data: dict) -> str:
    about = data["machine"]
    return f"{about['cpu']}, {about['threads']} threads, {about['instruction_set']}, torch {about['torch']}"
