"""Conversions of a weight, weights made like one, and requires_grad."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from quantized_weights import (
    DTYPES,
    assert_same,
    assert_same_planes,
    every_dtype,
    every_format,
    every_width,
    gaussian,
    message,
    requantized,
)
from torch import nn

from rtn_tensor import RTNQuantizedTensor, reference

# ----------------------------------------------------------------------------- conversions


@every_width
@every_dtype
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_to_dtype_changes_scale_and_output_alone(bits, dtype, to):
    w = gaussian(6, 300, bits=bits, dtype=dtype)
    for out in (w.to(to), w.to("cpu", to), w.to(torch.zeros(1, dtype=to)), w.type(to), w.to(to, copy=True)):
        assert_same(out.qdata, w.qdata)
        assert_same(out.scale, w.scale.to(to))
        assert out.dtype == out.dequantize().dtype == to
        assert (out.bits, out.group_size, out.transposed, out.shape) == (
            w.bits,
            w.group_size,
            w.transposed,
            w.shape,
        )
    assert w.to(dtype) is w
    assert w.to(dtype, copy=True).qdata.data_ptr() != w.qdata.data_ptr()
    assert_same(
        w.t().to(to).dequantize(),
        w.dequantize(torch.float32).t() if to is torch.float32 else w.to(to).dequantize().t(),
    )


def test_to_dtype_by_method():
    w = gaussian(6, 300)
    assert [w.half().dtype, w.bfloat16().dtype, w.half().float().dtype] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    module = nn.Linear(300, 6)
    module.weight = parameter = nn.Parameter(gaussian(6, 300))
    for cast, dtype in (
        (module.half, torch.float16),
        (module.bfloat16, torch.bfloat16),
        (module.float, torch.float32),
    ):
        cast()
        assert module.weight.dtype == module.bias.dtype == dtype
        assert isinstance(module.weight, nn.Parameter)
        assert isinstance(module.weight, RTNQuantizedTensor)
        assert not module.weight.requires_grad
        assert module(torch.randn(2, 300, dtype=dtype)).dtype == dtype
    assert module.weight is parameter  # as for a dense one, optimizers and ties hold on to it


def test_subnormal_scale_survives_half():
    w = RTNQuantizedTensor.from_float(torch.full((1, 32), 1e-9), 4, 32, "absmax")
    assert w.half().scale.item() > 0


def test_dtypes_that_cannot_be_raise_and_change_nothing():
    module = nn.Linear(32, 1)
    module.weight = nn.Parameter(RTNQuantizedTensor.from_float(torch.full((1, 32), 1e9), 4, 32, "absmax"))
    module.weight.fqn = "up_proj.weight"
    errors = [
        message(ValueError, module.half),
        message(TypeError, module.double),
        message(TypeError, lambda: module.weight.to(torch.int8)),
        message(TypeError, lambda: module.weight.dequantize(torch.int8)),
        message(TypeError, lambda: module.weight.dequantize("float32")),
    ]
    assert module.weight.dtype == module.bias.dtype == torch.float32
    assert_same(module.weight.dequantize(), torch.full((1, 32), module.weight.scale.item() * 7))
    assert_expected_inline(
        "\n".join(errors),
        """\
up_proj.weight: a scale of 1.33e+08 overflows torch.float16; keep torch.float32, or use torch.bfloat16
up_proj.weight: dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
up_proj.weight: dtype torch.int8 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
up_proj.weight: dtype is torch.int8; dequantize gives floats, as torch.float32 or torch.bfloat16
up_proj.weight: dtype is 'float32'; dequantize gives floats, as torch.float32 or torch.bfloat16""",
    )


def test_to_meta_and_back():
    w = gaussian(2, 6, 300).mT
    meta = w.to("meta")
    assert (meta.device.type, meta.qdata.device.type, meta.scale.device.type) == ("meta",) * 3
    assert (meta.shape, meta.dtype, meta.transposed) == (w.shape, w.dtype, True)
    assert meta.dequantize().shape == w.shape
    assert F.linear(torch.empty(3, 300, device="meta"), gaussian(6, 300).to("meta")).shape == (3, 6)

    module = nn.Linear(300, 6, bias=False)
    module.weight = nn.Parameter(gaussian(6, 300))
    module.to("meta").to_empty(device="cpu")
    assert module.weight.qdata.device.type == "cpu"
    module.weight.data.copy_(new := torch.randn(6, 300))
    assert_same_planes(module.weight, RTNQuantizedTensor.from_float(new, 4, 32))


def test_cpu_and_to_nothing_return_the_same():
    w = gaussian(6, 300)
    assert w.cpu() is w
    assert w.to("cpu") is w
    assert w.contiguous() is w
    assert w.is_contiguous()


@every_width
@pytest.mark.parametrize("w_shape", [(6, 300), (2, 6, 300)])
def test_factories(bits, w_shape):
    w = gaussian(*w_shape, bits=bits, scale_method="signed", dtype=torch.bfloat16)
    made = [
        (torch.empty_like(w), w.shape),
        (torch.empty_like(w, dtype=torch.float16), w.shape),
        (torch.zeros_like(w), w.shape),
        (torch.empty_like(w.mT), w.mT.shape),
        (w.new_empty(3, 100), (3, 100)),
        (w.new_zeros((3, 100)), (3, 100)),
        (w.new_zeros(100, dtype=torch.float16), (100,)),
        (w.mT.new_empty(100, 3), (100, 3)),
        (RTNQuantizedTensor.empty(3, 100, bits=bits, group_size=32, scale_method="signed"), (3, 100)),
    ]
    for t, shape in made:
        assert t.shape == shape
        assert (t.bits, t.group_size, t.scale_method) == (bits, 32, "signed")
        t.copy_(new := torch.randn(shape))  # the planes have room for the shape
        assert_same_planes(t, requantized(t, new))
    assert [t.dtype for t, _ in made].count(torch.float16) == 2
    assert [t.transposed for t, _ in made].count(True) == 2
    assert torch.empty_like(w, device="meta").qdata.device.type == "meta"
    assert not torch.zeros_like(w).dequantize().any()
    assert not w.new_zeros(3, 100).dequantize().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_pin_memory():
    w = gaussian(6, 300).pin_memory()
    assert w.is_pinned()
    assert w.qdata.is_pinned()
    assert torch.empty_like(w, pin_memory=True).is_pinned()


def test_is_pinned_is_false():
    assert not gaussian(6, 300).is_pinned()


def _fill_with_ones(w):
    w.copy_(torch.ones(w.shape))


def test_share_memory():
    w = gaussian(6, 300)
    assert not w.is_shared()
    assert w.share_memory_() is w
    assert w.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=_fill_with_ones, args=(w,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert_same_planes(w, RTNQuantizedTensor.from_float(torch.ones(6, 300), 4, 32))


def test_module_share_memory():
    module = nn.Linear(300, 6)
    module.weight = nn.Parameter(gaussian(6, 300))
    before = module.weight.dequantize()
    module.share_memory()
    assert module.weight.is_shared()
    assert_same(module.weight.dequantize(), before)


# ------------------------------------------------------------------------------ making one


@every_format
@pytest.mark.parametrize("shape", [(5, 300), (2, 5, 32), (300,), (0, 64), (1, 1)])
def test_from_float(bits, group_size, dtype, shape):
    w = torch.randn(shape).to(dtype)
    q = RTNQuantizedTensor.from_float(w, bits, group_size, "absmax")
    assert (q.shape, q.dtype, q.device, q.is_floating_point()) == (w.shape, dtype, w.device, True)
    qdata, scale = reference.quantize(w, bits, group_size, "absmax", dtype)
    assert_same(q.qdata, qdata)
    assert_same(q.scale, scale)
    assert_same(q.dequantize(), reference.dequantize(qdata, scale, bits, group_size, shape[-1], dtype))
    assert_same(
        q.dequantize(torch.float32),
        reference.dequantize(qdata, scale, bits, group_size, shape[-1], torch.float32),
    )


def test_from_float_of_a_parameter_needs_no_gradient():
    q = RTNQuantizedTensor.from_float(nn.Parameter(torch.randn(6, 96)), 4, 32, dtype=torch.float16)
    assert not q.requires_grad
    assert not q.dequantize().requires_grad
    assert q.dtype == torch.float16


def test_from_float_errors():
    w = torch.randn(6, 96)
    errors = [
        message(TypeError, lambda: RTNQuantizedTensor.from_float(gaussian(6, 96))),
        message(TypeError, lambda: RTNQuantizedTensor.from_float(w.double())),
        message(TypeError, lambda: RTNQuantizedTensor.from_float(w, dtype=torch.float64)),
        message(TypeError, lambda: RTNQuantizedTensor.from_float(w.to(torch.int8))),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(w, bits=3)),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(w, group_size=48)),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(w, scale_method="mse")),
        message(ValueError, lambda: RTNQuantizedTensor.from_float(torch.tensor(1.0))),
        message(TypeError, lambda: RTNQuantizedTensor.empty(6, 96, dtype=torch.float64)),
        message(ValueError, lambda: RTNQuantizedTensor.empty(6, 96, bits=5)),
        message(TypeError, lambda: RTNQuantizedTensor.empty()),
        message(TypeError, lambda: RTNQuantizedTensor.empty((6, 96))),
    ]
    assert_expected_inline(
        "\n".join(errors),
        """\
already quantized: got an RTNQuantizedTensor; quantize the float weight, or call .dequantize() first
dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
dtype torch.int8 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
bits=3 is not supported; use 4 or 8
group_size=48 is not supported; use a multiple of 32 (32, 64 and 128 are usual), or -1 for one group per row
scale_method='mse' is not supported; use one of 'absmax', 'signed', 'search', 'minmax', 'search8'
cannot quantize a tensor without dims; give a weight [..., N, K]
dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
bits=5 is not supported; use 4 or 8
shape is (); give its sizes one by one, as in empty(4096, 1024)
shape is ((6, 96),); give its sizes one by one, as in empty(4096, 1024)""",
    )


def test_repr():
    w = gaussian(6, 96)
    assert_expected_inline(
        "\n".join(
            repr(t)
            for t in (
                w,
                w.t(),
                gaussian(2, 5, 300, bits=8, group_size=-1, scale_method="signed", dtype=torch.bfloat16),
                w.to("meta"),
                nn.Parameter(w),
            )
        ),
        """\
RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu')
RTNQuantizedTensor(shape=(96, 6), bits=4, group_size=32, scale_method='search', transposed=True, dtype=torch.float32, device='cpu')
RTNQuantizedTensor(shape=(2, 5, 300), bits=8, group_size=-1, scale_method='signed', dtype=torch.bfloat16, device='cpu')
RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='meta')
RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu')""",
    )


# --------------------------------------------------------------------------- requires_grad


def test_requires_grad_is_always_false():
    w = gaussian(6, 96)
    assert not w.requires_grad_(True).requires_grad
    assert not w.requires_grad_().requires_grad
    w.requires_grad = True
    assert not w.requires_grad
    p = nn.Parameter(w)
    assert not p.requires_grad
    p.requires_grad = True
    assert not p.requires_grad
    assert not nn.Parameter(w, requires_grad=True).requires_grad

    module = nn.Linear(96, 6)
    module.weight = nn.Parameter(w)
    module.requires_grad_(True)
    assert (module.weight.requires_grad, module.bias.requires_grad) == (False, True)
    trained = nn.Linear(96, 6)
    trained.load_state_dict(module.state_dict(), assign=True)
    assert isinstance(trained.weight, RTNQuantizedTensor)
    assert not trained.weight.requires_grad
    assert torch.optim.SGD([p for p in trained.parameters() if p.requires_grad]).param_groups[0][
        "params"
    ] == [trained.bias]
