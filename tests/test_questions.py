"""docs/ says what a user sees: each message that heads a section of questions.md, or stands in a table, is
provoked."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_formats import gptq, gptq_config, write
from tiny_llama import tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rtn_tensor import RTNQuantizedTensor, explain, load, plan, quantize_, rtn, rtn_int4, rtn_int8, save
from rtn_tensor.kernels import cpu

ROOT = Path(__file__).resolve().parents[1]
HEADINGS = re.findall(r"^### `(.+)`$", (ROOT / "docs/questions.md").read_text(encoding="utf-8"), re.M)
TABLES = re.findall(
    r"^\|[^|\n]*\|(.*`[^|\n]*`[^|\n]*)\|$",
    "".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8")
        for name in ("load-and-save.md", "support-tables.md")
    ),
    re.M,
)
QUOTED = [
    message
    for cell in TABLES
    for message in re.findall(r"`([^`]+)`", cell)
    if ";" in message or "..." in message
]
PROVOKED: dict[str, Callable] = {}


def provokes(part: str) -> Callable:
    """Of a function whose error, last warning or return is each message that has this in it."""
    found = [message for message in [*HEADINGS, *QUOTED] if part in message]
    assert found, f"no page has {part}"

    def register(function: Callable) -> Callable:
        PROVOKED.update(dict.fromkeys(found, function))
        return function

    return register


@pytest.mark.parametrize("heading", [*HEADINGS, *QUOTED])
def test_message(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            said = PROVOKED[heading](monkeypatch)
        except Exception as error:
            said = str(error)
        said = said or str(warned[-1].message)
    pattern = ".*".join(re.escape(part) for part in re.split(r" ?\.\.\. ?", heading))
    assert re.search(pattern, " ".join(said.split())), f"{heading}\nis not what is said:\n{said}"


def test_the_most_likely_messages_are_there():
    assert len(HEADINGS) >= 20
    assert {*HEADINGS, *QUOTED} == set(PROVOKED)


def small() -> nn.Module:
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 128), nn.Linear(128, 64)).bfloat16()


def folder(name: str = "float", **config) -> str:
    tiny_llama().save_pretrained(name)
    path = Path(name) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return name


def fresh_process(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    ).stderr


@provokes("Failed to find class")
def _(_):
    save(load(folder(), rtn_int4(64)), "int4")
    return fresh_process(
        "from transformers import AutoConfig; from transformers import TorchAoConfig; import json;"
        "TorchAoConfig.from_dict(json.load(open('int4/config.json'))['quantization_config'])"
    )


@provokes("Unsupported global")
def _(_):
    torch.save({"w": RTNQuantizedTensor.from_float(torch.randn(8, 32))}, "w.pt")
    return fresh_process("import torch; torch.load('w.pt')")


@provokes("in plain torch")
def _(monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", Path("nowhere.so"))
    monkeypatch.setattr(cpu, "_load", cpu._load.__wrapped__)
    cpu.library.__wrapped__()


@provokes("RTN_KERNEL")
def _(monkeypatch):
    model = small()
    quantize_(model, rtn_int4(64))
    monkeypatch.setenv("RTN_KERNEL", "triton")
    model[1](torch.randn(2, 64).bfloat16())


@provokes("no CUDA device")
def _(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    explain(device="cuda")


@provokes("holds NaN or inf")
def _(_):
    model = small()
    model[1].weight.data[0, 0] = float("nan")
    quantize_(model, rtn_int4())


@provokes("is already quantized")
def _(_):
    model = small()
    quantize_(model, rtn_int4())
    quantize_(model, rtn_int8())


@provokes("only plain")
def _(_):
    quantize_(small().double(), rtn_int4())


@provokes("max_norm")
def _(_):
    model = nn.Sequential(nn.Embedding(64, 64, max_norm=1.0))
    quantize_(model, rtn_int4(), filter_fn=lambda module, name: isinstance(module, nn.Embedding))


@provokes("computes another weight")
def _(_):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    quantize_(model, [("0.parametrizations.weight.original1", rtn_int4())])


@provokes("is uninitialized")
def _(_):
    quantize_(nn.Sequential(nn.LazyLinear(64)), rtn_int4())


@provokes("nn.LSTM")
def _(_):
    quantize_(nn.Sequential(nn.LSTM(32, 32)), [("0.weight_ih_l0", rtn_int4())])


@provokes("no weight is selected")
def _(_):
    quantize_(nn.Sequential(nn.Conv2d(3, 3, 3)), rtn_int4())


@provokes("matches no weight")
def _(_):
    quantize_(small(), [("1.wieght", rtn_int8()), ("*", rtn_int4())])


@provokes("matches only weights that stay float")
def _(_):
    quantize_(small(), [("0*", rtn_int8()), ("*", rtn_int4())])


@provokes("bits=3 is not supported")
def _(_):
    rtn(bits=3)


@provokes("group_size=100")
def _(_):
    rtn_int4(100)


@provokes("is too few")
def _(_):
    plan(tiny_llama().eval(), 4.0, sequences=1, length=4)


@provokes("x is torch.float32")
def _(_):
    model = small()
    quantize_(model, rtn_int4(64))
    model[1](torch.randn(2, 64))


@provokes("cannot slice columns")
def _(_):
    RTNQuantizedTensor.from_float(torch.randn(8, 256), bits=4, group_size=64)[:, 16:144]


@provokes("does not implement")
def _(_):
    RTNQuantizedTensor.from_float(torch.randn(8, 64)).abs()


@provokes("no storage of its own")
def _(_):
    from safetensors.torch import save_file

    save_file({"w": RTNQuantizedTensor.from_float(torch.randn(8, 64))}, "w.safetensors")


@provokes("torch cannot convert or move")
def _(_):
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, rtn_int4())
    view = model[0].weight[:32]
    model.to(torch.bfloat16)
    del view


@provokes("no numpy array")
def _(_):
    RTNQuantizedTensor.from_float(torch.randn(8, 64)).numpy()


@provokes("quantized by HQQ")
def _(_):
    load(folder(quantization_config={"quant_method": "hqq"}), rtn_int4())


@provokes("the option 'rotation'")
def _(_):
    write(Path("rotated"), tiny_llama(), gptq, gptq_config(rotation="hadamard"))
    load("rotated", rtn_int4())


@provokes("dequantized as they are read")
def _(_):
    write(Path("gptq"), tiny_llama(), gptq, gptq_config())
    load("gptq", rtn_int4())


@provokes("auto_map")
def _(_):
    path = Path(folder(auto_map={"AutoModelForCausalLM": "own.Own"}, architectures=["Own"]))
    load(path, rtn_int4())


@provokes("posix.system")
def _(_):
    class Command:
        def __reduce__(self):
            return os.system, ("true",)

    path = Path(folder())
    (path / "model.safetensors").unlink()
    torch.save({"w": Command()}, path / "pytorch_model.bin")
    load(path, rtn_int4())


@provokes("bits=2")
def _(_):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(64, 32))
    quantize_(model, rtn_int4(), filter_fn=lambda module, name: name == "1")
    save(model, "lies")
    path = Path("lies/model.safetensors")
    path.write_bytes(path.read_bytes().replace(rb"\"bits\": 4", rb"\"bits\": 2"))
    load("lies", model=nn.Sequential(nn.Linear(32, 32), nn.Linear(64, 32)))


@provokes("is quantized already; load it")
def _(_):
    save(load(folder(), rtn_int4(64)), "int4")
    load("int4", rtn_int8())


@provokes("does not fit the model")
def _(_):
    load(folder(num_hidden_layers=9), rtn_int4())


@provokes("is truncated or corrupt")
def _(_):
    path = Path(folder()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    load("float", rtn_int4())


@provokes("exists; choose another name")
def _(_):
    Path("int4").mkdir()
    save(small(), "int4")


@provokes("sharded by fully_shard")
def _(_):
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = nn.Sequential(nn.Linear(64, 64))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        quantize_(model, rtn_int4())
    finally:
        dist.destroy_process_group()
