"""Whether every op of the Triton kernels is right on the device: fresh random data, outputs poisoned with
NaN, against the reference.

Products are held to the element-wise bound of tests/bounds.py, in fp64, and a second run to the bits of the
first; quantize, dequantize and embedding to the bits of the reference. The jobs run side by side, since
compiling is most of what they do, and what they compile the timings then find in Triton's cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bounds import Planes, activations, assert_linear_close, random_planes
from torch import Tensor

from benchmarks.gpu_workers import Budget, described, lost
from rtn_tensor import reference
from rtn_tensor.formats import FORMATS, groups
from rtn_tensor.kernels import triton
from rtn_tensor.kernels.problem import Kernel, make_problem

DTYPES = ("bfloat16", "float16", "float32")
GROUP_SIZES = (128, 32, 64, 96, -1)
PRODUCTS = ("linear", "linear_dx", "grouped", "grouped_dx")
# M, N, K: each number of rows that a tile has, and about; short last groups, chunks and steps.
SHAPES = (
    (1, 1, 32),
    (1, 5, 576),
    (3, 100, 1000),
    (17, 130, 100),
    (33, 200, 1000),
    (65, 257, 640),
    (130, 300, 1000),
    (300, 129, 160),
)
DX_SHAPES = ((1, 5, 576), (17, 130, 100), (65, 257, 640), (130, 300, 1000))
# weights; from so many on they are random bytes, checked some rows at a time, and N and K are those of a
# benchmark.
LARGE = 1 << 24
ROWS = 2048
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # which deterministic algorithms ask for

Report = Callable[[dict], None]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN: an element that a kernel forgets to write is seen. And where we
    leave a product to cuBLAS, it adds up in fp32, which is what the bound is for."""
    matmul = torch.backends.cuda.matmul
    settings = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = torch.are_deterministic_algorithms_enabled(), [getattr(matmul, name) for name in settings]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name in settings:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        for name, value in zip(settings, before[1], strict=True):
            setattr(matmul, name, value)


def attempt(report: Report, budget: Budget, name: str, check: Callable[[], Any]) -> None:
    if budget.left() < 0:
        report({"check": name, "skipped": "no time was left"})
        return
    error = None
    try:
        check()
    except Exception as raised:
        error = described(raised)
    report({"check": name, "error": error})
    if lost():
        raise RuntimeError(f"the GPU was lost in: {name}")


def label(op: str, w: Planes, dtype: torch.dtype, m: int) -> str:
    return (
        f"{op} int{w.bits} g{w.group_size} {str(dtype)[6:]}, x {m} rows, weight {[*w.qdata.shape[:-1], w.k]}"
    )


def some_planes(*shape: int, bits: int, group_size: int, dtype: torch.dtype, device: str) -> Planes:
    """As tests/bounds.py makes them; large ones of random bytes and scales, which takes a tenth of the
    memory."""
    if torch.Size(shape).numel() < LARGE:
        return random_planes(*shape, bits=bits, group_size=group_size, dtype=dtype, device=device)
    *rows, k = shape
    qdata = torch.randint(0, 256, (*rows, FORMATS[bits].row_bytes(k)), dtype=torch.uint8, device=device)
    scale = (torch.rand(*rows, groups(k, group_size), device=device) + 0.5) / FORMATS[bits].qmax
    return Planes(qdata, scale.to(dtype), bits, group_size, k)


def rows_of(w: Planes, rows: slice | int) -> Planes:
    return w._replace(qdata=w.qdata[rows], scale=w.scale[rows])


def row_slices(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]


# -------------------------------------------------------------------------------- products


def check_product(kernel: Kernel, op: str, x: Tensor, w: Planes, bias: Tensor | None = None) -> None:
    """For experts the rows are dealt as to one that is empty first, one in the middle, and nobody at the
    end."""
    m, over_k = x.shape[0], not op.endswith("dx")
    problem = make_problem(op, x.dtype, m, w.k, w.qdata, w.scale, w.bits, w.group_size)
    rounded_to = x.dtype if kernel.rounds_weight(problem) else None
    offs = (
        torch.tensor([0, m // 3, m // 3, m - m // 4], dtype=torch.int32, device=x.device)
        if op.startswith("grouped")
        else None
    )
    extra = [] if op == "linear_dx" else [bias] if offs is None else [offs]

    def run() -> Tensor:
        return getattr(kernel, op)(
            x, w.qdata, w.scale, *extra, w.bits, w.group_size, *([] if over_k else [w.k])
        )

    y = run()
    parts = [(slice(0, m), w)]
    if offs is not None:
        ends = [0, *offs.tolist()]
        parts = [(slice(ends[e], ends[e + 1]), rows_of(w, e)) for e in range(len(offs))]
        assert torch.equal(y[ends[-1] :], torch.zeros_like(y[ends[-1] :])), "rows of no expert are not zero"
    for rows, part in parts:
        if not over_k:
            assert_linear_close(y[rows], x[rows], part.exact(rounded_to).mT)
            continue
        for some in row_slices(part.qdata.shape[0]):
            exact = rows_of(part, some).exact(rounded_to)
            assert_linear_close(y[rows, some], x[rows], exact, None if bias is None else bias[some])
    assert torch.equal(y, run()), "a second run gave other bits"


def products(
    report: Report,
    budget: Budget,
    op: str,
    dtype: str,
    bits: int,
    group_size: int,
    shapes: Sequence[tuple[int, int, int]],
    device: str = "cuda",
    kernel: Kernel = triton.KERNEL,
) -> None:
    of = getattr(torch, dtype)
    planes: dict[tuple[int, int], Planes] = {}
    for m, n, k in shapes:
        experts = (4,) if op.startswith("grouped") else ()
        if (n, k) not in planes:
            planes = {
                (n, k): some_planes(*experts, n, k, bits=bits, group_size=group_size, dtype=of, device=device)
            }
        w = planes[n, k]
        x = activations(m, n if op.endswith("dx") else k, of, device)
        with poisoned():
            attempt(report, budget, label(op, w, of, m), partial(check_product, kernel, op, x, w))
            if op == "linear":
                bias = torch.randn(n, device=device).to(of)
                attempt(
                    report,
                    budget,
                    label("linear with bias", w, of, m),
                    partial(check_product, kernel, op, x, w, bias),
                )


# ------------------------------------------------------------------------ ops without sums


def check_quantize(
    kernel: Kernel, w: Tensor, bits: int, group_size: int, method: str, scale_dtype: torch.dtype
) -> None:
    got = kernel.quantize(w, bits, group_size, method, scale_dtype)
    for plane, expected in zip(
        got, reference.quantize(w, bits, group_size, method, scale_dtype), strict=True
    ):
        assert plane.dtype == expected.dtype
        torch.testing.assert_close(plane, expected, rtol=0, atol=0, equal_nan=True)


def check_dequantize(kernel: Kernel, w: Planes, dtype: torch.dtype) -> None:
    got = kernel.dequantize(w.qdata, w.scale, w.bits, w.group_size, w.k, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, w.exact().float().to(dtype), rtol=0, atol=0)


def check_embedding(kernel: Kernel, w: Planes, indices: Tensor) -> None:
    got = kernel.embedding(indices, w.qdata, w.scale, w.bits, w.group_size, w.k)
    torch.testing.assert_close(got, w.exact().float().to(w.scale.dtype)[indices], rtol=0, atol=0)


def planes(
    report: Report,
    budget: Budget,
    dtype: str,
    bits: int,
    group_size: int,
    shapes: Sequence[tuple[int, int]],
    device: str = "cuda",
    kernel: Kernel = triton.KERNEL,
) -> None:
    """quantize, dequantize and embedding; `dtype` is the weight's and the scale's, or one of the two."""
    of = getattr(torch, dtype)
    for n, k in shapes:
        w = torch.randn(n, k, device=device)
        if n > 3:
            w[0], w[1, k // 2], w[2] = 0, torch.nan, w[2] * torch.finfo(of).tiny
        kept = random_planes(n, k, bits=bits, group_size=group_size, dtype=of, device=device)
        indices = torch.randint(0, n, (3, 4), device=device)
        checks: dict[str, Callable[[], None]] = {"embedding": partial(check_embedding, kernel, kept, indices)}
        for method in ("absmax", "signed"):
            checks[f"quantize, {method},"] = partial(
                check_quantize, kernel, w.to(of), bits, group_size, method, of
            )
        for other in DTYPES:
            to = getattr(torch, other)
            checks[f"quantize, {other} scale,"] = partial(
                check_quantize, kernel, w.to(of), bits, group_size, "absmax", to
            )
            checks[f"dequantize to {other},"] = partial(check_dequantize, kernel, kept, to)
        with poisoned():
            for name, check in checks.items():
                attempt(report, budget, label(name, kept, of, n), check)
