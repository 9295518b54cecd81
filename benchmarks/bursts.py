"""How long calls take that each use other weights than the one before. Nothing but Python is needed, as peers
in interpreters of their own are measured by it too."""

import time
from collections.abc import Callable, Sequence

CALLS = 12  # of a peer in one turn, unless they take longer than TURN
TURN = 0.5  # seconds
CACHE_BYTES = 128 << 20  # more than the last-level cache of the machines this runs on


def weights_past_cache(n: int, k: int, bits: int) -> int:
    """How many weights [n, k] do not fit the cache together."""
    return max(2, -(-8 * CACHE_BYTES // (n * k * bits)))


def burst(layers: Sequence[Callable], first: int, *x) -> list[float]:
    """Seconds of each of a few calls on the layers from `first` on, after as many that are not counted."""
    seconds: list[float] = []
    for i in range(CALLS):
        started = time.perf_counter()
        layers[(first + i) % len(layers)](*x)
        seconds.append(time.perf_counter() - started)
        if i and sum(seconds) > TURN:
            break
    return seconds[len(seconds) // 2 :]
