"""vLLM's latency and throughput: bf16, this library's int8 and int4, and vLLM's own int4 from a GPTQ
checkpoint of the same weights.

    python -m benchmarks.serving [--json FILE] [--model FOLDER] [--batches 1 4 8 16] [--input 256]
                                 [--output 32] [--runs 5] [--gpu]

To be run where vLLM is installed (`make test-serving` makes such an environment for CPUs, .venv-vllm). Each
row is a process of its own, and what it measures is what `vllm bench latency` does: prompts of 256 tokens, 32
more of each, all at once. The model is SmolLM2-135M; with --gpu it is --model, and the setting is that of
vLLM's pull request 26051 (Llama-3.1-8B on one H100: bf16 .236/.260/.284/.336 s at batches of 1/4/8/16, int4
.139/.180/.230/.331 s).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gptq_checkpoint import GROUP_SIZE, write_gptq
from benchmarks.machine import machine
from benchmarks.real_model import smollm2
from rtn_tensor.text_table import table

# No quotation marks in the names: Inductor writes the command line into its code.
CONFIGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 by vLLM (GPTQ)": {"gptq": True},
}


def measure(name: str, model: Path, batches: list[int], input: int, output: int, runs: int) -> list[dict]:
    """Seconds of a whole batch, by its size; and how many tokens per second it put out."""
    from vllm import LLM, SamplingParams

    asked = CONFIGS[name]
    config = {"quant_method": "rtn", "group_size": GROUP_SIZE, **asked}
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": config}} if "bits" in asked else {}
    # No prefix is kept: each run computes its prompts anew.
    llm = LLM(
        str(model),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        seed=0,
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    prompts = torch.randint(
        100, 10000, (max(batches), input), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = []
    for batch in batches:
        seconds = []
        for _ in range(runs + 1):
            started = time.perf_counter()
            llm.generate([{"prompt_token_ids": ids} for ids in prompts[:batch]], sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[1:])
        speed = {"seconds": median, "fastest": min(seconds[1:]), "tokens_per_second": batch * output / median}
        rows.append({"weights": name, "batch": batch, **speed})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 4, 8, 16],
        metavar="B",
        help="prompts at once (default: 1 4 8 16)",
    )
    parser.add_argument(
        "--input", type=int, default=256, metavar="N", help="tokens of each prompt (default: 256)"
    )
    parser.add_argument("--output", type=int, default=32, metavar="N", help="tokens after it (default: 32)")
    parser.add_argument(
        "--runs", type=int, default=5, metavar="R", help="of which the median is taken (default: 5)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    parser.add_argument("--gpu", action="store_true", help="on a GPU, of --model")
    parser.add_argument("--only", choices=CONFIGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gpu and args.model is None:
        parser.error("--gpu needs --model, as meta-llama/Llama-3.1-8B in a folder")
    model = args.model or smollm2()
    if args.only:
        print(
            "\nROWS "
            + json.dumps(measure(args.only, model, args.batches, args.input, args.output, args.runs)),
            flush=True,
        )
        return
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not args.gpu:
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, asked in CONFIGS.items():
            folder = model
            if asked.get("gptq"):
                folder = Path(work) / "gptq"
                write_gptq(model, folder, torch.bfloat16)
            command = [
                sys.executable,
                "-m",
                "benchmarks.serving",
                "--only",
                name,
                "--model",
                str(folder),
                "--batches",
                *map(str, args.batches),
            ]
            command += ["--input", str(args.input), "--output", str(args.output), "--runs", str(args.runs)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            found = [
                line.removeprefix("ROWS ") for line in done.stdout.splitlines() if line.startswith("ROWS ")
            ]
            if not found:
                raise SystemExit(f"{name}:\n{done.stdout}\n{done.stderr}")
            rows += json.loads(found[0])
            print(
                f"{name}: " + ", ".join(f"{row['seconds']:.3f} s" for row in json.loads(found[0])), flush=True
            )
    headers = ["weights", *(f"batch {batch}" for batch in args.batches)]
    lines = [[name, *(f"{row['seconds']:.3f}" for row in rows if row["weights"] == name)] for name in CONFIGS]
    print(f"\nSeconds for {args.input} tokens in and {args.output} out\n\n{table(headers, lines)}")
    if args.json:
        engine = next(name for name in ("vllm", "vllm-cpu") if _version(name))
        about = (
            machine()
            | {engine: _version(engine)}
            | ({"gpu": torch.cuda.get_device_name()} if args.gpu else {})
        )
        setting = {
            "model": model.name,
            "input": args.input,
            "output": args.output,
            "group_size": GROUP_SIZE,
            "runs": args.runs,
        }
        args.json.write_text(json.dumps({"machine": about, **setting, "rows": rows}, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
