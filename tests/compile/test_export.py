"""Whole models through torch.compile, torch.export and AOTInductor, in this process and in one that has never
traced them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from rtn_tensor import dequantize_, quantize_, rtn, rtn_int4
from rtn_tensor.kernels import cpu

# torch.export copies what it deprecated itself.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # transformers' own.
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Logits(nn.Module):
    """A model without a cache, from one tensor to one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def llama(config=None):
    """Four equal blocks, quantized, and the same weights dequantized."""
    models = []
    for _ in range(2):
        model = Logits(tiny_llama(layers=4)).requires_grad_(False)
        quantize_(model, config or rtn_int4(group_size=32))
        models.append(model)
    dequantize_(models[1])
    return models


def tokens(*shape):
    return torch.randint(0, 320, shape)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------- compile

# torch makes graphs for a size of 1 of its own.
NEW_SIZES = [(2, 7), (3, 9), (4, 12), (2, 5), (5, 30)]
ONES = [(1, 8), (1, 1), (3, 1), (6, 2)]


def check_sizes(run, expected, sizes=NEW_SIZES):
    with torch.no_grad():
        for size in sizes:
            close(run(ids := tokens(*size)), expected(ids))


def test_a_whole_model_compiles_into_one_graph():
    model, expected = llama()
    counter = CompileCounterWithBackend("aot_eager")
    check_sizes(torch.compile(model, backend=counter, fullgraph=True), expected)
    assert counter.frame_count == 2  # of the first sizes, and of any


def test_dynamic_from_the_start():
    model, expected = llama()
    counter = CompileCounter()
    check_sizes(torch.compile(model, backend=counter, fullgraph=True, dynamic=True), expected)
    assert counter.frame_count == 1


def test_compiled_blocks_share_one_graph():
    model, expected = llama()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    check_sizes(model, expected)
    assert counter.frame_count == 2
    check_sizes(model, expected, ONES)
    assert counter.frame_count == 5


def test_blocks_of_two_precisions_make_two_graphs():
    model = Logits(tiny_llama(layers=4))
    for i, layer in enumerate(model.model.model.layers):
        quantize_(layer, rtn(8 if i % 2 else 4, 32))
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        model(tokens(2, 7))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_a_whole_model_under_inductor():
    model, expected = llama()
    counter = CompileCounterWithBackend("inductor")
    check_sizes(torch.compile(model, backend=counter, fullgraph=True), expected)
    assert counter.frame_count == 2


# ----------------------------------------------------------- every mode reaches the kernel


@pytest.fixture
def calls(monkeypatch):
    """The planes of every product of the CPU kernel, whoever asks for it."""
    if cpu.library() is None:
        pytest.skip("needs the C++ library")
    seen, linear = [], cpu.KERNEL.linear
    monkeypatch.setitem(vars(cpu.KERNEL), "linear", lambda *args: seen.append(args[1]) or linear(*args))
    cpu.direct(False)
    yield seen
    cpu.direct(True)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode, autocast], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("how", ["eager", "compiled", "exported"])
def test_every_mode_reaches_the_kernel(mode, how, calls):
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    quantize_(model, rtn_int4(group_size=32))
    x = torch.randn(5, 96)
    dense = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    dense.load_state_dict(model.state_dict())
    dequantize_(dense)
    run = model
    with mode():
        if how == "compiled":
            run = torch.compile(model, fullgraph=True, backend="aot_eager")
            run(x)
        elif how == "exported":
            run = torch.export.export(model, (x,)).module()
        calls.clear()
        y = run(x)
        assert [q.data_ptr() for q in calls] == [layer.weight.qdata.data_ptr() for layer in model[::2]]
        expected = dense(x)
    assert y.dtype == expected.dtype
    tolerance = 2e-2 if y.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert y.requires_grad == (mode is torch.enable_grad or mode is autocast)


# ---------------------------------------------------------------------------------- export


def export(model, strict=False):
    sizes = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("sequence", min=1, max=256)},)
    with torch.no_grad():
        return torch.export.export(model, (tokens(2, 7),), dynamic_shapes=sizes, strict=strict)


@pytest.fixture(scope="module")
def exported():
    if torch.__version__ < "2.13":  # seen on 2.11, with float weights too
        pytest.skip("this torch cannot export a Llama, float or quantized, with a dynamic sequence")
    torch.manual_seed(0)
    model, expected = llama()
    return export(model), model, expected


def in_a_fresh_process(program, *args):
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore::DeprecationWarning",
        "-W",
        "ignore::FutureWarning",
        "-c",
        program,
        *map(str, args),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch_and_sequence(strict, exported):
    program, model, expected = exported
    run = (export(model, strict) if strict else program).module()
    for shape in ((2, 7), (1, 1), (3, 20), (1, 5), (5, 1)):
        close(run(ids := tokens(*shape)), expected(ids))


def test_an_exported_model_keeps_its_packed_weights(exported):
    program, model, expected = exported
    planes = {name: w for name, w in model.named_parameters() if hasattr(w, "qdata")}
    assert {name for name, w in program.state_dict.items() if hasattr(w, "qdata")} == planes.keys()
    lowered = program.run_decompositions()
    assert (
        [str(node.target) for node in lowered.graph.nodes].count("rtn.linear.default")
        == len(planes)
        == 4 * 7 + 1
    )
    close(lowered.module()(ids := tokens(3, 4)), expected(ids))


def test_a_saved_export_runs_in_a_fresh_process(exported, tmp_path):
    program, model, expected = exported
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((ids := tokens(3, 11), expected(ids)), tmp_path / "expected.pt")
    in_a_fresh_process(
        "import sys, torch, rtn_tensor\n"
        "run = torch.export.load(sys.argv[1]).module()\n"
        "assert any(isinstance(w, rtn_tensor.RTNQuantizedTensor) for w in run.state_dict().values())\n"
        "ids, expected = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(run(ids), expected, rtol=1e-3, atol=1e-3)",
        tmp_path / "model.pt2",
        tmp_path / "expected.pt",
    )


# ----------------------------------------------------------------------------- AOTInductor

RUN_PACKAGE = """
run = torch._inductor.aoti_load_package(sys.argv[1])
ids, expected = torch.load(sys.argv[2])
for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
    with mode():
        torch.testing.assert_close(run(ids), expected, rtol=1e-3, atol=1e-3)
"""


@pytest.fixture(scope="module")
def package(exported, tmp_path_factory):
    program, model, expected = exported
    folder = tmp_path_factory.mktemp("package")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.save((ids := tokens(3, 11), expected(ids)), folder / "expected.pt")
    return folder / "model.pt2", folder / "expected.pt"


@pytest.mark.slow
def test_a_package_runs_with_the_python_package(package):
    in_a_fresh_process("import sys, torch, rtn_tensor" + RUN_PACKAGE, *package)


@pytest.mark.slow
def test_a_package_runs_with_nothing_but_the_library(package):
    if cpu.library() is None:
        pytest.skip("needs the C++ library")
    program = (
        "import ctypes, sys, torch\nassert ctypes.CDLL(sys.argv[3]).rtn_define() == 0"
        + RUN_PACKAGE
        + "assert 'rtn_tensor' not in sys.modules"
    )
    in_a_fresh_process(program, *package, cpu.LIBRARY)


@pytest.mark.slow
def test_a_package_says_what_it_lacks(package):
    said = in_a_fresh_process(
        "import sys, torch\ntry: torch._inductor.aoti_load_package(sys.argv[1])\nexcept RuntimeError as "
        "error: print(error)",
        *package,
    )
    assert "Could not find schema for rtn::linear" in said
