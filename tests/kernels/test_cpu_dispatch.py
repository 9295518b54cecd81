"""Products that torch's dispatcher hands to the C++ library without Python."""

import pytest
import torch
from bounds import activations, random_planes
from cpu_library import each_dtype

from rtn_tensor import ops
from rtn_tensor.kernels import cpu, registry


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory from torch.empty holds NaN: an element that is never written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


needs_library = pytest.mark.skipif(cpu.library() is None, reason="the C++ library was not built")


@pytest.fixture
def no_python(monkeypatch):
    """Whatever would choose a kernel in Python fails."""

    def fail(*args):
        raise AssertionError("a kernel was chosen in Python")

    monkeypatch.delenv("RTN_KERNEL", raising=False)
    monkeypatch.setattr(ops, "make_problem", fail)


@needs_library
@pytest.mark.parametrize("call", [torch.ops.rtn.linear.default, ops.linear], ids=["dispatched", "eager"])
@each_dtype
def test_product_without_python(call, dtype, no_python):
    w = random_planes(33, 100, group_size=32, dtype=dtype)
    bias = torch.randn(33).to(dtype)
    wide = activations(6, 116, dtype)
    for x in (
        wide[:, 8:108],
        wide[:, :100].contiguous().view(2, 3, 100),
        wide[0, :100],
        wide[:0, :100],
        wide[:5, :100].contiguous().view(5, 1, 1, 100),
    ):
        for b in (None, bias):
            with torch.no_grad():
                y = call(x, w.qdata, w.scale, b, 4, 32)
            expected = cpu.linear(x.reshape(-1, 100), w.qdata, w.scale, b, 4, 32).view(*x.shape[:-1], 33)
            assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), dtype)
            assert torch.equal(y, expected)


def interrupt(problem):
    raise KeyboardInterrupt


@needs_library
def test_what_cpp_does_not_take_goes_through_python(monkeypatch):
    monkeypatch.delenv("RTN_KERNEL", raising=False)
    w, x = random_planes(33, 64, group_size=32), activations(6, 64, torch.float32)
    planes = (w.qdata, w.scale, None, 4, 32)
    expected = torch.ops.rtn.linear(x, *planes)
    columns = x.t().contiguous().t()  # no row of it is dense
    sliced = x.repeat(1, 2).view(2, 3, 128)[..., :64]
    asked = []
    monkeypatch.setattr(ops, "choose", lambda problem: asked.append(problem.M) or registry.choose(problem))
    with torch.no_grad():
        assert torch.equal(torch.ops.rtn.linear(columns, *planes), expected)
        assert torch.equal(ops.linear(columns, *planes), expected)
        assert torch.equal(torch.ops.rtn.linear(sliced, *planes), expected.view(2, 3, 33))
        assert len(asked) == 3
        qdata, scale = (t.t().contiguous().t() for t in (w.qdata, w.scale))
        assert torch.equal(ops.linear(x, qdata, scale, None, 4, 32), expected)
        asked.pop()
        monkeypatch.setenv("RTN_KERNEL", "reference")
        torch.ops.rtn.linear(x, *planes)
        assert len(asked) == 4
        monkeypatch.setenv("RTN_KERNEL", "nothing")
        with pytest.raises(ValueError, match="RTN_KERNEL='nothing' names no kernel"):
            ops.linear(x, *planes)
        # The latter before torch 2.13.
        with pytest.raises(RuntimeError, match="RTN_KERNEL='nothing' names no kernel|printed above"):
            torch.ops.rtn.linear(x, *planes)
        monkeypatch.setattr(ops, "choose", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ops.linear(x, *planes)


@needs_library
def test_the_cpp_op_gives_its_tensors_back(monkeypatch):
    """Each argument comes to it with a reference of its own."""
    w, x, bias = random_planes(33, 64, group_size=32), activations(6, 64, torch.float32), torch.randn(33)
    tensors = (x, w.qdata, w.scale, bias)

    def uses():
        return [torch._C._storage_Use_Count(t.untyped_storage()._cdata) for t in tensors]

    before = uses()
    for forced in ("", "reference"):
        monkeypatch.setenv("RTN_KERNEL", forced) if forced else monkeypatch.delenv(
            "RTN_KERNEL", raising=False
        )
        y = [torch.ops.rtn.linear(*tensors, 4, 32) for _ in range(3)]
        assert torch._C._storage_Use_Count(y[0].untyped_storage()._cdata) <= 2  # ours, and the asking
        assert uses() == before
