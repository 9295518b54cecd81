"""What int8 activations cost in accuracy: how far the outputs of quantized models move with them.

    python -m benchmarks.int8_activations [--model NAME ...] [--threads 2] [--json FILE]

The models, texts, clips and measures are those of `benchmarks.four_bits`; what the outputs are compared with
is not the float model but the same quantized one, its activations as they are. All in fp32, so that no other
rounding is in it.
"""

import argparse
import warnings
from typing import Any

import torch
import transformers

from benchmarks.four_bits import CASES, exact, keep
from benchmarks.machine import add_kept_json, add_threads
from rtn_tensor import RTNConfig, rtn_int4, rtn_int8, set_activations_

WEIGHTS = {"int4 g64": rtn_int4(), "int8 g128": rtn_int8()}


@torch.inference_mode()
def row(model: str, config: RTNConfig) -> dict[str, Any]:
    case = CASES[model](config=config)
    rounds = case.load().float().eval()
    set_activations_(rounds, "int8")
    found = case.measure(rounds)
    before = case.measure(exact(case.load()))
    return found | {f"{name}_before": value for name, value in before.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.int8_activations", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=CASES, action="append", help="only this; may repeat")
    add_threads(parser)
    add_kept_json(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    for model in args.model or CASES:
        for weights, config in WEIGHTS.items():
            made = {"model": model, "weights": weights, **row(model, config)}
            print(
                ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in made.items()), flush=True
            )
            if args.json:
                keep(args.json, made, "weights")


if __name__ == "__main__":
    main()
