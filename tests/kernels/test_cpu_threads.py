"""The threads of the C++ library, and processes that fork."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from bounds import activations, random_planes
from cpu_library import DTYPES, assert_same, each_bits, each_dtype, need_library, run_python

from rtn_tensor import RTNQuantizedTensor
from rtn_tensor.formats import FORMATS
from rtn_tensor.kernels import cpu


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory from torch.empty holds NaN: an element that is never written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    need_library()
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_bits
@each_dtype
def test_threads_do_not_change_a_bit(threads, dtype, bits):
    w, offs = (
        random_planes(3, 1000, 576, bits=bits, group_size=96, dtype=dtype),
        torch.tensor([100, 101, 290], dtype=torch.int32),
    )
    x = activations(300, 576, dtype)

    def results():
        yield from (cpu.linear(x[:m], w.qdata[0], w.scale[0], None, bits, 96) for m in (1, 3, 20, 300))
        yield cpu.grouped(x, w.qdata, w.scale, offs, bits, 96)
        yield from cpu.quantize(x, bits, 96, "absmax", dtype)
        yield cpu.dequantize(w.qdata, w.scale, bits, 96, 576, dtype)

    threads(1)
    alone = list(results())
    threads(2)
    for one, two in zip(alone, results(), strict=True):
        assert_same(two, one)


def test_python_threads_at_once(threads):
    threads(2)
    problems = []
    for m, n, k, bits, dtype in product((1, 5, 40), (33, 300), (100, 640), FORMATS, DTYPES):
        weight = RTNQuantizedTensor.from_float(torch.randn(n, k).to(dtype), bits, 32)
        x = activations(m, k, dtype)
        problems.append((x, weight, F.linear(x, weight)))

    def run(seed):
        order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed)).tolist()
        for x, weight, expected in (problems[i] for i in order * 5):
            assert torch.equal(F.linear(x, weight), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

START = """
import os, signal
import torch
import torch.nn.functional as F
from rtn_tensor import RTNQuantizedTensor
from rtn_tensor.kernels import cpu

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
weight = RTNQuantizedTensor.from_float(torch.randn(512, 96), 4, 32)
x = torch.randn(8, 96)
expected = F.linear(x, weight)

def check():
    assert torch.equal(F.linear(x, weight), expected)
"""


@needs_linux
def test_one_openmp_runtime_and_its_threads():
    """As many threads as torch was told, all of the runtime that torch itself uses."""
    need_library()
    out = run_python(
        START
        + """
counts = [count()]
for threads in (1, 3):
    torch.set_num_threads(threads)
    check()
    counts.append(count())
assert counts[1] == counts[0] and counts[2] == counts[0] + 2, counts
(torch.randn(1000, 1000) @ torch.randn(1000, 1000)).sum()
assert cpu.library().rtn_has_threads() == 1
with open("/proc/self/maps") as maps:
    paths = {line.split()[-1] for line in maps}
print(*[name for name in map(os.path.basename, paths) if name.startswith(("libgomp", "libomp", "libiomp"))])
"""
    )
    assert len(out.split()) == 1, out


FORK = """
def in_a_child():
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        torch.set_num_threads(2)
        check()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

torch.set_num_threads(2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("used_by", ["the library", "torch alone"])
def test_fork_after_threads(used_by):
    """An OpenMP pool does not survive a fork: a child that asks the one it inherits would wait forever."""
    need_library()
    use = "check()" if used_by == "the library" else "torch.randn(10**6).exp_()"
    run_python(START + FORK + use + "\nin_a_child()\ncheck()\nin_a_child()")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_dataloader_workers():
    need_library()
    run_python(
        START
        + """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        torch.set_num_threads(2)
        return F.linear(x[i : i + 1], weight)[0]

torch.set_num_threads(2)
check()
loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
torch.testing.assert_close(torch.cat(list(loader)), expected)
check()
"""
    )
