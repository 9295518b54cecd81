"""torch's caches of compiled graphs on disk, which processes share: what was compiled for one weight must not
run another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rtn_tensor

PROGRAM = """
import sys, torch, torch.nn.functional as F
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor, Replicate
from rtn_tensor import RTNQuantizedTensor

kind, bits, group_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
w = RTNQuantizedTensor.from_float(torch.randn(64, 192), bits, group_size)
x = torch.randn(3, 192)
expected = F.linear(x, w)
if kind == "dtensor":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    w, x = (DTensor.from_local(t, mesh, [Replicate()], run_check=False) for t in (w, x))
y = torch.compile(lambda w, x: F.linear(x, w))(w, x)
torch.testing.assert_close(y.to_local() if kind == "dtensor" else y, expected)
print("hit" if counters["aot_autograd"]["autograd_cache_hit"] else "miss")
"""


def run(cache, package, *args):
    env = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=package,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Its key of a compiled graph is made of what it pickles, and it caches none of a DTensor.
hashed = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 does not ask a tensor for its hash"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", pytest.param("dtensor", marks=hashed)])
def test_each_format_has_a_graph_of_its_own(kind, tmp_path):
    package = Path(rtn_tensor.__file__).parents[1]
    for bits, group_size in ((8, 64), (4, 64), (4, 96)):
        assert run(tmp_path, package, kind, bits, group_size) == "miss"
    assert run(tmp_path, package, kind, 4, 96) == "hit"


@hashed
@pytest.mark.slow
def test_another_release_takes_no_graph_of_this_one(tmp_path):
    shutil.copytree(Path(rtn_tensor.__file__).parent, tmp_path / "rtn_tensor")
    assert run(tmp_path / "cache", tmp_path, "plain", 4, 64) == "miss"
    assert run(tmp_path / "cache", tmp_path, "plain", 4, 64) == "hit"
    with (tmp_path / "rtn_tensor" / "tensor.py").open("a") as file:
        file.write("\n# another release\n")
    assert run(tmp_path / "cache", tmp_path, "plain", 4, 64) == "miss"
