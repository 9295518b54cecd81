"""Processes that own the device: what one of them breaks, or hangs on, is lost, and nothing else. `gpu.py`
itself runs nothing there."""

import gc
import importlib
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from functools import partial
from typing import Any, NamedTuple

import torch

GRACE = 15.0  # seconds that a job has, after its own are over, to come back by itself
KEPT = 1 << 30  # bytes of the device that a process may keep from job to job


class Budget:
    """Seconds, and how many of them are left."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        return self.end - self.clock()


class Job(NamedTuple):
    """A call of `function`, "module:name", with (report, budget, **arguments), in a process of its own. It
    reports rows as it gets them."""

    section: str
    name: str
    function: str
    arguments: dict[str, Any]
    least: float  # seconds: it is not begun with fewer left
    most: float  # seconds: its budget, where so many are left


# What it is told: "row", "error", "skipped" (why), or "done" (the seconds).
Tell = Callable[[Job, str, Any], None]


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def lost() -> bool:
    """Whether this process can no longer use its GPU: after an illegal access there every later call
    fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def spent() -> bool:
    """Whether the next job should have a new process: the GPU is lost to this one, or memory stays that was
    not given back."""
    if not torch.cuda.is_initialized():
        return False
    if lost():
        return True
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled models, and the CUDA graphs of them
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() > KEPT


def serve(connection: Any, environment: Mapping[str, str]) -> None:
    """Runs the jobs that come, until whoever sends them is gone or this process is spent."""
    os.environ.update(environment)
    with closing(connection), suppress(EOFError, OSError):
        while True:
            function, seconds, arguments = connection.recv()
            module, _, name = function.partition(":")
            error = None
            try:
                getattr(importlib.import_module(module), name)(
                    lambda row: connection.send(("row", row)), Budget(seconds), **arguments
                )
            except Exception as raised:
                error = described(raised)
            if spent():
                connection.send(("last", error))
                return
            connection.send(("end", error))


def in_a_process(connection: Any, environment: Mapping[str, str]) -> Any:
    # Spawned: a forked child cannot use CUDA where its parent has.
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(connection, environment), daemon=True
    )
    process.start()
    connection.close()  # the child has its own; with this one open, its end would not be seen
    return process


class Worker:
    """Runs jobs in a process, and starts another where that died or had to be killed.

    Args:
        environment: variables that are set there before the first job.
        start: given a connection and `environment`, begins `serve` somewhere; what it returns can be killed
            and joined.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        start: Callable[[Any, Mapping[str, str]], Any] = in_a_process,
    ):
        self.environment = environment or {}
        self.start = start
        self.process: Any = None
        self.connection: Any = None

    def run(self, job: Job, seconds: float, row: Callable[[Any], None]) -> str | None:
        """None, or what went wrong."""
        if self.process is None:
            self.connection, theirs = multiprocessing.Pipe()
            self.process = self.start(theirs, self.environment)
        end = time.monotonic() + seconds + GRACE
        try:
            self.connection.send((job.function, seconds, job.arguments))
            while self.connection.poll(max(0.0, end - time.monotonic())):
                kind, what = self.connection.recv()
                if kind == "row":
                    row(what)
                    continue
                if kind == "last":
                    self.stop()
                return what
        except (EOFError, OSError):
            self.process.join()
            code = getattr(self.process, "exitcode", None)
            self.stop()
            return f"its process ended (exit code {code})"
        self.stop()
        return f"killed: it took more than {seconds + GRACE:.0f} s"

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = None


def run(jobs: Iterable[Job], worker: Worker, budget: Budget, tell: Tell) -> None:
    """One job after another, while there is time."""
    for job in jobs:
        left = budget.left()
        if left < job.least:
            tell(job, "skipped", f"{max(left, 0):.0f} s were left, and it takes {job.least:.0f}")
            continue
        started = budget.clock()
        if error := worker.run(job, min(left, job.most), partial(tell, job, "row")):
            tell(job, "error", error)
        tell(job, "done", budget.clock() - started)


def run_together(jobs: Iterable[Job], workers: list[Worker], budget: Budget, tell: Tell) -> None:
    """Each worker takes the next job. For what is not timed."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    one_at_a_time = threading.Lock()

    def locked(job: Job, kind: str, what: Any) -> None:
        with one_at_a_time:
            tell(job, kind, what)

    def work(worker: Worker) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                worker.stop()
                return
            run([job], worker, budget, locked)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
