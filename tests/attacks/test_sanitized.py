"""The attacks again over a C++ library that AddressSanitizer and UBSan watch: a read one byte past a plane
ends the process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
def test_attacks_under_the_sanitizers(tmp_path):
    """Leaks are not looked for: the interpreter ends with many."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    runtimes = [
        run(tmp_path, [compiler, f"-print-file-name={name}"]).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    for name in ("rtn_tensor", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    flags = {"CXXFLAGS": " ".join(["-O1", "-g1", *SANITIZERS]), "LDFLAGS": " ".join(SANITIZERS)}
    run(tmp_path, [sys.executable, "setup.py", "build_ext", "--inplace"], **flags)
    watched = {
        **{
            "LD_PRELOAD": " ".join(runtimes),
            "PYTHONPATH": str(tmp_path),
            "PYTHONMALLOC": "malloc",
            "OMP_NUM_THREADS": "1",
        },
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:allocator_may_return_null=1",
    }
    seen = run(
        tmp_path,
        [sys.executable, "-c", "from rtn_tensor.kernels import cpu; print(cpu.LIBRARY, cpu.isa())"],
        **watched,
    )
    assert seen.startswith(str(tmp_path))
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):  # so it does watch
        run(tmp_path, [sys.executable, "-c", PAST_THE_END], **watched)
    pytest_ = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        "not keep_its_memory",
    ]
    run(tmp_path, [*pytest_, "tests/attacks"], **watched)


PAST_THE_END = """
import sys
sys.path.insert(0, "tests/attacks")
from test_kernel_arguments import linear_arguments
from rtn_tensor.kernels import cpu
# The last row ends 16 bytes past x: nearer than any other allocation can lie, live or freed.
kept, arguments = linear_arguments(x_stride=97)
cpu.library().rtn_linear(arguments)
"""


def run(folder, command, **environment):
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-10000:]
    return done.stdout
