"""The C++ library of the CPU kernels in every instruction set: as installed, under AddressSanitizer and
UndefinedBehaviorSanitizer, and for aarch64 in an emulator. Then its threads."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bounds import Planes, activations, assert_linear_close, random_planes

from rtn_tensor import RTNQuantizedTensor, ops, reference
from rtn_tensor.formats import FORMATS, SCALE_METHODS, groups
from rtn_tensor.kernels import cpu, registry

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

DTYPES = list(cpu.DTYPE_CODES)
GROUP_SIZES = [32, 64, 96, 128, -1]
# Tokens below, at and above a tile of every instruction set, then more than a block of them and than a block
# of K.
SHAPES = [*product((0, 1, 2, 3, 12, 13, 17, 24, 25, 200), (1, 5, 33, 100), (32, 100, 576, 1000))]
# Several steps along K; blocks of rows that share them, and runs of tokens.
LONG = [(25, 300, 2100), (600, 33, 2100)]

each_bits = pytest.mark.parametrize("bits", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_group_size = pytest.mark.parametrize("group_size", GROUP_SIZES)


# ------------------------------------------------------------------ where the library runs

WARNINGS = ["-Wall", "-Wextra", "-Werror"]
if platform.machine() == "x86_64":
    WARNINGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 finds them in its own intrinsics
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATOR = ["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
AARCH64_LIBRARY = os.environ.get("RTN_AARCH64_LIBRARY")  # one that was built already, as tests/wheels has it


class Driver:
    """In the place of `cpu.library()`: hands each call, with its buffers, to tests/kernels/cpu_driver.cpp in a
    process of its own."""

    def __init__(self, *command):
        self.errors = tempfile.TemporaryFile()
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment
        )
        self.available = self._read(8) == bytes(8)

    def close(self):
        self.process.communicate()
        self.errors.close()

    def _read(self, size):
        data = self.process.stdout.read(size)
        if len(data) < size:
            self.errors.seek(0)
            raise AssertionError(
                f"the driver ended: {self.process.wait()}\n{self.errors.read(10000).decode()}"
            )
        return data

    def _call(self, function, fields, extents, written):
        sizes = [extent if address else -1 for extent, address in zip(extents, fields, strict=False)]
        request = [struct.pack(f"={len(fields) + 1}q", function, *sizes, *fields[len(sizes) :])]
        request += [
            ctypes.string_at(address, size) for address, size in zip(fields, sizes, strict=False) if size > 0
        ]
        with contextlib.suppress(BrokenPipeError):  # then reading says why
            self.process.stdin.write(b"".join(request))
            self.process.stdin.flush()
        (status,) = struct.unpack("=q", self._read(8))
        for b in written:
            ctypes.memmove(fields[b], self._read(max(sizes[b], 0)), max(sizes[b], 0))
        return status

    def rtn_linear(self, arguments):
        fields = cpu._LINEAR.unpack(arguments)
        (
            m,
            n,
            k,
            experts,
            bits,
            group_size,
            dtype,
            scale_dtype,
            x_stride,
            y_stride,
            q_stride,
            q_expert,
            s_stride,
            s_expert,
        ) = fields[6:20]
        extents = [
            _extent(dtype, (m, x_stride), (k, 1)),
            _extent(None, (experts, q_expert), (n, q_stride), (FORMATS[bits].row_bytes(k), 1)),
            _extent(scale_dtype, (experts, s_expert), (n, s_stride), (groups(k, group_size), 1)),
            _extent(dtype, (n, 1)),
            _extent(dtype, (m, y_stride), (n, 1)),
            4 * experts,
        ]
        return self._call(0, fields, extents, [4])

    def _planes(self, function, arguments, written):
        fields = cpu._PLANES.unpack(arguments)
        indices, rows, k, bits, group_size, dtype, scale_dtype, w_stride, q_stride, s_stride = fields[3:13]
        plane_rows = 1 + max((ctypes.c_int64 * rows).from_address(indices)) if indices else rows
        extents = [
            _extent(dtype, (rows, w_stride), (k, 1)),
            _extent(None, (plane_rows, q_stride), (FORMATS[bits].row_bytes(k), 1)),
            _extent(scale_dtype, (plane_rows, s_stride), (groups(k, group_size), 1)),
            8 * rows,
        ]
        return self._call(function, fields, extents, written)

    def rtn_quantize(self, arguments):
        return self._planes(1, arguments, [1, 2])

    def rtn_dequantize(self, arguments):
        return self._planes(2, arguments, [0])


def _extent(dtype, *dims):
    """Bytes from the first element to the last of dims (size, stride)."""
    element = 1 if dtype is None else DTYPES[dtype].itemsize
    return (
        element * (1 + sum((size - 1) * stride for size, stride in dims))
        if all(size for size, _ in dims)
        else 0
    )


def isas(machine):
    return [
        Path(source).stem[4:] for source in setup.sources(machine) if Path(source).stem.startswith("isa_")
    ]


def need(*tools):
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")


@pytest.fixture(scope="module")
def command_of(tmp_path_factory):
    """The command that starts a driver, compiled when first asked for."""

    @functools.cache
    def command(how):
        folder = tmp_path_factory.mktemp(how)
        driver, program = {"tests/kernels/cpu_driver.cpp": []}, str(folder / "driver")
        if how == "aarch64":
            need("aarch64-linux-gnu-g++", EMULATOR[0])
            compiler, flags, start = "aarch64-linux-gnu-g++", ["-O3"], EMULATOR
            files = driver if AARCH64_LIBRARY else setup.sources("aarch64") | driver
        else:
            need("g++")
            compiler, start = "g++", []
            if how == "sanitized":
                # -O0: GCC takes twice as long to optimize what the sanitizers add, and it reads and writes no
                # less.
                flags, files = ["-O0", "-g1", *SANITIZERS], setup.sources(platform.machine()) | driver
            else:
                flags, files = ["-O2"], driver
        here = os.getcwd()
        os.chdir(ROOT)
        try:
            objects = setup.compile_all([compiler, *flags, *WARNINGS], files, folder)
        finally:
            os.chdir(here)
        library = {"guarded": str(cpu.LIBRARY), "aarch64": AARCH64_LIBRARY}.get(how)
        link = [library, f"-Wl,-rpath,{Path(library).parent}"] if library else []
        setup.run(
            compiler,
            *flags,
            *objects,
            *link,
            "-o",
            program,
            "-pthread",
            "-Wl,--no-as-needed",
            "-lgomp",
            "-ldl",
        )
        return [*start, program]

    return command


def need_library():
    if not cpu.LIBRARY.exists():
        pytest.skip("the C++ library was not built")


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(("installed", isa), id=isa) for isa in isas(platform.machine())),
        *(
            pytest.param(("guarded", isa), id=f"guarded-{isa}", marks=pytest.mark.slow)
            for isa in isas(platform.machine())
        ),
        *(
            pytest.param(("sanitized", isa), id=f"sanitized-{isa}", marks=pytest.mark.slow)
            for isa in isas(platform.machine())
        ),
        *(
            pytest.param(("aarch64", isa), id=f"aarch64-{isa}", marks=pytest.mark.slow)
            for isa in isas("aarch64")
        ),
    ],
)
def place(request, command_of):
    how, isa = request.param
    if how in ("installed", "guarded"):
        need_library()
    if how == "installed":
        yield isa, None
        return
    driver = Driver(*command_of(how), isa)
    if not driver.available:
        pytest.skip(f"this processor has no {isa}")
    yield isa, driver
    driver.close()


@pytest.fixture
def library(place, monkeypatch):
    """The rest of the test calls one instruction set of one build."""
    isa, driver = place
    if driver:
        monkeypatch.setattr(cpu, "library", lambda: driver)
        yield
        return
    before = cpu.isa()
    try:
        cpu.set_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    assert cpu.isa() == isa
    yield
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory from torch.empty holds NaN: an element that is never written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# -------------------------------------------------------------- products, within the bound


def check(x, w, bias=None):
    assert_linear_close(cpu.linear(x, w.qdata, w.scale, bias, w.bits, w.group_size), x, w.exact(), bias)


@each_group_size
@each_bits
@each_dtype
def test_linear(library, dtype, bits, group_size):
    # A part of the shapes for each group size and dtype: all of them together.
    for m, n, k in SHAPES[GROUP_SIZES.index(group_size) + 5 * DTYPES.index(dtype) :: 15] + LONG:
        w = random_planes(n, k, bits=bits, group_size=group_size, dtype=dtype)
        check(activations(m, k, dtype), w, torch.randn(n).to(dtype) if n % 2 else None)


@each_group_size
@each_bits
def test_linear_with_another_scale_dtype(library, bits, group_size):
    for dtype, scale_dtype in product(DTYPES, DTYPES):
        for m in (1, 30):
            check(
                activations(m, 200, dtype),
                random_planes(35, 200, bits=bits, group_size=group_size, dtype=scale_dtype),
            )


@each_bits
@each_dtype
def test_linear_of_views(library, dtype, bits):
    n, k = 33, 164
    big = random_planes(n + 3, k, bits=bits, group_size=32, dtype=dtype)
    rows = Planes(big.qdata[2 : n + 2], big.scale[2 : n + 2], bits, 32, k)
    columns = Planes(rows.qdata[:, 8 * bits :], rows.scale[:, 2:], bits, 32, k - 64)
    fortran = rows._replace(scale=rows.scale.t().contiguous().t())

    def shift(plane):
        buffer = torch.empty(8 + plane.nbytes, dtype=torch.uint8)
        shifted = buffer[8:].view(plane.dtype).view(plane.shape).copy_(plane)
        assert shifted.data_ptr() % 16 == 8
        return shifted

    shifted = rows._replace(qdata=shift(rows.qdata), scale=shift(rows.scale))
    for m, w in product((1, 14, 40), (rows, columns, fortran, shifted)):
        x = activations(m, w.k, dtype)
        wide = torch.full((m, w.k + 5), torch.nan, dtype=dtype)
        wide[:, 2:-3] = x
        for view in (wide[:, 2:-3], x.t().contiguous().t(), x[:1].expand(m, -1), x[::2]):
            check(view, w, torch.randn(n, 2).to(dtype)[:, 0])


@each_group_size
@each_bits
@each_dtype
def test_grouped(library, dtype, bits, group_size):
    """Experts with no rows, with few, and with more than one block; rows that belong to none, and ends past
    the last row."""
    w = random_planes(6, 35, 100, bits=bits, group_size=group_size, dtype=dtype)
    cases = [
        (450, [0, 230, 230, 233, 440, 440]),
        (8, [1, 2, 3, 4, 5, 6]),
        (8, [0] * 6),
        (450, [450] * 6),
        (8, [3, 20, 20, 20, 20, 20]),
    ]
    for m, ends in cases:
        offs = torch.tensor(ends, dtype=torch.int32)
        x = activations(m, 100, dtype)
        y = cpu.grouped(x, w.qdata, w.scale, offs, bits, group_size)
        for e, (start, end) in enumerate(pairwise([0, *ends])):
            assert_linear_close(y[start:end], x[start:end], w.exact()[e])
        assert torch.equal(y[ends[-1] :], torch.zeros_like(y[ends[-1] :]))


# ------------------------------------------------------------- ops without sums: bit-exact


def assert_same(got, expected):
    """Bit for bit, the sign of zero included; any NaN is a NaN."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.itemsize]
    same = (got.view(as_integers) == expected.view(as_integers)) | (got.isnan() & expected.isnan())
    assert same.all(), f"{got[~same][:4]} instead of {expected[~same][:4]}"


def awkward_weight(k, dtype):
    limits = torch.finfo(dtype)
    w = torch.randn(20, k)
    w[1], w[2] = 0, -0.0
    w[3] *= limits.tiny
    w[4] *= limits.tiny * limits.eps  # subnormal, where it is not zero
    w[5, k // 2], w[6, -1], w[7, 0] = torch.nan, torch.inf, -torch.inf
    w[8] *= limits.max / 4  # overflows, or its scale does in another dtype
    w[9] = w[9].clamp(-1, 1)
    w[10] *= 1e-6
    w[11] *= 1e-41
    w[12] = torch.arange(k) % 16 * 0.5 - 4  # ties
    w[13], w[14] = w[13].abs(), -w[14].abs()
    w[15, 1:] = 0
    w[16] = limits.max
    w[17] = -limits.max
    w[18] = limits.tiny * limits.eps
    return w.to(dtype)


@pytest.mark.parametrize("method", SCALE_METHODS)
@each_group_size
@each_bits
@each_dtype
def test_quantize(library, dtype, bits, group_size, method):
    for k, scale_dtype in product((32, 100, 1000), DTYPES):
        w = awkward_weight(k, dtype)
        for view in (w, w[3:9, : k - 1], w.t().contiguous().t()):
            qdata, scale = cpu.quantize(view, bits, group_size, method, scale_dtype)
            expected_qdata, expected_scale = reference.quantize(view, bits, group_size, method, scale_dtype)
            assert_same(scale, expected_scale)
            assert_same(qdata, expected_qdata)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_quotient_rounds_as_a_division(library, dtype, bits):
    """Every mantissa as a row's largest weight, over every mantissa of what may round to one or more:
    quotients that are ties included."""
    mantissas = torch.arange(128 if dtype == torch.bfloat16 else 1024)[:: 1 if dtype == torch.bfloat16 else 8]
    one = torch.tensor(1.0, dtype=dtype).view(torch.int16).item()
    largest = (one + mantissas).to(torch.int16).view(dtype)
    others = torch.cat([largest * 2.0**-e for e in range(bits + 1)]).expand(len(largest), -1)
    w = torch.cat([largest[:, None], torch.where(others <= largest[:, None], others, -others / 2)], dim=1)
    for scaled in (w, -w * 2**4, w * 2**-8):
        qdata, scale = cpu.quantize(scaled, bits, -1, "absmax", dtype)
        expected_qdata, expected_scale = reference.quantize(scaled, bits, -1, "absmax", dtype)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(qdata, expected_qdata)


@each_group_size
@each_bits
@each_dtype
def test_dequantize(library, dtype, bits, group_size):
    for k, scale_dtype in product((1, 32, 100, 1000), DTYPES):
        limits = torch.finfo(scale_dtype)
        scale = torch.randn(40, groups(k, group_size)) * torch.logspace(-45, 38, 40)[:, None]
        scale[0], scale[1], scale[2], scale[3], scale[4] = (
            torch.nan,
            torch.inf,
            0,
            limits.tiny * limits.eps,
            limits.max,
        )
        scale = scale.to(scale_dtype)
        qdata = torch.randint(256, (40, FORMATS[bits].row_bytes(k)), dtype=torch.uint8)
        for rows in (slice(None), slice(3, 7), slice(0, 0)):
            got = cpu.dequantize(qdata[rows], scale[rows], bits, group_size, k, dtype)
            assert_same(got, reference.dequantize(qdata[rows], scale[rows], bits, group_size, k, dtype))


@each_bits
@each_dtype
def test_embedding(library, dtype, bits):
    w = random_planes(9, 100, bits=bits, group_size=64, dtype=dtype)
    for indices in (
        torch.tensor([[8, 0, 3], [3, 3, 1]]),
        torch.tensor([7, 2], dtype=torch.int32),
        torch.zeros(2, 0, dtype=torch.int64),
    ):
        expected = reference.embedding(indices, w.qdata, w.scale, bits, 64, 100)
        assert_same(cpu.embedding(indices, w.qdata, w.scale, bits, 64, 100), expected)


@pytest.mark.parametrize(("indices", "named"), [([0, 9], 9), ([-1, 3], -1)])
def test_embedding_out_of_range(indices, named):
    need_library()
    w = random_planes(9, 100)
    with pytest.raises(IndexError, match=f"index {named} is out of range: the weight has 9 rows"):
        cpu.embedding(torch.tensor(indices), w.qdata, w.scale, 4, 32, 100)


def test_set_isa_refuses_what_there_is_not():
    need_library()
    before = cpu.isa()
    for name in ("avx1024", ""):
        with pytest.raises(ValueError, match=f"'{name}' is not available here; {before} is in use"):
            cpu.set_isa(name)
    assert cpu.isa() == before


# ------------------------------------------------- from torch's dispatcher, without Python

needs_library = pytest.mark.skipif(cpu.library() is None, reason="the C++ library was not built")


@pytest.fixture
def no_python(monkeypatch):
    """Whatever would choose a kernel in Python fails."""

    def fail(*args):
        raise AssertionError("a kernel was chosen in Python")

    monkeypatch.delenv("RTN_KERNEL", raising=False)
    monkeypatch.setattr(ops, "make_problem", fail)


@needs_library
@pytest.mark.parametrize("call", [torch.ops.rtn.linear.default, ops.linear], ids=["dispatched", "eager"])
@each_dtype
def test_product_without_python(call, dtype, no_python):
    w = random_planes(33, 100, group_size=32, dtype=dtype)
    bias = torch.randn(33).to(dtype)
    wide = activations(6, 116, dtype)
    for x in (
        wide[:, 8:108],
        wide[:, :100].contiguous().view(2, 3, 100),
        wide[0, :100],
        wide[:0, :100],
        wide[:5, :100].contiguous().view(5, 1, 1, 100),
    ):
        for b in (None, bias):
            with torch.no_grad():
                y = call(x, w.qdata, w.scale, b, 4, 32)
            expected = cpu.linear(x.reshape(-1, 100), w.qdata, w.scale, b, 4, 32).view(*x.shape[:-1], 33)
            assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), dtype)
            assert torch.equal(y, expected)


def interrupt(problem):
    raise KeyboardInterrupt


@needs_library
def test_what_cpp_does_not_take_goes_through_python(monkeypatch):
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    w, x = random_planes(33, 64, group_size=32), activations(6, 64, torch.float32)
    planes = (w.qdata, w.scale, None, 4, 32)
    expected = torch.ops.rtn.linear(x, *planes)
    columns = x.t().contiguous().t()  # no row of it is dense
    sliced = x.repeat(1, 2).view(2, 3, 128)[..., :64]
    asked = []
    monkeypatch.setattr(ops, "choose", lambda problem: asked.append(problem.M) or registry.choose(problem))
    with torch.no_grad():
        assert torch.equal(torch.ops.rtn.linear(columns, *planes), expected)
        assert torch.equal(ops.linear(columns, *planes), expected)
        assert torch.equal(torch.ops.rtn.linear(sliced, *planes), expected.view(2, 3, 33))
        assert len(asked) == 3
        qdata, scale = (t.t().contiguous().t() for t in (w.qdata, w.scale))
        assert torch.equal(ops.linear(x, qdata, scale, None, 4, 32), expected)
        asked.pop()
        monkeypatch.setenv("RTN_KERNEL", "reference")
        torch.ops.rtn.linear(x, *planes)
        assert len(asked) == 4
        monkeypatch.setenv("RTN_KERNEL", "nothing")
        with pytest.raises(ValueError, match="RTN_KERNEL='nothing' names no kernel"):
            ops.linear(x, *planes)
        # The latter before torch 2.13.
        with pytest.raises(RuntimeError, match="RTN_KERNEL='nothing' names no kernel|printed above"):
            torch.ops.rtn.linear(x, *planes)
        monkeypatch.setattr(ops, "choose", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ops.linear(x, *planes)


@needs_library
def test_the_cpp_op_gives_its_tensors_back(monkeypatch):
    """Each argument comes to it with a reference of its own."""
    w, x, bias = random_planes(33, 64, group_size=32), activations(6, 64, torch.float32), torch.randn(33)
    tensors = (x, w.qdata, w.scale, bias)

    def uses():
        return [torch._C._storage_Use_Count(t.untyped_storage()._cdata) for t in tensors]

    before = uses()
    for forced in ("", "reference"):
        monkeypatch.setenv("RTN_KERNEL", forced) if forced else monkeypatch.delenv(
            "RTN_KERNEL", raising=False
        )
        y = [torch.ops.rtn.linear(*tensors, 4, 32) for _ in range(3)]
        assert torch._C._storage_Use_Count(y[0].untyped_storage()._cdata) <= 2  # ours, and the asking
        assert uses() == before


# ------------------------------------------------------------------- threads and processes


@pytest.fixture
def threads():
    need_library()
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_bits
@each_dtype
def test_threads_do_not_change_a_bit(threads, dtype, bits):
    w, offs = (
        random_planes(3, 1000, 576, bits=bits, group_size=96, dtype=dtype),
        torch.tensor([100, 101, 290], dtype=torch.int32),
    )
    x = activations(300, 576, dtype)

    def results():
        yield from (cpu.linear(x[:m], w.qdata[0], w.scale[0], None, bits, 96) for m in (1, 3, 20, 300))
        yield cpu.grouped(x, w.qdata, w.scale, offs, bits, 96)
        yield from cpu.quantize(x, bits, 96, "absmax", dtype)
        yield cpu.dequantize(w.qdata, w.scale, bits, 96, 576, dtype)

    threads(1)
    alone = list(results())
    threads(2)
    for one, two in zip(alone, results(), strict=True):
        assert_same(two, one)


def test_python_threads_at_once(threads):
    threads(2)
    problems = []
    for m, n, k, bits, dtype in product((1, 5, 40), (33, 300), (100, 640), FORMATS, DTYPES):
        weight = RTNQuantizedTensor.from_float(torch.randn(n, k).to(dtype), bits, 32)
        x = activations(m, k, dtype)
        problems.append((x, weight, F.linear(x, weight)))

    def run(seed):
        order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed)).tolist()
        for x, weight, expected in (problems[i] for i in order * 5):
            assert torch.equal(F.linear(x, weight), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def run_python(script, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

START = """
import os, signal
import torch
import torch.nn.functional as F
from rtn_tensor import RTNQuantizedTensor
from rtn_tensor.kernels import cpu

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
weight = RTNQuantizedTensor.from_float(torch.randn(512, 96), 4, 32)
x = torch.randn(8, 96)
expected = F.linear(x, weight)

def check():
    assert torch.equal(F.linear(x, weight), expected)
"""


@needs_linux
def test_one_openmp_runtime_and_its_threads():
    """As many threads as torch was told, all of the runtime that torch itself uses."""
    need_library()
    out = run_python(
        START
        + """
counts = [count()]
for threads in (1, 3):
    torch.set_num_threads(threads)
    check()
    counts.append(count())
assert counts[1] == counts[0] and counts[2] == counts[0] + 2, counts
(torch.randn(1000, 1000) @ torch.randn(1000, 1000)).sum()
assert cpu.library().rtn_has_threads() == 1
with open("/proc/self/maps") as maps:
    paths = {line.split()[-1] for line in maps}
print(*[name for name in map(os.path.basename, paths) if name.startswith(("libgomp", "libomp", "libiomp"))])
"""
    )
    assert len(out.split()) == 1, out


FORK = """
def in_a_child():
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        torch.set_num_threads(2)
        check()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

torch.set_num_threads(2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("used_by", ["the library", "torch alone"])
def test_fork_after_threads(used_by):
    """An OpenMP pool does not survive a fork: a child that asks the one it inherits would wait forever."""
    need_library()
    use = "check()" if used_by == "the library" else "torch.randn(10**6).exp_()"
    run_python(START + FORK + use + "\nin_a_child()\ncheck()\nin_a_child()")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_dataloader_workers():
    need_library()
    run_python(
        START
        + """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        torch.set_num_threads(2)
        return F.linear(x[i : i + 1], weight)[0]

torch.set_num_threads(2)
check()
loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
torch.testing.assert_close(torch.cat(list(loader)), expected)
check()
"""
    )
