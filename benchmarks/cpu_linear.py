"""Linear layers on the CPU: every kernel of ours, torch's own int4 and int8, torchao's, and the dense layer,
in one run.

    python -m benchmarks.cpu_linear [--json FILE] [--shapes 4096x4096,...] [--tokens 1,4,...] [--dtypes
    bfloat16,...] [--only NAME ...] [--threads 2]

Each call takes the next of several weights, which together do not fit the last-level cache, as the layers of
a model would. The peers take turns, each with a few calls in a row, of which the first half, which find what
the peer before left behind, are not counted (after the dense layer, rtn int4 takes 0.62 ms at its first call
and 0.44 from the eighth on). A ratio is the median over turns of dense time / own time, so that a slow moment
of the machine hits all alike.

Then the way in: a layer so small that what Python does around the kernel is what is measured, layer by layer
    of the library.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rtn_tensor
from benchmarks.machine import add_threads, machine
from rtn_tensor import ops
from rtn_tensor.kernels import cpu
from rtn_tensor.text_table import table

CALLS = 12  # of a peer in one turn, unless they take longer than TURN
TURN = 0.5  # seconds
CACHE_BYTES = 128 << 20  # more than the last-level cache of the machines this runs on
SHAPES = "4096x4096,14336x4096,4096x14336,576x1536"
TOKENS = "1,4,8,16,32,64,256,512"
DTYPES = "bfloat16"


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
    q, scale = (
        torch.randint(-128, 127, w.shape, dtype=torch.int8),
        torch.full((w.shape[0],), 0.01, dtype=w.dtype),
    )
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, q, scale)


def torchao_linear(config, w: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import quantize_

    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    quantize_(layer, config)
    return layer


def ours(bits: int, group_size: int, w: Tensor, scale_method: str = "absmax") -> Callable[[Tensor], Tensor]:
    q = rtn_tensor.RTNQuantizedTensor.from_float(w, bits, group_size, scale_method)
    return lambda x: F.linear(x, q)


def contenders(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return {
        "dense": lambda w: lambda x: F.linear(x, w),
        "rtn int4 g128": partial(ours, 4, 128),
        "rtn int4 g64": partial(ours, 4, 64),
        "rtn int4 g32": partial(ours, 4, 32),
        "rtn int4 g128, zero points": partial(ours, 4, 128, scale_method="minmax"),
        "rtn int4 g32, 8-bit scales": partial(ours, 4, 32, scale_method="search8"),
        "rtn int8 g128": partial(ours, 8, 128),
        "aten int4 g128": aten_int4,
        "aten int8": aten_int8,
        "torchao int4 g128": partial(torchao_linear, PrototypeInt4WeightOnlyConfig(group_size=128)),
        "torchao int8": partial(torchao_linear, Int8WeightOnlyConfig()),
    }


def burst(layers: list, first: int, x: Tensor) -> list[float]:
    """Seconds of each of a few calls on the layers from `first` on, after as many that are not counted."""
    seconds: list[float] = []
    for i in range(CALLS):
        started = time.perf_counter()
        layers[(first + i) % len(layers)](x)
        seconds.append(time.perf_counter() - started)
        if i and sum(seconds) > TURN:
            break
    return seconds[len(seconds) // 2 :]


@torch.inference_mode()
def measure(
    dtype: torch.dtype, n: int, k: int, tokens: list[int], turns: int, only: Sequence[str] = ()
) -> list[dict]:
    layers: dict[str, list] = {}
    rows: list[dict] = []
    for name, make in contenders(dtype).items():
        if only and name not in ("dense", *only):
            continue
        bits = 4 if "int4" in name else 8 if "int8" in name else 8 * dtype.itemsize
        count = max(2, -(-8 * CACHE_BYTES // (n * k * bits)))
        layers[name] = [make(torch.randn(n, k, dtype=dtype)) for _ in range(count)]
    for m in tokens:
        x = torch.randn(m, k, dtype=dtype)
        seconds: dict[str, list[float]] = {name: [] for name in layers}  # one number a turn
        for turn in range(turns + 1):
            for name, some in layers.items():
                median = statistics.median(burst(some, turn * CALLS, x))
                if turn:
                    seconds[name].append(median)
        for name, own in seconds.items():
            ratio = statistics.median(d / s for d, s in zip(seconds["dense"], own, strict=True))
            rows.append(
                {
                    "dtype": str(dtype)[6:],
                    "N": n,
                    "K": k,
                    "M": m,
                    "kernel": name,
                    "seconds": statistics.median(own),
                    "over_dense": ratio,
                }
            )
    return rows


@torch.inference_mode()
def way_in(turns: int) -> dict[str, float]:
    """Microseconds of `F.linear` on a bf16 x [1, 576] and weight [576, 576], one thread; and of each of its
    parts."""
    w, x = torch.randn(576, 576, dtype=torch.bfloat16), torch.randn(1, 576, dtype=torch.bfloat16)
    q = rtn_tensor.RTNQuantizedTensor.from_float(w, 4, 128)
    planes = (q.qdata, q.scale, None, 4, 128)
    y = torch.empty(1, 576, dtype=torch.bfloat16)
    numbers = [1, 576, 576, 1, 4, 128, 1, 1, 576, 576, q.qdata.stride(0), 0, q.scale.stride(0), 0, 1]
    packed = cpu._LINEAR.pack(
        x.data_ptr(), q.qdata.data_ptr(), q.scale.data_ptr(), 0, y.data_ptr(), 0, *numbers
    )
    parts = {
        "dense F.linear": lambda: F.linear(x, w),
        "F.linear": lambda: F.linear(x, q),
        "ops.linear": lambda: ops.linear(x, *planes),
        "the kernel in Python": lambda: cpu.linear(x, *planes),
        "the C function": lambda: cpu.library().rtn_linear(packed),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(turns):
            for name, call in parts.items():
                started = time.perf_counter()
                for _ in range(500):
                    call()
                seconds[name].append((time.perf_counter() - started) / 500)
    finally:
        torch.set_num_threads(threads)
    return {name: 1e6 * statistics.median(own) for name, own in seconds.items()}


def show(rows: list[dict], read: float) -> None:
    tokens = sorted({r["M"] for r in rows})
    for key in dict.fromkeys((r["dtype"], r["N"], r["K"]) for r in rows):
        mine = [r for r in rows if (r["dtype"], r["N"], r["K"]) == key]
        by = {(r["kernel"], r["M"]): r for r in mine}
        lines = [
            [
                name,
                *(f"{by[name, m]['over_dense']:.2f}" for m in tokens),
                f"{by[name, tokens[0]]['seconds'] * 1e3:.3f}",
            ]
            for name in dict.fromkeys(r["kernel"] for r in mine)
        ]
        print(
            f"\n{key[0]}, weight [{key[1]}, {key[2]}]: times as fast as dense, by rows of x; and ms at M = "
            f"{tokens[0]}"
        )
        print(table(["kernel", *(f"M={m}" for m in tokens), "ms"], lines), flush=True)
        if (fastest := by.get(("rtn int4 g128", 1))) is not None:
            rate = key[1] * key[2] * (4 / 8 + getattr(torch, key[0]).itemsize / 128) / fastest["seconds"]
            print(
                f"rtn int4 g128 at M = 1 reads {rate / 1e9:.1f} GB/s of weights, {rate / read:.0%} of the "
                "streaming read"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_linear", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--shapes", default=SHAPES, metavar="NxK,...", help=f"weights (default: {SHAPES})")
    parser.add_argument("--tokens", default=TOKENS, metavar="M,...", help=f"rows of x (default: {TOKENS})")
    parser.add_argument(
        "--dtypes",
        default=DTYPES,
        metavar="DTYPE,...",
        help=f"of x and of the dense weight (default: {DTYPES})",
    )
    parser.add_argument(
        "--only", metavar="NAME", action="append", default=[], help="dense and this kernel; may repeat"
    )
    add_threads(parser)
    parser.add_argument("--turns", type=int, default=5, metavar="R", help="turns counted (default: 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    read = streaming_read(args.threads)
    about = machine() | {"instruction_set": cpu.isa(), "streaming_read_GB_per_s": read / 1e9}
    print(
        f"{about['cpu']}, {args.threads} threads, torch {about['torch']}, {about['instruction_set']}; "
        f"streaming read {read / 1e9:.1f} GB/s"
    )
    tokens = [int(m) for m in args.tokens.split(",")]
    rows = []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            n, k = map(int, shape.split("x"))
            some = measure(getattr(torch, dtype), n, k, tokens, args.turns, args.only)
            show(some, read)
            rows += some
    parts = way_in(args.turns)
    print("\nThe way in, bf16 x [1, 576] and weight [576, 576], 1 thread, each part with all below it")
    print(table(["", "us"], [[name, f"{us:.1f}"] for name, us in parts.items()]))
    if args.json:
        args.json.write_text(
            json.dumps({"machine": about, "turns": args.turns, "way_in_us": parts, "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
