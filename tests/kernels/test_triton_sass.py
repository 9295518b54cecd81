"""The machine code of every kernel configuration that ships is what words.py promises: compiled with no GPU,
by the Triton that is there.

`sass.features` says what a specialisation of a kernel depends on. In the fast tests every two features that
occur together in a call do so on Hopper, for 16-bit activations, and each feature occurs once for the rest;
the slow ones have every three, and every two.
"""

import importlib.util
import inspect
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "TRITON_INTERPRET is set, and kernels that are interpreted are not compiled", allow_module_level=True
    )
pytest.importorskip("triton")

import sass
from triton.backends.compiler import GPUTarget

from rtn_tensor.kernels.triton import int8_kernel, linear_kernel, words

HALF, FLOAT = (torch.bfloat16, torch.float16), (torch.float32,)
ALL = 99  # the strength of a cover that leaves nothing out


def covers(*those):
    """Parameters, of each (cases, strength of the fast tests' cover, of the slow ones')."""
    parameters = []
    for cases, fast, slow in those:
        first = sass.cover(cases, fast) if fast else []
        parameters += [pytest.param(case, id=str(case)) for case in first]
        rest = [case for case in sass.cover(cases, slow) if case not in first]
        parameters += [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in rest]
    return pytest.mark.parametrize("case", parameters)


@pytest.fixture(scope="session")
def results(request, tmp_path_factory):
    """Futures of what the selected tests want compiled, in as many processes as there are cores."""
    wanted = {}
    for item in request.session.items:
        if "results" in getattr(item, "fixturenames", ()):
            wanted[item.callspec.params["case"]] = "product" in item.originalname
    cache = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), get_context("spawn"), sass.use_cache, (cache,)
    ) as pool:
        yield {case: pool.submit(sass.compiled_case, case, listing) for case, listing in wanted.items()}
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------ what is promised


def faults(arch, constants, options, code):
    """What of the promises the code of a product with 16-bit activations breaks: {"what": the number
    found}."""
    found = {"stack": code.stack, "loops": len(code.loops), "shared memory": code.shared}
    allowed = {"stack": [0], "loops": [1], "shared memory": range(sass.GPUS[arch].shared_memory + 1)}
    loop, warps = code.loops[0] if code.loops else [], options["num_warps"]
    zero = constants.get("z_ptr", "an address") is not None
    w_bytes = constants["BN"] * constants["BK"] * constants["BITS"] // 8
    x_bytes = constants["BM"] * constants["BK"] * 2

    def expect(what, pattern, numbers):
        found[what], allowed[what] = sass.count(loop, pattern), numbers

    # Weights and activations come 16 bytes a thread, straight to shared memory; with one stage, which has
    # nothing in flight, by registers.
    pieces = sum(math.ceil(size / (16 * 32 * warps)) for size in (w_bytes, x_bytes))
    by_registers = pieces if options["num_stages"] == 1 else 0
    expect("asynchronous loads", "LDGSTS", [pieces - by_registers])
    expect("asynchronous loads of 16 bytes", r"LDGSTS\S*\.128", [pieces - by_registers])
    expect("loads of 16 bytes", r"LDG\.\S*\.128", [by_registers])
    if arch < 90:
        expect("matrix products", "HMMA", range(1, 1000))
    else:
        # Beside them come only the scales of a thread's rows, of four groups at most, and as many zero points.
        scales = 4 * 2 * math.ceil(constants["BN"] / (16 * warps)) if constants["G"] else 0
        expect("loads", r"LDG\.", range(by_registers, by_registers + scales * (1 + zero) + 1))
        # Weights leave shared memory as wgmma wants them, four matrices of 8 x 16 bytes a warp, and stay in
        # registers.
        expect("ldmatrix", r"LDSM\S*\.4", [w_bytes // (512 * warps)])
        expect("other loads from shared memory", r"LDS[. ]", [0])
        expect("stores to shared memory", "STS", [by_registers])
        expect("matrix products", "HGMMA", range(1, 1000))
        expect(
            "matrix products with weights in registers",
            r"HGMMA\S* R\d+, R\d+, gdesc",
            [found["matrix products"]],
        )
        expect("mma.sync", "HMMA", [0])
        expect("waits for every product", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", [0, 1])
        # Integers become floats by the bits of words.py, but for zero points; ptxas moves a scale or two, and
        # widens each zero point, with PRMT.
        expect("conversions", "I2F", range(scales * zero + 1))
        expect("permutations", "PRMT", range(5 + 2 * scales * zero))
        expect("shuffles", "SHFL", [0])
        expect("spills in the loop", "LDL|STL", [0])
    return {what: number for what, number in found.items() if number not in allowed[what]}


def int8_faults(arch, constants, options, code):
    """What the code of a product with int8 activations breaks of what is promised: by how many there are too
    many, or too few."""
    loop = code.loops[0] if code.loops else []
    found = basic_faults(arch, code) | {"loops": len(code.loops) - 1}
    forbidden = {"other products": "HMMA|HGMMA", "shuffles": "SHFL", "spills in the loop": "LDL|STL"}
    if arch >= 90:
        # One of each of the four pieces, for the 16 rows of each warp and all tokens.
        found["matrix products"] = sass.count(loop, r"IGMMA\S* R\d+, R\d+, gdesc") - 4
        forbidden |= {"stores to shared memory": "STS", "permutations": "PRMT", "mma.sync": "IMMA"}
    else:
        tiles = constants["BN"] // (16 * options["num_warps"]) * constants["BM"] // 8
        found["matrix products"] = sass.count(loop, "IMMA") - 4 * tiles
    found |= {what: sass.count(loop, pattern) for what, pattern in forbidden.items()}
    return {what: number for what, number in found.items() if number}


def basic_faults(arch, code):
    found = {"stack": code.stack, "shared memory": max(0, code.shared - sass.GPUS[arch].shared_memory)}
    return {what: number for what, number in found.items() if number}


# ------------------------------------------------------------------ what does not hold yet


def rounded_by_fp32_scales(case):
    return case.how == "linear_autocast" and not case.tile.scale_after


def backward_of_ragged_rows(case):
    """Tiles of 64 and more sums a thread, stored to rows of dx that begin anywhere."""
    return case.how in sass.BACKWARD and case.tile.block_m == 128 and case.K % 16 != 0


def quantized_by_long_rows(case):
    return case.how.startswith("quantize_") and case.group_size == -1 and case.K > 8192


# What is broken, the most that was found of it, and where.
EXCEPTIONS = [
    # Weights are unpacked to fp32, multiplied and packed again: the loop is twice as long.
    ("permutations", 56, rounded_by_fp32_scales),
    ("permutations", 6, lambda case: case.N == 1),
    ("permutations", 21, lambda case: case.N == 1 and case.how.endswith("_zero")),
    # They are stored element by element, and there are not enough registers for the addresses. That is after
    # the loop.
    ("stack", 300, backward_of_ragged_rows),
    # A group is held in registers, and there are not enough for 14360 columns.
    ("stack", 1400, quantized_by_long_rows),
    # Eight bytes here and there, sixteen for fp32.
    ("stack", 8, lambda case: case.arch < 90),
    ("stack", 16, lambda case: case.dtype == torch.float32),
]


def without_exceptions(case, found):
    excused = {what for what, most, holds in EXCEPTIONS if found.get(what, 0) <= most and holds(case)}
    return {what: number for what, number in found.items() if what not in excused}


# ----------------------------------------------------------------------------------- tests


@covers(
    (sass.cases(90, sass.LINEAR, HALF), 2, 3),
    (sass.cases(90, sass.GROUPED, HALF), 2, 3),
    (sass.cases(80, sass.LINEAR, HALF), 1, 2),
    (sass.cases(80, sass.GROUPED, HALF), 1, 2),
    (sass.cases(89, sass.LINEAR, HALF), 0, 1),
    (sass.cases(89, sass.GROUPED, HALF), 0, 1),
    ([case for case in sass.tuned_cases() if case.dtype in HALF], 2, ALL),
)
def test_product(case, results):
    assert without_exceptions(case, faults(case.arch, *results[case].result())) == {}


@covers(
    (sass.cases(90, sass.INT8, HALF), 1, 2),
    (sass.cases(80, sass.INT8, HALF), 1, 2),
    (sass.cases(90, sass.INT8, FLOAT), 0, 1),
)
def test_int8_product(case, results):
    assert int8_faults(case.arch, *results[case].result()) == {}


@covers(
    (sass.cases(90, sass.LINEAR + sass.GROUPED, FLOAT), 1, 2),
    (sass.cases(90, sass.BACKWARD, HALF + FLOAT), 1, 2),
    (sass.cases(90, sass.PLANES, HALF + FLOAT), 1, 2),
    (sass.cases(80, sass.LINEAR + sass.GROUPED, FLOAT), 0, 1),
    (sass.cases(80, sass.BACKWARD + sass.PLANES, HALF + FLOAT), 0, 1),
    (sass.cases(100, sass.LINEAR + sass.GROUPED, HALF + FLOAT), 1, 1),
    (sass.cases(100, sass.BACKWARD + sass.PLANES, HALF + FLOAT), 0, 1),
    ([case for case in sass.tuned_cases() if case.dtype in FLOAT], 2, ALL),
)
def test_it_compiles_without_spills(case, results):
    assert without_exceptions(case, basic_faults(case.arch, results[case].result()[-1])) == {}


@pytest.mark.parametrize(
    "how",
    [
        *("linear", "linear_bias", "linear_zero", "linear_int8", "linear_dx", "grouped", "gate_up_silu"),
        *("quantize", "quantize_minmax", "dequantize", "embedding"),
    ],
)
def test_it_compiles_for_amd(how, monkeypatch, tmp_path):
    """Without their PTX. The compiler comes with Triton and needs nothing of ROCm."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu = sass.GPUS[90]._replace(shared_memory=65536)
    made = sass.launched(sass.Case(90, gpu, how, 4, 128, torch.bfloat16, 64, 4096, 4096), asm=False)
    kernel = sass.compiled(made, GPUTarget("hip", "gfx942", 64))
    assert kernel.metadata.shared <= gpu.shared_memory
    assert ("v_mfma" in kernel.asm["amdgcn"]) == (how.startswith(("linear", "g")))
    assert set(re.findall(r"ScratchSize: (\d+)", kernel.asm["amdgcn"])) == {"0"}


# --------------------------------------------------------------------- the checks can fail


def mutated(folder, pattern, replacement):
    """The kernels of linear_kernel.py with a change in its source, or in that of what it imports."""
    source = "".join(map(inspect.getsource, (words, int8_kernel, linear_kernel)))
    source = re.sub(r"from rtn_tensor\S+ import .*", "", source)
    changed, count = re.subn(pattern, replacement, source)
    assert count, f"{pattern} is nowhere in the kernels"
    file = folder / "mutated.py"
    file.write_text(changed)
    spec = importlib.util.spec_from_file_location("mutated", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"linear_kernel": module.linear_kernel}


def of(case, pattern=None, replacement="", asm=True, attributes=None, **options):
    """What makes the faults of `case`, given a folder, with the source, the attributes of arguments or the
    options changed."""

    def found(folder):
        made = sass.launched(
            case, kernels=mutated(folder, pattern, replacement) if pattern else sass.KERNELS, asm=asm
        )
        made = made._replace(
            options=made.options | options, attributes=made.attributes if attributes is None else attributes
        )
        return faults(case.arch, made.constexprs, made.options, sass.code(made, case.arch))

    return found


ROUNDED = sass.Case(90, sass.GPUS[90], "linear", 4, 32, torch.bfloat16, 64, 4096, 4096)
EXACT = ROUNDED._replace(group_size=-1)
ON_THE_RIGHT = r"acc = tl\.dot\(q, x, acc=acc, .*", "acc += tl.trans(tl.dot(tl.trans(x), tl.trans(q)))"
STORED = "stores to shared memory"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(of(ROUNDED), [], id="rounded"),
        pytest.param(of(EXACT), [], id="exact"),
        pytest.param(of(ROUNDED, num_stages=1), [], id="one stage"),
        pytest.param(
            of(EXACT, *ON_THE_RIGHT),
            [STORED, "matrix products with weights in registers"],
            id="weights on the right",
        ),
        pytest.param(
            of(ROUNDED, r"\(sx\S* \* CHUNK\)", "sx"),
            [STORED, "asynchronous loads of 16 bytes"],
            id="any stride",
        ),
        pytest.param(
            of(ROUNDED, attributes={}), ["asynchronous loads", "loads", "ldmatrix"], id="any address"
        ),
        pytest.param(of(ROUNDED, r"tl\.assume\(end.*"), ["waits for every product"], id="no step"),
        pytest.param(of(ROUNDED, asm=False), ["conversions", "permutations"], id="no PTX"),
        pytest.param(of(ROUNDED, num_warps=4), [STORED, "other loads from shared memory"], id="few warps"),
        pytest.param(of(ROUNDED, num_stages=12), ["shared memory"], id="many stages"),
        pytest.param(of(ROUNDED, maxnreg=64), ["stack", "spills in the loop"], id="few registers"),
    ],
)
def test_the_checks_can_fail(found, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    faults = found(tmp_path)
    assert faults == {} if not expected else set(faults) >= set(expected)
