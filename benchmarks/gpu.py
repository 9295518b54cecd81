"""The Triton kernels on an NVIDIA GPU: whether they are right, and how fast, beside cuBLAS and the kernels of
other libraries.

    python benchmarks/gpu.py [--json FILE] [--seconds 540] [--only correctness,linear,...] [--shapes
    4096x4096,...] [--tokens 1,16,...]

What matters most is done first, and what there was no time for is said. All that runs on the GPU does so in
processes of its own; the peers that are not installed are left out. The exit status is 1 where a result is
wrong, 2 where there is no CUDA GPU.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# tests: for bounds.py.
sys.path[:0] = [str(path) for path in (ROOT, ROOT / "tests") if str(path) not in sys.path]

import torch  # noqa: E402

from benchmarks import gpu_check, gpu_check_jobs  # noqa: E402
from benchmarks.gpu_peers import CUBLAS, KERNELS, MODELS, MOE_KERNELS, installed  # noqa: E402
from benchmarks.gpu_report import MAIN, Results, compared, text, wrong  # noqa: E402
from benchmarks.gpu_workers import Budget, Job, Tell, Worker, run, run_together  # noqa: E402

SECTIONS = ("correctness", "linear", "moe", "model", "load")
SHAPES = "8192x8192,4096x4096,28672x8192,14336x4096,4096x14336,6144x4096"
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,4096"
MOE_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 4096)
CORRECTNESS = 0.4  # of the time, at most


def timing_jobs(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[Job]:
    """In order of importance."""

    def linear(shape: tuple[int, int], *kernels: str) -> Job:
        name = f"{shape[0]}x{shape[1]}, {', '.join(kernels) if len(kernels) == 1 else 'ours'}"
        arguments = {"shape": shape, "tokens": tokens, "kernels": [CUBLAS, *kernels]}
        return Job("linear", name, "benchmarks.gpu_time:linear", arguments, least=10, most=75)

    def speed(weights: str, batch: int, prompt: int = 0) -> Job:
        name = f"{weights}, {f'prefill of {prompt}' if prompt else f'decoding at batch {batch}'}"
        arguments = {"weights": weights, "batch": batch, "prompt": prompt}
        return Job("model", name, "benchmarks.gpu_model:speed", arguments, least=30, most=120)

    def moe(model: str) -> Job:
        kernels = [name for name, kernel in MOE_KERNELS.items() if installed(kernel)]
        arguments = {"model": model, "tokens": MOE_TOKENS, "kernels": kernels}
        return Job("moe", model, "benchmarks.gpu_time:moe", arguments, least=10, most=75)

    main = [shape for shape in MAIN if shape in shapes]
    others = [shape for shape in shapes if shape not in MAIN]
    ours = [name for name in KERNELS if name.startswith("rtn")]
    peers = [name for name, kernel in KERNELS.items() if name not in (CUBLAS, *ours) and installed(kernel)]
    return [
        *(linear(shape, *ours) for shape in main),
        *(speed(weights, 1) for weights in ("bf16", "int4 g128")),
        *(linear(shape, peer) for shape in main[:1] for peer in peers if "int4" in peer),
        *(moe(model) for model in MODELS),
        Job("load", "1 GB", "benchmarks.gpu_model:loading", {}, least=10, most=75),
        *(linear(shape, peer) for shape in main[:1] for peer in peers if "int8" in peer),
        *(linear(shape, *ours) for shape in others),
        speed("int8 g128", 1),
        *(linear(shape, peer) for shape in main[1:] for peer in peers),
        *(speed(weights, 16) for weights in ("bf16", "int4 g128")),
        *(speed(weights, 1, 2048) for weights in ("bf16", "int4 g128", "int8 g128")),
        speed("int8 g128", 16),
        *(linear(shape, peer) for shape in others for peer in peers),
    ]


def no_results() -> Results:
    lists: dict[str, list] = {
        name: [] for name in ("linear", "moe", "model", "load", "errors", "skipped", "jobs", "targets")
    }
    return {"machine": {}, "ceilings": {}, "correctness": {"passed": 0, "skipped": 0, "failed": []}, **lists}


def short(value: Any) -> Any:
    """Floats to five digits, in all that is nested."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    return [short(each) for each in value] if isinstance(value, (list, tuple)) else value


def write(results: Results, file: Path) -> None:
    """JSON with a row a line."""
    parts = []
    for key, value in short(results).items():
        rows = ",\n".join(json.dumps(row) for row in value) if isinstance(value, list) else ""
        parts.append(f"{json.dumps(key)}: " + (f"[\n{rows}\n]" if rows else json.dumps(value)))
    file.write_text("{" + ",\n".join(parts) + "}\n")


def into(results: Results, file: Path | None = None) -> Tell:
    """Puts what is told in its place in `results`, prints what one wants to see at once, and writes `file`
    after each job."""

    def tell(job: Job, kind: str, what: Any) -> None:
        about = {"section": job.section, "name": job.name}
        if kind == "row" and job.section == "correctness":
            correctness = results["correctness"]
            if "skipped" in what:
                correctness["skipped"] += 1
            elif what["error"] is None:
                correctness["passed"] += 1
            else:
                correctness["failed"].append(what)
                print(f"WRONG: {what['check']}: {what['error']}", flush=True)
        elif kind == "row":
            target = results[job.section]
            target.update(what) if isinstance(target, dict) else target.append(what)
        elif kind == "done":
            results["jobs"].append(about | {"seconds": round(what, 1)})
            if job.section != "correctness":
                print(f"{job.section}, {job.name}: {what:.0f} s", flush=True)
            if file:
                write(results, file)
        else:
            results["errors" if kind == "error" else "skipped"].append(
                about | {"error" if kind == "error" else "why": what}
            )
            print(f"{job.section}, {job.name}: {kind}: {what}", flush=True)

    return tell


def sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not sizes as 4096x4096,8192x8192 (out_features x in_features)"
        )
    return [(int(match[1]), int(match[2])) for match in found if match]


def numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers of rows as 1,16,256")
    return [int(part) for part in text.split(",")]


def sections(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no section; use {', '.join(SECTIONS)}")
    return parts


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write all numbers (default: benchmarks/results/gpu-NAME.json)",
    )
    parser.add_argument(
        "--seconds", type=float, default=540, metavar="S", help="for everything (default: 540)"
    )
    parser.add_argument(
        "--only",
        type=sections,
        default=SECTIONS,
        metavar="SECTION,...",
        help=f"of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--shapes", type=sizes, default=SHAPES, metavar="NxK,...", help=f"weights (default: {SHAPES})"
    )
    parser.add_argument(
        "--tokens", type=numbers, default=TOKENS, metavar="M,...", help=f"rows of x (default: {TOKENS})"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here that this torch can use; nothing was measured.", file=sys.stderr)
        return 2
    budget, results, worker = Budget(args.seconds), no_results(), Worker()
    run(
        [Job("machine", "about", "benchmarks.gpu_time:about", {}, least=0, most=60)],
        worker,
        budget,
        into(results),
    )
    name = re.sub("[^A-Za-z0-9]+", "-", results["machine"].get("gpu", "unknown")).strip("-")
    file = args.json or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    tell = into(results, file)
    if "correctness" in args.only:
        workers = [Worker(gpu_check.ENVIRONMENT) for _ in range(max(1, min(12, (os.cpu_count() or 1) - 2)))]
        part = Budget(CORRECTNESS * budget.left() if len(args.only) > 1 else budget.left())
        run_together(gpu_check_jobs.jobs(args.shapes, args.tokens, MOE_TOKENS), workers, part, tell)
        print(
            f"correctness: {results['correctness']['passed']} checks passed, {budget.left():.0f} s left",
            flush=True,
        )
    if set(args.only) & {"linear", "moe"}:
        run(
            [Job("ceilings", "copy and product", "benchmarks.gpu_time:ceilings", {}, least=0, most=60)],
            worker,
            budget,
            tell,
        )
    run(
        [job for job in timing_jobs(args.shapes, args.tokens) if job.section in args.only],
        worker,
        budget,
        tell,
    )
    worker.stop()
    results["targets"] = compared(results)
    results["seconds"] = round(args.seconds - budget.left(), 1)
    write(results, file)
    print(f"\n{text(results)}\n\n{results['seconds']:.0f} s; all numbers are in {file}")
    return 1 if wrong(results) else 0


if __name__ == "__main__":
    sys.exit(main())
