"""Memory over time while a checkpoint is loaded and quantized: streamed by `load`, or float first.

    python -m benchmarks.memory [--json FILE] [--layers 8] [--threads 2]

The checkpoint is `benchmarks.load`'s, a Llama of random bf16 weights, in shards; each way is a process of its
own, sampled while it runs. "Anonymous" memory is the process's own. "Resident" memory counts pages of mapped
files, too, which the system can take back.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.load import bf16, make_checkpoint
from benchmarks.machine import add_threads, machine
from rtn_tensor import load, quantize_, report, rtn_int4
from rtn_tensor.kernels import cpu

INTERVAL = 0.005
INT4 = rtn_int4(128, "absmax")


def float_first(folder: str):
    model = bf16(folder)
    quantize_(model, INT4, filter_fn=but_lm_head)
    return model


def copied_first(folder: str):
    """As where the weights come from a pickle, from another dtype or from training: the float model is in
    memory, and no map of files."""
    model = bf16(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    quantize_(model, INT4, filter_fn=but_lm_head)
    return model


def but_lm_head(module: torch.nn.Module, name: str) -> bool:
    """What `load` quantizes."""
    return isinstance(module, torch.nn.Linear) and name != "lm_head"


WAYS: dict[str, Callable] = {
    "load(folder, int4)": lambda folder: load(folder, INT4),
    "float weights in memory, then quantize_": copied_first,
    "float weights mapped, then quantize_": float_first,
}


def memory() -> tuple[int, int]:
    """Bytes of anonymous memory, and of all that is resident."""
    status = Path("/proc/self/status").read_text()
    anonymous, resident = (
        1024 * int(status.partition(f"{key}:")[2].split()[0]) for key in ("RssAnon", "VmRSS")
    )
    return anonymous, resident


def measure(way: str, folder: str) -> dict:
    """Samples (seconds, bytes of anonymous memory, bytes of resident memory), both above what the process had
    before."""
    import transformers
    from transformers import LlamaForCausalLM  # noqa: F401  (imports what every way needs)

    transformers.utils.logging.disable_progress_bar()
    torch.ones(512, 512).bfloat16() @ torch.ones(512, 512).bfloat16()
    before, samples, done = memory(), [], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            now = memory()
            samples.append([round(time.perf_counter() - started, 4), now[0] - before[0], now[1] - before[1]])

    started = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = WAYS[way](folder)
    seconds = time.perf_counter() - started
    time.sleep(4 * INTERVAL)  # so that a sample is of the finished model
    done.set()
    watcher.join()
    return {"way": way, "seconds": seconds, "weights": report(model).bytes_after, "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--layers", type=int, default=8, metavar="L", help="of the model (default: 8, 1.1 GB)"
    )
    add_threads(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the samples, the machine and the versions there"
    )
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(Path(folder), args.layers)
        for way in WAYS:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.memory",
                "--one",
                way,
                folder,
                "--threads",
                str(args.threads),
            ]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(found.splitlines()[-1]))
            most = [max(sample[i] for sample in rows[-1]["samples"]) / 1e6 for i in (1, 2)]
            print(
                f"{way:>40}  {rows[-1]['seconds']:6.2f} s, MB at most: anonymous {most[0]:6,.0f}, resident "
                f"{most[1]:6,.0f}",
                flush=True,
            )
    if args.json:
        about = machine() | {"instruction_set": cpu.isa()}
        args.json.write_text(json.dumps({"machine": about, "bytes": size, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
