"""The memory that refining from a folder takes: that of a module at a time, not of the float model."""

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory"),
]

MEASURE = """
import sys, threading
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from rtn_tensor import load, refine_, rtn_int4

folder, layers = sys.argv[1], int(sys.argv[2])
config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, vocab_size=512)

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

def refined(folder):
    return refine_(load(folder, rtn_int4()), source=folder, sequences=2, length=64)

for name, count in (("warm", 1), ("model", layers)):
    config.num_hidden_layers = count
    LlamaForCausalLM(config).bfloat16().save_pretrained(f"{folder}/{name}")
refined(f"{folder}/warm")
before, peak, stop = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
report = refined(f"{folder}/model")
stop.set(); watcher.join()
print(report.bytes_before, report.bytes_after, peak - before)
"""


def test_from_files_the_float_model_is_never_in_memory(tmp_path):
    beside = []
    for layers in (4, 16):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(layers)), str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        before, after, peak = map(int, done.stdout.split())
        beside.append(peak - after)
    # What passes between modules and what one module needs does not grow with their number.
    assert beside[1] < beside[0] + 0.1 * before
