"""What int8 and int4 do to a real model: size, perplexity and speed, in some minutes on two CPU cores.

    python -m benchmarks.demo [--tokens N] [--new-tokens N] [--json FILE]

Every linear layer of SmolLM2-135M-Instruct is quantized but `lm_head`, which shares its weight with the
embedding.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from benchmarks.real_data import TEXT, state_of_the_union
from benchmarks.real_model import MODEL, smollm2
from rtn_tensor import quantize_, refine_, report, rtn_int4, rtn_int8
from rtn_tensor.evaluation.generation import generate
from rtn_tensor.evaluation.perplexity import perplexity
from rtn_tensor.quantize.report import Report
from rtn_tensor.text_table import table


class Weights(NamedTuple):
    quantize: Callable[[nn.Module], Report]
    what: str  # for whoever reads the table


WEIGHTS = {
    "bf16": Weights(report, "as they come"),
    "int8": Weights(
        lambda model: quantize_(model, rtn_int8(), is_linear_layer), "rtn_int8(): no visible loss, in seconds"
    ),
    "int4": Weights(
        lambda model: quantize_(model, rtn_int4(), is_linear_layer),
        "rtn_int4(): groups of 64 weights, each with the scale that loses least, in seconds",
    ),
    "int4 refined": Weights(
        lambda model: refine_(model, rtn_int4(), is_linear_layer),
        "refine_(model, rtn_int4()): the same size, but rounded so that errors make up for one another, on "
        "text that "
        "the model writes itself, in minutes",
    ),
}
WINDOW, STRIDE = 1024, 512
PROMPT = "Why is the sky blue?"


def is_linear_layer(module: nn.Module, fqn: str) -> bool:
    return isinstance(module, nn.Linear) and fqn != "lm_head"


class CountLinear(TorchDispatchMode):
    """Counts the calls of `rtn::linear`: a layer that fell back to a float weight would give right numbers
    too."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.rtn.linear.default
        return func(*args, **(kwargs or {}))


def measure(name: str, model, tokenizer, input_ids: torch.Tensor, new_tokens: int) -> dict:
    """One row: quantizes `model` in place as `WEIGHTS[name]` says, and measures it."""
    linears = {f"{fqn}.weight" for fqn, module in model.named_modules() if is_linear_layer(module, fqn)}
    clock = time.perf_counter()
    size = WEIGHTS[name].quantize(model)
    seconds = time.perf_counter() - clock
    linear_bytes = sum(row.bytes_after for row in size.rows if row.name in linears)
    linear_weights = sum(math.prod(row.shape) for row in size.rows if row.name in linears)
    with torch.inference_mode(), CountLinear() as counted:
        model(input_ids[None, :8])
    if counted.calls != (0 if name == "bf16" else len(linears)):
        raise RuntimeError(f"{name}: {counted.calls} of {len(linears)} linear layers ran rtn::linear")
    progress = partial(tqdm, desc=f"      {name}", unit="window", leave=False, disable=None)
    ppl = perplexity(model, input_ids, WINDOW, STRIDE, progress)
    generate(model, tokenizer, PROMPT, max_new_tokens=1)  # warms up
    written = generate(model, tokenizer, PROMPT, new_tokens)
    return {
        "weights": name,
        "model_bytes": size.bytes_after,
        "linear_bytes": linear_bytes,
        "linear_bits_per_weight": 8 * linear_bytes / linear_weights,
        "perplexity": ppl,
        "seconds": seconds,
        "tokens_per_second": written.tokens_per_second,
        "quantized_layers": counted.calls,
        "text": written.text,
    }


def at_least(lowest: int, text: str) -> int:
    value = int(text)
    if value < lowest:
        raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
    return value


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--tokens",
        type=partial(at_least, 2),
        default=8192,
        metavar="N",
        help="tokens of text to score (default: 8192)",
    )
    parser.add_argument(
        "--new-tokens",
        type=partial(at_least, 1),
        default=48,
        metavar="N",
        help="most tokens to generate (default: 48)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    about = machine()
    print(f"rtn-tensor on {about['cpu']}, {about['cores']} cores, torch {about['torch']}")
    how = (
        "Loading"
        if MODEL.exists() and TEXT.exists()
        else "Downloading (97 MB, once, into .cache) and loading"
    )
    print(f"[1/3] {how} SmolLM2-135M-Instruct and the text", flush=True)
    folder, text = smollm2(), state_of_the_union()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    # Ten characters are more than a token has on average, and all 12 million would take a while.
    input_ids = torch.tensor(tokenizer(text[: 10 * args.tokens])["input_ids"][: args.tokens])

    tokens = f"the first {input_ids.numel()} tokens of the State of the Union speeches"
    what = f"perplexity over {tokens}, and greedy decoding"
    print(f"[2/3] Measuring {what}", flush=True)
    rows = []
    for name in WEIGHTS:
        clock = time.perf_counter()
        rows.append(measure(name, copy.deepcopy(model), tokenizer, input_ids, args.new_tokens))
        layers = rows[-1]["quantized_layers"]
        ran = f", of which {rows[-1]['seconds']:.0f} to quantize {layers} layers" if layers else ""
        print(f"      {name}: {time.perf_counter() - clock:.0f} s{ran}", flush=True)

    print(
        "[3/3] Results (bits/weight: linear layers, with scales; perplexity: lower is better, window "
        f"{WINDOW}, stride {STRIDE})\n"
    )
    columns = {
        "model MB": lambda r: f"{r['model_bytes'] / 1e6:.1f}",
        "linears MB": lambda r: f"{r['linear_bytes'] / 1e6:.1f}",
        "bits/weight": lambda r: f"{r['linear_bits_per_weight']:.3f}",
        "perplexity": lambda r: f"{r['perplexity']:.3f}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
    }
    print(
        table(["weights", *columns], [[r["weights"], *(show(r) for show in columns.values())] for r in rows])
    )
    print()
    for name, weights in WEIGHTS.items():
        print(f"{name}: {weights.what}")
    print(f'\n"{PROMPT}"')
    for r in rows:
        print(f"  {r['weights']}: {' '.join(r['text'].split())}")
    seconds = time.perf_counter() - started
    print(f"\nTook {seconds:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps(
                {"machine": about, "tokens": input_ids.numel(), "rows": rows, "seconds": seconds}, indent=2
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
