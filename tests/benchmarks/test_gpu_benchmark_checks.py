"""The checks of benchmarks/gpu.py, on a CPU."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_gpu_benchmark import Clock, endless

from benchmarks import gpu_check, gpu_check_experts
from benchmarks.gpu_peers import Experts
from benchmarks.gpu_workers import Budget
from rtn_tensor.kernels import triton
from rtn_tensor.kernels.registry import REFERENCE

interpreted = pytest.mark.skipif(not triton.interpreting(), reason="needs TRITON_INTERPRET=1")


def checked(function, **arguments):
    rows = []
    function(rows.append, endless(), device="cpu", **arguments)
    assert rows
    return rows


@pytest.mark.parametrize("op", gpu_check.PRODUCTS)
@pytest.mark.parametrize("dtype", gpu_check.DTYPES)
def test_checks_pass_the_reference(op, dtype):
    shapes = [(1, 5, 100), (17, 33, 160)]
    for bits, group_size in ((4, 96), (8, -1)):
        rows = checked(
            gpu_check.products,
            op=op,
            dtype=dtype,
            bits=bits,
            group_size=group_size,
            shapes=shapes,
            kernel=REFERENCE,
        )
        assert [r["error"] for r in rows] == [None] * (4 if op == "linear" else 2)
    assert rows[-1]["check"].startswith(
        f"{op}{' with bias' if op == 'linear' else ''} int8 g-1 {dtype}, x 17 rows, weight ["
    )


def test_checks_pass_the_reference_without_sums():
    rows = checked(
        gpu_check.planes,
        dtype="bfloat16",
        bits=4,
        group_size=64,
        shapes=[(5, 100), (2, 64)],
        kernel=REFERENCE,
    )
    assert [r["error"] for r in rows] == [None] * 18


def test_checks_pass_the_reference_of_experts():
    for activation in ("silu", "gpt_oss"):
        form = {"dtype": "float32", "bits": 4, "group_size": 32, "activation": activation}
        rows = checked(
            gpu_check_experts.routed, shape=Experts(3, 64, 32, 2), tokens=[1, 5], kernel=REFERENCE, **form
        )
        assert [r["error"] for r in rows] == [None] * 4
        kinds = [[f"experts {how}", activation] for how in ("sorted", "unsorted")]
        assert [r["check"].split(", ")[:2] for r in rows] == 2 * kinds
    unweighted = dataclasses.replace(
        REFERENCE, routed=lambda *args: REFERENCE.routed(*args[:7], None, *args[8:])
    )
    rows = checked(
        gpu_check_experts.routed, shape=Experts(3, 64, 32, 2), tokens=[5], kernel=unweighted, **form
    )
    assert all("out of bound" in r["error"] for r in rows)


def test_checks_see_what_is_wrong():
    def one_row_off(x, *args):
        y = REFERENCE.linear(x, *args)
        y[0, -1] *= 1.02
        return y

    def unwritten(x, qdata, *args):
        return torch.empty(x.shape[0], qdata.shape[0], dtype=x.dtype)

    calls = []

    def other_bits(x, *args):
        calls.append(0)
        y = REFERENCE.linear(x, *args)
        return torch.nextafter(y, y + 1) if len(calls) % 2 else y

    def quantize(*args):
        qdata, scale = REFERENCE.quantize(*args)
        return qdata ^ 1, scale

    form = {"bits": 4, "group_size": 32}
    for linear, says in (
        (one_row_off, "out of bound"),
        (unwritten, "out of bound; the first, (0, 0), is nan"),
        (other_bits, "a second run gave other bits"),
    ):
        wrong = dataclasses.replace(REFERENCE, linear=linear)
        rows = checked(
            gpu_check.products, op="linear", dtype="float32", shapes=[(3, 5, 64)], kernel=wrong, **form
        )
        assert all(says in r["error"] for r in rows)
    wrong = dataclasses.replace(REFERENCE, quantize=quantize, embedding=print)
    rows = checked(gpu_check.planes, dtype="float32", shapes=[(5, 64)], kernel=wrong, **form)
    assert {r["check"].split()[0] for r in rows if r["error"]} == {"quantize,", "embedding"}


def test_checks_without_time_are_skipped():
    clock = Clock()
    rows = []
    form = {"dtype": "float32", "bits": 4, "group_size": 32, "device": "cpu", "kernel": REFERENCE}
    gpu_check.products(rows.append, Budget(-1, clock), op="linear_dx", shapes=[(1, 5, 64)], **form)
    assert [r.get("skipped") for r in rows] == ["no time was left"]


def test_large_weights_are_checked_in_parts(monkeypatch):
    monkeypatch.setattr(gpu_check, "LARGE", 1)
    monkeypatch.setattr(gpu_check, "ROWS", 7)
    form = {"dtype": "bfloat16", "bits": 4, "group_size": 32}
    rows = checked(gpu_check.products, op="linear", shapes=[(3, 20, 64)], kernel=REFERENCE, **form)
    assert [r["error"] for r in rows] == [None, None]


def test_bounds_of_experts_bite():
    x, gate, up = (
        torch.randn(5, 64).bfloat16(),
        torch.randn(8, 64).double() / 8,
        torch.randn(8, 64).double() / 8,
    )
    y = (F.silu(x.double() @ gate.mT) * (x.double() @ up.mT)).bfloat16()
    gpu_check_experts.assert_gated_close(y, x, gate, up, "silu")
    router = torch.rand(5)
    z = (router.double()[:, None] * (x.double() @ up.mT)).bfloat16()
    gpu_check_experts.assert_routed_close(z, x, up, router)
    for wrong in (y * 1.02, y.index_fill(1, torch.tensor([2]), torch.nan)):
        with pytest.raises(AssertionError, match="out of bound"):
            gpu_check_experts.assert_gated_close(wrong, x, gate, up, "silu")
    with pytest.raises(AssertionError, match="out of bound"):
        gpu_check_experts.assert_routed_close(z, x, up, router.flip(0))


@interpreted
@pytest.mark.parametrize("op", gpu_check.PRODUCTS)
def test_products_in_the_interpreter(op):
    for dtype in ("bfloat16", "float32"):
        rows = checked(gpu_check.products, op=op, dtype=dtype, bits=4, group_size=32, shapes=[(3, 33, 100)])
        assert [r["error"] for r in rows] == [None] * len(rows)


@interpreted
def test_planes_in_the_interpreter():
    rows = checked(gpu_check.planes, dtype="bfloat16", bits=8, group_size=-1, shapes=[(5, 100)])
    assert [r["error"] for r in rows] == [None] * 9


@interpreted
def test_experts_in_the_interpreter():
    for bits, group_size, activation in ((4, 32, "gpt_oss"), (8, -1, "silu")):
        form = {"dtype": "bfloat16", "bits": bits, "group_size": group_size, "activation": activation}
        rows = checked(gpu_check_experts.routed, shape=Experts(3, 64, 32, 2), tokens=[1, 5], **form)
        assert [r["error"] for r in rows] == [None] * 4
