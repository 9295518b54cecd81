"""The Triton kernels beyond what test_kernels asks of every kernel: in the interpreter where
TRITON_INTERPRET=1, else on a GPU."""

import dataclasses
import mmap
from itertools import pairwise

import pytest
import torch
from bounds import Planes, activations, assert_linear_close, random_planes

from rtn_tensor import kernels, quantize_, rtn_int4
from rtn_tensor.formats import FORMATS, pack, unpack
from rtn_tensor.kernels import dense, registry
from rtn_tensor.kernels.problem import make_problem
from rtn_tensor.kernels.registry import choose
from rtn_tensor.kernels.triton.config import Config, takes

if kernels.triton.interpreting():
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from rtn_tensor.kernels.triton import launch  # noqa: E402
from rtn_tensor.kernels.triton.words import integers  # noqa: E402

each_bits = pytest.mark.parametrize("bits", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


# --------------------------------------------------------------------- integers from words


@triton.jit
def integers_kernel(
    w_ptr, q_ptr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w = tl.load(w_ptr + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    K: tl.constexpr = WORDS * 16 // BITS
    tl.store(
        q_ptr + row[:, None] * K + tl.arange(0, K)[None, :], integers(w, BITS, q_ptr.dtype.element_ty, ASM)
    )


@each_bits
@each_dtype
@pytest.mark.parametrize("asm", [True, False])
def test_integers_of_every_word(bits, dtype, asm):
    words = torch.arange(2**16).to(torch.int16).view(1024, 64)
    # No word has the same neighbour twice.
    words = torch.stack([words, words[torch.randperm(1024)]], 1).view(2048, 64)
    q = torch.full((2048, 64 * 16 // bits), torch.nan, dtype=dtype, device=DEVICE)
    integers_kernel[(32,)](words.to(DEVICE), q, BITS=bits, ROWS=64, WORDS=64, ASM=asm, **launch.options(4))
    assert torch.equal(q.cpu(), unpack(words.view(torch.uint8), bits, q.shape[1]).to(dtype))


# ------------------------------------------------------------ every way to launch a linear


def launched(x, w, config, bias=None):
    y = torch.full((x.shape[0], w.qdata.shape[0]), torch.nan, dtype=x.dtype, device=DEVICE)
    return launch.launch_linear(x, w.qdata, w.scale, bias, w.bits, w.group_size, config, y, w.zero)


@each_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("block_m", "block_n", "m"), [(16, 64, 5), (32, 128, 33), (64, 64, 70), (128, 128, 130), (256, 128, 100)]
)
@pytest.mark.parametrize(
    ("group_size", "block_k", "scale_after"),
    [
        (128, 128, True),
        (128, 64, False),
        (32, 128, False),
        (96, 128, False),
        (-1, 256, True),
        (64, 256, False),
    ],
)
@pytest.mark.parametrize(("split_k", "method"), [(1, "minmax"), (3, "absmax"), (3, "minmax")])
def test_linear_as_configured(
    bits, dtype, block_m, block_n, m, group_size, block_k, scale_after, split_k, method
):
    assert takes(block_k, group_size, scale_after)
    n, k = 150, 3 * block_k - 32
    x, w = (
        activations(m, k, dtype, DEVICE),
        random_planes(n, k, bits=bits, group_size=group_size, dtype=dtype, device=DEVICE, method=method),
    )
    bias = torch.randn(n, device=DEVICE).to(dtype)
    y = launched(
        x,
        w,
        Config(block_m, block_n, block_k, split_k, scale_after, 8 if block_m * block_n >= 128 * 64 else 4, 2),
        bias,
    )
    assert_linear_close(y, x, w.exact(None if scale_after else dtype), bias)


def test_the_sum_of_parts_is_the_same_each_time_and_leaves_no_trace(monkeypatch):
    handed = []
    get = launch.ARRIVALS.get
    monkeypatch.setattr(launch.ARRIVALS, "get", lambda *args: handed.append(get(*args)) or handed[-1])
    x, w = (
        activations(5, 1024, torch.bfloat16, DEVICE),
        random_planes(300, 1024, group_size=128, dtype=torch.bfloat16, device=DEVICE),
    )
    results = [launched(x, w, Config(16, 64, 128, 8, True, 4, 3)) for _ in range(3)]
    assert all(torch.equal(results[0], y) for y in results)
    assert len(handed) == 3
    assert not any(count.any() for count in handed)


@each_bits
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_without_ptx_every_result_is_the_same(bits, method, monkeypatch):
    w = random_planes(100, 576, bits=bits, group_size=64, dtype=torch.bfloat16, device=DEVICE, method=method)
    x, dy = activations(17, 576, torch.bfloat16, DEVICE), activations(17, 100, torch.bfloat16, DEVICE)

    def all_of():
        return (
            launch.linear(x, w.qdata, w.scale, None, bits, 64, w.zero),
            launch.linear_dx(dy, w.qdata, w.scale, bits, 64, 576, w.zero),
            launch.dequantize(w.qdata, w.scale, bits, 64, 576, torch.bfloat16, w.zero),
        )

    with_ptx = all_of()
    monkeypatch.setattr(launch, "asm", lambda device: False)
    for a, b in zip(with_ptx, all_of(), strict=True):
        assert torch.equal(a, b)


NORESERVE = 0x4000  # Linux's; mmap.MAP_NORESERVE from Python 3.13 on


def reserved(dtype, *shape):
    """Memory that is there once it is written to."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(
        mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE), dtype=dtype
    ).view(shape)


@pytest.mark.skipif(DEVICE != "cpu", reason="takes memory on a GPU")
def test_offsets_past_2_to_the_31():
    """Rows of x, of the planes and of the result, each more than 2^31 elements from the first."""
    k, far = 128, 2**31 + 256
    w = random_planes(2, k, group_size=32, dtype=torch.bfloat16)
    x = activations(2, k, torch.bfloat16)
    far_x, far_q, far_s = (
        reserved(torch.bfloat16, 2, far)[:, :k],
        reserved(torch.uint8, 2, 2 * far)[:, : k // 2],
        reserved(torch.bfloat16, 2, far),
    )
    far_x.copy_(x)
    far_q.copy_(w.qdata)
    far_s = far_s[:, : k // 32].copy_(w.scale)
    far_w = Planes(far_q, far_s, 4, 32, k)
    config = Config(16, 64, 128, 1, False, 4, 2)
    assert torch.equal(launched(far_x, far_w, config), launched(x, w, config))
    dy = activations(3, 2, torch.bfloat16)
    assert torch.equal(
        launch.linear_dx(dy, far_q, far_s, 4, 32, k), launch.linear_dx(dy, w.qdata, w.scale, 4, 32, k)
    )
    assert torch.equal(
        launch.dequantize(far_q, far_s, 4, 32, k, torch.bfloat16),
        launch.dequantize(w.qdata, w.scale, 4, 32, k, torch.bfloat16),
    )


# --------------------------------------------------------------------------------- experts


def experts_of(e, n, k, bits, dtype, method="absmax"):
    return random_planes(e, n, k, bits=bits, group_size=64, dtype=dtype, device=DEVICE, method=method)


def scales_after(w, group_size):
    return launch.config_of(
        "grouped", 1, 1, w.qdata.shape[1], w.k, w.bits, group_size, w.scale.itemsize, w.qdata.device
    ).scale_after


def test_pairs_of_no_expert_come_out_zero():
    """As where the expert is another machine's."""
    w = experts_of(3, 64, 192, 4, torch.bfloat16)
    x = activations(4, 192, torch.bfloat16, DEVICE)
    experts = torch.tensor([0, -1, 3, 2], device=DEVICE)
    y = launch.routed(x, w.qdata, w.scale, None, experts, None, None, None, 1, "", 4, 64)
    assert not y[1:3].any()
    assert_linear_close(y[:1], x[:1], w.exact(None if scales_after(w, 64) else x.dtype)[0])
    assert_linear_close(y[3:], x[3:], w.exact(None if scales_after(w, 64) else x.dtype)[2])


@pytest.mark.parametrize(
    "ends", [[0, 0, 0], [40, 40, 40], [0, 0, 40], [1, 18, 35], [16, 32, 48], [17, 17, 17]]
)
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_every_way_to_deal_rows(ends, method):
    w = experts_of(3, 70, 192, 4, torch.bfloat16, method)
    x, dy = activations(48, 192, torch.bfloat16, DEVICE), activations(48, 70, torch.bfloat16, DEVICE)
    offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    y, dx = (
        launch.grouped(x, w.qdata, w.scale, offs, 4, 64, w.zero),
        launch.grouped_dx(dy, w.qdata, w.scale, offs, 4, 64, 192, w.zero),
    )
    exact = w.exact(None if scales_after(w, 64) else x.dtype)
    for e, (start, end) in enumerate(pairwise([0, *ends])):
        assert_linear_close(y[start:end], x[start:end], exact[e])
        assert_linear_close(dx[start:end], dy[start:end], w.exact(x.dtype)[e].mT)
    assert not y[ends[-1] :].any()
    assert not dx[ends[-1] :].any()


@pytest.mark.parametrize(
    ("ends", "meant"), [([3, 400, 400], [3, 48, 48]), ([-70, 20, 48], [0, 20, 48]), ([1 << 30] * 3, [48] * 3)]
)
def test_ends_past_the_rows_lead_to_no_others(ends, meant):
    """They had: what lies after x and y in memory was read and written."""
    w = experts_of(3, 70, 192, 4, torch.bfloat16)
    x, dy = activations(48, 192, torch.bfloat16, DEVICE), activations(48, 70, torch.bfloat16, DEVICE)
    (y, dx), (expected_y, expected_dx) = (
        (
            launch.grouped(x, w.qdata, w.scale, offs, 4, 64),
            launch.grouped_dx(dy, w.qdata, w.scale, offs, 4, 64, 192),
        )
        for offs in (torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in (ends, meant))
    )
    assert torch.equal(y, expected_y)
    assert torch.equal(dx, expected_dx)


# --------------------------------------------------------------- bad input, and the choice


@pytest.mark.skipif(DEVICE != "cpu", reason="stops the GPU's context")
def test_an_index_out_of_range_stops_the_program(monkeypatch):
    from triton.runtime import interpreter

    def create_assert(self, condition, message):  # its own takes a single condition
        assert condition.data.all(), message

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    monkeypatch.setattr(type(builder), "create_assert", create_assert)
    w = random_planes(9, 64, dtype=torch.bfloat16)
    for index in (9, -1):
        with pytest.raises(Exception, match="embedding index is out of range"):
            launch.embedding(torch.tensor([0, index]), w.qdata, w.scale, 4, 32, 64)


def problem(**changes):
    w = random_planes(5, 64, dtype=torch.bfloat16, device=DEVICE)
    return make_problem("linear", torch.bfloat16, 3, 64, w.qdata, w.scale, 4, 32)._replace(**changes)


@pytest.fixture
def a_gpu(monkeypatch):
    """A CUDA device that answers questions."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(launch, "gpu_of", lambda device: launch.INTERPRETED)


def test_what_it_refuses(a_gpu, monkeypatch):
    triton_ = kernels.triton
    assert triton_.why_not(problem(device="cuda", capability=(9, 0))) is None
    assert triton_.why_not(problem(device="cuda", capability=(7, 5))) == (
        "It needs compute capability 8.0 (Ampere) or later, and this GPU has 7.5."
    )
    assert triton_.why_not(problem(device="mps")) == "It runs on GPUs only."
    assert triton_.why_not(problem(alignment=8)) == (
        "It reads qdata 16 bytes at a time, and this one's address is a multiple of 8 only; clone the weight."
    )
    assert triton_.why_not(problem(dtype=torch.float64)) == (
        "It takes float32, bfloat16 and float16, not torch.float64 with a scale of torch.bfloat16."
    )
    many = problem(M=8192, N=4096, K=4096)
    assert (
        triton_.why_not(many)
        == "From M = 8192 on it is faster to dequantize the weight and multiply it densely."
    )
    monkeypatch.setattr(
        triton_, "missing", lambda: "Triton cannot be imported (no module); pip install triton."
    )
    assert (
        triton_.why_not(problem(device="cuda", capability=(9, 0)))
        == "Triton cannot be imported (no module); pip install triton."
    )


def test_a_large_product_goes_to_the_dense_kernel_over_triton_dequantize(a_gpu, monkeypatch):
    registry.forget()
    assert choose(problem(device="cuda", capability=(9, 0), M=8192, N=4096, K=4096)).name == "dense"
    called = []
    monkeypatch.setattr(launch, "dequantize", counted("dequantize", called))
    monkeypatch.setattr(
        dense.cpu,
        "KERNEL",
        dataclasses.replace(kernels.cpu.KERNEL, why_not=lambda problem: "It is not asked."),
    )
    w, x = (
        random_planes(5, 64, dtype=torch.bfloat16, device=DEVICE),
        activations(3, 64, torch.bfloat16, DEVICE),
    )
    y = dense.linear(x, w.qdata, w.scale, None, 4, 32)
    assert len(called) == 1
    assert torch.equal(y, torch.nn.functional.linear(x, w.exact().to(x.dtype)))


def counted(name, called):
    run = getattr(launch, name)
    return lambda *args: called.append(name) or run(*args)


def test_a_model_runs_on_them(monkeypatch):
    """Through the public API: every op of a small model and its backward, counted."""
    monkeypatch.setenv("RTN_KERNEL", "triton")
    registry.forget()
    called = []
    for name in ("linear", "linear_dx", "embedding", "quantize", "dequantize"):
        monkeypatch.setattr(launch, name, counted(name, called))
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 64), torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 10)
    ).to(DEVICE)
    model = model.bfloat16()
    floats = [p.detach().clone() for p in model.parameters()]
    quantize_(
        model,
        rtn_int4(group_size=32),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear | torch.nn.Embedding),
    )
    assert called == ["quantize"] * 3
    called.clear()
    adapter = torch.nn.Parameter(torch.zeros(64, device=DEVICE, dtype=torch.bfloat16))
    y = model[1:](model[0](torch.tensor([[3, 4]], device=DEVICE)) + adapter)
    y.float().sum().backward()
    assert called == ["embedding", "linear", "linear", "linear_dx", "linear_dx"]
    assert adapter.grad is not None
    assert adapter.grad.any()
    called.clear()
    model[1].weight.copy_(floats[1])
    assert torch.allclose(model[1].weight.dequantize(), floats[1], atol=0.02)
    assert called == ["quantize", "dequantize"]
    registry.forget()


def test_packing_is_the_formats():
    """quantize writes what formats.pack would, padding included."""
    for bits in FORMATS:
        w = torch.randint(FORMATS[bits].qmin, FORMATS[bits].qmax + 1, (7, 100)).float()
        w[:, [0, 40, 70, 99]] = FORMATS[bits].qmin  # an element of every group, so that S = 1
        qdata, scale = launch.quantize(w.to(DEVICE), bits, 32, "signed", torch.float32)
        assert torch.equal(scale.cpu(), torch.ones(7, 4))
        assert torch.equal(qdata.cpu(), pack(w.to(torch.int8), bits))
