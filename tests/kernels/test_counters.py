"""Who shares zeros with whom, with CUDA's answers made up; on a GPU, the split-K tests show that launches
leave them at zero."""

from types import SimpleNamespace

import pytest
import torch

from rtn_tensor.kernels.triton import counters
from rtn_tensor.kernels.triton.counters import BLOCK, Arrivals

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    state = SimpleNamespace(stream=1, capturing=False, allocated=0)

    def allocate(device):
        assert not state.capturing, "memory of a capture is the graph's"
        state.allocated += 1
        return torch.zeros(BLOCK, dtype=torch.int32)

    monkeypatch.setattr(counters, "allocate", allocate)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream)
    )
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kwargs: zeros(*size, **kwargs))
    return state


def shared(a, b):
    start, end = a.data_ptr(), a.data_ptr() + a.nbytes
    return start < b.data_ptr() + b.nbytes and b.data_ptr() < end


def test_a_stream_has_one_and_streams_and_devices_have_their_own(cuda):
    zeros = Arrivals()
    first = zeros.get(GPU, 500)
    assert first.numel() >= 500
    assert zeros.get(GPU, 700).data_ptr() == first.data_ptr()
    cuda.stream = 2
    second = zeros.get(GPU, 500)
    assert not shared(first, second)
    assert not shared(zeros.get(OTHER, 500), second)
    assert cuda.allocated == 2
    assert zeros.get(GPU, 100_000).numel() >= 100_000
    assert not shared(zeros.get(GPU, 100_000), first)


def test_each_captured_launch_has_its_own_for_good(cuda):
    zeros = Arrivals()
    handed = [zeros.get(GPU, 500)]
    for _ in range(5):
        cuda.capturing = True
        handed += [zeros.get(GPU, 500) for _ in range(150)]
        cuda.capturing = False
        zeros.get(GPU, 500)
    assert cuda.allocated > 1
    ordered = sorted(handed, key=lambda t: t.data_ptr())
    assert not any(shared(a, b) for a, b in zip(ordered, ordered[1:], strict=False))
    alive = {block.untyped_storage().data_ptr() for block in zeros.blocks}
    assert all(t.untyped_storage().data_ptr() in alive for t in handed)


def test_a_capture_with_none_left_takes_the_graphs_own(cuda):
    zeros = Arrivals()
    cuda.capturing = True
    assert zeros.get(GPU, 500).numel() == 500
    cuda.capturing = False
    zeros.get(GPU, 500)
    cuda.capturing = True
    taken = [zeros.get(GPU, 60_000) for _ in range(6)]
    assert cuda.allocated == 1
    assert not any(shared(a, b) for i, a in enumerate(taken) for b in taken[:i])


def test_on_the_cpu_they_are_fresh():
    assert not Arrivals().get(torch.device("cpu"), 7).any()
