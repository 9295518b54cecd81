"""One GPTQ checkpoint on a CPU, by each engine that reads it: prefill of 512 tokens, and decoding at batch 1.

    python -m benchmarks.gptq_checkpoint [--gptqmodel PYTHON] [--vllm PYTHON] [--threads 2] [--runs 5]
                                         [--json FILE]

The checkpoint is SmolLM2-135M-Instruct as `export` writes it: int4, groups of 64, of a model in bfloat16 and
of one in float16. This library keeps its integers and scales, and runs it by transformers, eager, and
compiled as `rtn-tensor generate` does. PYTHON is an interpreter that has GPTQModel and optimum, for
transformers' own way, or vLLM.
Each engine is a process of its own, and they run in turn.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.answers import Peer
from benchmarks.gptq_engine import ENGINES
from benchmarks.machine import add_threads, machine
from benchmarks.real_model import smollm2
from rtn_tensor import export, load, rtn_int4
from rtn_tensor.text_table import table

PROMPT, SHORT, NEW = 512, 32, 32  # tokens
MEASURES = ("prefill", "decode")
GROUP_SIZE = 64  # which divides SmolLM2's 576 columns, as GPTQ's format wants
VLLM = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def write_gptq(model: Path, to: Path, dtype: torch.dtype) -> None:
    """The folder `to`: the weights that this library's int4 gives, as a GPTQ checkpoint."""
    export(load(model, rtn_int4(GROUP_SIZE), dtype=dtype), to, "gptq")


def engine(name: str, python: str, folder: Path, threads: int) -> Peer:
    """A process that runs the checkpoint; see `gptq_engine.py`."""
    script = str(Path(__file__).with_name("gptq_engine.py"))
    bind = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    return Peer(name, [python, script, name, str(folder), str(threads)], os.environ | VLLM | bind)


def turn(engine: Peer) -> dict[str, float]:
    """Tokens per second, prefill and decoding."""

    def seconds(prompt: int, new: int) -> float:
        return engine.number(f"{prompt} {new}")

    one, more = seconds(SHORT, 1), seconds(SHORT, 1 + NEW)
    return {"prefill": PROMPT / seconds(PROMPT, 1), "decode": NEW / (more - one)}


def measure(dtype: str, pythons: dict[str, str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one checkpoint: each engine's median of the turns but the first."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "gptq"
        write_gptq(smollm2(), folder, getattr(torch, dtype))
        engines = [engine(name, python, folder, args.threads) for name, python in pythons.items()]
        turns = [{peer.name: turn(peer) for peer in engines} for _ in range(args.runs + 1)][1:]
        for peer in engines:
            peer.close()
    return [
        {"dtype": dtype, "engine": peer.name, "version": peer.version}
        | {what: statistics.median(each[peer.name][what] for each in turns) for what in MEASURES}
        for peer in engines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gptq_checkpoint", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="an interpreter with GPTQModel and optimum")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter with vLLM")
    add_threads(parser)
    parser.add_argument(
        "--runs", type=int, default=5, metavar="R", help="of which the median is taken (default: 5)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    args = parser.parse_args()
    of_package = {"rtn_tensor": sys.executable, "GPTQModel": args.gptqmodel, "vLLM": args.vllm}
    pythons = {name: of_package[re.split("[ ,]", name)[0]] for name in ENGINES}
    rows = [
        row
        for dtype in ("bfloat16", "float16")
        for row in measure(dtype, {name: python for name, python in pythons.items() if python}, args)
    ]
    print(f"Tokens per second: prefill of {PROMPT}, and decoding after {SHORT}\n")
    words = ("dtype", "engine", "version")
    lines = [[*(row[word] for word in words), *(f"{row[what]:.1f}" for what in MEASURES)] for row in rows]
    print(table([*words, *MEASURES], lines))
    if args.json:
        about = {"machine": machine(), "model": "SmolLM2-135M-Instruct", "group_size": GROUP_SIZE}
        about |= {"prompt": PROMPT, "new_tokens": NEW, "runs": args.runs, "threads": args.threads}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
