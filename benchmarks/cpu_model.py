"""SmolLM2-135M end to end on the CPU: prefill of 512 tokens, eager, and greedy decoding at batch 1, by transformers and compiled.

    python -m benchmarks.cpu_model [--llama PYTHON] [--json FILE] [--threads 2] [--new-tokens 48] [--runs 5]

Every linear layer is quantized, and the embedding, which is lm_head too. PYTHON is an interpreter that has `llama-cpp-python`, for
llama.cpp's numbers from the same weights. Compiling takes some minutes a row. transformers' own loop is the eager one.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
import warnings
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

CONFIGS = {"bf16": None, "int8 g128": rtn_int8(group_size=128), "int4 g32": rtn_int4(group_size=32)}
PROMPT = 512


def decode_by_transformers(model, new_tokens: int) -> float:
    """Tokens per second of `generate` with the cache that it takes by itself."""
    ids = torch.arange(100, 132)[None]
    started = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    return (out.shape[1] - ids.shape[1]) / (time.perf_counter() - started)


def decode_compiled(model, new_tokens: int) -> float:
    """Tokens per second, from the median over the tokens after the first two."""
    times = []
    for _ in decode(model, torch.arange(100, 132)[None], new_tokens, compile=True):
        times.append(time.perf_counter())
    return 1 / statistics.median(b - a for a, b in zip(times[2:], times[3:], strict=False))


def prefill(model, _: int) -> float:
    """Tokens of a prompt per second."""
    started = time.perf_counter()
    model(torch.arange(100, 100 + PROMPT)[None], use_cache=False, logits_to_keep=1)
    return PROMPT / (time.perf_counter() - started)


MEASURES = {"prefill eager": prefill, "decode eager": decode_by_transformers, "decode compiled": decode_compiled}


@torch.inference_mode()
def measure(name: str, new_tokens: int, runs: int) -> dict:
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()
    if (config := CONFIGS[name]) is not None:
        quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear | nn.Embedding))
    row: dict = {"weights": name}
    for what, run in MEASURES.items():
        run(model, new_tokens)
        row[what] = statistics.median(run(model, new_tokens) for _ in range(runs))
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
    rows = []
    for name in CONFIGS:
        rows.append(measure(name, args.new_tokens, args.runs))
        print("      " + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else v for k, v in rows[-1].items()), flush=True)
    lines = [[r["weights"], *(f"{r[c]:.1f}" for c in MEASURES)] for r in rows]
    for name, result in llama["results"].items() if llama else ():
        lines.append([f"llama.cpp {name}", f"{result['prefill']:.1f}", f"{result['decode']:.1f}", ""])
    print(f"\nTokens per second; prefill of {PROMPT} tokens, decoding after 32\n")
    print(table(["weights", *MEASURES], lines))
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "runs": args.runs, "rows": rows, "llama_cpp": llama}, indent=1) + "\n")


if __name__ == "__main__":
    main()
