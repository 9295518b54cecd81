"""Zeros for programs that share a tile to count themselves in, so that the last knows that it is. A launch
leaves them at zero."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 18  # int32s allocated at a time, 1 MiB
OF_STREAM = 1 << 13  # int32s of a stream; a launch takes one for each of its tiles


def allocate(device: torch.device) -> Tensor:
    """A block of zeros that is there for good. Of another thread, as torch.compile runs a model for the first
    time with this one's allocations put in the memory of its graphs, where it permits none to outlive the
    run."""

    def zeros() -> Tensor:
        block = torch.zeros(BLOCK, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        return block

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(zeros).result()


class Arrivals:
    """Launches of one stream share their zeros; those of different streams, which run at once, do not. A
    launch that is captured in a graph has zeros of its own, since graphs may be replayed on any stream."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []  # never freed: graphs hold addresses in them
        self.free: dict[torch.device, Tensor] = {}
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self.lock = threading.Lock()

    def get(self, device: torch.device, count: int) -> Tensor:
        """At least `count` zeros for a launch on the current stream of `device`."""
        if device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=device)
        capturing = torch.cuda.is_current_stream_capturing()
        key = device, torch.cuda.current_stream(device).cuda_stream
        with self.lock:
            if not capturing:
                found = self.of_stream.get(key)
                if found is None or found.numel() < count:
                    found = self.of_stream[key] = self.take(device, max(count, OF_STREAM))
                if self.free[device].numel() < BLOCK // 2:  # for captures, which cannot allocate
                    self.add_block(device)
                return found
            if device in self.free and self.free[device].numel() >= count:
                return self.take(device, count)
        # Of the graph's memory, zeroed at every replay.
        return torch.zeros(count, dtype=torch.int32, device=device)

    def take(self, device: torch.device, count: int) -> Tensor:
        if device not in self.free or self.free[device].numel() < count:
            self.add_block(device)
        free = self.free[device]
        self.free[device] = free[count:]
        return free[:count]

    def add_block(self, device: torch.device) -> Any:
        self.blocks.append(allocate(device))
        self.free[device] = self.blocks[-1]


ARRIVALS = Arrivals()
