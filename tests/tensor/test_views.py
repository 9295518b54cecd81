"""Views of a quantized weight alias it."""

import pytest
import torch
from expecttest import assert_expected_inline
from quantized_weights import assert_same, every_width, gaussian, message

from rtn_tensor import RTNQuantizedTensor
from rtn_tensor.formats import FORMATS

# ----------------------------------------------------------------------------------- views

# The same function of the quantized tensor and of its dequantized one. [6, 300] with groups of 32; 300 = 9 *
# 32 + 12.
VIEWS = {
    "rows": lambda w: w[1:4],
    "rows-negative": lambda w: w[-2:],
    "rows-step": lambda w: w[1:6:2],
    "no-rows": lambda w: w[3:3],
    "rows-beyond": lambda w: w[4:99],
    "narrow-rows": lambda w: w.narrow(0, 2, 3),
    "narrow-columns": lambda w: w.narrow(1, 64, 96),
    "narrow-columns-negative-dim": lambda w: w.narrow(-1, 64, 96),
    "columns-start": lambda w: w[:, :64],
    "columns-end": lambda w: w[:, 256:],
    "columns-negative": lambda w: w[:, -12:],
    "columns-all": lambda w: w[:, 0:300],
    "no-columns": lambda w: w[:, 64:64],
    "block": lambda w: w[1:3, 32:96],
    "slice-of-slice": lambda w: w[1:, 32:][1:4, 32:][:, 64:],
    "select": lambda w: w[2],
    "select-negative": lambda w: w.select(0, -1),
    "slice-of-row": lambda w: w[2][32:],
    "split": lambda w: w.split(4),
    "split-columns": lambda w: w.split(128, dim=1),
    "split-sizes": lambda w: w.split([1, 2, 3]),
    "split-sizes-columns": lambda w: w.split_with_sizes([96, 204], dim=-1),
    "chunk": lambda w: w.chunk(4),
    "chunk-columns": lambda w: w[:, 32:288].chunk(2, dim=1),
    "tensor-split": lambda w: w.tensor_split(4),
    "unbind": lambda w: w.unbind(),
    "iterate": lambda w: tuple(w),
    "view": lambda w: w.view(2, 3, 300),
    "view-inferred": lambda w: w.view(-1, 2, 300),
    "view-same": lambda w: w.view(6, 300),
    "view-as": lambda w: w.view_as(w),
    "reshape": lambda w: w.reshape(3, -1, 300),
    "flatten": lambda w: w.view(2, 3, 300).flatten(0, 1),
    "unflatten": lambda w: w.unflatten(0, (3, 2)),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "unsqueeze-1": lambda w: w.unsqueeze(1),
    "unsqueeze-none": lambda w: w[None, :, None],
    "squeeze": lambda w: w[None, 1:2].squeeze(),
    "squeeze-dim": lambda w: w[None].squeeze(0),
    "squeeze-dims": lambda w: w[None, None].squeeze((0, 1)),
    "squeeze-nothing": lambda w: w.squeeze(0),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose-twice": lambda w: w.t().t(),
    "transpose-with-itself": lambda w: w.transpose(1, 1),
    "permute": lambda w: w.permute(1, 0),
    "permute-nothing": lambda w: w.permute(0, -1),
    "t-of-row": lambda w: w[0].t(),
    "t-rows": lambda w: w.t()[32:96],
    "t-columns": lambda w: w.t()[:, 1:5:2],
    "t-select": lambda w: w.t()[:, 2],
    "t-split": lambda w: w.t().split(128),
    "t-split-columns": lambda w: w.t().split(4, dim=1),
    "t-unbind": lambda w: w.t().unbind(1),
    "t-unsqueeze": lambda w: w.t().unsqueeze(0),
    "t-view-same": lambda w: w.t().view(300, 6),
    "detach": lambda w: w.detach(),
    "alias": lambda w: torch.ops.aten.alias(w),
    "data": lambda w: w.data,
}

# [3, 4, 100]
VIEWS_3D = {
    "expert": lambda w: w[1],
    "experts": lambda w: w[1:],
    "select-rows": lambda w: w[:, 2],
    "select-rows-dim": lambda w: w.select(-2, 1),
    "block": lambda w: w[1:, 1:3, 32:],
    "ellipsis": lambda w: w[..., 64:],
    "unbind": lambda w: w.unbind(0),
    "unbind-rows": lambda w: w.unbind(1),
    "chunk-rows": lambda w: w.chunk(2, dim=-2),
    "flatten": lambda w: w.flatten(0, 1),
    "reshape": lambda w: w.reshape(-1, 100),
    "view": lambda w: w.view(3, 2, 2, 100),
    "mT": lambda w: w.mT,
    "mT-twice": lambda w: w.mT.transpose(-2, -1),
    "mT-expert": lambda w: w.mT[2],
    "mT-expert-slice": lambda w: w.mT[2, 32:],
    "mT-narrow": lambda w: w.mT.narrow(1, 32, 32),
    "mT-columns": lambda w: w.mT[..., 1:],
    "mT-select": lambda w: w.mT.select(2, 3),
    "mT-chunk": lambda w: w.mT.chunk(2, dim=2),
    "mT-unsqueeze": lambda w: w.mT.unsqueeze(1),
    "mT-squeeze": lambda w: w.mT[:1].squeeze(0),
    "swap-leading": lambda w: w.transpose(0, 1),
    "movedim": lambda w: w.movedim(1, 0),
    "permute-both": lambda w: w.view(3, 2, 2, 100).permute(1, 0, 3, 2),
    "permute-leading": lambda w: w.permute(1, 0, 2),
    "permute-mT": lambda w: w.mT.permute(0, 2, 1),
}


def parts(result):
    return result if isinstance(result, tuple) else (result,)


def check_view(w, fn):
    dense = w.dequantize()
    for part, expected in zip(parts(fn(w)), parts(fn(dense)), strict=True):
        assert isinstance(part, RTNQuantizedTensor)
        assert_same(part.dequantize(), expected)
        part.qdata.zero_()
        if part.zero is not None:
            part.zero.zero_()
        expected.zero_()
    # Written through the parts, so they alias, and nothing else was touched.
    assert_same(w.dequantize(), dense)


@pytest.mark.parametrize("inference", [False, True])
@every_width
@pytest.mark.parametrize("view", VIEWS)
def test_view(view, bits, inference):
    w = gaussian(6, 300, bits=bits)
    with torch.inference_mode(inference):
        check_view(w, VIEWS[view])


@every_width
@pytest.mark.parametrize("view", [view for view in VIEWS if "column" not in view and "slice" not in view])
@pytest.mark.parametrize("group_size", [64, -1])
def test_view_of_larger_groups(view, bits, group_size):
    cuts = {
        "block": lambda w: w[1:3, 64:128],
        "t-rows": lambda w: w.t()[64:128],
        "t-split": lambda w: w.t().split(128),
    }
    check_view(gaussian(6, 300, bits=bits, group_size=group_size), cuts.get(view, VIEWS[view]))


@pytest.mark.parametrize("inference", [False, True])
@every_width
@pytest.mark.parametrize("view", VIEWS_3D)
def test_view_3d(view, bits, inference):
    w = gaussian(3, 4, 100, bits=bits, dtype=torch.bfloat16)
    with torch.inference_mode(inference):
        check_view(w, VIEWS_3D[view])


@every_width
@pytest.mark.parametrize("k", [32, 96, 100, 576])
def test_every_cut_of_the_columns_at_a_multiple(bits, k):
    for start in range(0, k, 32):
        for end in [*range(start + 32, k, 32), k]:
            check_view(gaussian(3, k, bits=bits), lambda w, start=start, end=end: w[:, start:end])


@every_width
def test_one_group_a_row_cuts_at_chunks_and_shares_the_scale(bits):
    w = gaussian(3, 100, bits=bits, group_size=-1)
    chunk = FORMATS[bits].chunk
    part = w[:, chunk : 3 * chunk]
    assert part.scale.data_ptr() == w.scale.data_ptr()
    check_view(w, lambda w: w[:, chunk : 3 * chunk])
    check_view(w, lambda w: w[:, chunk:])
    with pytest.raises(ValueError, match=f"must be multiples of {chunk},"):
        w[:, : chunk + 8]


@pytest.mark.parametrize("view", ["rows", "columns-end", "t", "select", "unsqueeze", "rows-step"])
def test_a_view_writes_and_reads_through(view):
    w = gaussian(6, 300)
    v = VIEWS[view](w)
    assert v.qdata.untyped_storage().data_ptr() == w.qdata.untyped_storage().data_ptr()
    assert v.scale.untyped_storage().data_ptr() == w.scale.untyped_storage().data_ptr()
    w.copy_(torch.randn(6, 300))
    assert_same(v.dequantize(), VIEWS[view](w.dequantize()))


@pytest.mark.parametrize(
    "flatten", [lambda w: w.view(-1), lambda w: w.reshape(-1), torch.flatten, torch.ravel], ids="vrfr"
)
@pytest.mark.parametrize("shape", [(6, 300), (2, 6, 64)])
def test_a_weight_cannot_be_flattened(shape, flatten):
    with pytest.raises(ValueError, match="a view keeps the packed last dim"):
        flatten(gaussian(*shape))
    assert flatten(gaussian(64)).shape == (64,)


@pytest.mark.parametrize("bits", [4, 8])
def test_misaligned_cuts_raise(bits):
    w = gaussian(6, 300, bits=bits, group_size=64)
    row = gaussian(6, 300, bits=bits, group_size=-1)
    named = gaussian(6, 300, bits=bits)
    named.fqn = "layers.3.mlp.down_proj.weight"
    errors = {
        "slice": message(ValueError, lambda: named[:, 16:144]),
        "slice to the middle": message(ValueError, lambda: w[:, :32]),
        "one past": message(ValueError, lambda: w[:, 65:]),
        "step": message(ValueError, lambda: w[:, ::2]),
        "narrow": message(ValueError, lambda: w.narrow(1, 0, 299)),
        "t": message(ValueError, lambda: w.t()[10:]),
        "split": message(ValueError, lambda: w.split(100, dim=1)),
        "split sizes": message(ValueError, lambda: w.split([64, 64], dim=1)),
        "chunk": message(ValueError, lambda: w.chunk(2, dim=1)),
        "one group": message(ValueError, lambda: row[:, 8:]),
        "select": message(ValueError, lambda: w[:, 0]),
        "unbind": message(ValueError, lambda: w.unbind(1)),
    }
    errors = "\n".join(f"{name}: {error}" for name, error in errors.items())
    if bits == 4:
        assert_expected_inline(
            errors,
            """\
slice: layers.3.mlp.down_proj.weight: cannot slice columns 16:144; with bits=4 and group_size=32 cuts must be multiples of 32, or at the end, 300
slice to the middle: cannot slice columns 0:32; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
one past: cannot slice columns 65:300; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
step: cannot slice columns 0:300:2; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
narrow: cannot slice columns 0:299; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
t: cannot slice columns 10:300; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
split: cannot slice columns 0:100; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
split sizes: split sizes [64, 64] do not add up to 300, the size of dim 1
chunk: cannot slice columns 0:150; with bits=4 and group_size=64 cuts must be multiples of 64, or at the end, 300
one group: cannot slice columns 8:300; with bits=4 and group_size=-1 cuts must be multiples of 32, or at the end, 300
select: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()
unbind: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()""",
        )
    else:
        assert_expected_inline(
            errors,
            """\
slice: layers.3.mlp.down_proj.weight: cannot slice columns 16:144; with bits=8 and group_size=32 cuts must be multiples of 32, or at the end, 300
slice to the middle: cannot slice columns 0:32; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
one past: cannot slice columns 65:300; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
step: cannot slice columns 0:300:2; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
narrow: cannot slice columns 0:299; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
t: cannot slice columns 10:300; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
split: cannot slice columns 0:100; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
split sizes: split sizes [64, 64] do not add up to 300, the size of dim 1
chunk: cannot slice columns 0:150; with bits=8 and group_size=64 cuts must be multiples of 64, or at the end, 300
one group: cannot slice columns 8:300; with bits=8 and group_size=-1 cuts must be multiples of 16, or at the end, 300
select: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()
unbind: cannot select along dim 1: one column of a packed weight is no tensor; slice whole groups, or dequantize()""",
        )


def test_impossible_reshapes_raise():
    w, experts = gaussian(6, 300), gaussian(3, 4, 100)
    errors = {
        "view": message(ValueError, lambda: w.view(12, 150)),
        "view of another size": message(ValueError, lambda: w.view(7, 300)),
        "flatten": message(ValueError, lambda: w.flatten()),
        "view of t": message(ValueError, lambda: w.t().view(3, 100, 6)),
        "unsqueeze": message(ValueError, lambda: w.unsqueeze(-1)),
        "unsqueeze of t": message(ValueError, lambda: w.t().unsqueeze(1)),
        "squeeze": message(ValueError, lambda: gaussian(6, 1).squeeze()),
        "squeeze of t": message(ValueError, lambda: gaussian(1, 300).t().squeeze(1)),
        "permute": message(ValueError, lambda: experts.permute(2, 0, 1)),
        "transpose": message(ValueError, lambda: experts.transpose(0, 2)),
        "dim": message(IndexError, lambda: w.narrow(2, 0, 1)),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {error}" for name, error in errors.items()),
        """\
view: cannot view shape (6, 300) as (12, 150); a view keeps the packed last dim, in_features=300
view of another size: cannot view shape (6, 300) as (7, 300); a view keeps the packed last dim, in_features=300
flatten: cannot view shape (6, 300) as (1800,); a view keeps the packed last dim, in_features=300
view of t: cannot view shape (300, 6) as (3, 100, 6); a view keeps the packed last dim, in_features=300
unsqueeze: cannot unsqueeze at dim -1: the last 1 dim(s) of (6, 300) must stay last
unsqueeze of t: cannot unsqueeze at dim 1: the last 2 dim(s) of (300, 6) must stay last
squeeze: cannot squeeze dim(s) [1] of shape (6, 1): only the first 1 dim(s) may go
squeeze of t: cannot squeeze dim(s) [1] of shape (300, 1): only the first 0 dim(s) may go
permute: cannot permute (3, 4, 100) to (2, 0, 1): the last two dims may swap, and the others among themselves
transpose: cannot permute (3, 4, 100) to (2, 1, 0): the last two dims may swap, and the others among themselves
dim: Dimension out of range (expected to be in range of [-2, 1], but got 2)""",
    )
