import os

import pytest
import torch

# The processes that tests start pass without a compiler, too, as pyproject.toml has it for this one.
os.environ.setdefault("PYTHONWARNINGS", "ignore:rtn_tensor was installed without its C:UserWarning")

# The tensors are small: a second thread costs ten times what it saves where cores are shared. test_kernels has a test with two.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
