"""Installations with, without and with a damaged C++ library."""

import ctypes
import email
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bounds import Planes, activations, assert_linear_close
from cpu_library import ROOT, isas, need, need_library, run_python, setup
from expecttest import assert_expected_inline

import rtn_tensor
from rtn_tensor import RTNQuantizedTensor, explain
from rtn_tensor.kernels import cpu, registry


@pytest.fixture
def use_library(monkeypatch):
    """Makes a file the C++ library of this process, as if it had been there from the start."""

    def forget():
        cpu._load.cache_clear()
        cpu.library.cache_clear()
        registry.forget()

    def use(file):
        monkeypatch.setattr(cpu, "LIBRARY", file)
        forget()

    if cpu.LIBRARY.exists():
        cpu.direct(False)
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    yield use
    monkeypatch.undo()
    forget()
    if cpu.LIBRARY.exists():
        cpu.direct(True)


@pytest.fixture
def no_library(use_library):
    use_library(Path("missing") / "librtn.so")


def test_without_the_library(no_library):
    x = activations(3, 64, torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = RTNQuantizedTensor.from_float(torch.randn(5, 64).bfloat16(), 4, 32)
        for m in (1, 2, 3):
            y = F.linear(x[:m], weight)
    assert_expected_inline(
        "\n".join(str(w.message) for w in caught),
        """\
rtn_tensor runs quantized layers in plain torch on the CPU, many times slower. """
        """Its C++ library was not built; install g++ and reinstall rtn-tensor.""",
    )
    w = Planes(weight.qdata, weight.scale, 4, 32, 64)
    assert_linear_close(y, x, w.exact(torch.bfloat16))
    assert_expected_inline(
        str(explain(weight, x)),
        """\
linear on cpu: torch.bfloat16 x [3, 64], int4 weight [5, 64] with group_size 32
kernel           why not
---------  ----  --------------------------------------------------------------------
cpu              Its C++ library was not built; install g++ and reinstall rtn-tensor.
triton           It runs on GPUs only.
dense      runs
reference        It could, but dense is preferred.""",
    )
    assert cpu.isa() is None
    with pytest.raises(ValueError, match="'generic' is not available here; None is in use"):
        cpu.set_isa("generic")


def written(content):
    return lambda file: file.write_bytes(content)


def changed(change):
    """The installed library with its bytes changed."""

    def write(file):
        need_library()
        file.write_bytes(change(cpu.LIBRARY.read_bytes()))

    return write


def header(offset, value):
    return changed(lambda data: data[:offset] + value + data[offset + len(value) :])


def built(source, *flags):
    def write(file):
        need("g++")
        text = file.with_suffix(".cpp")
        text.write_text(source)
        setup.run("g++", "-shared", "-fPIC", "-o", str(file), str(text), *flags)

    return write


def needing_another(file):
    built("int other() { return 1; }")(file.with_name("libother.so"))
    built("int other(); int mine() { return other(); }", f"-L{file.parent}", "-lother")(file)
    file.with_name("libother.so").unlink()


OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}.get(platform.machine(), "")
ABI = 'extern "C" long rtn_abi() { return %d; }'
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
DAMAGED = {  # how the file comes about, and what is said of it
    "empty": (written(b""), "is empty;"),
    "text": (
        written(b"version https://git-lfs.github.com/spec/v1\n" * 4),
        "is damaged: it is not a shared library;",
    ),
    "one byte": (written(b"\x7f"), "is damaged: it is not a shared library;"),
    "a folder": (lambda file: file.mkdir(), "cannot be loaded ("),
    **{
        f"truncated to {part}": (
            changed(lambda data, part=part: data[: int(part * len(data))]),
            "is damaged: it ends after",
        )
        for part in (0.0001, 0.01, 0.5, 0.9, 0.999)
    },
    "without its last byte": (changed(lambda data: data[:-1]), "is damaged: it ends after"),
    "its header alone": (changed(lambda data: data[:64]), "is damaged: it ends after 64 of"),
    "half of its header": (changed(lambda data: data[:32]), "is damaged: it is not a shared library;"),
    "zeros at its end": (
        changed(lambda data: data[:-10000] + bytes(10000)),
        "is damaged: its end was never written;",
    ),
    "tables beyond its end": (header(32, b"\xff" * 16), "is damaged: it ends after"),
    "another processor": (
        header(18, b"\x3e\0" if OTHER == "x86_64" else b"\xb7\0"),
        f"was built for {OTHER}, and this is",
    ),
    "an unknown processor": (header(18, b"\xf3\0"), "was built for another processor (243), and this is"),
    "32 bits": (
        header(4, b"\1"),
        "was built for another processor: it is not a 64-bit little-endian library;",
    ),
    "big-endian": (
        header(5, b"\2"),
        "was built for another processor: it is not a 64-bit little-endian library;",
    ),
    "another library": (built("int x;"), "has no rtn_abi, rtn_isa,"),
    "an old one": (
        built(ABI % 1),
        f"built from other sources than this Python code (interface 1, and not {cpu.ABI})",
    ),
    "a newer one": (
        built(ABI % 99),
        f"built from other sources than this Python code (interface 99, and not {cpu.ABI})",
    ),
    "without a function": (built(ABI % cpu.ABI), "has no rtn_isa, rtn_set_isa,"),
    "with a dependency that is not there": (needing_another, "cannot be loaded (libother.so: cannot open"),
}


@linux
@pytest.mark.parametrize("how", DAMAGED)
def test_a_library_that_cannot_be_used_is_as_none(use_library, tmp_path, how):
    file, (write, why) = tmp_path / "librtn.so", DAMAGED[how]
    write(file)
    use_library(file)
    x = activations(3, 64, torch.bfloat16)
    assert not cpu.register()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = RTNQuantizedTensor.from_float(torch.randn(5, 64).bfloat16(), 4, 32)
        for m in (1, 2, 3):
            y = F.linear(x[:m], weight)
        found = explain(weight, x)
    (warning,) = caught
    reason = str(warning.message).removeprefix(
        "rtn_tensor runs quantized layers in plain torch on the CPU, many times slower. "
    )
    assert reason.startswith("Its C++ library ")
    assert why in reason
    assert "reinstall rtn-tensor" in reason
    assert found.kernel == "dense"
    assert found.reasons["cpu"] == reason
    assert_linear_close(y, x, Planes(weight.qdata, weight.scale, 4, 32, 64).exact(torch.bfloat16))


@linux
def test_a_copy_and_a_stripped_one_are_used(use_library, tmp_path):
    need_library()
    for strip in (False, True):
        file = shutil.copy(cpu.LIBRARY, tmp_path / f"librtn{strip}.so")
        if strip:
            need("strip")
            setup.run("strip", str(file))
        use_library(file)
        assert cpu._load()[1] == ""
        assert cpu.isa() in isas(platform.machine())


@linux
def test_an_import_with_a_truncated_library(tmp_path):
    """In a process of its own, as reading pages that a file does not have ends the process."""
    need_library()
    shutil.copytree(
        ROOT / "rtn_tensor", tmp_path / "rtn_tensor", ignore=shutil.ignore_patterns("__pycache__", "csrc")
    )
    file = tmp_path / "rtn_tensor/kernels/librtn.so"
    file.write_bytes(file.read_bytes()[:500_000])
    out = run_python(
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, rtn_tensor
    weight = rtn_tensor.RTNQuantizedTensor.from_float(torch.randn(5, 64), 4, 32)
    for _ in range(2):
        torch.nn.functional.linear(torch.randn(3, 64), weight)
print(rtn_tensor.__file__)
print([str(w.message) for w in caught if "rtn" in str(w.message)])
print(rtn_tensor.explain(weight, M=3).reasons["cpu"])
""",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    where, warned, reason = out.splitlines()
    assert where == str(tmp_path / "rtn_tensor/__init__.py")
    assert warned.count("many times slower") == 1
    assert f"{file} is damaged: it ends after 500000 of" in reason


@pytest.fixture
def source(tmp_path):
    """A copy of what an installation reads."""
    folder = tmp_path / "source"
    shutil.copytree(
        ROOT / "rtn_tensor", folder / "rtn_tensor", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_install_without_a_compiler(source, tmp_path):
    site = tmp_path / "site"
    pip("install", "--no-deps", "--no-build-isolation", "--target", site, source, CXX="false")
    assert (site / "rtn_tensor/kernels/cpu.py").exists()
    assert not list(site.rglob("*.so"))
    out = run_python(
        """
import warnings, torch, rtn_tensor
print(rtn_tensor.__file__)
weight = rtn_tensor.RTNQuantizedTensor.from_float(torch.randn(5, 64), 4, 32)
x = torch.randn(3, 64)
torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ weight.dequantize().t())
print(rtn_tensor.explain(weight, x).kernel)
""",
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert out.split() == [str(site / "rtn_tensor/__init__.py"), "dense"]


def test_one_version():
    """Its one source is the package, and installers read it without importing torch."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split()[-1] == rtn_tensor.__version__, done.stderr
    assert (Path(rtn_tensor.__file__).parent / "py.typed").exists()


def test_the_oldest_versions_that_are_tested_are_those_that_are_claimed():
    claimed = dict(
        re.findall(r'"(torch|torchao|transformers)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    )
    tested = dict(
        re.findall(r"(\w+)==([\d.]+)", re.search("^OLDEST := (.*)", (ROOT / "Makefile").read_text(), re.M)[1])
    )
    assert len(claimed) == 3
    for package, version in claimed.items():
        assert f"{tested[package]}.".startswith(f"{version}.")


@pytest.mark.slow
def test_wheel(source, tmp_path):
    need("g++")
    tables = source / "rtn_tensor/kernels/triton/tuned"
    tables.mkdir(exist_ok=True)
    (tables / "NVIDIA-A1-triton-3.6.0.json").write_text("{}")
    pip("wheel", "--no-deps", "--no-build-isolation", source, "-w", tmp_path, CXXFLAGS="-O0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stem.split("-")[1:4] == [rtn_tensor.__version__, "py3", "none"]
    assert platform.machine() in wheel.stem.split("-")[4]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "wheel")
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rtn_tensor"}
    assert not [name for name in names if "test" in name or name.endswith((".cpp", ".h"))]
    assert {"rtn_tensor/py.typed", "rtn_tensor/kernels/triton/tuned/NVIDIA-A1-triton-3.6.0.json"} <= set(
        names
    )
    metadata = email.message_from_bytes(
        (tmp_path / f"wheel/rtn_tensor-{rtn_tensor.__version__}.dist-info/METADATA").read_bytes()
    )
    assert metadata["Version"] == rtn_tensor.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# rtn-tensor")
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_all("Project-URL")
    built = ctypes.CDLL(str(tmp_path / "wheel/rtn_tensor/kernels/librtn.so"))
    built.rtn_isa.restype = ctypes.c_char_p
    assert built.rtn_isa().decode() in isas(platform.machine())


@pytest.mark.slow
def test_source_distribution(source, tmp_path):
    """It holds what a build reads; that it builds is seen by `make wheels`, which builds from it."""
    (source / "rtn_tensor/kernels/librtn.so").write_text("of this machine")
    (source / "rtn_tensor/kernels/triton/tuned").mkdir(exist_ok=True)
    (source / "rtn_tensor/kernels/triton/tuned/NVIDIA-A1-triton-3.6.0.json").write_text("{}")
    setup.run(
        sys.executable,
        "-c",
        "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta as b; b.build_sdist('.')",
        str(source),
    )
    (archive,) = source.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "rtn_tensor").rglob("*")
        if file.suffix in (".py", ".cpp", ".h", ".typed")
    }
    expected = sources | {
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "rtn_tensor/kernels/triton/tuned/NVIDIA-A1-triton-3.6.0.json",
    }
    assert expected <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests")]
