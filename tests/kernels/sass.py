"""What Triton's compilers make of our kernels for GPUs that are not here; test_triton_sass.py says what it
has to be.

A `Case` is a call of a launcher of kernels/triton/launch.py, made with the kernels replaced: what is compiled
is what a GPU would have been given, from the tile to which sizes are known to be multiples of 16.
"""

import heapq
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from rtn_tensor.formats import FORMATS, groups
from rtn_tensor.kernels.problem import bucket
from rtn_tensor.kernels.triton import grouped_kernel, int8_kernel, launch, linear_kernel, planes_kernel
from rtn_tensor.kernels.triton.config import SHIPPED, Config, Gpu, Shape, configure, tuned_table
from rtn_tensor.reference import ACTIVATIONS

VERSION = ".".join(triton.__version__.split(".")[:2])
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        linear_kernel.linear_kernel,
        linear_kernel.linear_dx_kernel,
        grouped_kernel.grouped_kernel,
        grouped_kernel.grouped_dx_kernel,
        int8_kernel.int8_rows_kernel,
        planes_kernel.quantize_kernel,
        planes_kernel.dequantize_kernel,
    )
}

# --------------------------------------------------------------------------- what is called

# zero: with zero points. int8: with int8 activations.
LINEAR = ("linear", "linear_bias", "linear_autocast", "linear_zero")
# An MoE layer's products: gate and up with each activation, and down; few: of so few rows that they are not
# sorted.
GROUPED = (
    "grouped",
    "grouped_zero",
    *(f"gate_up_{name}" for name in ACTIVATIONS),
    "down",
    "few_gate_up",
    "few_down",
)
INT8 = (
    "linear_int8",
    "linear_int8_zero",
    "grouped_int8",
    "grouped_int8_zero",
    "gate_up_silu_int8",
    "few_down_int8",
)
BACKWARD = ("linear_dx", "grouped_dx", "linear_dx_zero", "grouped_dx_zero")
PLANES = ("quantize", "quantize_signed", "quantize_search", "quantize_minmax")
PLANES += ("int8_rows", "int8_rows_zero", "dequantize", "embedding", "dequantize_zero", "embedding_zero")
EXPERTS, TOP_K = 8, 4


class Case(NamedTuple):
    arch: int  # compute capability, 90 for 9.0
    gpu: Gpu
    how: str  # one of the above
    bits: int
    group_size: int
    dtype: torch.dtype
    M: int  # rows; of an expert, on average
    N: int
    K: int

    @property
    def shape(self) -> Shape:
        op = "linear" if self.how.startswith("linear") else "grouped"
        rows = 1 if self.how.startswith("few") else self.M
        itemsize = 1 if self.how in INT8 else self.dtype.itemsize
        return Shape(op, self.bits, self.group_size, itemsize, bucket(rows), self.N, self.K)

    @property
    def tile(self) -> Config | None:
        if self.how in PLANES:
            return None
        if self.how in BACKWARD:
            block_m, block_n, block_k, warps, stages = launch.dx_blocks(self.M, self.dtype)
            return Config(block_m, block_n, block_k, 1, False, warps, stages)
        return configure(self.shape, self.gpu)

    def __str__(self) -> str:
        dtype, tile = str(self.dtype).removeprefix("torch."), self.tile
        name = (
            f"sm{self.arch}-{self.how}-{dtype}-int{self.bits}-g{self.group_size}-{self.M}x{self.N}x{self.K}"
        )
        if tile is None:
            return name
        name += f"-tile{tile.block_m}x{tile.block_n}x{tile.block_k}w{tile.num_warps}s{tile.num_stages}"
        return f"{name}-split{tile.split_k}" if tile.split_k > 1 else name


def call(case: Case) -> None:
    _, _, how, bits, group_size, dtype, m, n, k = case
    # torch.empty's memory costs nothing until it is touched.
    q = torch.empty(n, FORMATS[bits].row_bytes(k), dtype=torch.uint8)
    scale = torch.empty(n, groups(k, group_size), dtype=torch.float32 if how == "linear_autocast" else dtype)
    x, dy, w = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype), torch.empty(n, k, dtype=dtype)
    planes = q.expand(EXPERTS, -1, -1), scale.expand(EXPERTS, -1, -1)
    zero = torch.empty(scale.shape, dtype=torch.int8) if how.endswith("_zero") else None
    zeros = None if zero is None else zero.expand(EXPERTS, -1, -1)
    int8_x = how in INT8
    how = how.removesuffix("_zero").removesuffix("_int8")
    rows = m * EXPERTS
    row_x, token_x = torch.empty(rows, k, dtype=dtype), torch.empty(rows // TOP_K, k, dtype=dtype)
    offs, pairs = torch.empty(EXPERTS, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
    experts, router = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    if how in ("linear", "linear_autocast"):
        launch.linear(x, q, scale, None, bits, group_size, zero, int8_x)
    elif how == "linear_bias":
        launch.linear(x, q, scale, torch.empty(n, dtype=dtype), bits, group_size)
    elif how == "linear_dx":
        launch.linear_dx(dy, q, scale, bits, group_size, k, zero)
    elif how == "grouped":
        launch.grouped(row_x, *planes, offs, bits, group_size, zeros, int8_x)
    elif how.startswith("gate_up"):
        activation = how.removeprefix("gate_up_")
        bias = None if activation == "silu" else torch.empty(EXPERTS, n, dtype=dtype)
        routing = experts, pairs, offs, None, TOP_K, activation
        launch.routed(token_x, *planes, bias, *routing, bits, group_size, int8_x=int8_x)
    elif how == "down":
        launch.routed(row_x, *planes, None, experts, pairs, offs, router, 1, "", bits, group_size)
    elif how == "few_gate_up":
        launch.routed(token_x, *planes, None, experts, None, None, None, TOP_K, "silu", bits, group_size)
    elif how == "few_down":
        routing = experts, None, None, router, 1, ""
        launch.routed(row_x, *planes, None, *routing, bits, group_size, int8_x=int8_x)
    elif how == "grouped_dx":
        launch.grouped_dx(torch.empty(rows, n, dtype=dtype), *planes, offs, bits, group_size, k, zeros)
    elif how == "int8_rows":
        launch.activations(x, bits, zero, Config(16, 64, 128, 1, True, 4, 3), True)
    elif how.startswith("quantize"):
        launch.quantize(w, bits, group_size, how.partition("_")[2] or "absmax", dtype)
    elif how == "dequantize":
        launch.dequantize(q, scale, bits, group_size, k, dtype, zero)
    else:
        launch.embedding(pairs, q, scale, bits, group_size, k, zero)


# ------------------------------------------------------------------- which calls there are

# A GPU of each compute capability. No table is for this version of Triton, so they are given what `by_rule`
# says.
GPUS = {
    80: Gpu("NVIDIA A100-SXM4-80GB", 108, 166912, ""),
    89: Gpu("NVIDIA GeForce RTX 4090", 128, 101376, ""),
    90: Gpu("NVIDIA H100 80GB HBM3", 132, 232448, ""),
    100: Gpu("NVIDIA B200", 148, 232448, ""),
}
BITS, GROUP_SIZES, M = tuple(FORMATS), (32, 64, 96, 128, 256, -1), tuple(1 << i for i in range(11))
# Few tiles and many, one row, sizes that are no multiple of 16, steps along K that are full and that are not,
# enough of them to split.
SIZES = [(1, 64), (1, 4128), (100, 1000), (100, 14360), (4096, 4096), (28668, 64), (28668, 1000)]
SIZES += [(28672, 64), (28672, 4096), (28672, 14360)]


def cases(arch: int, hows: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """One for each specialisation of the kernels, and some more."""
    found = {}
    for how, bits, group_size, dtype, m, (n, k) in product(hows, BITS, GROUP_SIZES, dtypes, M, SIZES):
        if "gate_up" in how and n % 2 or m > 1 and (how in PLANES or how.startswith("few")):
            continue
        case = Case(arch, GPUS[arch], how, bits, group_size, dtype, m, n, k)
        found.setdefault(features(case), case)
    return list(found.values())


def tuned_cases() -> list[Case]:
    """Those of the tables that the package has for this version of Triton."""
    found = []
    for file in sorted(SHIPPED.glob(f"*-triton-{VERSION}.json")):
        gpu = Gpu(file.stem.removesuffix(f"-triton-{VERSION}"), 0, 0, VERSION)
        assert gpu.file_name == file.name
        arch = next(
            arch
            for name, arch in (("H100", 90), ("H200", 90), ("GH200", 90), ("A100", 80), ("B200", 100))
            if name in gpu.name
        )
        for shape, config in tuned_table(file.name).items():
            hows = LINEAR[:1] if shape.op == "linear" else GROUPED[:1]
            dtypes = [torch.float32] if shape.itemsize == 4 else [torch.bfloat16, torch.float16]
            found += [
                Case(arch, gpu, how, *shape[1:3], dtype, *shape[4:])
                for how, dtype in product(hows, dtypes)
                if config
            ]
    return found


def features(case: Case) -> tuple[tuple[str, Any], ...]:
    """All that a specialisation depends on: each of these is a constant in the kernel, or is where others are
    made from."""
    tile = case.tile
    if tile is None:
        tiled = ()
    else:
        block = ("tile", (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages))
        even_k = ("even K", case.how not in BACKWARD and case.K % tile.block_k == 0)
        tiled = block, ("scale after", tile.scale_after), ("split", tile.split_k > 1), even_k
    return (
        ("how", case.how),
        ("bits", case.bits),
        ("group_size", case.group_size),
        ("dtype", case.dtype),
        ("16 | K", case.K % 16 == 0),
        ("16 | N", 1 if case.N == 1 else case.N % 16 == 0),
        *tiled,
    )


def cover(cases: list[Case], strength: int) -> list[Case]:
    """Some of the cases, in which every `strength` features that occur together in one of them all do so."""
    together = [set(combinations(f, min(strength, len(f)))) for f in map(features, cases)]
    covered, chosen = set(), []
    queue = [(-len(sets), i) for i, sets in enumerate(together)]
    heapq.heapify(queue)
    while queue:  # greedily; what a case adds only shrinks, so it is counted again only when it comes up
        _, i = heapq.heappop(queue)
        together[i] -= covered
        if together[i] and queue and -len(together[i]) > queue[0][0]:
            heapq.heappush(queue, (-len(together[i]), i))
        elif together[i]:
            covered |= together[i]
            chosen.append(cases[i])
    return chosen


# ------------------------------------------------------------------------ what is launched


class Launch(NamedTuple):
    """A specialised kernel: all that machine code is made from, but for the GPU."""

    kernel: Any
    signature: dict[str, str]  # argument -> type, or "constexpr"
    constants: dict[tuple[int, ...], Any]  # by position
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def constexprs(self) -> dict[str, Any]:
        names = list(self.signature)
        return {names[position]: value for (position,), value in self.constants.items()}


@cache
def _binder(kernel: Any) -> tuple[Any, Any]:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialised(kernel: Any, *args: Any, **kwargs: Any) -> Launch:
    """By the functions with which Triton's JIT does it."""
    backend, bind = _binder(kernel)
    bound, kinds, _ = bind(*args, **kwargs)
    _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, kinds, None)
    return Launch(
        kernel,
        signature,
        constants,
        attributes,
        {name: v for name, v in kwargs.items() if name not in kernel.arg_names},
    )


@contextmanager
def recorded(gpu: Gpu, kernels: dict[str, Any] = KERNELS, asm: bool = True):
    """A list that fills with what is launched in the block, with configurations for `gpu`; nothing runs."""
    launches = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launches.append(specialised(self.kernel, *args, **kwargs))

    before = dict(vars(launch))
    vars(launch).update(
        {name: Recorder(kernel) for name, kernel in kernels.items()}, gpu_of=lambda _: gpu, asm=lambda _: asm
    )
    try:
        yield launches
    finally:
        vars(launch).update(before)


def launched(case: Case, **changes: Any) -> Launch:
    with recorded(case.gpu, **changes) as launches:
        call(case)
    # Activations are rounded first.
    assert len(launches) == 1 + (case.how in INT8)
    return launches[-1]


# ------------------------------------------------------------------------ what is compiled


class Code(NamedTuple):
    registers: int
    stack: int  # bytes of a thread's memory, where registers are spilled to
    shared: int  # bytes of shared memory
    all: list[str]  # instructions
    loops: list[list[str]]  # those of each innermost loop with matrix instructions


def compiled(made: Launch, target: GPUTarget) -> Any:
    source = ASTSource(made.kernel, made.signature, made.constants, made.attributes)
    return triton.compile(source, target=target, options=made.options)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{tool}: {done.stderr}"
    return done.stdout + done.stderr


def code(made: Launch, arch: int, listing: bool = True) -> Code:
    kernel = compiled(made, GPUTarget("cuda", arch, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", _run("cuobjdump", "-res-usage", file.name))
        text = _run("nvdisasm", "-c", "-ndf", file.name) if listing else ""  # 0.3 s
    assert usage
    registers, stack, local = map(int, usage.groups())
    return Code(registers, stack + local, kernel.metadata.shared, *parsed(text))


def parsed(listing: str) -> tuple[list[str], list[list[str]]]:
    """The instructions of nvdisasm's listing, and of those the innermost loops: from a label to a branch back
    to it."""
    instructions, labels, loops = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            if found[1].startswith("@!PT "):  # never executed; ptxas puts such beside barriers
                continue
            instructions.append(found[1])
            if (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", found[1])) and branch[1] in labels:
                loops.append(range(labels[branch[1]], len(instructions)))
    loops = [loop for loop in loops if count([instructions[i] for i in loop], r"\w*MMA")]
    inner = [a for a in loops if not any(a != b and b.start >= a.start and b.stop <= a.stop for b in loops)]
    return instructions, [[instructions[i] for i in loop] for loop in inner]


def count(instructions: list[str], pattern: str) -> int:
    """Instructions, less their predicates, whose beginning `pattern` matches."""
    return sum(
        re.match(rf"(@!?U?P\w+\s+)?(?:{pattern})", instruction) is not None for instruction in instructions
    )


# ---------------------------------------------------------------------- in another process


def use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def compiled_case(case: Case, listing: bool) -> tuple[dict[str, Any], dict[str, Any], Code]:
    """The constants and options of the launch, and its code."""
    made = launched(case)
    return made.constexprs, made.options, code(made, case.arch, listing)
