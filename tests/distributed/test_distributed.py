"""FSDP2, tensor parallelism, distributed checkpoints and training, on gloo ranks of this machine; the cases
are in sharded_*.py."""

import functools

import pytest
import torch.distributed

if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

from ranks import cases, run_all

MODULES = (
    "sharded_fsdp",
    "sharded_tp",
    "sharded_load",
    "sharded_rank0",
    "sharded_transformers",
    "sharded_training",
    "sharded_2d",
    "sharded_ddp",
)
CASES = [
    (module, name, ranks) for module in MODULES for ranks in cases(module).ranks for name in cases(module)
]


@functools.cache
def results(ranks):
    return run_all(ranks, [module for module in MODULES if ranks in cases(module).ranks])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("module", "name", "ranks"), CASES)
def test_on_ranks(module, name, ranks):
    failed = results(ranks)
    assert (module, name) not in failed, failed[module, name]
