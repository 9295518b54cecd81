"""A format for each weight under a budget of bits, found without calibration data.

To second order in the rounding errors D of the weights, the divergence between the float model's next-token distributions and the quantized
one's is 1/2 D^T F D, with F the Fisher information: the mean of g g^T over labels *drawn from the model itself*, g the gradient of their
log-likelihood. Rounding errors hardly correlate, so F's diagonal is enough, and one backward pass a sequence measures every format of every
weight at once: 1/2 sum(F_ii D_ii^2). The tokens are those that the model itself writes, which tell
nearly what text does; random ones overstate SmolLM2's first layer, its v_proj by 20 times.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtn_tensor.config import RTNConfig, rtn
from rtn_tensor.policy import FilterFn, bits_of
from rtn_tensor.pretrained import but_the_output
from rtn_tensor.quantize import Target, targets_of
from rtn_tensor.tensor import RTNQuantizedTensor

OPTIONS = (*(rtn(4, size, method) for size in (128, 64, 32) for method in ("signed", "search")), rtn(8, 128))
Table = Mapping[str, Mapping[RTNConfig, float]]  # of weights' names and formats
Fuse = Mapping[str, Sequence[str]]
SHADES = " ░▒▓█"


class Plan(list[tuple[str, RTNConfig | None]]):
    """Rules, one a weight by its full name, with what they were chosen by. Printed, a map of layers and modules.

    Attributes:
        bits_per_weight: of the planned weights, scales included.
        divergence: what it is expected to cost, in nats a token, on the tokens that were measured.
        sensitivity: by the weight's name and the format, the divergence that this weight costs in it.
        tokens: what was measured on, as in "4096 tokens of its own".
    """

    def __init__(self, budget: float, sensitivity: Table, bits: Table, counts: Mapping[str, int], fuse: Fuse, tokens: str):
        self.sensitivity, self.tokens = sensitivity, tokens
        self._bits, self._counts, self._fuse = bits, counts, fuse
        total = sum(counts.values())
        fused = {part: whole for whole, parts in fuse.items() for part in parts}
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sensitivity:
            head, _, last = name.removesuffix(".weight").rpartition(".")
            groups[f"{head}.{fused.get(last, last)}"].append(name)
        costs, sizes = ([_sum([table[name] for name in names]) for names in groups.values()] for table in (sensitivity, bits))
        if budget * total < (least := sum(min(size.values()) for size in sizes)):
            raise ValueError(f"bits_per_weight={budget} is too few; the smallest of the options take {least / total:.4f}")
        chosen = spend(costs, sizes, budget * total)
        configs = {name: config for names, config in zip(groups.values(), chosen, strict=True) for name in names}
        super().__init__((name, configs[name]) for name in sensitivity)
        self.bits_per_weight = sum(bits[name][config] for name, config in configs.items()) / total

    def at(self, bits_per_weight: float) -> "Plan":
        """The plan for another budget, by the same sensitivity: nothing is measured again. Raises ValueError for one too small."""
        return Plan(bits_per_weight, self.sensitivity, self._bits, self._counts, self._fuse, self.tokens)

    @property
    def divergence(self) -> float:
        return sum(self.sensitivity[name][config] for name, config in self if config)

    def cells(self) -> tuple[list[str], list[str], dict[tuple[str, str], tuple[RTNConfig, float]]]:
        """Layers, kinds of modules, and at (layer, kind) the format and the divergence that 4 bits there cost at best."""
        cells = {}
        for name, config in self:
            assert config is not None
            match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            layer, kind = (match[1], name[: match.start()] + "*" + name[match.end() - 1 :]) if match else ("", name)
            at_4 = [cost for option, cost in self.sensitivity[name].items() if option.bits == 4] or [self.sensitivity[name][config]]
            cells[layer, kind] = config, min(at_4)
        layers, kinds = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
        return layers, kinds, cells

    def __str__(self) -> str:
        layers, kinds, cells = self.cells()
        names = [kind.removesuffix(".weight").rpartition(".")[2] for kind in kinds]
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
        names = [kind.removesuffix(".weight").rpartition(".")[2] for kind in kinds]
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


# ------------------------------------------------------------------------------------------- sensitivity


def _tokens(model: Any, given: Tensor | None, sequences: int, length: int, seed: int) -> tuple[Tensor, str]:
    if given is None:
        return _written(model, sequences, length, seed), f"{sequences * length} tokens of its own"
    if given.dim() != 2 or given.is_floating_point() or given.shape[1] < 1:
        raise ValueError(f"text is {given.dtype} {list(given.shape)}; give int64 tokens [sequences, length]")
    return given.long(), f"{given.numel()} given tokens"


def _written(model: Any, sequences: int, length: int, seed: int) -> Tensor:
    """What the model writes, drawn from its own distribution: after its first token, or where it has none, after any."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, model.get_input_embeddings().num_embeddings, (sequences, 1), generator=generator)
    if model.config.bos_token_id is not None:
        start.fill_(model.config.bos_token_id)
    start = start.to(next(model.parameters()).device)
    with torch.random.fork_rng([start.device] if start.is_cuda else []):
        torch.manual_seed(seed)
        # The end of a text is not drawn, or sequences would be of unequal lengths.
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=0,
        )


def _fisher(
    model: Any, parameters: list[nn.Parameter], ids: Tensor, seed: int, progress: Callable[[list], Iterable] | None
) -> list[Tensor]:
    """The diagonal of the Fisher information of each parameter, fp32, for one token."""
    sums = [torch.zeros(p.shape, device=p.device) for p in parameters]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for row in progress(list(ids)) if progress else ids:
        with torch.enable_grad():
            logits = model(row[None].to(device), use_cache=False).logits[0].float()
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
        ValueError: the model is in training mode; a budget below what the smallest of `options` takes; a weight that cannot be quantized.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes its loss random; call model.eval() first")
    targets = targets_of(model, options[0], filter_fn or but_the_output(model))
    ids, tokens = _tokens(model, text, sequences, length, seed)
    parameters: list[Any] = [t.parameter for t in targets]
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        fishers = _fisher(model, parameters, ids, seed, progress)
    finally:
        for p, required in before:
            p.requires_grad_(required)
    costs = {t.fqn: {option: _cost(t, fisher, option) for option in options} for t, fisher in zip(targets, fishers, strict=True)}
    bits = {t.fqn: _bits(t, options) for t in targets}
    return Plan(bits_per_weight, costs, bits, {t.fqn: t.parameter.numel() for t in targets if t.parameter is not None}, fuse or {}, tokens)


def _bits(target: Target, options: Sequence[RTNConfig]) -> dict[RTNConfig, float]:
    w = target.parameter
    assert w is not None
    shape = (w.mT if target.transposed else w).shape
    return {option: bits_of(shape, option, 8 * w.dtype.itemsize) for option in options}
