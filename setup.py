"""Builds the C++ library of the CPU kernels; the rest of the project's description is in pyproject.toml.

It is a plain shared library, with no Python or torch headers, so one wheel serves every version of both. Where there is no working
compiler the installation goes on without it, and the pure-torch kernels run.
"""

import os
import platform
import shlex
import subprocess
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
    "isa_avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
    "isa_avx512.cpp": AVX512,
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}
PORTABLE = ["isa_generic.cpp", "rtn.cpp", "threads.cpp"]


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        for folder in (objects, target.parent):
            folder.mkdir(parents=True, exist_ok=True)

        def run(*arguments: str) -> None:
            command = [*compiler, *arguments]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise CompileError(f"{shlex.join(command)}: {error}") from error
            if done.returncode:
                raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")

        def compile_one(source: str) -> str:
            name = Path(source).name
            output = str(objects / f"{name}.o")
            run(*flags, *FLAGS.get(name, []), "-c", source, "-o", output)
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        run("-shared", *shlex.split(os.environ.get("LDFLAGS", "")), *compiled, "-o", str(target), "-ldl")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = [*(FLAGS if platform.machine() in ("x86_64", "AMD64") else ()), *PORTABLE]
library = Extension(
    "rtn_tensor.kernels.librtn",
    [str(CSRC / name) for name in sources],
    depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
    optional=True,
)
setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
