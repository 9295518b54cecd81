"""The C++ library in every instruction set: as installed, under sanitizers, and for aarch64 in an emulator."""

import functools
import os
import platform
from pathlib import Path

import pytest
from cpu_library import (
    AARCH64_LIBRARY,
    EMULATOR,
    ROOT,
    SANITIZERS,
    WARNINGS,
    Driver,
    isas,
    need,
    need_library,
    setup,
)

from rtn_tensor.kernels import cpu


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
            elif how == "imitated":
                # AVX-VNNI by a processor that has the same instructions as part of AVX-512.
                flags, files = ["-O2"], setup.sources(platform.machine()) | driver
                files[str(setup.CSRC / "isa_avxvnni.cpp")] = [
                    *setup.AVX512,
                    "-mavx512vnni",
                    "-D__AVXVNNI__",
                    *("-include", "tests/kernels/with_avxvnni.h"),
                ]
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
        pytest.param(("imitated", "avxvnni"), id="imitated-avxvnni", marks=pytest.mark.slow),
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
    if how == "imitated" and not has_avx512_vnni():
        pytest.skip("this processor has no AVX-512 VNNI, which could stand in for AVX-VNNI")
    driver = Driver(*command_of(how), isa)
    if not driver.available:
        pytest.skip(f"this processor has no {isa}")
    yield isa, driver
    driver.close()


def has_avx512_vnni():
    before = cpu.isa()
    try:
        cpu.set_isa("avx512vnni")
    except ValueError:
        return False
    cpu.set_isa(before)
    return True


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
