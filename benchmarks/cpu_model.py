"""SmolLM2-135M end to end on the CPU: prefill of 512 tokens and greedy decoding at batch 1, eager (by
transformers) and compiled.

    python -m benchmarks.cpu_model [--llama PYTHON] [--json FILE] [--threads 2] [--new-tokens 48] [--runs 5]

Every linear layer is quantized, and the embedding, which is lm_head too. PYTHON is an interpreter that has
`llama-cpp-python`, for llama.cpp's numbers from the same weights, in turn with ours. Compiling takes some
minutes a row.
"""

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.answers import Peer
from benchmarks.machine import add_threads, machine
from benchmarks.real_model import smollm2, smollm2_gguf
from rtn_tensor import quantize_, rtn_int4, rtn_int8
from rtn_tensor.evaluation.decoding import Decoder
from rtn_tensor.kernels import cpu
from rtn_tensor.text_table import table

Run = Callable[[], float]  # tokens per second
CONFIGS = {
    "bf16": (None, "BF16"),
    "int8 g128": (rtn_int8(group_size=128), "Q8_0"),
    "int8 g128, int8 activations": (rtn_int8(group_size=128, activations="int8"), "Q8_0"),
    "int4 g32": (rtn_int4(32, "absmax"), "Q4_0"),
    "int4 g32, int8 activations": (rtn_int4(32, "absmax", "int8"), "Q4_0"),
}
PROMPT = 512


def decode_by_transformers(model, new_tokens: int) -> Run:
    """`generate`, with the cache that it takes by itself."""
    ids = torch.arange(100, 132)[None]

    def run() -> float:
        started = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        return (out.shape[1] - ids.shape[1]) / (time.perf_counter() - started)

    return run


def decode_compiled(model, new_tokens: int) -> Run:
    """From the median over the tokens after the first two."""
    ids = torch.arange(100, 132)[None]
    decoder = Decoder(model, ids.shape[1] + new_tokens, compile=True)

    def run() -> float:
        times = [time.perf_counter() for _ in decoder(ids)]
        return 1 / statistics.median(b - a for a, b in zip(times[2:], times[3:], strict=False))

    return run


def prefill(model, _: int, compiled: bool = False) -> Run:
    ids = torch.arange(100, 100 + PROMPT)[None]
    forward = torch.compile(model) if compiled else model

    def run() -> float:
        started = time.perf_counter()
        forward(ids, use_cache=False, logits_to_keep=1)
        return PROMPT / (time.perf_counter() - started)

    return run


MEASURES = {
    "prefill eager": prefill,
    "prefill compiled": functools.partial(prefill, compiled=True),
    "decode eager": decode_by_transformers,
    "decode compiled": decode_compiled,
}


def llama_cpp(python: str, threads: int, new_tokens: int) -> Peer:
    """llama.cpp, by an interpreter that has it; it is asked as in "decode Q4_0"."""
    script = str(Path(__file__).with_name("llama_cpp_model.py"))
    return Peer("llama.cpp", [python, script, str(smollm2_gguf()), *map(str, (threads, PROMPT, new_tokens))])


@torch.inference_mode()
def measure(name: str, new_tokens: int, runs: int, llama: Peer | None) -> list[dict]:
    """Medians over `runs`, ours and llama.cpp's in turn, after one of each."""
    config, peer = CONFIGS[name]
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()
    if config is not None:
        quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear | nn.Embedding))
    rows = []
    for what, prepare in MEASURES.items():
        ours = prepare(model, new_tokens)
        peers = {"ours": ours} | (
            {"llama.cpp": lambda what=what: llama.number(f"{what.split()[0]} {peer}")} if llama else {}
        )
        turns = [{who: run() for who, run in peers.items()} for _ in range(runs + 1)][1:]
        rows.append(
            {"weights": name, "what": what, "peer": peer}
            | {who: statistics.median(t[who] for t in turns) for who in peers}
        )
        print(
            "      " + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else v for k, v in rows[-1].items()),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_model", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--llama", metavar="PYTHON", help="an interpreter with llama-cpp-python")
    add_threads(parser)
    parser.add_argument(
        "--new-tokens", type=int, default=48, metavar="N", help="tokens to generate (default: 48)"
    )
    parser.add_argument(
        "--runs", type=int, default=5, metavar="R", help="of which the median is taken (default: 5)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    about = machine() | {"instruction_set": cpu.isa()}
    print(
        f"SmolLM2-135M, {about['cpu']}, {args.threads} threads, torch {about['torch']}, "
        f"{about['instruction_set']}",
        flush=True,
    )
    llama = llama_cpp(args.llama, args.threads, args.new_tokens) if args.llama else None
    rows = [row for name in CONFIGS for row in measure(name, args.new_tokens, args.runs, llama)]
    headers = ["weights", "what", "ours", *(["llama.cpp", "its weights", "ratio"] if llama else [])]
    print(f"\nTokens per second; prefill of {PROMPT} tokens, decoding after 32\n")
    lines = [[r["weights"], r["what"], f"{r['ours']:.1f}"] for r in rows]
    if llama:
        lines = [
            [*line, f"{r['llama.cpp']:.1f}", r["peer"], f"{r['ours'] / r['llama.cpp']:.2f}"]
            for line, r in zip(lines, rows, strict=True)
        ]
    print(table(headers, lines))
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "machine": about,
                    "runs": args.runs,
                    "llama_cpp": llama.version if llama else None,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
