"""Linear layers on the CPU: every kernel of ours, torch's own int4 and int8, torchao's, and the dense layer, in one run.

    python -m benchmarks.cpu_linear [--json FILE] [--shapes 4096x4096,...] [--tokens 1,4,...] [--threads 2] [--repeats 15]

Each call takes the next of several weights, which together do not fit the last-level cache, as the layers of a model would. The peers are
called in turn, and each ratio is the median over turns of dense time / own time, so that a slow moment of the machine hits all alike.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rtn_tensor
from benchmarks.machine import machine
from rtn_tensor.kernels import cpu
from rtn_tensor.tables import table

CACHE_BYTES = 128 << 20  # more than the last-level cache of the machines this runs on
SHAPES = "4096x4096,14336x4096,4096x14336,576x1536"
TOKENS = "1,4,8,16,32,64,256,512"


def streaming_read(threads: int) -> float:
    """Bytes per second of summing 256 MiB of int64, the plainest loop torch has."""
    data = torch.ones(32 << 20, dtype=torch.int64)
    data.sum()
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / statistics.median(seconds)


def aten_int4(w: Tensor) -> Callable[[Tensor], Tensor]:
    q = torch.randint(0, 16, w.shape, dtype=torch.int32)  # the speed does not depend on the values
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    scales = torch.full((w.shape[1] // 128, w.shape[0], 2), 0.01, dtype=w.dtype)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)


def aten_int8(w: Tensor) -> Callable[[Tensor], Tensor]:
    q, scale = torch.randint(-128, 127, w.shape, dtype=torch.int8), torch.full((w.shape[0],), 0.01, dtype=w.dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, q, scale)


def torchao_linear(config, w: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import quantize_

    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    quantize_(layer, config)
    return layer


def ours(bits: int, group_size: int, w: Tensor) -> Callable[[Tensor], Tensor]:
    q = rtn_tensor.RTNQuantizedTensor.from_float(w, bits, group_size)
    return lambda x: F.linear(x, q)


def contenders(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return {
        "dense": lambda w: lambda x: F.linear(x, w),
        "rtn int4 g128": partial(ours, 4, 128),
        "rtn int4 g32": partial(ours, 4, 32),
        "rtn int8 g128": partial(ours, 8, 128),
        "aten int4 g128": aten_int4,
        "aten int8": aten_int8,
        "torchao int4 g128": partial(torchao_linear, PrototypeInt4WeightOnlyConfig(group_size=128)),
        "torchao int8": partial(torchao_linear, Int8WeightOnlyConfig()),
    }


@torch.inference_mode()
def measure(dtype: torch.dtype, n: int, k: int, tokens: list[int], repeats: int) -> list[dict]:
    count = max(2, -(-CACHE_BYTES // (n * k // 2)))  # int4 weights are the smallest, and must not fit either
    layers: dict[str, list] = {}
    rows: list[dict] = []
    for name, make in contenders(dtype).items():
        weights = (torch.randn(n, k, dtype=dtype) for _ in range(count if "4" in name else max(2, count // 4)))
        layers[name] = [make(w) for w in weights]
    for m in tokens:
        x = torch.randn(m, k, dtype=dtype)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(repeats + 1):
            for name, some in layers.items():
                layer = some[turn % len(some)]
                started = time.perf_counter()
                layer(x)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        for name, own in seconds.items():
            ratio = statistics.median(d / s for d, s in zip(seconds["dense"], own, strict=True))
            rows.append(
                {"dtype": str(dtype)[6:], "N": n, "K": k, "M": m, "kernel": name, "seconds": statistics.median(own), "over_dense": ratio}
            )
    return rows


def show(rows: list[dict]) -> None:
    tokens = sorted({r["M"] for r in rows})
    for key in dict.fromkeys((r["dtype"], r["N"], r["K"]) for r in rows):
        mine = [r for r in rows if (r["dtype"], r["N"], r["K"]) == key]
        by = {(r["kernel"], r["M"]): r for r in mine}
        lines = [
            [name, *(f"{by[name, m]['over_dense']:.2f}" for m in tokens), f"{by[name, tokens[0]]['seconds'] * 1e3:.2f}"]
            for name in dict.fromkeys(r["kernel"] for r in mine)
        ]
        print(f"\n{key[0]}, weight [{key[1]}, {key[2]}]: times as fast as dense, by rows of x; and ms at M = {tokens[0]}")
        print(table(["kernel", *(f"M={m}" for m in tokens), "ms"], lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_linear", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=SHAPES, metavar="NxK,...", help=f"weights (default: {SHAPES})")
    parser.add_argument("--tokens", default=TOKENS, metavar="M,...", help=f"rows of x (default: {TOKENS})")
    parser.add_argument("--dtypes", default="bfloat16", metavar="DTYPE,...", help="of x and of the dense weight (default: bfloat16)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="T", help="default: one a core")
    parser.add_argument("--repeats", type=int, default=15, metavar="R", help="turns counted (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    read = streaming_read(args.threads)
    about = machine() | {"instruction_set": cpu.isa(), "streaming_read_GB_per_s": read / 1e9}
    print(
        f"{about['cpu']}, {args.threads} threads, torch {about['torch']}, {about['instruction_set']}; streaming read {read / 1e9:.1f} GB/s"
    )
    tokens = [int(m) for m in args.tokens.split(",")]
    rows = []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            n, k = map(int, shape.split("x"))
            some = measure(getattr(torch, dtype), n, k, tokens, args.repeats)
            show(some)
            rows += some
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "repeats": args.repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
