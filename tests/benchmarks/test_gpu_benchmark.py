"""benchmarks/gpu.py, as far as it goes without a GPU: what it does with measurements, and its jobs on a CPU
with clocks that are told."""

import contextlib
import dataclasses
import faulthandler
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from benchmarks import gpu, gpu_check, gpu_model, gpu_peers, gpu_report, gpu_time, gpu_workers, pictures
from benchmarks.gpu_peers import CUBLAS, GROUPED_MM, Experts, Kernel, MoeKernel
from benchmarks.gpu_workers import Budget, Job, Worker
from rtn_tensor.kernels import triton
from rtn_tensor.kernels.registry import REFERENCE

interpreted = pytest.mark.skipif(not triton.interpreting(), reason="needs TRITON_INTERPRET=1")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def endless():
    return Budget(1e9)


def job(section="linear", name="a", function="test_gpu_benchmark:echo", least=0.0, most=60.0, **arguments):
    return Job(section, name, function, arguments, least, most)


# ----------------------------------------------------------------------------- the command


def test_arguments():
    args = gpu.arguments([])
    assert (args.seconds, args.json, tuple(args.only)) == (540, None, gpu.SECTIONS)
    assert args.shapes[:2] == [(8192, 8192), (4096, 4096)]
    assert len(args.shapes) == 6
    assert args.tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
    args = gpu.arguments(
        [
            "--only",
            "load,moe",
            "--shapes",
            "64x32,1x2",
            "--tokens",
            "3",
            "--seconds",
            "60",
            "--json",
            "a.json",
        ]
    )
    assert (args.only, args.shapes, args.tokens, args.seconds, args.json.name) == (
        ["load", "moe"],
        [(64, 32), (1, 2)],
        [3],
        60,
        "a.json",
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--only", "linear,speed"], "'speed' is no section; use correctness, linear, moe, model, load"),
        (["--shapes", "4096"], "'4096' is not sizes as 4096x4096,8192x8192 (out_features x in_features)"),
        (["--tokens", "1,0"], "'1,0' is not numbers of rows as 1,16,256"),
    ],
)
def test_wrong_arguments(given, says, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.arguments(given)
    assert error.value.code == 2
    assert says in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert_expected_inline(
        capsys.readouterr().err,
        """There is no CUDA GPU here that this torch can use; nothing was measured.\n""",
    )


def every_job():
    shapes, tokens = gpu.sizes(gpu.SHAPES), gpu.numbers(gpu.TOKENS)
    return [*gpu.timing_jobs(shapes, tokens), *gpu_check.jobs(shapes, tokens, gpu.MOE_TOKENS)]


def test_every_job_names_a_function_that_takes_its_arguments():
    for each in every_job():
        module, _, name = each.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(print, endless(), **each.arguments)
        multiprocessing.reduction.ForkingPickler.dumps(each.arguments)
        assert each.section in gpu.SECTIONS
        assert each.least < each.most


def test_what_matters_most_comes_first(monkeypatch):
    monkeypatch.setattr(gpu, "installed", lambda kernel: kernel.package in (None, "humming"))
    jobs = gpu.timing_jobs([(6144, 4096), (4096, 4096), (8192, 8192)], [1, 16])
    assert_expected_inline(
        "\n".join(f"{each.section}: {each.name}" for each in jobs[:14]),
        """\
linear: 8192x8192, ours
linear: 4096x4096, ours
model: bf16, decoding at batch 1
model: int4 g128, decoding at batch 1
linear: 8192x8192, tinygemm int4 g128
linear: 8192x8192, humming int4 g128
moe: Mixtral 8x7B
moe: Qwen3 30B-A3B
moe: DeepSeek V3, TP 8
load: 1 GB
linear: 8192x8192, humming int8 g128
linear: 8192x8192, torchao int8 g-1
linear: 6144x4096, ours
model: int8 g128, decoding at batch 1""",
    )
    assert not any("gemlite" in each.name or "marlin" in str(each.arguments) for each in jobs)
    assert jobs[0].arguments["kernels"][0] == CUBLAS


def test_correctness_covers_every_format_and_op():
    jobs = gpu_check.jobs([(8192, 8192)], [1, 4096], [1])
    forms = {
        (j.arguments.get("op"), *(j.arguments[key] for key in ("dtype", "bits", "group_size")))
        for j in jobs
        if "bits" in j.arguments
    }
    for dtype in ("bfloat16", "float16", "float32"):
        for bits in (4, 8):
            for group_size in (32, 64, 96, 128, -1):
                for op in ("linear", "linear_dx", "grouped", "grouped_dx", None):
                    assert (op, dtype, bits, group_size) in forms
    assert {j.arguments["mode"] for j in jobs if "mode" in j.arguments} == {
        "default",
        "reduce-overhead",
        "max-autotune",
    }


class Told:
    """In the place of a Worker: rows that are known before, and no process."""

    wrong = False

    def __init__(self, environment=None):
        self.environment = environment

    def run(self, job, seconds, row):
        if job.section == "correctness":
            row(
                {
                    "check": job.name,
                    "error": "AssertionError: no" if self.wrong and "CUDA graphs" in job.name else None,
                }
            )
        elif job.section == "machine":
            row({"gpu": "NVIDIA T800 (fake)", "versions": {"torch": "2.11"}})
        elif job.section == "ceilings":
            row({"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 8e14})
        elif job.section == "linear":
            for row_ in linear_rows(*job.arguments["shape"], job.arguments["kernels"]):
                row(row_)
        return "killed: it took more than 135 s" if job.section == "model" else None

    def stop(self):
        pass


@pytest.mark.parametrize("wrong", [False, True])
def test_a_whole_run_ends_in_json_and_a_status(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Worker", Told)
    monkeypatch.setattr(Told, "wrong", wrong)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--seconds", "1000"]) == wrong
    out = capsys.readouterr().out
    assert ("WRONG: CUDA graphs: AssertionError: no" in out) == wrong
    assert out.rstrip().endswith("gpu-NVIDIA-T800-fake.json")
    results = json.loads((tmp_path / "benchmarks" / "results" / "gpu-NVIDIA-T800-fake.json").read_text())
    assert list(results) == [
        *(
            "machine",
            "ceilings",
            "correctness",
            "linear",
            "moe",
            "model",
            "load",
            "errors",
            "skipped",
            "jobs",
            "targets",
            "seconds",
        )
    ]
    assert results["correctness"]["failed"] == (
        [{"check": "CUDA graphs", "error": "AssertionError: no"}] if wrong else []
    )
    assert results["correctness"]["passed"] == len(gpu_check.jobs(gpu.sizes(gpu.SHAPES), [1], [1])) - wrong
    assert {e["section"] for e in results["errors"]} == {"model"}
    assert {len(r["target"]) > 0 for r in results["targets"]} == {True}


def test_only_some_sections(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Worker", Told)
    assert gpu.main(["--only", "load", "--json", str(tmp_path / "new" / "a.json")]) == 0
    results = json.loads((tmp_path / "new" / "a.json").read_text())
    assert [j["name"] for j in results["jobs"]] == ["about", "1 GB"]


# ---------------------------------------------------------------------- time and processes


def test_budget_and_what_is_skipped():
    clock = Clock()
    budget = Budget(100, clock)
    given = []

    class Taking:
        def run(self, job, seconds, row):
            given.append((job.name, seconds))
            clock.now += job.arguments["takes"]
            row({"name": job.name})

    said = []
    jobs = [
        job(name="a", takes=50, most=60),
        job(name="b", takes=30),
        job(name="c", takes=1, least=30),
        job(name="d", takes=1, least=5),
    ]
    gpu_workers.run(jobs, Taking(), budget, lambda job, kind, what: said.append((job.name, kind, what)))
    assert given == [("a", 60), ("b", 50), ("d", 20)]
    assert said == [
        ("a", "row", {"name": "a"}),
        ("a", "done", 50),
        ("b", "row", {"name": "b"}),
        ("b", "done", 30),
        ("c", "skipped", "20 s were left, and it takes 30"),
        ("d", "row", {"name": "d"}),
        ("d", "done", 1),
    ]
    assert budget.left() == 19


killed = threading.Event()


def echo(report, budget, **arguments):
    for key, value in arguments.items():
        report({key: value})


def failing(report, budget):
    report({"before": 1})
    raise ValueError("several\n  lines")


def dying(report, budget):
    raise SystemExit  # no exception that a job could have: it ends the thread


def hanging(report, budget):
    killed.wait(20)


class Thread:
    """In the place of a process."""

    exitcode = -11

    def __init__(self, connection, environment):
        def run():
            with contextlib.suppress(SystemExit):
                gpu_workers.serve(connection, environment)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def kill(self):
        killed.set()

    def join(self):
        self.thread.join(0.2)  # one that waits for jobs waits on


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(gpu_workers, "GRACE", 0.0)
    killed.clear()
    found = Worker(start=Thread)
    yield found
    found.stop()


def test_worker(worker):
    rows = []
    assert worker.run(job(a=1, b=(2, 3)), 60, rows.append) is None
    assert rows == [{"a": 1}, {"b": (2, 3)}]
    first = worker.process
    assert (
        worker.run(job(function="test_gpu_benchmark:failing"), 60, rows.append) == "ValueError: several lines"
    )
    assert rows[-1] == {"before": 1}
    assert worker.run(job(function="test_gpu_benchmark:absent"), 60, rows.append).startswith("AttributeError")
    assert worker.process is first


def test_worker_that_dies_is_followed_by_another(worker):
    assert (
        worker.run(job(function="test_gpu_benchmark:dying"), 60, print) == "its process ended (exit code -11)"
    )
    assert worker.run(job(), 60, print) is None


def test_worker_that_hangs_is_killed(worker):
    assert (
        worker.run(job(function="test_gpu_benchmark:hanging"), 0.1, print) == "killed: it took more than 0 s"
    )
    assert killed.is_set()
    assert worker.run(job(), 60, print) is None


def test_worker_that_is_spent_is_followed_by_another(worker, monkeypatch):
    monkeypatch.setattr(gpu_workers, "spent", lambda: True)
    assert worker.run(job(function="test_gpu_benchmark:failing"), 60, print) == "ValueError: several lines"
    assert worker.process is None
    assert worker.run(job(), 60, print) is None


def test_workers_share_jobs():
    class Slow:
        stopped = False

        def run(self, job, seconds, row):
            time.sleep(0.01)
            row({"worker": id(self)})

        def stop(self):
            self.stopped = True

    workers, said = [Slow(), Slow(), Slow()], []
    jobs = [job(name=str(i)) for i in range(12)]
    gpu_workers.run_together(
        jobs, workers, endless(), lambda job, kind, what: said.append((job.name, kind, what))
    )
    assert sorted(int(name) for name, kind, _ in said if kind == "done") == list(range(12))
    assert len({what["worker"] for _, kind, what in said if kind == "row"}) == 3
    assert all(worker.stopped for worker in workers)


def environment_of(report, budget, variable):
    report(os.environ.get(variable))


def crashing(report, budget):
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.slow
def test_real_processes():
    worker, rows = Worker({"RTN_OF_THE_TEST": "1"}), []
    try:
        assert (
            worker.run(
                job(function="test_gpu_benchmark:environment_of", variable="RTN_OF_THE_TEST"), 60, rows.append
            )
            is None
        )
        assert rows == ["1"]
        assert (
            worker.run(job(function="test_gpu_benchmark:crashing"), 60, rows.append)
            == "its process ended (exit code -11)"
        )
        assert worker.run(job(a=2), 60, rows.append) is None
        assert rows == ["1", {"a": 2}]
    finally:
        worker.stop()


# ----------------------------------------------------------------------------- correctness


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
        rows = checked(gpu_check.routed, shape=Experts(3, 64, 32, 2), tokens=[1, 5], kernel=REFERENCE, **form)
        assert [r["error"] for r in rows] == [None] * 4
        kinds = [[f"experts {how}", activation] for how in ("sorted", "unsorted")]
        assert [r["check"].split(", ")[:2] for r in rows] == 2 * kinds
    unweighted = dataclasses.replace(
        REFERENCE, routed=lambda *args: REFERENCE.routed(*args[:7], None, *args[8:])
    )
    rows = checked(gpu_check.routed, shape=Experts(3, 64, 32, 2), tokens=[5], kernel=unweighted, **form)
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
    gpu_check.assert_gated_close(y, x, gate, up, "silu")
    router = torch.rand(5)
    z = (router.double()[:, None] * (x.double() @ up.mT)).bfloat16()
    gpu_check.assert_routed_close(z, x, up, router)
    for wrong in (y * 1.02, y.index_fill(1, torch.tensor([2]), torch.nan)):
        with pytest.raises(AssertionError, match="out of bound"):
            gpu_check.assert_gated_close(wrong, x, gate, up, "silu")
    with pytest.raises(AssertionError, match="out of bound"):
        gpu_check.assert_routed_close(z, x, up, router.flip(0))


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
        rows = checked(gpu_check.routed, shape=Experts(3, 64, 32, 2), tokens=[1, 5], **form)
        assert [r["error"] for r in rows] == [None] * 4


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


# ------------------------------------------------------------------------------ the report


def linear_rows(n, k, kernels, tokens=(1, 16, 32, 64, 128, 256)):
    """As if cuBLAS read 2 TB/s, and others 1.5 TB/s of less."""
    rows = []
    for m in tokens:
        for name in kernels:
            size = gpu_peers.KERNELS[name].bytes(n, k)
            seconds = size / (2e12 if name == CUBLAS else 1.5e12) * max(1, m / 32)
            dense = 2 * n * k / 2e12 * max(1, m / 32)
            time = {
                "seconds": seconds,
                "spread": 0.01,
                "over_cublas": dense / seconds,
                "cublas_seconds": dense,
            }
            time |= {"bytes_per_s": size / seconds, "flop_per_s": 2 * m * n * k / seconds}
            rows.append(
                {
                    "N": n,
                    "K": k,
                    "M": m,
                    "kernel": name,
                    "relative_error": 0.1,
                    "graph": time,
                    "do_bench": dict(time),
                }
            )
    return rows


def some_results():
    results = gpu.no_results()
    results["machine"] = {
        "gpu": "NVIDIA T800",
        "driver": "580.1",
        "cuda": "13.0",
        "versions": {"torch": "2.11.0", "vllm": None},
    }
    results["ceilings"] = {"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 8e14}
    results["correctness"] |= {"passed": 1234, "skipped": 2}
    names = [CUBLAS, "rtn int4 g128", "rtn int8 g128", "humming int4 g128"]
    results["linear"] = linear_rows(8192, 8192, names) + linear_rows(6144, 4096, names[:3], [1, 64])
    results["linear"].append(
        {"N": 8192, "K": 8192, "kernel": "mslk int4 g128", "error": "OSError: mslk.so: undefined symbol"}
    )
    for kernel, what, t, ratio in (
        (GROUPED_MM, "layer", 1, 1.0),
        ("rtn int4 g128", "layer", 1, 2.5),
        (GROUPED_MM, "layer, sorted before", 1, 1.0),
        ("rtn int4 g128", "layer, sorted before", 1, 2.75),
        (GROUPED_MM, "layer", 64, 1.0),
        ("rtn int4 g128", "layer", 64, 1.5),
    ):
        time = {"seconds": 1e-4 / ratio, "over_grouped_mm": ratio}
        results["moe"].append(
            {
                "model": "Mixtral 8x7B",
                "tokens": t,
                "kernel": kernel,
                "what": what,
                "graph": time,
                "do_bench": time,
            }
        )
    for weights, seconds in (("bf16", 5.6e-3), ("int4 g128", 2.5e-3)):
        row = {"what": "decode", "weights": weights, "batch": 1, "tokens": 1024, "seconds": seconds}
        results["model"].append(row | {"tokens_per_s": 1 / seconds, "bytes_per_s": 3e9 / seconds})
    results["load"] = [
        {
            "weights": "int4 g128",
            "run": 1,
            "checkpoint_bytes": 10**9,
            "finished_bytes": 3 * 10**8,
            "extra_bytes": 9 * 10**7,
        }
        | {"allowed_extra_bytes": 2 * 10**8, "seconds": 1.5, "read_seconds": 0.75}
    ]
    results["errors"] = [
        {
            "section": "model",
            "name": "int8 g128, decoding at batch 1",
            "error": "killed: it took more than 135 s",
        }
    ]
    results["skipped"] = [
        {"section": "model", "name": "bf16, prefill of 2048", "why": "12 s were left, and it takes 30"}
    ]
    results["targets"] = gpu_report.compared(results)
    return results


def test_report():
    assert_expected_inline(
        gpu_report.text(some_results()),
        """\
NVIDIA T800, driver 580.1, CUDA 13.0; torch 2.11.0
copy 3.00 TB/s, read and written; 8192^3 bf16 product 800 TFLOP/s

Weight 8192x8192: times as fast as cuBLAS bf16, by rows of x
kernel                          1    16    32     64    128    256
---------------------------  ----  ----  ----  -----  -----  -----
cuBLAS us, do_bench          67.1  67.1  67.1  134.2  268.4  536.9
rtn int4 g128                2.91  2.91  2.91   2.91   2.91   2.91
rtn int8 g128                1.48  1.48  1.48   1.48   1.48   1.48
humming int4 g128            2.91  2.91  2.91   2.91   2.91   2.91
mslk int4 g128                  x     x     x      x      x      x
cuBLAS us, graph             67.1  67.1  67.1  134.2  268.4  536.9
rtn int4 g128, graph         2.91  2.91  2.91   2.91   2.91   2.91
  % of a copy's bytes/s        50    50    50     25     12      6
  % of the ceiling's FLOP/s     1    12    23     23     23     23
rtn int8 g128, graph         1.48  1.48  1.48   1.48   1.48   1.48
  % of a copy's bytes/s        50    50    50     25     12      6
  % of the ceiling's FLOP/s     0     6    12     12     12     12

Other weights: times as fast as cuBLAS bf16, by rows of x, do_bench
weight and kernel           1    64
-----------------------  ----  ----
6144x4096 rtn int4 g128  2.91  2.91
6144x4096 rtn int8 g128  1.48  1.48

Experts' layers: times as fast as bf16, by tokens, graph
layer and kernel                      1    64
---------------------------------  ----  ----
Mixtral 8x7B, bf16 grouped_mm, us   100   100
  rtn int4 g128                    2.50  1.50
    sorted before                  2.75     -

Llama 8B, random weights
what                 weights    batch    ms  tokens/s  GB/s of weights  over bf16
-------------------  ---------  -----  ----  --------  ---------------  ---------
decode, 1024 tokens  bf16           1  5.60       179              536       1.00
decode, 1024 tokens  int4 g128      1  2.50       400            1,200       2.24

load, 1.00 GB of bf16
weights    run  model MB  above it MB  allowed MB  seconds  floats read in
---------  ---  --------  -----------  ----------  -------  --------------
int4 g128    1       300           90         200     1.50            0.75

Errors of other kernels, and of whole jobs:
  model, int8 g128, decoding at batch 1: killed: it took more than 135 s
  mslk int4 g128: OSError: mslk.so: undefined symbol

Skipped:
  model, bf16, prefill of 2048: 12 s were left, and it takes 30

Correctness: 1234 checks passed, 0 failed, 2 skipped

target                                                          needed      worst measured
--------------------------------------------------------------  -------  -----------------  ------------
rtn int4 g128 8192x8192, M <= 16, do_bench: over cuBLAS         >= 2.3         2.91 at M=1  met
rtn int4 g128 8192x8192, M <= 16, graph: bytes/s over a copy's  >= 0.5         0.50 at M=1  met
rtn int4 g128 8192x8192, M = 32, do_bench: over cuBLAS          >= 1.9        2.91 at M=32  met
rtn int4 g128 8192x8192, M = 64, do_bench: over cuBLAS          >= 1.6        2.91 at M=64  met
rtn int4 g128 8192x8192, M = 128, do_bench: over cuBLAS         >= 1.25      2.91 at M=128  met
rtn int4 g128 8192x8192, M >= 256, do_bench: over cuBLAS        >= 0.95      2.91 at M=256  met
rtn int4 g128 4096x4096, M <= 8, do_bench: over cuBLAS          >= 2.3                   -  not measured
rtn int8 g128 8192x8192, M <= 16, do_bench: over cuBLAS         >= 1.6         1.48 at M=1  MISSED
rtn int8 g128 8192x8192, M >= 256, do_bench: over cuBLAS        >= 0.95      1.48 at M=256  met
Llama 8B, decoding at batch 1, int4 g128: over bf16             >= 2.2                2.24  met
load: bytes above the model over largest tensor + 64 MiB        <= 1     0.45 at int4 g128  met""",
    )


def test_report_of_what_is_wrong():
    results = some_results()
    results["correctness"]["failed"] = [
        {"check": "linear int4 g128", "error": "AssertionError: 3 of 9 elements are out of bound"}
    ]
    results["errors"].append(
        {"section": "correctness", "name": "CUDA graphs", "error": "its process ended (exit code -11)"}
    )
    results["errors"].append(
        {"section": "model", "name": "int4, decoding", "error": "AssertionError: logits that are not finite"}
    )
    results["errors"].append(
        {"section": "linear", "name": "64x32, mslk int4 g128", "error": "its process ended (exit code -11)"}
    )
    results["linear"].append(
        {"N": 64, "K": 32, "M": 3, "kernel": "rtn int8 g128", "error": "ValueError: wrong result"}
    )
    results["moe"].append({"model": "Qwen3", "kernel": "rtn int4 g128", "error": "CompilationError: no"})
    assert_expected_inline(
        "\n".join(gpu_report.wrong(results)),
        """\
linear int4 g128: AssertionError: 3 of 9 elements are out of bound
CUDA graphs: its process ended (exit code -11)
int4, decoding: AssertionError: logits that are not finite
rtn int8 g128, 64x32, 3: ValueError: wrong result
rtn int4 g128, Qwen3, made: CompilationError: no""",
    )
    assert "1234 checks passed, 5 failed, 2 skipped:\n  linear int4 g128: Assert" in gpu_report.text(results)


def test_report_of_nothing():
    results = gpu.no_results()
    results["targets"] = gpu_report.compared(results)
    assert {r["met"] for r in results["targets"]} == {None}
    assert "not measured" in gpu_report.text(results)


def test_a_target_goes_by_the_worst():
    results = some_results()
    rows = {(r["N"], r.get("M"), r["kernel"]): r for r in results["linear"]}
    target = gpu_report.TARGETS[0]
    assert target.what == "rtn int4 g128 8192x8192, M <= 16, do_bench: over cuBLAS"
    assert gpu_report.compared(results)[0]["met"] is True
    rows[8192, 16, "rtn int4 g128"]["do_bench"]["over_cublas"] = 2.2
    found = gpu_report.compared(results)[0]
    assert (found["measured"], found["at"], found["met"]) == (2.2, "M=16", False)
    results["load"][0]["extra_bytes"] = 3 * 10**8
    found = gpu_report.compared(results)[-1]
    assert (found["measured"], found["at"], found["met"]) == (1.5, "int4 g128", False)


def test_report_is_not_too_long():
    """Every kernel at every size."""
    results = some_results()
    shapes, tokens = gpu.sizes(gpu.SHAPES), gpu.numbers(gpu.TOKENS)
    results["linear"] = [r for n, k in shapes for r in linear_rows(n, k, gpu_peers.KERNELS, tokens)]
    one = results["moe"][0]
    results["moe"] = [
        one | {"model": model, "tokens": t, "kernel": kernel, "what": what}
        for model in gpu_peers.MODELS
        for t in gpu.MOE_TOKENS
        for kernel in gpu_peers.MOE_KERNELS
        for what in ("layer", "layer, sorted before")
    ]
    results["model"] = [
        r | {"batch": b, "what": what}
        for r in results["model"]
        for b in (1, 16)
        for what in ("decode", "prefill")
    ]
    results["load"] *= 6
    results["errors"] *= 20
    results["skipped"] *= 20
    assert len(gpu_report.text(results)) < 11_500


def test_picture(tmp_path):
    results = some_results()
    results["machine"]["versions"]["triton"] = "3.6.0"
    (tmp_path / "gpu-a.json").write_text(json.dumps(results))
    for name in ("a.svg", "b.svg"):
        pictures.write(pictures.gpu, tmp_path / "gpu-a.json", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    for text in (
        "humming int4 g128",
        "weight [6144, 4096]",
        "roofline int4",
        "NVIDIA T800, torch 2.11.0, Triton 3.6.0",
        "do_bench",
    ):
        assert text in drawn
    row = results["linear"][0]
    assert pictures.roofline(row, "graph", "rtn int4 g128", results["ceilings"]) == pytest.approx(
        1.5 * 16384 / (4096 + 128)
    )
    results["ceilings"] = {}
    (tmp_path / "gpu-a.json").write_text(json.dumps(results))
    pictures.write(pictures.gpu, tmp_path / "gpu-a.json", tmp_path / "c.svg")
    assert "roofline" not in (tmp_path / "c.svg").read_text()


def test_json_has_a_row_a_line(tmp_path):
    gpu.write(
        {"a": [], "b": {"c": (1.23456789, None)}, "d": [{"e": 2}, {"e": 1e-7 / 3}]}, tmp_path / "a.json"
    )
    written = (tmp_path / "a.json").read_text()
    assert_expected_inline(
        written,
        """\
{"a": [],
"b": {"c": [1.2346, null]},
"d": [
{"e": 2},
{"e": 3.3333e-08}
]}
""",
    )
    assert json.loads(written)["b"] == {"c": [1.2346, None]}


def test_into_keeps_what_was_told(tmp_path):
    results, file = gpu.no_results(), tmp_path / "a.json"
    tell = gpu.into(results, file)
    tell(job("correctness", "x"), "row", {"check": "c", "skipped": "no time was left"})
    tell(job("linear", "y"), "row", {"kernel": "k"})
    tell(job("linear", "y"), "error", "killed")
    assert not file.exists()
    tell(job("linear", "y"), "done", 1.234)
    found = json.loads(file.read_text())
    assert found["correctness"] == {"passed": 0, "skipped": 1, "failed": []}
    assert (found["linear"], found["jobs"]) == (
        [{"kernel": "k"}],
        [{"section": "linear", "name": "y", "seconds": 1.2}],
    )
    assert found["errors"] == [{"section": "linear", "name": "y", "error": "killed"}]
