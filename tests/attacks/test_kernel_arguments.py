"""The C library and the ops refuse arguments by which a kernel would read or write past an array; each in a
forked process."""

import gc
import os

import pytest
import torch
import torch.nn.functional as F
from forked import survives
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from rtn_tensor import RTNQuantizedTensor, explain, ops
from rtn_tensor.formats import FORMATS, Format
from rtn_tensor.kernels import cpu, problem, triton
from rtn_tensor.kernels.registry import forget

needs_library = pytest.mark.skipif(cpu.library() is None, reason="the C++ library was not built")
HUGE = 1 << 62
REFUSED = -2
LAST_THAT_FITS = {
    "dtype": len(cpu.DTYPE_CODES) - 1,
    "scale_dtype": len(cpu.SCALE_CODES) - 1,
    "int8_x": 1,
}  # of the codes


# ----------------------------------------------------------------- the C library by itself

LINEAR = (
    "x qdata scale bias y offs zero m n k experts bits group_size int8_x dtype scale_dtype x_stride y_stride "
    "qdata_stride qdata_expert_stride "
    "scale_stride scale_expert_stride zero_stride zero_expert_stride threads "
    "qdata_experts qdata_rows qdata_bytes scale_experts scale_rows scale_groups "
    "zero_experts zero_rows zero_groups bias_size offs_size"
).split()
PLANES = (
    "w qdata scale zero indices rows k bits group_size dtype scale_dtype w_stride qdata_stride scale_stride "
    "zero_stride scale_method threads qdata_rows "
    "qdata_bytes scale_rows scale_groups zero_rows zero_groups"
).split()
LIES = (-HUGE, -1, 0, 1, 3, 7, 16, 33, 100, 1 << 26, HUGE)


def linear_arguments(**lie):
    e, m, n, k = 2, 5, 6, 96
    arrays = {
        "x": torch.randn(m, k),
        "qdata": torch.zeros(e, n, 48, dtype=torch.uint8),
        "scale": torch.ones(e, n, 3),
        "bias": torch.zeros(n),
        "y": torch.empty(m, n),
        "offs": torch.tensor([2, 5], dtype=torch.int32),
        "zero": torch.zeros(e, n, 3, dtype=torch.int8),
    }
    numbers = [m, n, k, e, 4, 32, 0, 0, 0, k, n, 48, n * 48, 3, n * 3, 3, n * 3]
    numbers += [1, e, n, 48, e, n, 3, e, n, 3, n, e]
    fields = dict(zip(LINEAR, [t.data_ptr() for t in arrays.values()] + numbers, strict=True))
    return arrays, cpu._LINEAR.pack(*(fields | lie).values())


def planes_arguments(indices=None, **lie):
    rows, k = 6, 96
    arrays = {
        "w": torch.randn(rows, k),
        "qdata": torch.zeros(rows, 48, dtype=torch.uint8),
        "scale": torch.ones(rows, 3),
        "zero": torch.zeros(rows, 3, dtype=torch.int8),
    }
    at = torch.tensor(indices or [0] * rows)
    pointers = [t.data_ptr() for t in arrays.values()] + [at.data_ptr() if indices else 0]
    fields = dict(
        zip(
            PLANES,
            [*pointers, rows, k, 4, 32, 0, 0, k, 48, 3, 3, 3, 1, rows, 48, rows, 3, rows, 3],
            strict=True,
        )
    )
    return (arrays, at), cpu._PLANES.pack(*(fields | lie).values())


def status(function, make, lie):
    kept, arguments = make(**lie)
    return getattr(cpu.library(), function)(arguments)


# That so much memory is there, and x has so many rows, only the caller knows.
ONLY_THE_CALLER = {"x", "y", "qdata", "scale", "zero", "w", "m", "rows", "threads", "offs", "bias", "indices"}


@needs_library
@pytest.mark.parametrize(
    "field", [name for name in LINEAR if name not in ONLY_THE_CALLER and "stride" not in name]
)
def test_a_number_that_does_not_fit_is_refused_by_rtn_linear(field):
    _, honest = linear_arguments()
    true = cpu._LINEAR.unpack(honest)[LINEAR.index(field)]
    assert survives(status, "rtn_linear", linear_arguments, {}).value == 0
    for lie in LIES:
        if lie != true and not 0 <= lie <= LAST_THAT_FITS.get(field, -1):
            assert survives(status, "rtn_linear", linear_arguments, {field: lie}).value == REFUSED, (
                field,
                lie,
            )


@needs_library
@pytest.mark.parametrize("function", ["rtn_quantize", "rtn_dequantize"])
@pytest.mark.parametrize(
    "field", [name for name in PLANES if name not in ONLY_THE_CALLER and "stride" not in name]
)
def test_a_number_that_does_not_fit_is_refused_by_the_others(function, field):
    _, honest = planes_arguments()
    true = cpu._PLANES.unpack(honest)[PLANES.index(field)]
    assert survives(status, function, planes_arguments, {}).value == 0
    for lie in LIES:
        fits = 0 <= lie <= LAST_THAT_FITS.get(field, -1)
        # By the scale method it is seen whether there is to be a plane `zero`.
        fits |= field == "scale_method" and function == "rtn_dequantize" and 0 <= lie <= 3
        if lie != true and not fits:
            assert survives(status, function, planes_arguments, {field: lie}).value == REFUSED, (field, lie)


NO_ZERO = {"zero": 0, "zero_rows": 0, "zero_groups": 0}


@needs_library
def test_zero_points_that_are_not_there():
    """Null with sizes, and sizes of none; what makes them must have a place for them, and no other."""
    nothing = NO_ZERO | {"zero_experts": 0}
    assert survives(status, "rtn_linear", linear_arguments, nothing).value == 0
    for lie in ({"zero": 0}, nothing | {"zero_rows": 6}, nothing | {"zero_stride": -1}):
        assert survives(status, "rtn_linear", linear_arguments, lie).value == REFUSED
    for method in range(3):
        lie = {"scale_method": method}
        assert survives(status, "rtn_quantize", planes_arguments, lie).value == REFUSED
        assert survives(status, "rtn_quantize", planes_arguments, NO_ZERO | lie).value == 0
    assert survives(status, "rtn_quantize", planes_arguments, NO_ZERO).value == REFUSED
    assert survives(status, "rtn_dequantize", planes_arguments, NO_ZERO).value == 0
    assert survives(status, "rtn_dequantize", planes_arguments, {"zero": 0}).value == REFUSED
    assert survives(status, "rtn_dequantize", planes_arguments, {"zero_stride": -1}).value == REFUSED


@needs_library
def test_null_negative_strides_and_no_threads_are_refused():
    for lie in ("x", "qdata", "scale", "y"):
        assert survives(status, "rtn_linear", linear_arguments, {lie: 0}).value == REFUSED
    for lie in ("x_stride", "y_stride", "qdata_stride", "scale_expert_stride", "m", "threads"):
        assert survives(status, "rtn_linear", linear_arguments, {lie: -1}).value == REFUSED
    for lie in ("w", "qdata", "scale"):
        assert survives(status, "rtn_dequantize", planes_arguments, {lie: 0}).value == REFUSED
    for lie in ("w_stride", "qdata_stride", "scale_stride", "rows", "threads"):
        assert survives(status, "rtn_quantize", planes_arguments, {lie: -1}).value == REFUSED


@needs_library
def test_indices_past_the_rows_are_refused():
    for indices in ([0, 1, 2, 3, 4, 6], [-1, 0, 0, 0, 0, 0], [HUGE, 0, 0, 0, 0, 0], [-HUGE, 0, 0, 0, 0, 0]):
        assert survives(status, "rtn_dequantize", planes_arguments, {"indices": indices}).value == REFUSED
    assert survives(status, "rtn_dequantize", planes_arguments, {"indices": [5] * 6}).value == 0
    # It writes no rows twice.
    assert survives(status, "rtn_quantize", planes_arguments, {"indices": [5] * 6}).value == REFUSED


@needs_library
def test_a_library_of_other_sources_says_so(monkeypatch):
    """As after a pull without a rebuild."""
    monkeypatch.setattr(cpu, "ABI", cpu.ABI + 1)
    cpu._load.cache_clear()
    try:
        lib, why = cpu._load()
    finally:
        cpu._load.cache_clear()
    assert lib is None
    assert "built from other sources than this Python code" in why
    assert "pip install -e ." in why


def test_the_structs_are_those_of_the_header():
    """Their fields and RTN_ABI stand in two places, and must change in both."""
    header = (cpu.LIBRARY.parent / "csrc/rtn.h").read_text()
    assert f"enum {{ RTN_ABI = {cpu.ABI} }};" in header
    for end, fields, packed in (
        ("} rtn_linear_args;", LINEAR, cpu._LINEAR),
        ("} rtn_planes_args;", PLANES, cpu._PLANES),
    ):
        body = header[: header.index(end)].rpartition("typedef struct {")[2]
        lines = [line.partition("//")[0].replace("*", " ") for line in body.splitlines()]
        names = [
            name.split()[-1]
            for line in lines
            if ";" in line
            for part in line.split(";")
            if part.strip()
            for name in part.split(",")
        ]
        assert names == fields
        assert packed.size == 8 * len(fields)


# --------------------------------------------------------------------------------- the ops

rtn = torch.ops.rtn


def good(op):
    e, n, k, m = 3, 6, 96, 5
    planes = torch.zeros(n, 48, dtype=torch.uint8), torch.ones(n, 3)
    stacked = torch.zeros(e, n, 48, dtype=torch.uint8), torch.ones(e, n, 3)
    zero, zeros = torch.zeros(n, 3, dtype=torch.int8), torch.zeros(e, n, 3, dtype=torch.int8)
    offs = torch.tensor([1, 3, 5], dtype=torch.int32)
    x, dy = torch.ones(m, k), torch.ones(m, n)
    arguments = {
        "linear": {"x": x, **named(planes), "bias": torch.ones(n), "bits": 4, "group_size": 32},
        "linear_dx": {"dy": dy, **named(planes), "bits": 4, "group_size": 32, "k": k},
        "grouped": {"x": x, **named(stacked), "offs": offs, "bits": 4, "group_size": 32},
        "grouped_dx": {"dy": dy, **named(stacked), "offs": offs, "bits": 4, "group_size": 32, "k": k},
        "routed": {
            **{
                "x": x,
                **named(stacked),
                "bias": torch.ones(e, n),
                "experts": torch.zeros(m, dtype=torch.int64),
            },
            **{
                "pairs": torch.arange(m, dtype=torch.int32),
                "offs": offs,
                "router": torch.ones(m),
                "top_k": 1,
                "activation": "silu",
            },
            **{"bits": 4, "group_size": 32},
        },
        "embedding": {"indices": torch.tensor([0, 5]), **named(planes), "bits": 4, "group_size": 32, "k": k},
        "quantize": {
            "w": x,
            "bits": 4,
            "group_size": 32,
            "scale_method": "absmax",
            "scale_dtype": torch.float32,
        },
        "dequantize": {**named(planes), "bits": 4, "group_size": 32, "k": k, "dtype": torch.float32},
    }[op]
    if op == "quantize":
        return arguments
    return arguments | {"zero": zeros if op in ("grouped", "grouped_dx", "routed") else zero}


def named(planes):
    return dict(zip(("qdata", "scale"), planes, strict=True))


def lies(op, name, value):
    """Values of another size, kind or number than the one that fits, each of which must be refused."""
    if isinstance(value, torch.Tensor):
        yield value.to(torch.int16 if value.is_floating_point() else torch.float64)
        yield value.reshape(-1)[0] if name != "indices" else value.bool()
        if op == "quantize":
            return  # any tensor of floats that has dims can be quantized
        yield value.to("meta")
        if name in ("x", "dy"):
            yield value[..., :-40] if name == "x" else value[..., :-1]
            yield torch.cat([value, value], -1)
        elif name != "indices":
            yield value[..., :-1].contiguous()
            yield torch.cat([value, value], -1)
            yield value[None]
            yield value[:0]
    elif name in ("bits", "group_size", "k", "top_k"):
        yield from (-(1 << 60), -128, -2, 0, 3, 5, 16, 31, 33, 1 << 60)
        yield from () if op == "quantize" else (-1, 1 << 26)
    elif name == "scale_method":
        yield from ("", "median")
    elif name == "activation":
        yield "median"
    else:
        yield torch.int8


def refused(op, name, eager):
    """What was not refused, of all lies about one argument."""
    given = []
    for lie in lies(op, name, good(op)[name]):
        arguments = good(op) | {name: lie}
        try:
            (getattr(ops, op) if eager else getattr(rtn, op))(*arguments.values())
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            continue
        given.append(repr(lie))
    return given


OPS = ["linear", "linear_dx", "grouped", "grouped_dx", "routed", "embedding", "quantize", "dequantize"]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "dispatched"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_refuses_an_argument_that_does_not_fit(op, eager):
    (getattr(ops, op) if eager else getattr(rtn, op))(*good(op).values())
    for name in good(op):
        assert survives(refused, op, name, eager).value == [], name


def test_a_fake_refuses_what_the_op_refuses():
    """So that a compiler sees the error where the call stands, and traces no product that cannot run."""
    arguments = good("linear") | {"scale": torch.ones(6, 2)}
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, tuple(arguments.values()))
        with pytest.raises(
            RuntimeError,
            match=r"rtn::linear: qdata .* are not the planes of a weight of 96 " r"columns with bits=4",
        ):
            rtn.linear(*fakes)


def test_embedding_names_the_index():
    for indices in ([6], [-1], [0, 1 << 40]):
        with pytest.raises(IndexError, match="out of range"):
            ops.embedding(*(good("embedding") | {"indices": torch.tensor(indices)}).values())


def test_kernels_say_which_bits_they_have(monkeypatch):
    """A width that is added to FORMATS runs in plain torch until a kernel says that it has it."""
    monkeypatch.setitem(FORMATS, 2, Format(2))
    w = RTNQuantizedTensor.from_float(torch.randn(8, 64), bits=2, group_size=32)
    x = torch.randn(3, 64)
    torch.testing.assert_close(F.linear(x, w), x @ w.dequantize().t())
    reasons = explain(w, x).reasons
    assert reasons["cpu"] == "It reads 4 and 8 bits, not 2."
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (
        triton.why_not(problem.make_problem("dequantize", w.dtype, 8, 64, w.qdata, w.scale, 2, 32))
        == reasons["cpu"]
    )


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("ends", [[3, 100, 100], [-7, 2, 5], [5, 2, 1], [1 << 30, -(1 << 30), 5], [0, 0, 2]])
def test_ends_that_are_none_stay_inside(kernel, ends):
    """Of rows that no expert's own range holds nothing is said; what is read and written are rows that there
    are."""

    def run():
        os.environ["RTN_KERNEL"] = kernel
        forget()
        arguments = good("grouped") | {"offs": torch.tensor(ends, dtype=torch.int32)}
        return ops.grouped(*arguments.values()).isfinite().all().item()

    assert survives(run, allowed=(RuntimeError,) if kernel == "reference" else ()).value in (True, None)


@needs_library
def test_a_prefill_does_not_keep_its_memory():
    """136 MB stayed after one of [16384, 4096], for as long as the thread ran."""

    def kept(rows):
        w = RTNQuantizedTensor.from_float(torch.ones(32, 4096).bfloat16(), 4, 128)
        F.linear(torch.ones(1, 4096).bfloat16(), w)
        before = resident()
        F.linear(torch.ones(rows, 4096).bfloat16(), w)
        gc.collect()
        return resident() - before

    assert survives(kept, 16384).value < 40 << 20


def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096
