"""Builds of the C++ library of the CPU kernels, and processes that run them."""

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from bounds import apart

from rtn_tensor.formats import FORMATS, groups
from rtn_tensor.kernels import cpu
from rtn_tensor.kernels.problem import make_problem

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

DTYPES = list(cpu.DTYPE_CODES)
CODES = list(cpu.SCALE_CODES)  # by their numbers
each_bits = pytest.mark.parametrize("bits", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
            _int8_x,
            dtype,
            scale_dtype,
            x_stride,
            y_stride,
            q_stride,
            q_expert,
            s_stride,
            s_expert,
            z_stride,
            z_expert,
        ) = fields[7:24]
        extents = [
            _extent(dtype, (m, x_stride), (k, 1)),
            _extent(None, (experts, q_expert), (n, q_stride), (FORMATS[bits].row_bytes(k), 1)),
            _extent(scale_dtype, (experts, s_expert), (n, s_stride), (groups(k, group_size), 1)),
            _extent(dtype, (n, 1)),
            _extent(dtype, (m, y_stride), (n, 1)),
            4 * experts,
            _extent(None, (experts, z_expert), (n, z_stride), (groups(k, group_size), 1)),
        ]
        return self._call(0, fields, extents, [4])

    def _planes(self, function, arguments, written):
        fields = cpu._PLANES.unpack(arguments)
        indices, rows, k, bits, group_size, dtype, scale_dtype = fields[4:11]
        w_stride, q_stride, s_stride, z_stride = fields[11:15]
        plane_rows = 1 + max((ctypes.c_int64 * rows).from_address(indices)) if indices else rows
        extents = [
            _extent(dtype, (rows, w_stride), (k, 1)),
            _extent(None, (plane_rows, q_stride), (FORMATS[bits].row_bytes(k), 1)),
            _extent(scale_dtype, (plane_rows, s_stride), (groups(k, group_size), 1)),
            _extent(None, (plane_rows, z_stride), (groups(k, group_size), 1)),
            8 * rows,
        ]
        return self._call(function, fields, extents, written)

    def rtn_rounds_weight(self, *numbers):
        self.process.stdin.write(struct.pack("=6q", 3, *(number.value for number in numbers)))
        self.process.stdin.flush()
        return struct.unpack("=q", self._read(8))[0]

    def rtn_quantize(self, arguments):
        fields = cpu._PLANES.unpack(arguments)
        return self._planes(1, arguments, [1, 2, *([3] if fields[3] else [])])

    def rtn_dequantize(self, arguments):
        return self._planes(2, arguments, [0])


def _extent(dtype, *dims):
    """Bytes from the first element to the last of dims (size, stride)."""
    element = 1 if dtype is None else CODES[dtype].itemsize
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


def need_library():
    if not cpu.LIBRARY.exists():
        pytest.skip("the C++ library was not built")


def assert_same(got, expected):
    """Bit for bit, the sign of zero included; any NaN is a NaN."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.itemsize]
    same = (got.view(as_integers) == expected.view(as_integers)) | (got.isnan() & expected.isnan())
    assert same.all(), f"{got[~same][:4]} instead of {expected[~same][:4]}"


def what_is_multiplied(op, x, w, int8_x=False):
    """Whether the library rounds what it multiplies to x's dtype; the weight in fp64, so rounded where it does;
    and the sizes of the terms that it sums, where they are not those of the products."""
    sizes = (w.k, w.qdata, w.scale, w.bits, w.group_size, w.zero)
    rounded = cpu.rounds_weight(make_problem(op, x.dtype, x.shape[0], *sizes, int8_x=int8_x))
    return (True, w.exact(x.dtype), None) if rounded else (False, w.exact(), apart(w))


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
