"""Linear layers on the CPU: every kernel of ours, torch's own int4 and int8, torchao's, and the dense layer,
in one run; and those of OpenVINO and ONNX Runtime, which round activations to int8 unless told not to.

    python -m benchmarks.cpu_linear [--engines PYTHON] [--json FILE] [--shapes 4096x4096,...] [--tokens
    1,2,...] [--dtypes bfloat16,...] [--only NAME ...] [--threads 2]

PYTHON is an interpreter that has `openvino`, `onnxruntime` and `onnx`. Each engine answers from a process of
its own (`benchmarks/linear_engines.py`), which waits while the others run.

Each call takes the next of several weights, which together do not fit the last-level cache, as the layers of
a model would. The peers take turns, each with a few calls in a row, of which the first half, which find what
the peer before left behind, are not counted (after the dense layer, rtn int4 takes 0.62 ms at its first call
and 0.44 from the eighth on). A ratio is the median over turns of dense time / own time, so that a slow moment
of the machine hits all alike. Each time is that of a call from Python, with what the engine does around the
product.

Then the way in: a layer so small that what Python does around the kernel is what is measured, layer by layer
    of the library.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rtn_tensor
from benchmarks.answers import Peer
from benchmarks.bursts import CALLS, burst, weights_past_cache
from benchmarks.machine import add_threads, machine
from rtn_tensor import ops
from rtn_tensor.kernels import cpu
from rtn_tensor.text_table import table

SHAPES = "4096x4096,14336x4096,4096x14336,576x1536"
TOKENS = "1,2,4,8,16,32,64,128,256,512"
DTYPES = "bfloat16"
DENSE = "dense"
INT8_ACTIVATIONS = ", int8 activations"  # ends the name of ours that have them
ENGINE = "OpenVINO"  # as it runs by default, what int8 activations of ours are compared with
ENGINES = (ENGINE, "OpenVINO, int8 in groups of 128", "OpenVINO, bf16 activations", "ONNX Runtime")
REST = 0.1  # seconds before each peer, as the threads of another process spin on for up to half of that


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


def ours(
    bits: int, group_size: int, w: Tensor, scale_method: str = "absmax", activations: str | None = None
) -> Callable[[Tensor], Tensor]:
    about = (bits, group_size, scale_method)
    q = rtn_tensor.RTNQuantizedTensor.from_float(w, *about, activations=activations)
    return lambda x: F.linear(x, q)


def contenders(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return {
        DENSE: lambda w: lambda x: F.linear(x, w),
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
        # The last, so that little time passes between them and the engines.
        f"rtn int8 g128{INT8_ACTIVATIONS}": partial(ours, 8, 128, activations="int8"),
        f"rtn int4 g128{INT8_ACTIVATIONS}": partial(ours, 4, 128, activations="int8"),
    }


def engine(name: str, python: str, n: int, k: int) -> Peer:
    """To be asked for the median seconds of a burst, by rows of x and the first layer."""
    script = str(Path(__file__).with_name("linear_engines.py"))
    return Peer(name, [python, script, name, *map(str, (n, k, torch.get_num_threads()))])


def of_engine(peer: Peer, x: Tensor, first: int) -> float:
    return peer.number(f"{len(x)} {first}")


def of_layers(layers: list, x: Tensor, first: int) -> float:
    return statistics.median(burst(layers, first, x))


@torch.inference_mode()
def measure(
    dtype: torch.dtype,
    n: int,
    k: int,
    tokens: list[int],
    turns: int,
    only: Sequence[str] = (),
    engines: str | None = None,
) -> list[dict]:
    """`engines` is an interpreter that has them."""
    runs: dict[str, Callable[[Tensor, int], float]] = {}
    rows: list[dict] = []
    with ExitStack() as processes:
        for name, make in contenders(dtype).items():
            if only and name not in (DENSE, *only):
                continue
            bits = 4 if "int4" in name else 8 if "int8" in name else 8 * dtype.itemsize
            weights = (torch.randn(n, k, dtype=dtype) for _ in range(weights_past_cache(n, k, bits)))
            runs[name] = partial(of_layers, [make(w) for w in weights])
        versions = {}
        for name in ENGINES if engines else ():
            if only and name not in only:
                continue
            peer = processes.enter_context(closing(engine(name, engines, n, k)))
            runs[name], versions[name] = partial(of_engine, peer), peer.version
        for m in tokens:
            x = torch.randn(m, k, dtype=dtype)
            seconds: dict[str, list[float]] = {name: [] for name in runs}  # one number a turn
            for turn in range(turns + 1):
                for name, run in runs.items():
                    if versions:
                        time.sleep(REST)
                    own = run(x, turn * CALLS)
                    if turn:
                        seconds[name].append(own)
            for name, own in seconds.items():
                row = {
                    "dtype": str(dtype)[6:],
                    "N": n,
                    "K": k,
                    "M": m,
                    "kernel": name,
                    "seconds": statistics.median(own),
                    "least_seconds": min(own),  # of its best turn
                    "over_dense": over(seconds[DENSE], own),
                }
                if name.endswith(INT8_ACTIVATIONS) and ENGINE in seconds:
                    row["over_openvino"] = over(seconds[ENGINE], own)
                if name in versions:
                    row["version"] = versions[name]
                rows.append(row)
    return rows


def over(others: list[float], own: list[float]) -> float:
    """How many times as fast as the other, in the median turn."""
    return statistics.median(other / s for other, s in zip(others, own, strict=True))


@torch.inference_mode()
def way_in(turns: int) -> dict[str, float]:
    """Microseconds of `F.linear` on a bf16 x [1, 576] and weight [576, 576], one thread; and of each of its
    parts."""
    w, x = torch.randn(576, 576, dtype=torch.bfloat16), torch.randn(1, 576, dtype=torch.bfloat16)
    q = rtn_tensor.RTNQuantizedTensor.from_float(w, 4, 128)
    planes = (q.qdata, q.scale, None, 4, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = {
        "dense F.linear": lambda: F.linear(x, w),
        "F.linear": lambda: F.linear(x, q),
        "ops.linear": lambda: ops.linear(x, *planes),
        "the kernel in Python": lambda: cpu.linear(x, *planes),
        "the C function": c_function(x, planes),
    }
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


def c_function(x: Tensor, planes: tuple) -> Callable[[], Tensor]:
    """What `cpu.linear` calls, with the arguments that it packs."""
    packed = []
    pack = cpu._LINEAR.pack
    recorder = SimpleNamespace(pack=lambda *numbers: packed.append(pack(*numbers)) or packed[-1])
    with mock.patch.object(cpu, "_LINEAR", recorder):
        y = cpu.linear(x, *planes)

    def call() -> Tensor:
        cpu.library().rtn_linear(packed[0])
        return y  # which the arguments point to

    return call


def show(rows: list[dict], read: float) -> None:
    for key in dict.fromkeys((r["dtype"], r["N"], r["K"]) for r in rows):
        mine = [r for r in rows if (r["dtype"], r["N"], r["K"]) == key]
        print(f"\n{key[0]}, weight [{key[1]}, {key[2]}], by rows of x")
        show_column(mine, "times as fast as dense", lambda r: f"{r['over_dense']:.2f}")
        compared = [r for r in mine if "over_openvino" in r]
        if compared:
            show_column(compared, f"times as fast as {ENGINE}", lambda r: f"{r['over_openvino']:.2f}")
        show_column(mine, "us", lambda r: f"{1e6 * r['seconds']:.0f}")
        show_column(mine, "us at best", lambda r: f"{1e6 * r['least_seconds']:.0f}")
        fastest = next((r for r in mine if (r["kernel"], r["M"]) == ("rtn int4 g128", 1)), None)
        if fastest is not None:
            rate = key[1] * key[2] * (4 / 8 + getattr(torch, key[0]).itemsize / 128) / fastest["seconds"]
            print(
                f"rtn int4 g128 at M = 1 reads {rate / 1e9:.1f} GB/s of weights, {rate / read:.0%} of the "
                "streaming read"
            )


def show_column(rows: list[dict], what: str, cell: Callable[[dict], str]) -> None:
    """What each kernel reached, by rows of x."""
    tokens = sorted({r["M"] for r in rows})
    by = {(r["kernel"], r["M"]): cell(r) for r in rows}
    lines = [[name, *(by[name, m] for m in tokens)] for name in dict.fromkeys(r["kernel"] for r in rows)]
    print("\n" + table([what, *(f"M={m}" for m in tokens)], lines), flush=True)


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
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="dense and this kernel or engine; may repeat",
    )
    parser.add_argument(
        "--engines",
        metavar="PYTHON",
        help="an interpreter with openvino, onnxruntime and onnx; bfloat16 only",
    )
    add_threads(parser)
    parser.add_argument("--turns", type=int, default=5, metavar="R", help="turns counted (default: 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    args = parser.parse_args()
    if args.engines and args.dtypes != "bfloat16":
        parser.error(f"--engines measures --dtypes bfloat16, not {args.dtypes}")
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
            some = measure(getattr(torch, dtype), n, k, tokens, args.turns, args.only, args.engines)
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
