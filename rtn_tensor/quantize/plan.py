"""A plan, and how it is shown."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rtn_tensor.config import RTNConfig

Table = Mapping[str, Mapping[RTNConfig, float]]  # of weights' names and formats
SHADES = " ░▒▓█"
SHOWN = {"search": "+", "search8": "+8"}


@dataclass(frozen=True)
class Measured:
    """What plans are made of. A weight that has several places goes by its first name."""

    sensitivity: Table  # the divergence that a weight costs in a format
    bits: Table  # that it takes
    counts: Mapping[str, int]  # of its elements
    together: Sequence[Sequence[str]]  # weights that must share a format
    places: Mapping[str, Sequence[str]]  # all names of a weight
    wide: bool  # whether scales are fp32
    tokens: str


class Plan(list[tuple[str, RTNConfig | None]]):
    """Rules, one a weight by its full name, with what they were chosen by. Printed, a map of layers and
    modules.

    Attributes:
        bits_per_weight: of the planned weights, scales included.
        divergence: what it is expected to cost, in nats per token, on the tokens that were measured.
        sensitivity: by the weight's name and the format, the divergence that this weight costs in it.
        tokens: what was measured on, as in "4096 tokens of its own".
        measured: what it does cost, in nats per token, with every weight rounded plainly, on the last of
            these tokens; None of a plan that `at` gives.
    """

    measured: float | None = None

    def __init__(self, budget: float, measured: Measured):
        if not isinstance(budget, int | float) or not budget > 0:
            raise ValueError(f"bits_per_weight={budget!r}; give a number, as 4.5")
        self._measured = measured
        total = sum(measured.counts.values())
        costs, sizes = (
            [_sum([t[name] for name in names]) for names in measured.together]
            for t in (measured.sensitivity, measured.bits)
        )
        if budget * total < (least := sum(min(size.values()) for size in sizes)):
            raise ValueError(
                f"bits_per_weight={budget} is too few; the smallest of the options take "
                f"{math.ceil(least / total * 1e4) / 1e4:.4f}"
                + (
                    "; of a model in bfloat16 they take less, as scales have the width of its floats"
                    if measured.wide
                    else ""
                )
            )
        chosen = spend(costs, sizes, budget * total)
        configs = {
            name: config for names, config in zip(measured.together, chosen, strict=True) for name in names
        }
        super().__init__(
            (place, configs[name]) for name in measured.sensitivity for place in measured.places[name]
        )
        self.bits_per_weight = sum(measured.bits[name][config] for name, config in configs.items()) / total

    def at(self, bits_per_weight: float) -> "Plan":
        """The plan for another budget, by the same sensitivity: nothing is measured again. Raises ValueError
        for one too small."""
        return Plan(bits_per_weight, self._measured)

    @property
    def sensitivity(self) -> Table:
        return self._measured.sensitivity

    @property
    def tokens(self) -> str:
        return self._measured.tokens

    def _planned(self) -> list[tuple[str, RTNConfig]]:
        """Its rules but those that were put beside them, and but further names of a weight."""
        return [
            (name, config) for name, config in self if config and config in self.sensitivity.get(name, ())
        ]

    @property
    def divergence(self) -> float:
        return sum(self.sensitivity[name][config] for name, config in self._planned())

    def cells(self) -> tuple[list[str], list[str], dict[tuple[str, str], tuple[RTNConfig, float]]]:
        """Layers, kinds of modules, and at (layer, kind) the format and the divergence that 4 bits there cost
        at best."""
        cells = {}
        for name, config in self._planned():
            match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            layer, kind = (
                (match[1], name[: match.start()] + "*" + name[match.end() - 1 :]) if match else ("", name)
            )
            at_4 = [cost for option, cost in self.sensitivity[name].items() if option.bits == 4] or [
                self.sensitivity[name][config]
            ]
            cells[layer, kind] = config, min(at_4)
        layers, kinds = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
        return layers, kinds, cells

    def __str__(self) -> str:
        layers, kinds, cells = self.cells()
        names = [last_part(kind) for kind in kinds]
        top = max(cost for _, cost in cells.values()) or 1.0
        lines = [
            f"{self.bits_per_weight:.3f} bits per weight, an expected divergence of {self.divergence:.4f} "
            "nats "
            f"per token on {self.tokens}"
            + ("" if self.measured is None else f", and a measured one of {self.measured:.4f}"),
            "bits:group size, + for searched scales, +8 of 8 bits; shaded by what 4 bits would cost",
            " ".join(["layer", *(f"{name:>10}" for name in names)]),
        ]
        for layer in layers:
            row = [f"{layer:>5}"]
            for kind in kinds:
                text = ""
                if (layer, kind) in cells:
                    config, cost = cells[layer, kind]
                    # By the square root, or one weight would leave the others blank.
                    shade = SHADES[round((cost / top) ** 0.5 * (len(SHADES) - 1))]
                    text = f"{_short(config)} {shade}"
                row.append(f"{text:>10}")
            lines.append(" ".join(row))
        return "\n".join(lines)

    def draw(self, path: Any) -> None:
        """Writes the map as a picture (PNG, SVG, as the name's ending says); it wants matplotlib."""
        from matplotlib.figure import Figure

        layers, kinds, cells = self.cells()
        names = [last_part(kind) for kind in kinds]
        figure = Figure(figsize=(2 + len(kinds), 1.5 + 0.28 * len(layers)), layout="constrained")
        axes = figure.add_subplot()
        costs = [
            [cells[layer, kind][1] if (layer, kind) in cells else float("nan") for kind in kinds]
            for layer in layers
        ]
        shown = torch.tensor(costs).clamp_min(1e-12).log10()
        image = axes.imshow(shown.tolist(), aspect="auto", cmap="viridis")
        middle = float(shown.nanmean())
        for (layer, kind), (config, _) in cells.items():
            x, y = kinds.index(kind), layers.index(layer)
            weight = "bold" if config.bits == 8 else "normal"
            color = "black" if float(shown[y, x]) > middle else "white"
            axes.text(x, y, _short(config), ha="center", va="center", fontsize=7, color=color, weight=weight)
        axes.set_xticks(range(len(kinds)), names, rotation=30)
        axes.set_yticks(range(len(layers)), layers)
        axes.set(
            ylabel="layer",
            title=f"{self.bits_per_weight:.3f} bits per weight: bits:group size, + for searched scales",
        )
        figure.colorbar(image, label="log10 of the divergence at 4 bits, nats per token")
        figure.savefig(path, dpi=110)


def _short(config: RTNConfig) -> str:
    return f"{config.bits}:{config.group_size}{SHOWN.get(config.scale_method, '')}"


def last_part(name: str) -> str:
    """Of a weight's name its module's own, as in down_proj."""
    return name.removesuffix(".weight").rpartition(".")[2]


def spend(
    costs: Sequence[Mapping[RTNConfig, float]], bits: Sequence[Mapping[RTNConfig, float]], budget: float
) -> list[RTNConfig]:
    """A format for each weight so that their bits are at most `budget` and the sum of their costs is small:
    from the fewest bits on, the step that saves most a bit, along each weight's convex hull of (bits, cost).

    Args:
        costs: by weight and format.
        bits: that each format takes of each weight.
        budget: bits in all.

    Raises:
        ValueError: the budget is less than the smallest formats take.
    """
    hulls: list[list[tuple[float, float, RTNConfig]]] = []
    for cost, size in zip(costs, bits, strict=True):
        hull: list[tuple[float, float, RTNConfig]] = []
        for point in sorted(((size[c], cost[c], c) for c in cost), key=lambda p: p[:2]):
            if hull and point[1] >= hull[-1][1]:
                continue
            while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        hulls.append(hull)
    at = [0] * len(hulls)
    used = sum(hull[0][0] for hull in hulls)
    if used > budget:
        raise ValueError(f"the smallest formats take {used:.0f} bits, and the budget is {budget:.0f}")
    steps = sorted(
        (_slope(a, b), i, j)
        for i, hull in enumerate(hulls)
        for j, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
    )
    for _, i, j in steps:
        more = hulls[i][j + 1][0] - hulls[i][j][0]
        if at[i] == j and used + more <= budget:
            at[i], used = j + 1, used + more
    return [hull[i][2] for hull, i in zip(hulls, at, strict=True)]


def _sum(tables: Sequence[Mapping[RTNConfig, float]]) -> dict[RTNConfig, float]:
    return {option: sum(table[option] for table in tables) for option in tables[0]}


def _slope(a: tuple[float, float, RTNConfig], b: tuple[float, float, RTNConfig]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
