import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401

# The tensors are small: a second thread costs ten times what it saves where cores are shared. test_kernels has a test with two.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
