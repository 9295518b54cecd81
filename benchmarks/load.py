"""Loading a checkpoint and quantizing it on the way: ours, and transformers with torchao's configs, from the
same files.

    python -m benchmarks.load [--json FILE] [--layers 18] [--threads 2] [--runs 3]

The checkpoint is a Llama of random bf16 weights (2.1 GB), in shards. Each load is a process of its own.
Memory is anonymous memory: pages of the files, which the system can take back, are not counted. Beside them
stands what the machine can do: reading the files from end to end, and quantizing weights that lie in memory.
With root's rights the files are also read from the disk, not from its cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.machine import add_threads, machine
from rtn_tensor import RTNQuantizedTensor, load, report, rtn_int4, rtn_int8
from rtn_tensor.kernels import cpu
from rtn_tensor.text_table import table


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes the model, a shard at a time; bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "vocab_size": 32000,
        "num_hidden_layers": layers,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(p.nbytes for p in model.parameters())


def by_transformers(config: Callable) -> Callable:
    def run(folder: str):
        from transformers import AutoModelForCausalLM, TorchAoConfig

        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=TorchAoConfig(config())
        )

    return run


def bf16(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def torchao_int4():  # the one int4 of torchao's that runs on a CPU
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig()


WAYS = {
    "rtn_tensor.load int4": lambda folder: load(folder, rtn_int4(128, "absmax")),
    "rtn_tensor.load int8": lambda folder: load(folder, rtn_int8()),
    "transformers, rtn_int4": by_transformers(partial(rtn_int4, 128, "absmax")),
    "transformers, torchao int4": by_transformers(torchao_int4),
    "transformers, torchao int8": by_transformers(torchao_int8),
    "transformers, bf16": bf16,
}


def anonymous() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


def measure(way: str, folder: str) -> dict[str, float]:
    """Seconds, and bytes of anonymous memory: at the highest, and at the end, above those at the start."""
    import transformers
    from transformers import LlamaForCausalLM, TorchAoConfig  # noqa: F401  (imports what every way needs)

    transformers.utils.logging.disable_progress_bar()
    torch.ones(512, 512).bfloat16() @ torch.ones(512, 512).bfloat16()
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = WAYS[way](folder)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "peak": peak - before,
        "finished": anonymous() - before,
        "weights": report(model).bytes_after,
    }


def in_a_process(way: str, folder: Path, threads: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.load",
        "--one",
        way,
        str(folder),
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sequential_read(folder: Path) -> float:
    """Bytes per second of reading the shards from end to end, 16 MiB at a time."""
    buffer, total, started = memoryview(bytearray(16 << 20)), 0, time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started)


def quantize_throughput() -> float:
    """bf16 bytes per second of `copy_` into int4 weights, 16 MiB at a time, from memory."""
    w = torch.randn(64, 2048, 4096).bfloat16()
    q = RTNQuantizedTensor.empty(2048, 4096)
    started = time.perf_counter()
    for part in w:
        q.copy_(part)
    return w.nbytes / (time.perf_counter() - started)


def drop_caches() -> bool:
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--layers", type=int, default=18, metavar="L", help="of the model (default: 18, 2.1 GB)"
    )
    add_threads(parser)
    parser.add_argument(
        "--runs", type=int, default=3, metavar="R", help="of which the median is taken (default: 3)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    about = machine() | {"instruction_set": cpu.isa()}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = make_checkpoint(folder, args.layers)
        sequential_read(folder)
        can = {"cached read": [], "quantize": []}
        cold = drop_caches()
        if cold:
            can["disk read"] = []
        results: dict[str, list[dict[str, float]]] = {
            f"{way}{how}": [] for way in WAYS for how in ("", *([", disk"] if cold else []))
        }
        for _ in range(args.runs):
            if cold:
                drop_caches()
                can["disk read"].append(sequential_read(folder))
            can["cached read"].append(sequential_read(folder))
            can["quantize"].append(quantize_throughput())
            for way in WAYS:
                results[way].append(in_a_process(way, folder, args.threads))
                if cold:
                    drop_caches()
                    results[f"{way}, disk"].append(in_a_process(way, folder, args.threads))
                    sequential_read(folder)
    throughput = {what: statistics.median(values) for what, values in can.items()}
    for way, runs in results.items():
        rows.append({"way": way} | {key: statistics.median(run[key] for run in runs) for key in runs[0]})
    about["GB_per_s"] = {what: value / 1e9 for what, value in throughput.items()}
    print(
        f"Loading {size / 1e9:.2f} GB of bf16, {about['cpu']}, {args.threads} threads, torch {about['torch']}"
    )
    print("; ".join(f"{what} {value / 1e9:.2f} GB/s" for what, value in throughput.items()) + "\n")
    lines = []
    for row in rows:
        possible = min(
            throughput["quantize"], throughput["disk read" if row["way"].endswith("disk") else "cached read"]
        )
        speed = size / row["seconds"]
        memory = [f"{row[key] / 1e6:,.0f}" for key in ("finished", "peak")]
        lines.append(
            [row["way"], f"{row['seconds']:.2f}", f"{speed / 1e9:.2f}", f"{speed / possible:.0%}", *memory]
        )
    print(table(["way", "seconds", "GB/s", "of read or quantize", "memory MB after", "at most"], lines))
    if args.json:
        args.json.write_text(
            json.dumps({"machine": about, "runs": args.runs, "bytes": size, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
