"""What `rtn-tensor` prints beside its result."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

FORESEEN = OSError, ValueError, TypeError  # kinds whose messages are for a user


def say(text: str) -> None:
    """Prints a line on stderr; what a file's name or content could do to a terminal is escaped."""
    if sys.stderr is None:
        return
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:  # whoever read it is gone, which is no reason to stop
        discard(sys.stderr)


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def progress(what: str) -> Callable[[Iterable], Iterable[Any]]:
    """Wraps a list to show, where stderr is a terminal, how much of it is done, at what rate, and the time
    that is left."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items: track(items, what, console=console, disable=not console.is_terminal)


def discard(stream: Any) -> None:
    """Sends what is still to be written to a stream nowhere; else Python fails once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def named(error: Exception) -> str:
    """The error's own words; with its class, where those are not for a user."""
    text = str(error)
    return (
        text
        if text and isinstance(error, FORESEEN)
        else f"{type(error).__name__}{f': {text}' if text else ''}"
    )
