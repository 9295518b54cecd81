"""Runs an attack in a forked process, so that a crash or a hang fails the test and not the run of pytest."""

import os
import pickle
import resource
import select
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Bytes that an attack may take beside what the process has: a file must not be able to ask for more.
MEMORY = 4 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of an attack: a `value`, or an error of an allowed kind."""

    value: Any = None
    error: str | None = None  # the name of its class
    message: str = ""


def survives(
    fn: Callable[..., Any],
    *args: Any,
    allowed: tuple[type[BaseException], ...] = (ValueError,),
    seconds: float = 60,
) -> Outcome:
    """What `fn(*args)` gives in a forked process; its value must pickle.

    Raises:
        AssertionError: the process died (a signal, an exit), did not end within `seconds`, or raised an error
            whose class is not, exactly, one of `allowed`: a JSONDecodeError is a ValueError, and yet names no
            file.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # That there may be threads; the tests run with one.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.close(reading)
        _run(fn, args, allowed, writing)
    os.close(writing)
    what = f"{getattr(fn, '__name__', fn)}{args}"
    try:
        done = _all_of(reading, seconds)
        if done is None:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    assert done is not None, f"{what} did not end within {seconds} s"
    assert not os.WIFSIGNALED(status), f"{what} died of {signal.Signals(os.WTERMSIG(status)).name}"
    assert (os.WEXITSTATUS(status), bool(done)) == (0, True), (
        f"{what} ended the process with status {os.WEXITSTATUS(status)}"
    )
    outcome, unexpected = pickle.loads(done)
    assert not unexpected, (
        f"{what} raised an error of another kind than {[kind.__name__ for kind in allowed]}:\n{unexpected}"
    )
    return outcome


def _run(fn: Callable[..., Any], args: tuple, allowed: tuple[type[BaseException], ...], writing: int) -> None:
    code, unexpected = 1, ""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as pages:
            now = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        try:
            outcome = Outcome(fn(*args))
        except BaseException as error:
            outcome = Outcome(None, type(error).__name__, str(error))
            if type(error) not in allowed:
                unexpected = "".join(traceback.format_exception(error))
        with open(writing, "wb") as pipe:
            pickle.dump((outcome, unexpected), pipe)
        code = 0
    finally:
        os._exit(code)  # nothing of pytest's may run twice


def _all_of(reading: int, seconds: float) -> bytes | None:
    """What is written until the other end closes, or None where that takes longer than `seconds` at one
    point."""
    parts = []
    while select.select([reading], [], [], seconds)[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None
