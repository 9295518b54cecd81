"""What a number was measured on."""

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> dict:
    """The CPU, and the versions that a number depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    versions = {name: version(name) for name in ("torch", "torchao", "transformers")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


def add_kept_json(parser: argparse.ArgumentParser) -> None:
    """The argument by which a benchmark is told of a file that it adds its rows to."""
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write each row there when it is done; others in it are kept",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The argument by which a benchmark is told how many threads to take."""
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), metavar="T", help="default: one per core"
    )
