"""What benchmarks/gpu.py measures, on a CPU with clocks that are told."""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from test_gpu_benchmark import endless

from benchmarks import gpu_model, gpu_peers, gpu_time
from benchmarks.gpu_peers import CUBLAS, GROUPED_MM, Experts, Kernel, MoeKernel
from benchmarks.gpu_workers import Budget

# ---------------------------------------------------------------------------------- timing


def told(seconds):
    """A clock that calls everything once, and then says the next of `seconds`."""
    left = iter(seconds)

    def measure(calls):
        for call in calls:
            call()
        t = next(left)
        return {"graph": gpu_time.summed_up([t, t, t]), "do_bench": gpu_time.summed_up([2 * t] * 3)}

    return measure


def test_summed_up():
    found = gpu_time.summed_up([5, 1, 2, 2, 3])
    assert (found["seconds"], found["spread"]) == (2, (3 - 2) / 2)
    assert gpu_time.summed_up([4.0]) == {"seconds": 4.0, "spread": 0.0}


class Gpu:
    """A CUDA of which each launch takes 10 us; a graph also 90 us to begin with."""

    def __init__(self):
        self.now, self.capturing, self.sizes = 0.0, None, []

    def launch(self):
        if self.capturing is None:
            self.now += 10e-6
        else:
            self.capturing.launches += 1

    def module(gpu):
        class Stream:
            def wait_stream(self, other):
                pass

            def synchronize(self):
                pass

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self, stream):
                self.at = gpu.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            launches = 0

            def replay(self):
                gpu.now += 90e-6 + 10e-6 * self.launches

        @contextlib.contextmanager
        def graph(of, stream):
            gpu.capturing = of
            yield
            gpu.capturing = None
            gpu.sizes.append(of.launches)

        names = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "current_stream": Stream,
        }
        return names | {"stream": lambda stream: contextlib.nullcontext()}


@pytest.mark.parametrize(("copies", "launches"), [(2, 18), (20, 60), (13, 65), (200, 200)])
def test_graphs_are_long_enough(copies, launches, monkeypatch):
    """As many rounds as 1 ms has room for, by the time of the first, and where those are more than one 128
    launches at most."""
    fake = Gpu()
    for name, value in fake.module().items():
        monkeypatch.setattr(torch.cuda, name, value)
    seconds = gpu_time.by_graph(copies * [fake.launch])
    assert fake.sizes == sorted({copies, launches})
    assert seconds == pytest.approx([10e-6 + 90e-6 / launches] * 7)


def test_bytes_of_weights():
    kernels = gpu_peers.KERNELS
    assert kernels[CUBLAS].bytes(8, 256) == 8 * 512
    assert kernels["rtn int4 g128"].bytes(8, 256) == 8 * (128 + 4)
    assert kernels["rtn int4 g32"].bytes(8, 256) == 8 * (128 + 16)
    assert kernels["rtn int8 g-1"].bytes(8, 256) == 8 * (256 + 2)


def test_linear_rows():
    rows = []
    names = [CUBLAS, "rtn int4 g128", "rtn int8 g-1", "rtn dequantize + cuBLAS"]
    given = {"shape": (256, 384), "tokens": [1, 3], "kernels": names, "device": "cpu", "l2_bytes": 100_000}
    gpu_time.linear(
        rows.append, endless(), **given, measure=told([8e-6, 2e-6, 4e-6, 16e-6, 9e-6, 3e-6, 9e-6])
    )
    assert [(r["M"], r["kernel"]) for r in rows] == [
        *((1, name) for name in names),
        *((3, name) for name in names if name != names[2]),
    ]
    assert all("error" not in r for r in rows)
    assert [r["graph"]["over_cublas"] for r in rows] == pytest.approx([1, 4, 2, 0.5, 1, 3, 1])
    int4 = rows[1]
    assert int4["graph"]["bytes_per_s"] == pytest.approx(256 * (192 + 6) / 2e-6)
    assert int4["do_bench"]["flop_per_s"] == pytest.approx(2 * 256 * 384 / 4e-6)
    assert int4["do_bench"]["cublas_seconds"] == pytest.approx(16e-6)
    assert 0.05 < int4["relative_error"] < 0.2
    assert rows[2]["relative_error"] < 0.03
    assert int4["runs"] in ("cpu", "triton", "dense", "reference")
    json.dumps(rows)


def test_linear_loses_nothing_to_a_kernel_that_fails(monkeypatch):
    def no(w):
        raise ImportError("no such library")

    def wrong(w):
        return lambda x: F.linear(x, w) * 1.5

    def breaks(w):
        return lambda x: F.linear(x, w[:, 1:])

    more = {name: Kernel(make, 4) for name, make in (("no", no), ("wrong", wrong), ("breaks", breaks))}
    monkeypatch.setattr(gpu_time, "KERNELS", gpu_peers.KERNELS | more)

    def measure(calls):
        return {
            "graph": {"error": "RuntimeError: not permitted when stream is capturing"},
            "do_bench": gpu_time.summed_up([1e-6]),
        }

    rows = []
    kernels = [CUBLAS, "no", "wrong", "breaks", "rtn int8 g128"]
    gpu_time.linear(
        rows.append, endless(), (64, 128), [2], kernels, device="cpu", l2_bytes=1000, measure=measure
    )
    by = {r["kernel"]: r for r in rows}
    assert by["no"] == {"N": 64, "K": 128, "kernel": "no", "error": "ImportError: no such library"}
    assert by["wrong"]["error"].startswith("ValueError: wrong result: of shape [2, 64], off by 0.5")
    assert by["breaks"]["error"].startswith("RuntimeError: ")
    assert by["rtn int8 g128"]["do_bench"]["over_cublas"] == 1.0
    assert by["rtn int8 g128"]["graph"] == {"error": "RuntimeError: not permitted when stream is capturing"}


def test_cublas_is_told_once():
    rows = []
    given = {"shape": (64, 128), "tokens": [1], "device": "cpu", "l2_bytes": 1000}
    gpu_time.linear(
        rows.append,
        endless(),
        kernels=[CUBLAS, "rtn dequantize + cuBLAS"],
        **given,
        measure=told([4e-6, 2e-6]),
    )
    assert [(r["kernel"], r["graph"]["over_cublas"]) for r in rows] == [("rtn dequantize + cuBLAS", 2)]


def test_linear_out_of_time():
    rows = []
    gpu_time.linear(
        rows.append, Budget(-1), (64, 128), [1, 2], [CUBLAS], device="cpu", l2_bytes=1000, measure=told([])
    )
    assert [(r["M"], r["skipped"]) for r in rows] == [(1, "no time was left"), (2, "no time was left")]


def test_looked_at():
    y = torch.ones(2, 3)
    assert gpu_time.looked_at(y, y, 0.1) == 0
    for wrong in (y * 1.2, y.index_fill(0, torch.tensor([0]), torch.nan), torch.ones(3, 2)):
        with pytest.raises(ValueError, match="wrong result"):
            gpu_time.looked_at(wrong, y, 0.1)


def test_routing():
    ids = torch.tensor([[2, 0], [2, 3], [0, 2]])
    routing = gpu_peers.route(ids, torch.rand(3, 2), 5)
    assert routing.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert routing.offs.tolist() == [2, 2, 5, 6, 6]
    assert {t.dtype for t in (routing.order, routing.offs)} == {torch.int32}
    assert gpu_time.experts_touched(1, Experts(8, 1, 1, 2)) == 2
    assert gpu_time.experts_touched(10**6, Experts(8, 1, 1, 2)) == 8


def plain_layer(w13, w2):
    def run(x, routing):
        return gpu_time.moe_reference(x, w13, w2, routing).to(x.dtype)

    return run


def test_moe_rows(monkeypatch):
    made = []

    def counted(w13, w2):
        made.append(1)
        return plain_layer(w13, w2)

    kernels = {
        GROUPED_MM: MoeKernel(counted, 16),
        "rtn": MoeKernel(plain_layer, 4),
        "rtn, unsorted": MoeKernel(plain_layer, 4, sorts=False, tokens=1),
        "no": MoeKernel(lambda w13, w2: 1 / 0, 4),
    }
    monkeypatch.setattr(gpu_time, "MOE_KERNELS", kernels)
    rows = []
    given = {
        "model": "a",
        "tokens": [1, 5],
        "kernels": list(kernels),
        "shape": Experts(4, 32, 16, 2),
        "device": "cpu",
        "l2_bytes": 3000,
    }
    gpu_time.moe(
        rows.append, endless(), **given, measure=told([8e-6, 6e-6, 4e-6, 3e-6, 2e-6, 8e-6, 8e-6, 4e-6, 2e-6])
    )
    assert rows[0] == {
        "model": "a",
        "experts": 4,
        "hidden": 32,
        "between": 16,
        "top_k": 2,
        "kernel": "no",
    } | {"error": "ZeroDivisionError: division by zero"}
    found = [(r["tokens"], r["kernel"], r["what"], r["graph"]["over_grouped_mm"]) for r in rows[1:]]
    before = "layer, sorted before"
    assert found == [
        (1, GROUPED_MM, "layer", 1),
        (1, GROUPED_MM, before, 1),
        (1, "rtn", "layer", pytest.approx(2)),
        (1, "rtn", before, pytest.approx(2)),
        (1, "rtn, unsorted", "layer", pytest.approx(4)),
        (5, GROUPED_MM, "layer", 1),
        (5, GROUPED_MM, before, 1),
        (5, "rtn", "layer", pytest.approx(2)),
        (5, "rtn", before, pytest.approx(4)),
    ]
    assert len(made) == 2  # of two experts, 3 * 16 * 32 weights in bf16 each: twice that is 4 x 3000 bytes
    assert all(r["relative_error"] < 0.01 for r in rows[1:])
    json.dumps(rows)


def test_grouped_mm_is_the_layer():
    shape = Experts(4, 32, 16, 2)
    w13, w2 = torch.randn(4, 32, 32).bfloat16() / 6, torch.randn(4, 32, 16).bfloat16()
    x, routing = torch.randn(6, 32).bfloat16(), gpu_time.random_routing(6, shape, "cpu")
    y = gpu_peers.grouped_mm(w13, w2)(x, routing)
    assert gpu_time.relative_error(y, gpu_time.moe_reference(x, w13, w2, routing)) < 0.02


@pytest.mark.parametrize("sorts", [True, False])
def test_our_experts_are_the_layer(sorts):
    shape = Experts(4, 64, 32, 2)
    w13, w2 = torch.randn(4, 64, 64).bfloat16() / 8, torch.randn(4, 64, 32).bfloat16()
    x, routing = torch.randn(3, 64).bfloat16(), gpu_time.random_routing(3, shape, "cpu")
    y = gpu_peers.our_experts(8, sorts, w13, w2)(x, routing)
    assert gpu_time.relative_error(y, gpu_time.moe_reference(x, w13, w2, routing)) < 0.03


def test_packed_rows():
    for bits in (4, 8):
        q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (6, 64), dtype=torch.int8)
        packed = gpu_peers.packed_rows(q, bits)
        assert packed.shape == (64 * bits // 32, 6)
        fields = torch.stack([packed >> bits * i & (1 << bits) - 1 for i in range(32 // bits)], 1).reshape(
            64, 6
        )
        assert torch.equal(fields.t() - (1 << bits - 1), q.int())


def test_versions():
    assert gpu_time.package_version("torch") == torch.__version__
    assert gpu_time.package_version("rtn-tensor")
    assert gpu_time.package_version("no-such-package") is None


# ------------------------------------------------------------------------------- the model

TINY = gpu_model.Shape(layers=2, hidden=64, between=96, heads=4, kv_heads=2, vocabulary=50)


def test_decoding_continues_a_prefill():
    """The step reads what prefill wrote to the cache, and the two ways to attend agree."""
    model = gpu_model.build(TINY, "bf16", 2, 6, "cpu").float()
    tokens = torch.randint(0, 50, (2, 6))
    with torch.no_grad():
        whole = model(tokens, torch.arange(6))
        model(tokens[:, :5], torch.arange(5))
        step = model(tokens[:, 5:], torch.tensor([5]))
    torch.testing.assert_close(step, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prompt", [0, 5])
def test_speed_rows(prompt):
    rows = []
    for weights in gpu_model.FORMATS:
        given = {"weights": weights, "batch": 1, "prompt": prompt, "device": "cpu", "shape": TINY, "room": 8}
        told = {
            "rounds": lambda step, steps: [step() is None or 2.0, 3.0, 1.0],
            "compiled": lambda model, decoding: model,
        }
        gpu_model.speed(rows.append, endless(), **given, **told)
    assert [r["weights"] for r in rows] == ["bf16", "int8 g128", "int4 g128"]
    assert {(r["what"], r["tokens"], r["seconds"], r["relative_error"]) for r in rows} == {
        ("prefill", 5, 2.0, 0.0) if prompt else ("decode", 8, 2.0, 0.0)
    }
    assert rows[0]["tokens_per_s"] == (prompt or 1) / 2
    assert rows[0]["bytes_per_s"] > 1.8 * rows[1]["bytes_per_s"] > 3 * rows[2]["bytes_per_s"]
    json.dumps(rows)


def test_load_rows():
    class Memory:
        def begin(self):
            return 100

        def end(self):
            return 1100, 1500

    rows = []
    gpu_model.loading(rows.append, endless(), device="cpu", shape=TINY, memory=Memory(), runs=1)
    assert [(r["weights"], r["run"]) for r in rows] == [("bf16", 1), ("int8 g128", 1), ("int4 g128", 1)]
    assert {(r["finished_bytes"], r["extra_bytes"]) for r in rows} == {(1000, 400)}
    assert rows[0]["largest_tensor_bytes"] == 2 * 192 * 64
    assert rows[0]["allowed_extra_bytes"] == 2 * 192 * 64 + (64 << 20)
    json.dumps(rows)


def test_size_of_the_real_shapes():
    with torch.device("meta"):
        assert sum(p.numel() for p in gpu_model.Llama(gpu_model.LLAMA_8B).parameters()) == 8_030_261_248
        assert 0.95e9 < 2 * sum(p.numel() for p in gpu_model.Llama(gpu_model.SMALL).parameters()) < 1.1e9
