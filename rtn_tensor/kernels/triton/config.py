"""Launch configurations: from a table of measured ones, else by rule.

The table is JSON, a file for each GPU and Triton version: those shipped in `tuned/` beside this file, and
over them those that `rtn-tensor tune` wrote to `tuned_folder()`. Nothing is ever measured inside a user's
call.
"""

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rtn_tensor.kernels.problem import Problem, bucket

SHIPPED = Path(__file__).with_name("tuned")


class Config(NamedTuple):
    """How `linear_kernel` and `grouped_kernel` are launched. Sizes are of a program's tile: tokens, rows and
    columns of the weight."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int  # programs that share a tile
    scale_after: bool  # scale fp32 sums, weights exact; else round q * S to the dtype of x first
    num_warps: int
    num_stages: int


class Shape(NamedTuple):
    """What a configuration is chosen by. M is the number of rows (of an expert, on average) rounded up to a
    power of two."""

    op: str  # "linear" or "grouped"
    bits: int
    group_size: int
    itemsize: int  # of the activations as they are multiplied, in bytes
    M: int
    N: int
    K: int


def shape_of(problem: Problem) -> Shape:
    rows = bucket(-(-problem.M // (problem.experts or 1)))
    itemsize = 1 if problem.int8_x else problem.dtype.itemsize
    return Shape(problem.op, problem.bits, problem.group_size, itemsize, rows, problem.N, problem.K)


class Gpu(NamedTuple):
    name: str
    processors: int  # streaming multiprocessors
    shared_memory: int  # bytes that a program may have
    triton: str  # Triton's version, "major.minor"

    @property
    def file_name(self) -> str:
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.name).strip('-')}-triton-{self.triton}.json"


def tuned_folder() -> Path:
    """Where `rtn-tensor tune` writes and this reads: `RTN_TUNED`, or rtn-tensor in the user's cache
    folder."""
    if folder := os.environ.get("RTN_TUNED"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtn-tensor"


@lru_cache
def tuned_table(file_name: str) -> dict[Shape, Config | None]:
    """What was measured on a GPU: `None` where dequantizing the weight and multiplying it densely was faster.

    Raises:
        ValueError: a file is not what `rtn-tensor tune` writes.
    """
    found: dict[Shape, Config | None] = {}
    for folder in (SHIPPED, tuned_folder()):
        file = folder / file_name
        if not file.exists():
            continue
        try:
            for row in json.loads(file.read_text())["rows"]:
                found[Shape(**row["shape"])] = None if row["config"] is None else Config(**row["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a table that `rtn-tensor tune` writes ({error}); delete it, or tune again"
            ) from error
    return found


def takes(block_k: int, group_size: int, scale_after: bool) -> bool:
    """Whether the kernels can take steps of `block_k` columns: their sums are scaled where a group is a whole
    number of steps, the weights where a step is at most four groups, or four times the 32 columns that are
    always of one group."""
    if group_size == -1 or scale_after:
        return scale_after and group_size % block_k in (0, block_k - 1)
    unit = block_k if group_size % block_k == 0 else group_size if block_k % group_size == 0 else 32
    return block_k <= 4 * unit


def shared_memory(config: Config, shape: Shape) -> int:
    """Bytes of the tiles of x and of the weight in flight."""
    return (
        config.num_stages
        * config.block_k
        * (config.block_n * shape.bits // 8 + config.block_m * shape.itemsize)
    )


def fits(config: Config, gpu: Gpu, shape: Shape) -> bool:
    return shared_memory(config, shape) <= gpu.shared_memory


def split(steps: int, parts: int) -> int:
    """At most `parts`, so that each of them has some of the `steps`."""
    return -(-steps // -(-steps // max(1, min(parts, steps))))


# Dequantizing first moves 2.5 more bytes per weight, 56 us for [8192, 8192] on an H100, which a tile kernel
# at 80 % of the dense one loses to from some 1150 rows on. By calculation: not measured yet.
DENSE_FROM = 2048


def by_rule(shape: Shape, gpu: Gpu) -> Config | None:
    """A configuration that the compiler makes well of on Hopper (see tests/kernels/test_triton_sass.py),
    sized to the GPU. Not measured yet."""
    m, n, k = (max(size, 1) for size in (shape.M, shape.N, shape.K))
    if shape.itemsize == 1:
        # A step is four pieces. Their integer sums need as many registers as the others, and so do the
        # addresses of gathered rows.
        config = Config(min(max(m, 16), 64 if shape.op == "linear" else 32), 64, 128, 1, True, 4, 3)
    elif shape.itemsize == 4:  # no tensor cores for exact fp32
        config = Config(16 if m <= 16 else 32, 64, 32, 1, takes(32, shape.group_size, True), 4, 2)
    elif m <= 64:
        # While the weights are what takes the time: steps of at least 64 bytes of a row, sums scaled where
        # groups allow it.
        block_k = 128
        block_m = 16 if m <= 16 else 32 if m <= 32 else 64
        wide = block_m == 64 and n > 64
        config = Config(
            block_m,
            128 if wide else 64,
            block_k,
            1,
            takes(block_k, shape.group_size, True),
            8 if wide else 4,
            3 if wide else 4,
        )
    elif shape.op == "linear" and m >= DENSE_FROM:
        return None
    else:
        # The largest tile where there is one for every multiprocessor, and wgmma, which has x in shared
        # memory: with mma.sync it spills. Rows of y that begin anywhere are stored element by element, and
        # past 64 tokens there are not enough registers for that.
        large = gpu.shared_memory > 200_000 and m > 128 and -(-m // 256) * -(-n // 128) >= gpu.processors
        block_m = 64 if n % 16 else 256 if large else 128
        config = Config(block_m, 128, 64, 1, shape.group_size == -1, 8, 3 if block_m == 256 else 4)
    while config.num_stages > 1 and not fits(config, gpu, shape):
        config = config._replace(num_stages=config.num_stages - 1)
    if shape.op == "grouped":
        return config
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    # Programs of 4 warps and 16 tokens: four and more fit a multiprocessor and keep enough loads in flight;
    # fewer of the large ones.
    wanted = gpu.processors * (4 if config.block_m <= 32 else 2 if config.block_m == 64 else 1)
    steps = -(-k // config.block_k)
    return config._replace(split_k=split(steps, min(wanted // tiles, steps // 4, 16)))


@lru_cache(maxsize=4096)
def configure(shape: Shape, gpu: Gpu) -> Config | None:
    """The configuration to launch with; None: dequantize, then multiply densely."""
    measured = tuned_table(gpu.file_name)
    return measured[shape] if shape in measured else by_rule(shape, gpu)
