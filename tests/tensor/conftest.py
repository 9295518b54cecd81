import pytest
import torch

from rtn_tensor import reference
from rtn_tensor.kernels import registry
from rtn_tensor.kernels.problem import Kernel

OPS = ["linear", "linear_dx", "grouped", "grouped_dx", "embedding", "quantize", "dequantize"]


@pytest.fixture
def calls(monkeypatch):
    """(op, its tensors) of every kernel call, in order: a silent dequantize() would leave another trace."""
    made = []

    def counted(op):
        def run(*args):
            made.append((op, [a for a in args if isinstance(a, torch.Tensor)]))
            return getattr(reference, op)(*args)

        return run

    monkeypatch.delenv("RTN_KERNEL", raising=False)
    before = list(registry.KERNELS)
    ops_of = {op: counted(op) for op in OPS}
    registry.KERNELS[:] = [
        Kernel(name="counting", why_not=lambda problem: None, rounds_weight=lambda problem: False, **ops_of)
    ]
    yield made
    registry.KERNELS[:] = before
