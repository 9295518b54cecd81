"""One layer of experts on the CPU: ours, bf16 by each of transformers' functions, and torchao's int8, in one
run.

    python -m benchmarks.moe [--json FILE] [--shapes qwen3-30b-a3b,mixtral] [--tokens 1,4,...] [--threads 2]

The layers have the shapes of Qwen3-30B-A3B's and Mixtral-8x7B's, random bf16 weights and random routing, the
same for every peer. Few tokens use few of the experts, whose int4 weights would lie in the cache the next
time: so the calls of a burst go by routings that use the experts in turn. The peers take turns, as in
`benchmarks.cpu_linear`. A ratio is the median over turns of the best bf16's time / own time; the best is
found for each number of tokens.

Memory is the weights', and what one call takes beside them at the highest, in a thread of its own, so that
what a kernel keeps for the thread's next call is counted, too. Every output is first compared with bf16's,
within what its format loses.
"""

import argparse
import ctypes
import json
import os
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bursts import CALLS, burst
from benchmarks.machine import add_threads, machine
from rtn_tensor import quantize_, rtn_int4, rtn_int8
from rtn_tensor.kernels import cpu
from rtn_tensor.text_table import table


class Layer(NamedTuple):
    model: str
    kind: str  # of transformers' models
    experts: int
    hidden: int
    between: int
    top_k: int
    router: torch.dtype  # of the weights that the model's router gives


LAYERS = {
    "qwen3-30b-a3b": Layer("Qwen3-30B-A3B", "qwen3_moe", 128, 2048, 768, 8, torch.bfloat16),
    "mixtral": Layer("Mixtral-8x7B", "mixtral", 8, 4096, 14336, 2, torch.float32),
}
TOKENS = "1,4,16,64,256"
ROUTINGS = 16  # of one token each, they use every expert of Qwen3's once: 300 MB of int4
# Bytes of weights that batched_mm may copy in a call; more takes seconds, and memory that the machine may not
# have.
MOST_COPIED = 3e9
# Seconds of a call; a peer that takes more, and twice the best bf16's time, is out after the first turn
# counted.
SLOW = 0.5
# Most relative error of an output, against bf16's by transformers' eager function.
NOISE = {"bf16": 0.02, "int4": 0.35, "int8": 0.03}  # of the first that a name has


def target(tokens: int) -> float:
    """What int4 is meant to reach, in times the best bf16's speed."""
    return 2.5 if tokens <= 4 else 1.5 if tokens <= 16 else 1.0


# ----------------------------------------------------------------------------------- peers


def random_weights(layer: Layer) -> dict[str, nn.Parameter]:
    up, down = (layer.experts, 2 * layer.between, layer.hidden), (layer.experts, layer.hidden, layer.between)
    return {
        name: nn.Parameter(torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02), requires_grad=False)
        for name, shape in (("gate_up_proj", up), ("down_proj", down))
    }


def module_of(layer: Layer, weights: dict[str, nn.Parameter], implementation: str) -> nn.Module:
    """transformers' module over these very weights; no copy."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    with torch.device("meta"):
        if layer.kind == "mixtral":
            sizes = {"num_local_experts": layer.experts, "intermediate_size": layer.between}
            module = MixtralExperts(MixtralConfig(hidden_size=layer.hidden, **sizes))
        else:
            sizes = {"num_experts": layer.experts, "moe_intermediate_size": layer.between}
            module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=layer.hidden, **sizes))
    for name, w in weights.items():
        setattr(module, name, w)
    module.config._experts_implementation = implementation
    return module.eval()


def bf16(implementation: str, layer: Layer, weights: dict[str, nn.Parameter]) -> nn.Module:
    return module_of(layer, weights, implementation)


def ours(config, compiled: bool, layer: Layer, weights: dict[str, nn.Parameter]) -> nn.Module:
    module = module_of(layer, weights, "eager")
    quantize_(module, config)
    if module.config._experts_implementation != "rtn":
        raise RuntimeError(f"quantize_ left the experts to {module.config._experts_implementation!r}")
    if compiled:
        module.compile(fullgraph=True, dynamic=True)
    return module


def torchao_int8(layer: Layer, weights: dict[str, nn.Parameter]) -> nn.Module:
    """By the eager function, the one of transformers' that torchao's tensor runs in. Quantizing takes several
    fp32 copies of a weight."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    need, have = (
        5 * max(w.nbytes for w in weights.values()),
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    if need > have:
        raise MemoryError(f"quantizing takes {need / 1e9:.1f} GB, and {have / 1e9:.1f} are free")
    module = module_of(layer, weights, "eager")
    torchao_quantize_(module, FqnToConfig(dict.fromkeys(weights, Int8WeightOnlyConfig())), filter_fn=None)
    return module


Make = Callable[[Layer, dict[str, nn.Parameter]], nn.Module]
PEERS: dict[str, Make] = {
    "bf16 eager": partial(bf16, "eager"),
    "bf16 batched_mm": partial(bf16, "batched_mm"),
    "bf16 grouped_mm": partial(bf16, "grouped_mm"),
    "rtn int4 g128": partial(ours, rtn_int4(128, "absmax"), False),
    "rtn int4 g128 compiled": partial(ours, rtn_int4(128, "absmax"), True),
    "rtn int4 g128 with int8 activations": partial(ours, rtn_int4(128, "absmax", "int8"), False),
    "rtn int8 g128": partial(ours, rtn_int8(), False),
    "torchao int8": torchao_int8,
}


def weights_bytes(module: nn.Module) -> int:
    """Of all planes that the module's weights are made of."""
    planes = [getattr(w, name) for w in module.parameters() for name in getattr(w, "tensor_data_names", [])]
    return sum(plane.nbytes for plane in planes or module.parameters())


# -------------------------------------------------------------------------------- one call


def routings(layer: Layer, tokens: int, count: int) -> list[Tensor]:
    """Random experts of each token, `[tokens, top_k]`, `count` times; the experts of one are those that were
    not used for longest."""
    some, first = [], 0
    for _ in range(count):
        drawn = torch.rand(tokens, layer.experts).topk(layer.top_k).indices
        used, which = drawn.unique(return_inverse=True)
        some.append((first + which) % layer.experts)
        first += len(used)
    return some


def router_weights(layer: Layer, tokens: int) -> Tensor:
    return torch.rand(tokens, layer.top_k).softmax(-1).to(layer.router)


def resident(what: str) -> int:
    """`VmRSS`, bytes of memory in use, or `VmHWM`, their highest so far."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0])


def map_from(size: int) -> None:
    """Has glibc map blocks of `size` bytes and more, and so give them back when they are freed; smaller ones
    it keeps for the next."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, size)  # M_MMAP_THRESHOLD
        mallopt(-1, 2 * size)  # M_TRIM_THRESHOLD


def extra_memory(call: Callable[[], Tensor]) -> int:
    """Bytes of memory at the highest of a call, above those before; its result is counted."""
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def run() -> None:
        torch.set_num_threads(threads)
        call()

    map_from(64 << 10)  # else the call is given what others left, as if it took none
    try:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest from now on
        with ThreadPoolExecutor(1) as executor:
            executor.submit(run).result()
        return max(0, resident("VmHWM") - before)
    finally:
        map_from(32 << 20)  # what glibc comes to by itself, where blocks of that size are freed


def why_skipped(name: str, layer: Layer, tokens: int) -> str | None:
    copied = tokens * layer.top_k * 3 * layer.hidden * layer.between * 2
    return (
        f"would copy {copied / 1e9:.1f} GB of weights"
        if "batched_mm" in name and copied > MOST_COPIED
        else None
    )


def check(name: str, error: float) -> None:
    limit = next(most for kind, most in NOISE.items() if kind in name)
    if not error <= limit:
        raise RuntimeError(
            f"{name} is wrong: its output is off by {error:.3g} of bf16's, and {limit} is "
            "what the format may lose"
        )


def attempt(name: str, failed: dict[str, str], fn: Callable, *args):
    """What `fn` gives; None, and why in `failed`, where a peer of another library cannot run."""
    if name in failed:
        return None
    try:
        return fn(*args)
    except Exception as error:
        if not name.startswith("torchao"):
            raise
        failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return None


def take_turns(calls: dict[str, list], x: Tensor, turns: int) -> dict[str, list[float]]:
    """Seconds of a call in each turn but the first, which is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        quick = min((own[0] for name, own in seconds.items() if own and name.startswith("bf16")), default=0.0)
        for name, own in calls.items():
            if turn > 1 and seconds[name][0] > max(SLOW, 2 * quick):
                continue
            median = statistics.median(burst(own, turn * CALLS, x))
            if turn:
                seconds[name].append(median)
    return seconds


@torch.inference_mode()
def measure(layer: Layer, tokens: list[int], turns: int, names: list[str]) -> list[dict]:
    """One row a peer and number of tokens, with `seconds`, `over_bf16` and more, or with `failed` or
    `skipped`, which say why not."""
    weights = random_weights(layer)
    failed: dict[str, str] = {}
    modules = {name: attempt(name, failed, PEERS[name], layer, weights) for name in names}
    reference = module_of(layer, weights, "eager")
    rows: list[dict] = []
    for t in tokens:
        x, router, some = (
            torch.randn(t, layer.hidden).bfloat16(),
            router_weights(layer, t),
            routings(layer, t, ROUTINGS),
        )
        calls: dict[str, list] = {}
        found = {name: {"layer": layer.model, "tokens": t, "peer": name} for name in names}
        expected = reference(x, some[0], router).float()
        for name, row in found.items():
            if why := why_skipped(name, layer, t):
                row["skipped"] = why
                continue
            own = (
                [partial(modules[name], top_k_index=experts, top_k_weights=router) for experts in some]
                if modules[name]
                else []
            )
            if (y := attempt(name, failed, lambda own=own, x=x: own[0](x))) is None:
                row["failed"] = failed[name]
                continue
            row["error"] = ((y.float() - expected).norm() / expected.norm()).item()
            check(name, row["error"])
            calls[name] = own
            row |= {
                "weights_bytes": weights_bytes(modules[name]),
                "extra_bytes": extra_memory(partial(own[1], x)),
            }
        seconds = take_turns(calls, x, turns)
        best = min(
            (name for name in calls if name.startswith("bf16")),
            key=lambda name, s=seconds: statistics.median(s[name]),
        )
        for name, own in seconds.items():
            ratio = statistics.median(b / s for b, s in zip(seconds[best], own, strict=False))
            found[name] |= {"seconds": statistics.median(own), "over_bf16": ratio, "best_bf16": best}
        rows += found.values()
    return rows


# ------------------------------------------------------------------------------ the report


def show(rows: list[dict]) -> str:
    """The rows of one layer, as tables."""
    tokens, names = (
        sorted({r["tokens"] for r in rows}),
        [name for name in PEERS if any(r["peer"] == name for r in rows)],
    )
    by = {(r["peer"], r["tokens"]): r for r in rows}

    def cells(name: str, key: str, form: Callable[[float], str]) -> list[str]:
        return [form(by[name, t][key]) if key in by[name, t] else "-" for t in tokens]

    header = [f"T={t}" for t in tokens]
    speed = [[name, *cells(name, "over_bf16", "{:.2f}".format)] for name in names]
    speed.append(["target of int4", *(f"{target(t):.2f}" for t in tokens)])
    times = [[name, *cells(name, "seconds", lambda s: f"{1e3 * s:.2f}")] for name in names]
    memory = []
    for name in names:
        weights = next(
            (f"{by[name, t]['weights_bytes'] / 1e6:,.0f}" for t in tokens if "weights_bytes" in by[name, t]),
            "-",
        )
        error = max((by[name, t]["error"] for t in tokens if "error" in by[name, t]), default=None)
        memory.append(
            [
                name,
                "-" if error is None else f"{error:.3f}",
                weights,
                *cells(name, "extra_bytes", lambda b: f"{b / 1e6:,.0f}"),
            ]
        )
    parts = [
        "Times as fast as the best bf16, by tokens",
        table(["peer", *header], speed),
        "\nMilliseconds a call",
        table(["peer", *header], times),
        "\nThe output's error against bf16 eager, at most; MB of the weights, and at most beside them in a "
        "call",
        table(["peer", "error", "weights", *header], memory),
    ]
    whys = [
        f"{r['peer']}, T={r['tokens']}: {r.get('skipped') or r['failed']}"
        for r in rows
        if "skipped" in r or "failed" in r
    ]
    return "\n".join([*parts, *(["", *whys] if whys else [])])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--shapes", default=",".join(LAYERS), metavar="NAME,...", help=f"layers (default: {','.join(LAYERS)})"
    )
    parser.add_argument(
        "--tokens", default=TOKENS, metavar="T,...", help=f"tokens at once (default: {TOKENS})"
    )
    parser.add_argument(
        "--peers", default=",".join(PEERS), metavar="NAME,...", help=f"default: {', '.join(PEERS)}"
    )
    add_threads(parser)
    parser.add_argument("--turns", type=int, default=5, metavar="R", help="turns counted (default: 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    args = parser.parse_args(argv)
    layers, names = args.shapes.split(","), args.peers.split(",")
    for given, known, what in ((layers, LAYERS, "--shapes"), (names, PEERS, "--peers")):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{what}: {unknown[0]!r} is none of {', '.join(known)}")
    if not any(name.startswith("bf16") for name in names):
        parser.error("--peers: ratios are to the best bf16, of which there is none")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = machine() | {"instruction_set": cpu.isa()}
    print(f"{about['cpu']}, {args.threads} threads, torch {about['torch']}, {about['instruction_set']}")
    rows = []
    for name in layers:
        layer = LAYERS[name]
        some = measure(layer, [int(t) for t in args.tokens.split(",")], args.turns, names)
        print(
            f"\n{layer.model}: {layer.experts} experts, {layer.hidden} -> {layer.between} -> "
            f"{layer.hidden}, {layer.top_k} a token\n"
        )
        print(show(some), flush=True)
        rows += some
    if args.json:
        shapes = {
            LAYERS[name].model: LAYERS[name]._asdict() | {"router": str(LAYERS[name].router)[6:]}
            for name in layers
        }
        args.json.write_text(
            json.dumps({"machine": about, "turns": args.turns, "layers": shapes, "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
