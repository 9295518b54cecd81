"""The files of dist/, as `make wheels` has built them: where they install, and that the C++ kernels run where
they do."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
# torch's own wheels ask for glibc 2.28, and ours shall not be what keeps a system out.
GLIBC = (2, 28)

each_machine = pytest.mark.parametrize("machine", ["x86_64", "aarch64"])


def wheel(machine):
    (file,) = DIST.glob(f"*_{machine}.whl")
    return file


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@each_machine
def test_it_installs_wherever_torch_does(machine):
    python, abi, platform = wheel(machine).stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    oldest = re.fullmatch(rf"manylinux_(\d+)_(\d+)_{machine}", platform)
    assert (int(oldest[1]), int(oldest[2])) <= GLIBC


@each_machine
def test_what_is_in_it(machine):
    with zipfile.ZipFile(wheel(machine)) as archive:
        assert {"rtn_tensor/kernels/librtn.so", "rtn_tensor/py.typed"} <= set(archive.namelist())
        header = archive.read("rtn_tensor/kernels/librtn.so")[:20]
    assert header[18:20] == {"x86_64": b"\x3e\0", "aarch64": b"\xb7\0"}[machine]


PROGRAM = """
import shutil, sys, warnings
warnings.simplefilter("error", UserWarning)
import torch
import torch.nn.functional as F
import rtn_tensor
from rtn_tensor import reference
from rtn_tensor.kernels import cpu

assert not any(map(shutil.which, ("c++", "g++", "gcc", "cc", "clang", "clang++")))
w = torch.randn(33, 100)
weight = rtn_tensor.RTNQuantizedTensor.from_float(w, 4, 32, "absmax")
qdata, scale = reference.quantize(w, 4, 32, "absmax", torch.float32)
assert torch.equal(weight.qdata, qdata) and torch.equal(weight.scale, scale)
for m in (1, 3, 40):
    x = torch.randn(m, 100)
    torch.testing.assert_close(F.linear(x, weight), x @ reference.dequantize(qdata, scale, 4, 32, 100, torch.float32).t())
    assert rtn_tensor.explain(weight, x).kernel == "cpu"
print(rtn_tensor.__file__, rtn_tensor.__version__, cpu.isa(), sep="\\n")
"""


def test_the_kernels_run_where_there_is_no_compiler(tmp_path):
    """In an environment of its own, which has torch and torchao of the one that runs this test, and no
    program but its own."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python, environment = (
        home / "bin/python",
        {"PATH": str(home / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    install = [python, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    run(*install, wheel("x86_64"), env=environment)
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=environment).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    file, version, isa = run(python, "-c", PROGRAM, cwd=tmp_path, env=environment).split()
    assert Path(file) == site / "rtn_tensor/__init__.py"
    assert version == wheel("x86_64").stem.split("-")[1]
    assert isa in ("amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "generic")
    command = run(home / "bin/rtn-tensor", "--help", cwd=tmp_path, env=environment)
    assert command.startswith("usage: rtn-tensor")


def test_the_aarch64_library_under_emulation(tmp_path):
    """In one dtype: `make test-slow` emulates all of them, of a library that it builds itself."""
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    with zipfile.ZipFile(wheel("aarch64")) as archive:
        library = archive.extract("rtn_tensor/kernels/librtn.so", tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "slow",
        "-k",
        "aarch64 and bfloat16",
        "tests/kernels/test_cpu.py",
    ]
    out = run(*command, cwd=ROOT, env=os.environ | {"RTN_AARCH64_LIBRARY": library})
    summary = out.splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 100
    assert "skipped" not in summary
