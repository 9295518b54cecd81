import os
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401

# The tensors are small: a second thread costs ten times what it saves where cores are shared. test_kernels
# has a test with two.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """What a test sets, no other sees: PEFT's BOFT leaves CXX=gcc behind, and what inductor then links lacks libstdc++."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def run(capsys):
    """The command line in this process."""
    from rtn_tensor.cli import main

    def run(*args):
        """(exit status, stdout, stderr)"""
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run
