"""Measures launch configurations of the Triton kernels on this GPU and writes the table that
`kernels/triton/config.py` reads."""

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rtn_tensor.formats import FORMATS, check_format, groups, or_default
from rtn_tensor.kernels import registry
from rtn_tensor.kernels.problem import bucket, device_of
from rtn_tensor.kernels.triton import config as configs
from rtn_tensor.kernels.triton.config import Config, Gpu, Shape, tuned_folder

Run = Callable[[], object]
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024)
CACHE_BYTES = 200 << 20  # twice the L2 of the GPUs there are
DENSE_ROWS = 256  # rows; with fewer, dequantizing first is not worth measuring


def candidates(shape: Shape, gpu: Gpu) -> list[Config]:
    """Configurations worth measuring: tiles around those of the rule, all that the kernels take and the GPU
    has the shared memory for."""
    m = shape.M
    blocks_m = (
        (16,)
        if m <= 16
        else (16, 32)
        if m <= 32
        else (32, 64)
        if m <= 64
        else (64, 128)
        if m <= 128
        else (128, 256)
    )
    found: dict[Config, None] = {}
    for block_m, block_n, block_k, scale_after in product(blocks_m, (64, 128), (64, 128, 256), (True, False)):
        if not configs.takes(block_k, shape.group_size, scale_after) or (
            not scale_after and configs.takes(block_k, shape.group_size, True) and m <= 16
        ):
            continue  # to scale the sums of 16 tokens is less work than the weights
        tiles, steps = -(-m // block_m) * -(-shape.N // block_n), -(-shape.K // block_k)
        warps = 8 if block_m * block_n >= 128 * 64 else 4
        for programs, stages in product((0, 1, 2, 4, 6), (2, 3, 4, 5)):  # programs a multiprocessor
            parts = configs.split(steps, min(gpu.processors * programs // tiles, 32))
            config = Config(block_m, block_n, block_k, parts, scale_after, warps, stages)
            if configs.fits(config, gpu, shape):
                found[config] = None
    return list(found)


def graph_seconds(run: Run) -> float:
    """Median seconds of `run`, replayed from a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    milliseconds: Any = do_bench_cudagraph(run, rep=10, return_mode="median")
    return milliseconds / 1e3


def fastest(
    measure: Callable[[Run], float],
    run: Callable[[Config | None], None],
    configs: list[Config | None],
    found: tuple[Config | None, float],
) -> tuple[Config | None, float]:
    """The fastest of `configs` and `found`, with its seconds. A configuration that Triton refuses is passed
    over."""
    for config in configs:
        try:
            seconds = measure(partial(run, config))
        except Exception as error:  # its compiler's and its launcher's share no base class
            if not type(error).__module__.startswith("triton"):
                raise
            continue
        if seconds < found[1]:
            found = config, seconds
    return found


def random_planes(
    n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device, copies: int
) -> list[tuple[Tensor, Tensor]]:
    """Any integers do for a measurement, but zeros would let the GPU run at a higher clock."""
    shape = n, FORMATS[bits].row_bytes(k)
    planes = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(copies)]
    return [
        (qdata, (torch.rand(n, groups(k, group_size), device=device) + 0.5).to(dtype)) for qdata in planes
    ]


def _check_writable(folder: Path) -> None:
    """Raises OSError where what is measured could not be written to `folder`, which need not be there yet."""
    there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise OSError(
            f"{there} is {'no folder' if not there.is_dir() else 'read-only'}; set RTN_TUNED to a "
            "folder that can be written"
        )


def tune(
    sizes: Iterable[tuple[int, int]],
    bits: int = 4,
    group_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokens: Iterable[int] = TOKENS,
    device: str | torch.device = "cuda",
    measure: Callable[[Run], float] = graph_seconds,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """Measures linear layers of `sizes` (N, K) for numbers of `tokens`, and writes what is fastest to
    `tuned_folder()`.

    Tokens count as the power of two that they round up to. Each measurement goes through as many copies of
    the weight as exceed the cache. What was in the table for other shapes stays.

    Returns:
        The rows written: the shape, its configuration (None: dequantize and multiply densely), its
            microseconds, and those of the rule.

    Raises:
        ValueError: there is no GPU for Triton, or the format is none.
    """
    group_size, scale_method = or_default(bits, group_size, None)
    check_format(bits, group_size, scale_method)
    if measure is graph_seconds and not (torch.cuda.is_available() and str(device).startswith("cuda")):
        raise ValueError(f"device={str(device)!r}: tuning measures kernels on a CUDA GPU, and there is none")
    device = device_of(device)
    tokens, sizes = list(tokens), list(sizes)
    if wrong := [
        m for m in (*tokens, *(side for size in sizes for side in size)) if type(m) is not int or m < 1
    ]:
        raise ValueError(f"{wrong[0]!r} among the sizes and tokens; both are whole numbers of 1 or more")
    _check_writable(tuned_folder())
    from rtn_tensor.kernels.triton import launch

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    gpu = launch.gpu_of(device)
    rows = []
    for (n, k), m in progress([(size, m) for size in sizes for m in sorted({bucket(m) for m in tokens})]):
        shape = Shape("linear", bits, group_size, dtype.itemsize, m, n, k)
        copies = 1 if device.type == "cpu" else min(64, 1 + CACHE_BYTES // (n * FORMATS[bits].row_bytes(k)))
        weights = random_planes(n, k, bits, group_size, dtype, device, copies)
        x, y = torch.randn(m, k, device=device).to(dtype), torch.empty(m, n, dtype=dtype, device=device)

        def run(
            config: Config | None,
            x: Tensor = x,
            y: Tensor = y,
            weights: list[tuple[Tensor, Tensor]] = weights,
        ) -> None:
            for qdata, scale in weights:
                if config is None:
                    F.linear(x, launch.dequantize(qdata, scale, bits, group_size, x.shape[1], x.dtype))
                else:
                    launch.launch_linear(x, qdata, scale, None, bits, group_size, config, y)

        rule = configs.by_rule(shape, gpu)
        before = measure(partial(run, rule))
        others: list[Config | None] = [*candidates(shape, gpu), *([None] if m >= DENSE_ROWS else [])]
        config, seconds = fastest(
            measure, run, [config for config in others if config != rule], (rule, before)
        )
        rows.append(
            {
                "shape": shape._asdict(),
                "config": None if config is None else config._asdict(),
                "microseconds": round(1e6 * seconds / copies, 2),
                "rule_microseconds": round(1e6 * before / copies, 2),
            }
        )
    write_table(gpu, rows)
    return rows


def write_table(gpu: Gpu, rows: list[dict[str, Any]]) -> None:
    """Adds `rows` to the table of `gpu` in `tuned_folder()`, over those of the same shapes."""
    folder = tuned_folder()
    file = folder / gpu.file_name
    configs.tuned_table.cache_clear()
    configs.tuned_table(gpu.file_name)  # raises where the file is not one of ours
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    new = [row["shape"] for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in [row for row in kept if row["shape"] not in new] + rows)
    partial = file.with_suffix(".partial")
    partial.write_text(
        f'{{"gpu": {json.dumps(gpu.name)}, "triton": {json.dumps(gpu.triton)}, "rows": [\n{lines}\n]}}\n'
    )
    partial.replace(file)
    configs.tuned_table.cache_clear()
    configs.configure.cache_clear()
    registry.forget()
