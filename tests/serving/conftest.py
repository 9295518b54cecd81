import pytest
import tiny

from benchmarks.real_model import MODEL
from rtn_tensor import ops


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function from the name of a model to its folder."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: MODEL if name == "smollm2" else tiny.make(name, root / name)


@pytest.fixture
def calls(monkeypatch):
    """How often each op of ours was called; eager layers go through these two."""
    counts = {"linear": 0, "routed": 0}

    def counted(name, op):
        def call(*args):
            counts[name] += 1
            return op(*args)

        return call

    for name in counts:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counts
