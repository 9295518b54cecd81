"""Builds the C++ library of the CPU kernels; the rest of the project's description is in pyproject.toml.

It is a plain shared library, with no Python or torch headers, so one wheel serves every version of both.
Where there is no working compiler the installation goes on without it, and the pure-torch kernels run.
"""

import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("rtn_tensor/kernels/csrc")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
# One file an instruction set; which of them runs is chosen when the library is loaded.
FLAGS = {
    "x86_64": {
        "isa_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        "isa_avx512bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        "isa_avx512vnni.cpp": [*AVX512, "-mavx512vnni"],
        "isa_avx512.cpp": AVX512,
        "isa_avxvnni.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
        "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    },
    "aarch64": {
        "isa_neoni8mm.cpp": ["-march=armv8.2-a+dotprod+bf16+i8mm"],
        "isa_neonbf16.cpp": ["-march=armv8.2-a+dotprod+bf16"],
        "isa_neondot.cpp": ["-march=armv8.2-a+dotprod"],
    },
}
PORTABLE: dict[str, list[str]] = {"isa_generic.cpp": [], "rtn.cpp": [], "threads.cpp": [], "torch_op.cpp": []}


def sources(machine: str) -> dict[str, list[str]]:
    """The files of the library for a `platform.machine()`, each with the flags that it alone is compiled
    with."""
    return {str(CSRC / name): flags for name, flags in (FLAGS.get(machine, {}) | PORTABLE).items()}


def target() -> str:
    """The `platform.machine()` that is built for, which _PYTHON_HOST_PLATFORM changes where a compiler for
    another one is in CXX."""
    return sysconfig.get_platform().rpartition("-")[2]


def run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def compile_all(compiler: list[str], files: dict[str, list[str]], folder: Path) -> list[str]:
    """Compiles `files` (name -> flags) into `folder`, in parallel; the names of the objects."""

    def compile_one(source: str) -> str:
        output = str(folder / f"{Path(source).name}.o")
        run(*compiler, "-std=c++17", *files[source], "-c", source, "-o", output)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, files))


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        flags = ["-O3", "-fPIC", "-fvisibility=hidden", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        output = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        for folder in (objects, output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        compiled = compile_all([*compiler, *flags], sources(target()), objects)
        # -lgcc: the conversions of half floats from the compiler's own archive, as libgcc_s.so.1 has them
        # from GCC 12 on only.
        run(
            *compiler,
            "-shared",
            *shlex.split(os.environ.get("LDFLAGS", "")),
            *compiled,
            "-o",
            str(output),
            "-lgcc",
            "-ldl",
        )


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # the tests build the library in other ways
    library = Extension(
        "rtn_tensor.kernels.librtn",
        list(sources(target())),
        depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
        optional=True,
    )
    setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
