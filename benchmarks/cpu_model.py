"""SmolLM2-135M end to end on the CPU: prefill of 512 tokens and greedy decoding at batch 1, over a static cache, eager and compiled.

    python -m benchmarks.cpu_model [--llama PYTHON] [--json FILE] [--threads 2] [--new-tokens 48] [--runs 5]

Every linear layer is quantized, and the embedding, which is lm_head too. PYTHON is an interpreter that has `llama-cpp-python`, for
llama.cpp's numbers from the same weights. Compiling takes some minutes a row.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
import warnings
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.machine import machine
from benchmarks.real_model import smollm2, smollm2_gguf
from rtn_tensor import quantize_, rtn_int4, rtn_int8
from rtn_tensor.evaluate import decode
from rtn_tensor.kernels import cpu
from rtn_tensor.tables import table

CONFIGS = {"bf16": None, "int8 g128": rtn_int8(group_size=128), "int4 g128": rtn_int4(group_size=128), "int4 g32": rtn_int4(group_size=32)}
PROMPT = 512


def seconds_a_token(model, new_tokens: int, compile: bool) -> float:
    """The median over the tokens after the first two, which warm up."""
    times = []
    for _ in islice(decode(model, torch.arange(100, 132)[None], new_tokens, compile), new_tokens):
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(times[2:], times[3:], strict=False))


@torch.inference_mode()
def prefill(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits


def measure(name: str, new_tokens: int, runs: int) -> dict:
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()
    if (config := CONFIGS[name]) is not None:
        quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear | nn.Embedding))
    row: dict = {"weights": name}
    ids = torch.arange(100, 100 + PROMPT)[None]
    for compile in (False, True):
        how = "compiled" if compile else "eager"
        seconds_a_token(model, new_tokens, compile)
        row[f"decode {how}"] = 1 / statistics.median(seconds_a_token(model, new_tokens, compile) for _ in range(runs))
        run = torch.compile(prefill, fullgraph=True) if compile else prefill
        run(model, ids)
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            run(model, ids)
            times.append(time.perf_counter() - started)
        row[f"prefill {how}"] = PROMPT / statistics.median(times)
        print(f"      {name}, {how}: prefill {row[f'prefill {how}']:.0f}, decode {row[f'decode {how}']:.1f} tokens/s", flush=True)
    return row


def llama_cpp(python: str, threads: int, new_tokens: int, runs: int) -> dict:
    script = str(Path(__file__).with_name("llama_cpp_model.py"))
    command = [python, script, str(smollm2_gguf()), *map(str, (threads, PROMPT, new_tokens, runs))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python} could not measure llama.cpp:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_model", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama", metavar="PYTHON", help="an interpreter with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="T", help="default: one a core")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="tokens to generate (default: 48)")
    parser.add_argument("--runs", type=int, default=5, metavar="R", help="of which the median is taken (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    about = machine() | {"instruction_set": cpu.isa()}
    print(f"SmolLM2-135M, {about['cpu']}, {args.threads} threads, torch {about['torch']}, {about['instruction_set']}", flush=True)
    llama = llama_cpp(args.llama, args.threads, args.new_tokens, args.runs) if args.llama else None
    rows = [measure(name, args.new_tokens, args.runs) for name in CONFIGS]
    columns = ["prefill eager", "prefill compiled", "decode eager", "decode compiled"]
    lines = [[r["weights"], *(f"{r[c]:.1f}" for c in columns)] for r in rows]
    for name, result in llama["results"].items() if llama else ():
        lines.append([f"llama.cpp {name}", f"{result['prefill']:.1f}", "", f"{result['decode']:.1f}", ""])
    print(f"\nTokens per second; prefill of {PROMPT} tokens, decoding after 32\n")
    print(table(["weights", *columns], lines))
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "runs": args.runs, "rows": rows, "llama_cpp": llama}, indent=1) + "\n")


if __name__ == "__main__":
    main()
