"""Parts that are gathered, and what is copied into a weight."""

import pytest
import torch
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

from rtn_tensor import RTNQuantizedTensor

# ------------------------------------------------------------------------- copies of parts

GATHERS = {
    "index": lambda w: w[torch.tensor([4, 0, 4])],
    "index-list": lambda w: w[[5, 1]],
    "index-negative": lambda w: w[torch.tensor([-1])],
    "index-2d": lambda w: w[torch.tensor([[0, 1], [2, 3]])],
    "index-none": lambda w: w[torch.tensor([], dtype=torch.int64)],
    "index-then-t": lambda w: w.index_select(0, torch.tensor([1, 0])).t(),
    "mask": lambda w: w[torch.tensor([True, False, True, True, False, False])],
    "mask-none": lambda w: w[torch.zeros(6, dtype=torch.bool)],
    "index-select": lambda w: w.index_select(0, torch.tensor([3, 3, 1])),
    "index-select-t": lambda w: w.t().index_select(1, torch.tensor([3, 3, 1])),
    "cat": lambda w: torch.cat([w, w[1:3]]),
    "cat-negative": lambda w: torch.cat((w[1:3], w), dim=-2),
    "cat-columns": lambda w: torch.cat([w[:, :64], w], dim=1),
    "cat-columns-parts": lambda w: torch.cat([w[:, 64:128], w[:, 288:]], dim=-1),
    "cat-t": lambda w: torch.cat([w.t()[:64], w.t()], dim=0),
    "cat-t-columns": lambda w: torch.cat([w.t(), w.t()], dim=1),
    "concat-of-chunks": lambda w: torch.cat(w.chunk(3)),
    "concat-of-split-columns": lambda w: torch.cat(w.split(96, dim=1), dim=1),
    "vstack": lambda w: torch.vstack([w, w]),
    "stack": lambda w: torch.stack([w, w.clone()]),
    "stack-1": lambda w: torch.stack([w, w], dim=1),
    "stack-t": lambda w: torch.stack([w.t(), w.t()]),
    "clone": lambda w: w.clone(),
    "clone-t": lambda w: w.t().clone(),
    "clone-columns": lambda w: w[:, 32:].clone(),
    "contiguous-columns": lambda w: w[:, 32:64].contiguous(),
}


@every_width
@every_dtype
@pytest.mark.parametrize("gather", GATHERS)
def test_gather(gather, bits, dtype):
    w = gaussian(6, 300, bits=bits, dtype=dtype)
    out = GATHERS[gather](w)
    assert isinstance(out, RTNQuantizedTensor)
    assert_same(out.dequantize(), GATHERS[gather](w.dequantize()))
    before = w.dequantize()
    out.qdata.zero_()
    assert_same(w.dequantize(), before)  # a copy, not a view


@every_width
def test_gather_experts(bits):
    w = gaussian(3, 4, 100, bits=bits)
    dense = w.dequantize()
    picked = torch.tensor([2, 0])
    mask = torch.rand(3, 4) < 0.5
    for fn in (
        lambda w: w[picked],
        lambda w: w[:, picked],
        lambda w: w[picked, picked],
        lambda w: w[mask],
        lambda w: w.mT[picked],
        lambda w: w.index_select(1, picked),
        lambda w: torch.cat([w, w], dim=0),
        lambda w: torch.cat([w, w], dim=1),
        lambda w: torch.cat([w[..., :64], w], dim=2),
        lambda w: torch.cat([w.mT[:, :64], w.mT], dim=1),
        lambda w: torch.stack(w.unbind()),
    ):
        assert_same(fn(w).dequantize(), fn(dense))


def test_index_assignment():
    w, new = gaussian(6, 96), torch.randn(96)
    w[2] = new
    assert_same_planes(w[2], RTNQuantizedTensor.from_float(new, 4, 32))


def test_impossible_gathers_raise():
    w, row = gaussian(6, 300), gaussian(6, 320, group_size=-1)
    errors = {
        "index both": message(ValueError, lambda: w[torch.tensor([0]), torch.tensor([0])]),
        "index columns": message(ValueError, lambda: w[:, torch.tensor([0])]),
        "index t": message(ValueError, lambda: w.t()[torch.tensor([0])]),
        "mask": message(ValueError, lambda: w[torch.ones(6, 300, dtype=torch.bool)]),
        "index_select": message(ValueError, lambda: w.index_select(1, torch.tensor([0]))),
        "cat with float": message(TypeError, lambda: torch.cat([w, w.dequantize()])),
        "cat of bits": message(TypeError, lambda: torch.cat([w, gaussian(6, 300, bits=8)])),
        "cat of groups": message(TypeError, lambda: torch.cat([w, gaussian(6, 300, group_size=64)])),
        "cat of dtypes": message(TypeError, lambda: torch.cat([w, w.half()])),
        "cat of a transpose": message(TypeError, lambda: torch.cat([gaussian(32, 32), gaussian(32, 32).t()])),
        "cat of widths": message(ValueError, lambda: torch.cat([w, w[:, 32:]])),
        "cat after a part group": message(ValueError, lambda: torch.cat([w, w], dim=1)),
        "cat of single groups": message(ValueError, lambda: torch.cat([row, row], dim=-1)),
        "stack of widths": message(ValueError, lambda: torch.stack([w, w[:, 32:]])),
        "stack behind": message(ValueError, lambda: torch.stack([w, w], dim=2)),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {error}" for name, error in errors.items()),
        """\
index both: cannot index 2 dim(s) of shape (6, 300) by tensors: only the first 1 can be
index columns: cannot index 2 dim(s) of shape (6, 300) by tensors: only the first 1 can be
index t: cannot index 1 dim(s) of shape (300, 6) by tensors: only the first 0 can be
mask: cannot index 2 dim(s) of shape (6, 300) by tensors: only the first 1 can be
index_select: cannot index_select along dim 1 of (6, 300): it is packed; dequantize() first
cat with float: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu') with a plain torch.float32 tensor of shape (6, 300): format and dtype must be the same
cat of bits: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(6, 300), bits=8, group_size=32, dtype=torch.float32, device='cpu'): format and dtype must be the same
cat of groups: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=64, scale_method='search', dtype=torch.float32, device='cpu'): format and dtype must be the same
cat of dtypes: cannot cat RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(6, 300), bits=4, group_size=32, scale_method='search', dtype=torch.float16, device='cpu'): format and dtype must be the same
cat of a transpose: cannot cat RTNQuantizedTensor(shape=(32, 32), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu') with RTNQuantizedTensor(shape=(32, 32), bits=4, group_size=32, scale_method='search', transposed=True, dtype=torch.float32, device='cpu'): format and dtype must be the same
cat of widths: cannot cat weights of in_features [300, 268] along dim 0; they must be the same
cat after a part group: cannot cat parts of 300 columns; all but the last must be multiples of group_size=32
cat of single groups: cannot cat along in_features with group_size=-1: every part has a scale of its own; dequantize() first
stack of widths: cannot stack weights of in_features [300, 268] along dim 0; they must be the same
stack behind: cannot stack along dim 2: the packed dims of (6, 300) must stay last""",
    )


# ----------------------------------------------------------------------------------- copy_

# Where copy_ writes: the view of a [6, 300] or [3, 4, 100] tensor.
TARGETS = {
    "whole": ((6, 300), lambda w: w),
    "narrow": ((6, 300), lambda w: w.narrow(0, 1, 3)),
    "step": ((6, 300), lambda w: w[::2]),
    "row": ((6, 300), lambda w: w[4]),
    "columns": ((6, 300), lambda w: w[:, 128:256]),
    "columns-end": ((6, 300), lambda w: w[:, 128:]),
    "block": ((6, 300), lambda w: w[2:5, 128:256]),
    "slice-of-row": ((6, 300), lambda w: w[4, 128:]),
    "t": ((6, 300), lambda w: w.t()),
    "t-block": ((6, 300), lambda w: w.t()[128:, 1:3]),
    "view": ((6, 300), lambda w: w.view(2, 3, 300)),
    "unsqueezed": ((6, 300), lambda w: w[None]),
    "chunk": ((6, 300), lambda w: w.chunk(3)[1]),
    "expert": ((3, 4, 100), lambda w: w[1]),
    "expert-rows": ((3, 4, 100), lambda w: w[1, 1:3]),
    "rows-of-experts": ((3, 4, 100), lambda w: w[:, 2:]),
    "experts-mT": ((3, 4, 100), lambda w: w.mT),
    "expert-t": ((3, 4, 100), lambda w: w[2].t()),
}


@every_format
@pytest.mark.parametrize("target", TARGETS)
def test_copy_from_float_quantizes_in_place(target, bits, group_size, dtype):
    shape, fn = TARGETS[target]
    w = gaussian(*shape, bits=bits, group_size=group_size, dtype=dtype)
    view, dense = fn(w), w.dequantize()
    new = torch.randn(view.shape)
    if group_size == -1 and view.in_features < w.in_features:
        with pytest.raises(ValueError, match="share the scale"):
            view.copy_(new)
        return
    at = [p.data_ptr() for p in (w.qdata, w.scale, view.qdata, view.scale)]
    assert view.copy_(new) is view
    assert at == [p.data_ptr() for p in (w.qdata, w.scale, view.qdata, view.scale)]
    assert_same_planes(view, requantized(view, new))
    fn(dense).copy_(requantized(view, new).dequantize())
    assert_same(w.dequantize(), dense)  # the rest is as it was


@every_width
@pytest.mark.parametrize("target", TARGETS)
def test_copy_of_quantized(target, bits):
    shape, fn = TARGETS[target]
    w = gaussian(*shape, bits=bits)
    view, dense = fn(w), w.dequantize()
    new = requantized(view, torch.randn(view.shape))
    view.copy_(new)
    assert_same_planes(view, new)
    fn(dense).copy_(new.dequantize())
    assert_same(w.dequantize(), dense)
    plain = torch.empty(view.shape, dtype=torch.bfloat16)
    plain.copy_(new)
    assert_same(plain, new.dequantize(torch.bfloat16))


@every_dtype
@pytest.mark.parametrize("from_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_method", ["absmax", "signed"])
def test_copy_converts_dtypes(dtype, from_dtype, scale_method):
    w = gaussian(6, 300, dtype=dtype, scale_method=scale_method)
    new = torch.randn(300, 6, dtype=from_dtype).t()
    w.copy_(new)
    assert_same_planes(w, RTNQuantizedTensor.from_float(new, 4, 32, scale_method, dtype))
    other = RTNQuantizedTensor.from_float(torch.randn(6, 300, dtype=from_dtype), 4, 32, scale_method)
    w.copy_(other)
    assert_same_planes(w, other.to(dtype))


def test_copy_into_a_parameter_that_layers_share():
    a, b = nn.Linear(96, 6, bias=False), nn.Linear(96, 6, bias=False)
    a.weight = b.weight = nn.Parameter(gaussian(6, 96))
    with torch.no_grad():
        a.weight.data[2:4].copy_(torch.zeros(2, 96))
    assert_same(b.weight.dequantize()[2:4], torch.zeros(2, 96))


@every_width
def test_copy_into_columns_that_share_a_scale_raises(bits):
    w = gaussian(6, 320, bits=bits, group_size=-1)
    before = w.dequantize()
    for part in (
        w[:, :64],
        w[:, 64:],
        w[2, 64:],
        w.t()[64:],
        w[2:3, 64:],
        w[:, 64:][1:][0],
        w[:, 64:].detach(),
        w.view(2, 3, 320)[1, 2, 64:],
    ):
        with pytest.raises(ValueError, match="share the scale"):
            part.copy_(torch.randn(part.shape))
    assert_same(w.dequantize(), before)
    w[:, :64].clone().copy_(new := torch.randn(6, 64))  # a copy has a scale of its own
    own = w[:, :64].to(torch.bfloat16)
    own.copy_(new)
    assert_same_planes(own, RTNQuantizedTensor.from_float(new, bits, -1, dtype=torch.bfloat16))
    w[1::2].copy_(torch.zeros(3, 320))
    w.view(2, 3, 320)[:, 0].copy_(torch.zeros(2, 320))
    assert not w.dequantize()[[0, 1, 3, 5]].any()


def test_copy_mismatches_raise():
    w = gaussian(6, 96)
    before = w.dequantize()
    errors = {
        "shape": message(ValueError, lambda: w.copy_(torch.randn(6, 64))),
        "broadcast": message(ValueError, lambda: w.copy_(torch.randn(96))),
        "quantized shape": message(ValueError, lambda: w.copy_(gaussian(5, 96))),
        "into a float shape": message(ValueError, lambda: torch.empty(6).copy_(w)),
        "bits": message(TypeError, lambda: w.copy_(gaussian(6, 96, bits=8))),
        "groups": message(TypeError, lambda: w.copy_(gaussian(6, 96, group_size=96))),
        "transposed": message(TypeError, lambda: gaussian(6, 6).copy_(gaussian(6, 6).t())),
        "double": message(TypeError, lambda: w.copy_(torch.randn(6, 96).double())),
        "integers": message(TypeError, lambda: w.copy_(torch.ones(6, 96, dtype=torch.int8))),
        "scale": message(
            ValueError, lambda: w.half().copy_(RTNQuantizedTensor.from_float(torch.full((6, 96), 1e9), 4, 32))
        ),
    }
    assert_same(w.dequantize(), before)
    assert_expected_inline(
        "\n".join(f"{name}: {error}" for name, error in errors.items()),
        """\
shape: cannot copy_ a tensor of shape (6, 64) into one of shape (6, 96)
broadcast: cannot copy_ a tensor of shape (96,) into one of shape (6, 96)
quantized shape: cannot copy_ a tensor of shape (5, 96) into one of shape (6, 96)
into a float shape: cannot copy_ a tensor of shape (6, 96) into one of shape (6,)
bits: cannot copy_ RTNQuantizedTensor(shape=(6, 96), bits=8, group_size=32, dtype=torch.float32, device='cpu') into RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu'): the formats differ; copy_ from src.dequantize() to requantize
groups: cannot copy_ RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=96, scale_method='search', dtype=torch.float32, device='cpu') into RTNQuantizedTensor(shape=(6, 96), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu'): the formats differ; copy_ from src.dequantize() to requantize
transposed: cannot copy_ RTNQuantizedTensor(shape=(6, 6), bits=4, group_size=32, scale_method='search', transposed=True, dtype=torch.float32, device='cpu') into RTNQuantizedTensor(shape=(6, 6), bits=4, group_size=32, scale_method='search', dtype=torch.float32, device='cpu'): the formats differ; copy_ from src.dequantize() to requantize
double: dtype torch.float64 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
integers: dtype torch.int8 is not supported for a quantized weight; use torch.float32, torch.bfloat16, torch.float16
scale: a scale of 1.25e+08 overflows torch.float16; keep torch.float32, or use torch.bfloat16""",
    )


@every_width
@pytest.mark.parametrize("zeroed", [lambda w: w.zero_(), lambda w: w.fill_(0)], ids=["zero_", "fill_"])
def test_zeros_in_some_rows(zeroed, bits):
    w = gaussian(6, 300, bits=bits)
    expected = w.dequantize()
    part = zeroed(w[2:4])
    expected[2:4] = 0
    assert isinstance(part, RTNQuantizedTensor)
    assert_same(w.dequantize(), expected)
    assert zeroed(w[6:]).shape == (0, 300)
