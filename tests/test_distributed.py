"""FSDP2, tensor parallelism and distributed checkpoints, on gloo ranks of this machine; the cases are in sharded.py."""

import functools

import pytest
import torch.distributed

if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

from sharded import CASES, run_all

results = functools.cache(run_all)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_on_ranks(name, ranks):
    failed = results(ranks)
    assert name not in failed, failed[name]
