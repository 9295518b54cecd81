"""The list of kernels, which of them is chosen, and what `explain` says of that."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from bounds import activations, random_planes
from expecttest import assert_expected_inline
from torch.testing import assert_close

from rtn_tensor import RTNQuantizedTensor, explain, ops, reference
from rtn_tensor.formats import FORMATS
from rtn_tensor.kernels import dense, registry
from rtn_tensor.kernels.problem import Kernel, make_problem
from rtn_tensor.kernels.registry import KERNELS, REFERENCE, choose, why_not


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory from torch.empty holds NaN: an element that a kernel forgets to write is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use():
    """Puts other kernels in the list."""
    before = list(registry.KERNELS)

    def put(*others):
        registry.KERNELS[:] = others

    yield put
    registry.KERNELS[:] = before


def counting(kernel):
    """The kernel, with its linear wrapped so that calls are counted."""
    calls = []

    def linear(x, *args):
        calls.append(x.shape[0])
        return kernel.linear(x, *args)

    return dataclasses.replace(kernel, linear=linear), calls


def small(problem):
    return None if problem.M <= 4 else f"It takes at most 4 rows, got {problem.M}."


SMALL = Kernel(name="small", why_not=small, rounds_weight=lambda p: False, linear=reference.linear)
OTHER_DEVICE = Kernel(
    name="gpu",
    why_not=lambda p: "It needs a GPU." if p.device == "cpu" else None,
    rounds_weight=lambda p: False,
    linear=print,
)


def problem(**changes):
    x, w = activations(3, 64, torch.bfloat16), random_planes(5, 64, dtype=torch.bfloat16)
    return make_problem("linear", x.dtype, 3, 64, w.qdata, w.scale, 4, 32)._replace(**changes)


def test_the_list():
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert KERNELS[-1] is REFERENCE
    ops_ = [f.name for f in dataclasses.fields(Kernel) if f.name not in ("name", "why_not", "rounds_weight")]
    for op in ops_:
        assert why_not(REFERENCE, problem(op=op)) is None
    for kernel in KERNELS:
        assert any(getattr(kernel, op) for op in ops_)
        for device in ("cpu", "cuda", "xpu"):
            for bits in FORMATS:
                reason = why_not(
                    kernel, problem(device=device, bits=bits, capability=(7, 0) if device == "cuda" else None)
                )
                assert reason is None or reason.endswith("."), "a reason is one sentence"


def test_problem():
    q = torch.zeros(4096 + 64, dtype=torch.uint8)
    scale = torch.ones(8, 4, dtype=torch.bfloat16)
    p = make_problem("linear", torch.float16, 5, 100, q[:512].view(8, 64), scale, 4, 32)
    assert p == (
        "linear",
        "cpu",
        None,
        torch.float16,
        torch.bfloat16,
        4,
        32,
        8,
        8,
        100,
        None,
        16,
        False,
        False,
    )
    buckets = [
        make_problem("linear", torch.float16, m, 100, q[:64], scale, 4, 32).M
        for m in (0, 1, 2, 3, 4, 5, 17, 4096)
    ]
    assert buckets == [0, 1, 2, 4, 4, 8, 32, 4096]
    aligned = [
        make_problem("linear", torch.float16, 1, 100, q[at:], scale, 4, 32).alignment
        for at in (0, 16, 8, 24, 4, 2, 1)
    ]
    assert aligned == [16, 16, 8, 8, 4, 2, 1]
    assert make_problem("linear", torch.float16, 1, 100, q, scale.flatten()[4:], 4, 32).alignment == 16
    assert make_problem("grouped", torch.float16, 1, 100, q[:1024].view(2, 8, 64), scale, 4, 32)[8:11] == (
        8,
        100,
        2,
    )
    assert (
        make_problem("linear", torch.float16, 1, 100, q[:64].to("meta"), scale.to("meta"), 4, 32).device
        == "meta"
    )


def test_first_that_can_is_chosen(use):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    assert choose(problem(M=4)).name == "small"
    assert choose(problem(M=8)).name == "dense"
    assert choose(problem(M=1, device="cuda")).name == "gpu"
    assert choose(problem(op="embedding")).name == "reference"


def test_choice_is_made_once_for_a_bucket_of_rows(use):
    asked = []
    spy = dataclasses.replace(SMALL, why_not=lambda p: asked.append(p.M))
    use(spy, REFERENCE)
    w = random_planes(5, 64, dtype=torch.bfloat16)
    for m in (1, 5, 6, 7, 8, 5, 9, 1, 16):
        ops.linear(activations(m, 64, torch.bfloat16), w.qdata, w.scale, None, 4, 32)
    assert asked == [1, 8, 16]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_before_the_cpus_runs(compiled, monkeypatch):
    """Wherever a product comes from: eager products and compiled graphs go to C++ on their own, which asks no
    list."""
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    calls = []
    linear = reference.linear
    spy = Kernel(
        name="spy",
        why_not=lambda problem: None if problem.op == "linear" else "It has only linear.",
        rounds_weight=lambda problem: False,
        linear=lambda *args: calls.append(args[0].shape[0]) or linear(*args),
    )
    w = RTNQuantizedTensor.from_float(torch.randn(48, 64), 4, 32)
    x = torch.randn(3, 64)
    product = torch.compile(lambda x: F.linear(x, w)) if compiled else lambda x: F.linear(x, w)
    with torch.no_grad():
        expected = product(x)
        assert explain(w, x).kernel != "spy"
        registry.KERNELS.insert(0, spy)
        try:
            assert explain(w, x).kernel == "spy"
            for i, mode in enumerate((torch.no_grad, torch.inference_mode, torch.enable_grad), 1):
                with mode():
                    assert_close(product(x), expected)
                assert calls == [3] * i
        finally:
            registry.KERNELS.remove(spy)
        product(x)
        assert len(calls) == 3
        assert explain(w, x).kernel != "spy"


@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS])
def test_forced_kernel_is_the_one_that_runs(name, use, monkeypatch):
    counted = [counting(kernel) for kernel in KERNELS]
    use(*(kernel for kernel, _ in counted))
    monkeypatch.setenv("RTN_KERNEL", name)
    w, x = random_planes(5, 64, group_size=32, dtype=torch.bfloat16), activations(3, 64, torch.bfloat16)
    forced = next(kernel for kernel in KERNELS if kernel.name == name)
    if reason := why_not(forced, make_problem("linear", x.dtype, 3, 64, w.qdata, w.scale, 4, 32)):
        with pytest.raises(ValueError, match=f"RTN_KERNEL='{name}' cannot run") as error:
            ops.linear(x, w.qdata, w.scale, None, 4, 32)
        assert reason in str(error.value)
        return
    ops.linear(x, w.qdata, w.scale, None, 4, 32)
    torch.ops.rtn.linear(x, w.qdata, w.scale, None, 4, 32)
    assert {kernel.name: calls for kernel, calls in counted if calls} == {name: [3, 3]}


def test_forced_kernel_without_the_op_is_passed_over(use, monkeypatch):
    use(SMALL, dense.KERNEL, REFERENCE)
    monkeypatch.setenv("RTN_KERNEL", "small")
    assert choose(problem(op="linear_dx")).name == "dense"
    assert choose(problem(op="embedding")).name == "reference"


def test_forcing_changes_as_the_variable_does(use, monkeypatch):
    use(SMALL, dense.KERNEL, REFERENCE)
    assert choose(problem()).name == "small"
    monkeypatch.setenv("RTN_KERNEL", "reference")
    assert choose(problem()).name == "reference"
    monkeypatch.setenv("RTN_KERNEL", "")
    assert choose(problem()).name == "small"


def test_forcing_errors(use, monkeypatch):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    monkeypatch.setenv("RTN_KERNEL", "fast")
    with pytest.raises(ValueError, match="fast") as error:
        choose(problem())
    assert_expected_inline(
        str(error.value),
        """RTN_KERNEL='fast' names no kernel; use one of gpu, small, dense, reference, or unset it""",
    )
    monkeypatch.setenv("RTN_KERNEL", "small")
    with pytest.raises(ValueError, match="small") as error:
        choose(problem(M=8))
    assert_expected_inline(
        str(error.value).replace(str(problem(M=8)), "Problem(...)"),
        """RTN_KERNEL='small' cannot run Problem(...): It takes at most 4 rows, got 8. Unset RTN_KERNEL to let the library choose""",
    )


def test_explain_by_weight_and_x(use):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    w = RTNQuantizedTensor.from_float(torch.randn(96, 320).bfloat16(), 8, 64)
    found = explain(w, torch.zeros(2, 5, 320, dtype=torch.bfloat16))
    assert_expected_inline(
        str(found),
        """\
linear on cpu: torch.bfloat16 x [10, 320], int8 weight [96, 320] with group_size 64
kernel           why not
---------  ----  ---------------------------------
gpu              It needs a GPU.
small            It takes at most 4 rows, got 16.
dense      runs
reference        It could, but dense is preferred.""",
    )
    as_dict = found.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert_expected_inline(
        json.dumps(as_dict, indent=1),
        """\
{
 "problem": {
  "op": "linear",
  "device": "cpu",
  "capability": null,
  "dtype": "torch.bfloat16",
  "scale_dtype": "torch.bfloat16",
  "bits": 8,
  "group_size": 64,
  "M": 10,
  "N": 96,
  "K": 320,
  "experts": null,
  "alignment": 16,
  "zero": false,
  "int8_x": false
 },
 "kernel": "dense",
 "reasons": {
  "gpu": "It needs a GPU.",
  "small": "It takes at most 4 rows, got 16.",
  "reference": "It could, but dense is preferred."
 }
}""",
    )
    assert explain(w, torch.zeros(3, 320, dtype=torch.bfloat16)).kernel == "small"
    assert explain(w, M=4).kernel == "small"
    assert explain(w, M=5).kernel == "dense"
    assert explain(w, op="quantize").kernel == "reference"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device": "banana"}, ValueError, "device='banana' is no device; cpu and cuda are"),
        ({"device": 0.5}, TypeError, "device=0.5; give its name"),
        (
            {"dtype": torch.int8},
            ValueError,
            "dtype=torch.int8 is none that a product with a quantized weight has",
        ),
        ({"dtype": "bfloat16"}, ValueError, "dtype='bfloat16' is none"),
        ({"op": 3}, ValueError, "op=3 is not an op"),
        ({"M": "1"}, TypeError, "M='1': sizes are whole numbers"),
        ({"N": 2.5, "K": None}, TypeError, "N=2.5, K=None: sizes are whole numbers"),
        ({"x": torch.tensor(1.0)}, TypeError, "x is a scalar; give a tensor"),
        ({"x": 3}, TypeError, "x is an int; give a tensor"),
    ],
)
def test_explain_says_what_is_wrong(given, error, message):
    with pytest.raises(error, match=message):
        explain(**given)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda")])
def test_explain_of_a_gpu_that_is_not_there(device):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        ValueError,
        match="there is no CUDA device here, and which kernel runs depends on it; use device='cpu'",
    ):
        explain(device=device)


def test_explain_by_numbers(use):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    assert_expected_inline(
        str(explain(bits=4, group_size=32, M=3, N=100, K=1000, dtype=torch.float16)),
        """\
linear on cpu: torch.float16 x [3, 1000], int4 weight [100, 1000] with group_size 32
kernel           why not
---------  ----  ---------------------------------
gpu              It needs a GPU.
small      runs
dense            It could, but small is preferred.
reference        It could, but small is preferred.""",
    )
    assert_expected_inline(
        str(explain(op="linear_dx", M=0)),
        """\
linear_dx on cpu: torch.bfloat16 x [0, 4096], int4 weight [4096, 4096] with group_size 64
kernel           why not
---------  ----  ---------------------------------
gpu              It has no linear_dx.
small            It has no linear_dx.
dense      runs
reference        It could, but dense is preferred.""",
    )
    assert explain(x=torch.zeros(7, 64)).problem[3:10] == (torch.float32, torch.float32, 4, 64, 7, 4096, 64)


def test_explain_when_forced(use, monkeypatch):
    use(OTHER_DEVICE, SMALL, dense.KERNEL, REFERENCE)
    monkeypatch.setenv("RTN_KERNEL", "reference")
    assert_expected_inline(
        str(explain(M=3)),
        """\
linear on cpu: torch.bfloat16 x [3, 4096], int4 weight [4096, 4096] with group_size 64
kernel           why not
---------  ----  ------------------------------------------------
gpu              It needs a GPU.
small            It could, but reference is forced by RTN_KERNEL.
dense            It could, but reference is forced by RTN_KERNEL.
reference  runs""",
    )
    monkeypatch.setenv("RTN_KERNEL", "gpu")
    with pytest.raises(ValueError, match="It needs a GPU"):
        explain(M=3)


def test_explain_errors():
    with pytest.raises(ValueError, match="conv") as error:
        explain(op="conv")
    assert_expected_inline(
        str(error.value),
        """op='conv' is not an op; use linear, linear_dx, grouped, grouped_dx, routed, embedding, quantize or dequantize""",
    )
    with pytest.raises(ValueError, match="why_not"):
        explain(op="why_not")
    with pytest.raises(TypeError, match="Parameter") as error:
        explain(torch.nn.Linear(3, 4).weight)
    assert_expected_inline(
        str(error.value),
        """explain needs a quantized weight, got Parameter; quantize it, or describe it by numbers""",
    )


def test_explain_agrees_with_what_runs(use):
    """The whole table, without running anything: one kernel runs, and each other has a sentence."""
    counted = [counting(kernel) for kernel in KERNELS]
    use(*(kernel for kernel, _ in counted))
    w, x = RTNQuantizedTensor.from_float(torch.randn(5, 64), 4, 32), torch.randn(3, 64)
    found = explain(w, x)
    assert not any(calls for _, calls in counted)
    assert {found.kernel, *found.reasons} == {kernel.name for kernel in KERNELS}
    assert all(reason.endswith(".") for reason in found.reasons.values())
    ops.linear(x, w.qdata, w.scale, None, 4, 32)
    assert {kernel.name: calls for kernel, calls in counted if calls} == {found.kernel: [3]}
