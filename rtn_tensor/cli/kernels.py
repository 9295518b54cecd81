"""`rtn-tensor explain` and `tune`."""

import argparse
from typing import Any

from torch import nn

from rtn_tensor.cli.models import DTYPE_NAMES, local, selects
from rtn_tensor.cli.screen import progress
from rtn_tensor.integrations.transformers.folders import empty_model
from rtn_tensor.kernels.registry import explain
from rtn_tensor.text_table import table
from rtn_tensor.tuning import tune, tuned_folder


def run_explain(args: argparse.Namespace) -> tuple[Any, str]:
    result = explain(
        op=args.op,
        device=args.device,
        dtype=DTYPE_NAMES[args.dtype],
        bits=args.bits,
        group_size=args.group_size,
        activations=args.activations,
        M=args.m,
        N=args.n,
        K=args.k,
    )
    return result.to_dict(), str(result)


def run_tune(args: argparse.Namespace) -> tuple[Any, str]:
    sizes = list(args.size)
    for path in args.model:
        chosen = selects(model := empty_model(local(path)), False)
        sizes += [
            tuple(m.weight.shape)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and chosen(m, name)
        ]
    if not sizes:
        raise ValueError("nothing to tune for; name a model's folder with --model, or sizes with --size")
    rows = tune(
        dict.fromkeys(sizes),
        args.bits,
        args.group_size,
        DTYPE_NAMES[args.dtype],
        args.tokens,
        args.device,
        progress=progress("Tuning"),
    )
    cells = [
        [
            f"[{row['shape']['N']}, {row['shape']['K']}]",
            str(row["shape"]["M"]),
            f"{row['microseconds']:.1f}",
            f"{row['rule_microseconds']:.1f}",
        ]
        for row in rows
    ]
    return rows, table(["weight", "tokens", "us", "us before"], cells) + f"\nwritten to {tuned_folder()}"
