"""benchmarks/gpu.py, as far as it goes without a GPU: its clock and its processes."""

import contextlib
import faulthandler
import os
import signal
import threading
import time

import pytest

from benchmarks import gpu_peers, gpu_workers
from benchmarks.gpu_peers import CUBLAS
from benchmarks.gpu_workers import Budget, Job, Worker


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def endless():
    return Budget(1e9)


def job(section="linear", name="a", function="test_gpu_benchmark:echo", least=0.0, most=60.0, **arguments):
    return Job(section, name, function, arguments, least, most)


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
