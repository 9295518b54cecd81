"""What torch's and others' tools see of a quantized model: bytes, floating-point operations, profiles, a
printed model, raw memory."""

import copy
import ctypes
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.dlpack
from test_inputs import NAME, numbers, weight
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import quantize_ as torchao_quantize_

from rtn_tensor import RTNQuantizedTensor, dequantize_, quantize_, report, rtn_int4, rtn_int8
from rtn_tensor import save as rtn_save


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))


# ----------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("config", [rtn_int4(32, "absmax"), rtn_int8(64)])
def test_bytes_are_those_of_the_planes(config):
    w = RTNQuantizedTensor.from_float(numbers(64, 96), config.bits, config.group_size)
    assert w.nbytes == w.qdata.nbytes + w.scale.nbytes < 64 * 96 * 4
    assert w.numel() * w.element_size() == pytest.approx(w.nbytes)
    assert (w.itemsize, w[:32].nbytes, w.t().nbytes) == (4, w.nbytes // 2, w.nbytes)
    assert isinstance(weight(0, 96).element_size(), float)
    m = model()
    quantize_(m, config)
    assert sum(p.nbytes for p in m.parameters()) == report(m).bytes_after


def test_memory_footprint_of_transformers():
    from tiny_llama import tiny_llama

    m = tiny_llama()
    quantize_(m, rtn_int4(32, "absmax"))
    expected = report(m).bytes_after + sum(b.nbytes for b in m.buffers())
    assert m.get_memory_footprint() == pytest.approx(expected, abs=1)


# --------------------------------------------------------------- floating-point operations


@pytest.mark.parametrize("grad", [False, True])
def test_flops_are_those_of_the_dense_weight(grad: bool):
    w, x, e = weight(64, 96), numbers(2, 5, 96).requires_grad_(grad), weight(2, 64, 96)
    offs = torch.tensor([3, 10], dtype=torch.int32)

    def count(fn, *weights) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            y = fn(*weights)
            if grad:
                y.sum().backward()
        return counter.get_total_flops()

    cases = [
        (lambda w: F.linear(x, w, numbers(64)), w),
        (lambda w: x @ w.t(), w),
        (lambda w: x[..., :64] @ w, w),
        (lambda w: torch.bmm(x, w.mT), e),
    ]
    for i, (fn, q) in enumerate(cases):
        assert count(fn, q) == count(fn, q.dequantize()) > 0, i
    flat = 2 * 10 * 96 * 64
    assert count(lambda w: F.grouped_mm(x.view(10, 96), w.mT, offs=offs), e) == flat * (2 if grad else 1)


def test_flops_of_experts_and_of_a_compiled_model():
    w, x, experts = weight(2, 64, 96), numbers(5, 96), torch.tensor([0, 1, 0, 1, 1])
    with FlopCounterMode(display=False) as counter:
        torch.ops.rtn.routed(x, w.qdata, w.scale, None, experts.int(), None, None, None, 1, "", 4, 32)
    assert counter.get_total_flops() == 2 * 5 * 96 * 64
    m = model()
    quantize_(m, rtn_int4(32, "absmax"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        m(torch.arange(7))
    assert counter.get_total_flops() == 2 * 7 * 96 * (64 + 32)


# -------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_profile_shows_every_product(mode):
    w, e, x = weight(64, 96), weight(2, 64, 96), numbers(5, 96)
    with mode(), torch.profiler.profile(record_shapes=True) as profile:
        F.linear(x, w)
        F.embedding(torch.tensor([1]), w)
        F.grouped_mm(x, e.mT, offs=torch.tensor([1, 5], dtype=torch.int32))
        numbers(5, 64) @ w
        w.dequantize()
        RTNQuantizedTensor.from_float(numbers(64, 96), 4, 32)
    shapes = {event.name: event.input_shapes for event in profile.events() if event.name.startswith("rtn::")}
    assert set(shapes) == {
        f"rtn::{op}" for op in ("linear", "embedding", "grouped", "linear_dx", "dequantize", "quantize")
    }
    assert shapes["rtn::linear"][:2] == [[5, 96], [64, 48]]


# -------------------------------------------------------------------------------- printing


def test_a_printed_model_names_what_is_quantized():
    m = model()
    before = repr(m)
    quantize_(m, rtn_int4(32, "absmax"), lambda module, name: name != "1")
    assert (
        repr(m[3]) == "Linear(in_features=96, out_features=32, bias=False, weight=RTNQuantizedTensor(bits=4, "
        "group_size=32))"
    )
    assert "Embedding(10, 64, weight=RTNQuantizedTensor(bits=4, group_size=32))" in repr(m)
    assert repr(m[1]) == "Linear(in_features=64, out_features=96, bias=True)"
    shown = repr(m)
    for same in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.compile(m)._orig_mod):
        assert repr(same) == shown
    buffer = io.BytesIO()
    torch.save(m, buffer)
    assert repr(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)) == shown
    dequantize_(m)
    assert repr(m) == before
    m.load_state_dict(
        {
            k: RTNQuantizedTensor.from_float(v, 8, 32, "signed") if v.dim() == 2 else v
            for k, v in m.state_dict().items()
        },
        assign=True,
    )
    assert "weight=RTNQuantizedTensor(bits=8, group_size=32, scale_method='signed')" in repr(m[1])


def test_a_printed_model_after_torchaos_quantize_():
    m = model()
    torchao_quantize_(m, rtn_int4(32, "absmax"))
    assert repr(m[3]).count("weight=RTNQuantizedTensor(bits=4, group_size=32)") == 1
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(weight(2, 64, 96), requires_grad=False)
    assert (
        repr(experts)
        == "Module(gate_up_proj=RTNQuantizedTensor(bits=4, group_size=32, scale_method='search'))"
    )


# ------------------------------------------------------------------------------ raw memory

MEMORY = {
    "numpy.from_dlpack": np.from_dlpack,
    "torch.from_dlpack": torch.from_dlpack,
    "__dlpack__": lambda w: w.__dlpack__(),
    "__dlpack_device__": lambda w: w.__dlpack_device__(),
    "numpy": lambda w: w.numpy(),
    "numpy(force)": lambda w: w.numpy(force=True),
    "numpy.asarray": np.asarray,
    "numpy.array": np.array,
    "tolist": lambda w: w.tolist(),
    "untyped_storage": lambda w: bytes(w.untyped_storage()),
    "untyped_storage's address": lambda w: w.untyped_storage().data_ptr(),
    "storage": lambda w: w.storage(),
    "view of bytes": lambda w: w.view(torch.uint8),
    "memoryview": memoryview,
    "frombuffer": lambda w: torch.frombuffer(w, dtype=torch.uint8),
    "ctypes": lambda w: (ctypes.c_char * 4).from_buffer(w),
    "cuda array": lambda w: w.__cuda_array_interface__,
    "item": lambda w: w.item(),
    "item of one": lambda w: w[:1, :].item(),
}


@pytest.mark.parametrize("way", MEMORY)
def test_nobody_gets_memory_that_is_not_there(way: str):
    with pytest.raises((NotImplementedError, TypeError, AttributeError, ValueError, RuntimeError)) as error:
        MEMORY[way](weight(64, 96))
    if (
        way not in ("memoryview", "frombuffer", "ctypes", "item", "item of one") and "untyped" not in way
    ):  # Python's own and torch's sentences, clear as they are
        assert error.match(f"{NAME}: .*(dequantize|rtn_tensor.save)")


def test_data_ptr_tells_weights_apart():
    w, other = weight(64, 96), weight(64, 96)
    assert w.data_ptr() == w.detach().data_ptr() != other.data_ptr()
    assert w.data_ptr() < 0  # no address, where one would read floats
    assert copy.deepcopy(w).data_ptr() != w.data_ptr()
    for same in (copy.deepcopy(nn.Parameter(w, requires_grad=False)), pickle.loads(pickle.dumps(w))):
        assert same.equal(w)


def test_safetensors_of_a_quantized_weight(tmp_path):
    from safetensors.torch import save, save_file, save_model

    m = model()
    quantize_(m, rtn_int4(32, "absmax"))
    for call in (
        lambda: save_file(m.state_dict(), tmp_path / "x.safetensors"),
        lambda: save_model(m, str(tmp_path / "x.safetensors")),
        lambda: save(m.state_dict()),
    ):
        with pytest.raises(
            TypeError,
            match=r"1\.weight: a quantized weight lies in two planes.*to save it, " r"use rtn_tensor\.save",
        ):
            call()
    assert not list(tmp_path.iterdir())
    rtn_save(m, tmp_path / "folder")
