"""A format for each weight under a budget of bits, found without calibration data.

To second order in the rounding errors D of the weights, the divergence between the float model's next-token distributions and the quantized
one's is 1/2 D^T F D, with F the Fisher information: the mean of g g^T over labels *drawn from the model itself*, g the gradient of their
log-likelihood. Rounding errors hardly correlate, so F's diagonal is enough, and one backward pass a sequence measures every format of every
weight at once: 1/2 sum(F_ii D_ii^2). The tokens are those that the model itself writes, which tell
nearly what text does; random ones overstate SmolLM2's first layer, its v_proj by 20 times.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtn_tensor.config import RTNConfig, rtn
from rtn_tensor.integrations.transformers.models import but_the_output, is_pretrained
from rtn_tensor.quantize.selection import FilterFn, bits_of, unmatched
from rtn_tensor.quantize.targets import Target, is_finite, targets_of
from rtn_tensor.tensor.quantized import RTNQuantizedTensor

OPTIONS = (*(rtn(4, size, method) for size in (128, 64, 32) for method in ("signed", "search")), rtn(8, 128))
Table = Mapping[str, Mapping[RTNConfig, float]]  # of weights' names and formats
Fuse = Mapping[str, Sequence[str]]
SHADES = " ░▒▓█"


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
    """Rules, one a weight by its full name, with what they were chosen by. Printed, a map of layers and modules.

    Attributes:
        bits_per_weight: of the planned weights, scales included.
        divergence: what it is expected to cost, in nats a token, on the tokens that were measured.
        sensitivity: by the weight's name and the format, the divergence that this weight costs in it.
        tokens: what was measured on, as in "4096 tokens of its own".
    """

    def __init__(self, budget: float, measured: Measured):
        if not isinstance(budget, int | float) or not budget > 0:
            raise ValueError(f"bits_per_weight={budget!r}; give a number, as 4.5")
        self._measured = measured
        total = sum(measured.counts.values())
        costs, sizes = ([_sum([t[name] for name in names]) for names in measured.together] for t in (measured.sensitivity, measured.bits))
        if budget * total < (least := sum(min(size.values()) for size in sizes)):
            raise ValueError(
                f"bits_per_weight={budget} is too few; the smallest of the options take {math.ceil(least / total * 1e4) / 1e4:.4f}"
                + ("; of a model in bfloat16 they take less, as scales have the width of its floats" if measured.wide else "")
            )
        chosen = spend(costs, sizes, budget * total)
        configs = {name: config for names, config in zip(measured.together, chosen, strict=True) for name in names}
        super().__init__((place, configs[name]) for name in measured.sensitivity for place in measured.places[name])
        self.bits_per_weight = sum(measured.bits[name][config] for name, config in configs.items()) / total

    def at(self, bits_per_weight: float) -> "Plan":
        """The plan for another budget, by the same sensitivity: nothing is measured again. Raises ValueError for one too small."""
        return Plan(bits_per_weight, self._measured)

    @property
    def sensitivity(self) -> Table:
        return self._measured.sensitivity

    @property
    def tokens(self) -> str:
        return self._measured.tokens

    def _planned(self) -> list[tuple[str, RTNConfig]]:
        """Its rules but those that were put beside them, and but further names of a weight."""
        return [(name, config) for name, config in self if config and config in self.sensitivity.get(name, ())]

    @property
    def divergence(self) -> float:
        return sum(self.sensitivity[name][config] for name, config in self._planned())

    def cells(self) -> tuple[list[str], list[str], dict[tuple[str, str], tuple[RTNConfig, float]]]:
        """Layers, kinds of modules, and at (layer, kind) the format and the divergence that 4 bits there cost at best."""
        cells = {}
        for name, config in self._planned():
            match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            layer, kind = (match[1], name[: match.start()] + "*" + name[match.end() - 1 :]) if match else ("", name)
            at_4 = [cost for option, cost in self.sensitivity[name].items() if option.bits == 4] or [self.sensitivity[name][config]]
            cells[layer, kind] = config, min(at_4)
        layers, kinds = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
        return layers, kinds, cells

    def __str__(self) -> str:
        layers, kinds, cells = self.cells()
        names = [_last(kind) for kind in kinds]
        top = max(cost for _, cost in cells.values()) or 1.0
        lines = [
            f"{self.bits_per_weight:.3f} bits a weight, an expected divergence of {self.divergence:.4f} nats a token on {self.tokens}",
            "bits:group size, + for searched scales; shaded by what 4 bits would cost",
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
        names = [_last(kind) for kind in kinds]
        figure = Figure(figsize=(2 + len(kinds), 1.5 + 0.28 * len(layers)), layout="constrained")
        axes = figure.add_subplot()
        costs = [[cells[layer, kind][1] if (layer, kind) in cells else float("nan") for kind in kinds] for layer in layers]
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
        axes.set(ylabel="layer", title=f"{self.bits_per_weight:.3f} bits a weight: bits:group size, + for searched scales")
        figure.colorbar(image, label="log10 of the divergence at 4 bits, nats a token")
        figure.savefig(path, dpi=110)


def _short(config: RTNConfig) -> str:
    return f"{config.bits}:{config.group_size}{'+' if config.scale_method == 'search' else ''}"


def _last(name: str) -> str:
    """Of a weight's name its module's own, as in down_proj."""
    return name.removesuffix(".weight").rpartition(".")[2]


# ------------------------------------------------------------------------------------------- sensitivity


def _check_tokens(model: Any, given: Any, sequences: int, length: int) -> None:
    if given is not None:
        if not isinstance(given, Tensor) or given.dim() != 2 or given.is_floating_point() or not given.numel():
            what = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise ValueError(f"text is {what}; give int64 tokens [sequences, length], as a tokenizer's input_ids")
    elif not (is_pretrained(model) and model.can_generate()):
        raise TypeError(f"{type(model).__name__} is no causal language model of transformers, which could write; give tokens as text")
    elif sequences < 1 or length < 2:
        raise ValueError(f"sequences={sequences}, length={length}; give one sequence or more, of two tokens or more")


def _written(model: Any, sequences: int, length: int, seed: int) -> Tensor:
    """What the model writes, drawn from its own distribution: after its first token, or where it has none, after any."""
    from transformers import GenerationConfig

    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, model.get_input_embeddings().num_embeddings, (sequences, 1), generator=generator)
    first = getattr(model.config.get_text_config(), "bos_token_id", None)
    if first is not None:
        start.fill_(first)
    start = start.to(next(model.parameters()).device)
    _logits(model, start[:1])  # or `generate` fails with no advice
    before = model.generation_config
    # What it says of beams, penalties or smallest probabilities would be merged with arguments.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    # The end of a text is not drawn, or sequences would be of unequal lengths.
    model.generation_config.update(eos_token_id=before.eos_token_id, min_new_tokens=length - 1, max_new_tokens=length - 1)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            return model.generate(start, attention_mask=torch.ones_like(start))
    finally:
        model.generation_config = before


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits
    if not is_finite(logits.detach()):
        raise ValueError(f"the model's logits hold NaN or inf in {logits.dtype}; load it in bfloat16 or float32")
    return logits.float()


@contextmanager
def _only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Meanwhile these of its parameters have gradients, and no others."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def _fisher(
    model: Any, parameters: list[nn.Parameter], ids: Tensor, seed: int, progress: Callable[[list], Iterable] | None
) -> list[Tensor]:
    """The diagonal of the Fisher information of each parameter, fp32, for one token."""
    sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for row in progress(list(ids)) if progress else ids:
        with torch.enable_grad():
            logits = _logits(model, row[None].to(device))[0]
            # Positions' scores are uncorrelated, as labels are drawn from the model: the square of their sum is the sum of their squares.
            drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, drawn.to(device), reduction="sum")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # experts that no token went to have none
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.float().square_()
    return [total.div_(ids.numel()) for total in sums]


@torch.no_grad()
def _cost(target: Target, fisher: Tensor, config: RTNConfig) -> float:
    """The divergence in nats a token of this weight alone in this format."""
    assert target.parameter is not None
    w, f = (t.mT if target.transposed else t for t in (target.parameter.detach(), fisher))
    rounded = RTNQuantizedTensor.from_float(w, config.bits, config.group_size, config.scale_method).dequantize()
    return 0.5 * float((f * (rounded.float() - w.float()).square()).sum(dtype=torch.float64))


# ------------------------------------------------------------------------------------------- the choice


def spend(costs: Sequence[Mapping[RTNConfig, float]], bits: Sequence[Mapping[RTNConfig, float]], budget: float) -> list[RTNConfig]:
    """A format for each weight so that their bits are at most `budget` and the sum of their costs is small: from the fewest bits on, the
    step that saves most a bit, along each weight's convex hull of (bits, cost).

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
    steps = sorted((_slope(a, b), i, j) for i, hull in enumerate(hulls) for j, (a, b) in enumerate(zip(hull, hull[1:], strict=False)))
    for _, i, j in steps:
        more = hulls[i][j + 1][0] - hulls[i][j][0]
        if at[i] == j and used + more <= budget:
            at[i], used = j + 1, used + more
    return [hull[i][2] for hull, i in zip(hulls, at, strict=True)]


def _sum(tables: Sequence[Mapping[RTNConfig, float]]) -> dict[RTNConfig, float]:
    return {option: sum(table[option] for table in tables) for option in tables[0]}


def _slope(a: tuple[float, float, RTNConfig], b: tuple[float, float, RTNConfig]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def plan(
    model: Any,
    bits_per_weight: float = 4.25,
    *,
    options: Sequence[RTNConfig] = OPTIONS,
    text: Tensor | None = None,
    fuse: Fuse | None = None,
    filter_fn: FilterFn | None = None,
    sequences: int = 16,
    length: int = 256,
    seed: int = 0,
    progress: Callable[[list], Iterable] | None = None,
) -> Plan:
    """Rules for `quantize_` that spend a budget of bits on the weights where it helps most, by their second-order effect on what the model
    predicts. The model stays as it is. The same arguments give the same rules on one machine.

    It takes the writing, and a forward and a backward pass a sequence, and meanwhile 4 bytes a weight, and its gradients, beside the model.

    Args:
        model: a float causal language model of transformers, in eval mode: `model(ids [1, T]).logits` is `[1, T, vocabulary]`.
        bits_per_weight: the average over the weights that `filter_fn` selects, scales included, is at most this.
        options: the formats to choose among; of every weight all are tried.
        text: tokens `[sequences, length]` to measure on, in the place of those that the model writes.
        fuse: modules that a serving engine makes one, and that so must have one format, as in `load`: {"qkv_proj": ["q_proj", ...]}.
        filter_fn: as for `load`: by default every linear but the output layer, and experts.
        sequences: that the model writes; more measure more finely, and take longer.
        length: tokens a sequence.
        seed: of what it writes, and of the labels that are drawn.
        progress: wraps the list of sequences to come, for instance `tqdm.tqdm`.

    Raises:
        ValueError: the model is in training mode; a budget below what the smallest of `options` takes; a weight that cannot be quantized,
            or none at all; `fuse` names what no weight is called; `text` that is no tokens; all that before anything is measured. Then,
            logits or gradients that are not finite.
        TypeError: `options` or `fuse` is of another type; or the model cannot write, and no `text` is given.
        RuntimeError: it is called under torch.inference_mode().
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes its loss random; call model.eval() first")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("plan takes gradients; call it outside of torch.inference_mode()")
    options = list(options)
    if not options or not all(isinstance(option, RTNConfig) for option in options):
        raise TypeError(f"options is {options}; give formats to choose among, as [rtn_int4(), rtn_int8()]")
    _check_tokens(model, text, sequences, length)
    targets, sizes = _sizes(targets_of(model, options[0], filter_fn or but_the_output(model)), options, fuse or {})
    Plan(bits_per_weight, sizes)  # what it raises, it raises before all is measured
    ids = _written(model, sequences, length, seed) if text is None else text.long()
    tokens = f"{ids.numel()} {'tokens of its own' if text is None else 'given tokens'}"
    parameters: list[Any] = [t.parameter for t in targets]
    with _only(model, parameters):
        fishers = _fisher(model, parameters, ids, seed, progress)
    costs = {t.fqn: {option: _cost(t, fisher, option) for option in options} for t, fisher in zip(targets, fishers, strict=True)}
    for t in targets:
        if not all(math.isfinite(cost) for cost in costs[t.fqn].values()):
            raise ValueError(f"{t.fqn}: its gradients overflow in {t.parameter.dtype}; load the model in bfloat16 or float32")  # type: ignore[union-attr]
    return Plan(bits_per_weight, replace(sizes, sensitivity=costs, tokens=tokens))


def _sizes(found: Iterable[Target], options: Sequence[RTNConfig], fuse: Fuse) -> tuple[list[Target], Measured]:
    """The weights, each at its first place, and what is known of them before anything is measured: no format costs anything."""
    places: dict[int, list[Target]] = defaultdict(list)
    for target in found:
        places[id(target.parameter)].append(target)
    if not places:
        raise ValueError("no weight is selected, so there is nothing to plan; check filter_fn, or the kinds of the model's layers")
    targets = [same[0] for same in places.values()]
    parameters: dict[str, Any] = {t.fqn: t.parameter for t in targets}
    return targets, Measured(
        sensitivity={name: dict.fromkeys(options, 0.0) for name in parameters},
        bits={t.fqn: _bits(t, options) for t in targets},
        counts={name: p.numel() for name, p in parameters.items()},
        together=_together(list(parameters), fuse),
        places={same[0].fqn: [t.fqn for t in same] for same in places.values()},
        wide=any(p.dtype == torch.float32 for p in parameters.values()),
        tokens="",
    )


def _together(names: Sequence[str], fuse: Fuse) -> list[list[str]]:
    """The names by groups that must share a format."""
    if not isinstance(fuse, Mapping) or any(isinstance(parts, str) for parts in fuse.values()):
        raise TypeError(f"fuse is {fuse!r}; give a dict of lists, as {{'qkv_proj': ['q_proj', 'k_proj', 'v_proj']}}")
    fused = {part: whole for whole, parts in fuse.items() for part in parts}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        last = _last(name)
        head = name.removesuffix(".weight").removesuffix(last)
        groups[head + fused.get(last, last)].append(name)
    kinds = [_last(name) for name in names]
    for part in fused:
        if part not in kinds:
            raise ValueError(f"fuse: {unmatched(part, kinds)}")
    return list(groups.values())


def _bits(target: Target, options: Sequence[RTNConfig]) -> dict[RTNConfig, float]:
    w = target.parameter
    assert w is not None
    shape = (w.mT if target.transposed else w).shape
    return {option: bits_of(shape, option, 8 * w.dtype.itemsize) for option in options}
