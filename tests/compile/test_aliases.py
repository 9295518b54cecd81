"""Views of a quantized weight: the numbers they show, `as_strided` from those numbers, and through
torch.compile, which keeps nothing else of a view of its input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtn_tensor import RTNQuantizedTensor

MODES = pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weight(*shape, bits=4, group_size=32):
    return RTNQuantizedTensor.from_float(torch.randn(shape), bits, group_size)


def listed(out):
    return list(out) if isinstance(out, (tuple, list)) else [out]


def dense(out):
    return [t.dequantize() if isinstance(t, RTNQuantizedTensor) else t for t in listed(out)]


def same(got, expected):
    got, expected = dense(got), dense(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Of w [6, 128] and of experts [3, 6, 128].
VIEWS = {
    "rows": lambda w: w[2:],
    "no-rows": lambda w: w[6:],
    "step": lambda w: w[1::2],
    "row": lambda w: w[4],
    "columns": lambda w: w[:, 64:],
    "first-columns": lambda w: w[:, :64],
    "both": lambda w: w[2:4, :64],
    "one-row-of-columns": lambda w: w[3:4, 64:],
    "columns-of-a-row": lambda w: w[3, 64:],
    "t": lambda w: w.t(),
    "rows-of-t": lambda w: w.t()[64:, 2:],
    "chunk": lambda w: w.chunk(3),
    "split": lambda w: w.split([1, 2, 3]),
    "unbind": lambda w: w[3:].unbind(),
    "again": lambda w: w[1:][1:][::3],
    "view": lambda w: w[2:].view(2, 2, -1),
    "unsqueeze": lambda w: w[2:].unsqueeze(0),
    "expand": lambda w: w[2:].expand(3, -1, -1),
    "detach": lambda w: w[2:].detach(),
    "itself": lambda w: w.view(w.shape),
}
EXPERTS = {
    "select": lambda w: w[1],
    "rows": lambda w: w[1:, 2:],
    "same-row": lambda w: w[:, 4],
    "mT": lambda w: w[:, 2:].mT,
    "permute": lambda w: w.permute(1, 0, 2)[3:],
    "merge": lambda w: w.view(-1, w.shape[-1])[7:],
    "columns": lambda w: w[1:, :, 64:],
}
ALL = [((6, 128), fn) for fn in VIEWS.values()] + [((3, 6, 128), fn) for fn in EXPERTS.values()]
every_view = pytest.mark.parametrize(
    ("shape", "view"), ALL, ids=[*VIEWS, *(f"experts-{name}" for name in EXPERTS)]
)


# --------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (4, -1)])
@every_view
def test_a_view_shows_the_numbers_of_a_plain_one(shape, view, bits, group_size):
    w, plain = weight(*shape, bits=bits, group_size=group_size), torch.empty(shape)
    for a, b in zip(listed(view(w)), listed(view(plain)), strict=True):
        assert (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


@pytest.mark.parametrize("k", [128, 100])
@pytest.mark.parametrize("root", [False, True])
@every_view
def test_as_strided_finds_a_view_by_its_numbers(shape, view, k, root):
    w = weight(*shape[:-1], k)
    if root:  # the planes begin in the middle of a storage, as those of a file do
        w = torch.cat([w, w, w])[2:].narrow(0, 1, shape[0])
    for v in listed(view(w)):
        again = w.as_strided(v.shape, v.stride(), v.storage_offset())
        assert (again.shape, again.stride(), again.transposed) == (v.shape, v.stride(), v.transposed)
        assert torch.equal(again, v)
        if v.numel():
            assert again.qdata.data_ptr() == v.qdata.data_ptr()
            assert again.scale.data_ptr() == v.scale.data_ptr()


def test_as_strided_of_views():
    w = weight(6, 128)
    for base in (w[2:], w[:, 64:], w.t(), w[3], w[::2], w[2:].t()):
        assert torch.equal(base.as_strided(base.shape, base.stride(), base.storage_offset()), base)
        assert torch.equal(base.as_strided(base.shape, base.stride()), base)
    assert torch.equal(w[2:].as_strided((2, 64), (128, 1), 3 * 128 + 64), w[3:5, 64:])
    assert torch.equal(w[:, 32:].as_strided((2, 64), (256, 1), 3 * 128 + 64), w[3::2, 64:])


BAD = {
    "past-the-end": ((6, 128), (128, 1), 128),
    "before": ((4, 128), (128, 1), 0),
    "across-rows": ((2, 128), (128, 1), 3 * 128 + 64),
    "half-a-group": ((2, 32), (128, 1), 2 * 128 + 16),
    "cut-group": ((2, 48), (128, 1), 2 * 128),
    "columns-step": ((2, 32), (128, 2), 2 * 128),
    "diagonal": ((2, 32), (160, 1), 2 * 128),
    "flat": ((256,), (1,), 2 * 128),
    "overlap": ((2, 64), (64, 1), 2 * 128),
    "odd-offset": ((2, 64), (128, 1), 2 * 128 + 1),
    "odd-stride": ((2, 64), (129, 1), 2 * 128),
    "no-dims": ((), (), 2 * 128),
}


@pytest.mark.parametrize("case", BAD)
def test_as_strided_refuses_what_is_no_view(case):
    w = weight(6, 128)[2:]
    w.fqn = "layer.weight"
    with pytest.raises(ValueError, match=r"layer.weight: as_strided gives rows and whole groups of columns"):
        w.as_strided(*BAD[case])


def test_as_strided_knows_a_shared_scale():
    w = weight(6, 128, group_size=-1)
    part = w.as_strided((6, 64), (128, 1), 64)
    assert torch.equal(part.dequantize(), w.dequantize()[:, 64:])
    with pytest.raises(ValueError, match="share the scale"):
        part.copy_(torch.randn(6, 64))


# ---------------------------------------------------------------------- through a compiler


@pytest.mark.parametrize("dynamic", [None, True])
@every_view
def test_a_compiled_function_gives_the_view(shape, view, dynamic):
    w = weight(*shape)
    out, expected = torch.compile(view, backend="aot_eager", dynamic=dynamic)(w), view(w)
    same(out, expected)
    for a, b in zip(listed(out), listed(expected), strict=True):
        assert a.qdata.data_ptr() == b.qdata.data_ptr()
        assert a.scale.data_ptr() == b.scale.data_ptr()


@pytest.mark.parametrize("k", [100, 96])
def test_of_a_padded_width_and_of_an_argument_that_is_a_view(k):
    def fn(w):
        return w[2:], w[:, 64:], w.t(), w[1]

    for w in (
        weight(6, k),
        weight(9, k)[3:],
        weight(6, 160)[:, 64:],
        weight(2, 6, k)[1],
        weight(6, 2, k).transpose(0, 1)[1],
    ):
        torch._dynamo.reset()
        same(torch.compile(fn, backend="aot_eager")(w), fn(w))


def test_under_inductor():
    def fn(w, experts):
        return w[2:], w.chunk(3), w[:, 64:].t(), experts[1, 2:], experts.mT[2]

    def flat(w, experts):
        return [t for part in fn(w, experts) for t in listed(part)]

    w, experts = weight(6, 128), weight(3, 6, 128, bits=8)
    same(torch.compile(flat)(w, experts), flat(w, experts))


def fused(w, x):
    q, k, v = w.chunk(3)
    torch._dynamo.graph_break()
    return F.linear(x, q), F.linear(x, k), F.linear(x, v)


def rows_of_t(w, x):
    t = w[4:].t()
    torch._dynamo.graph_break()
    return x @ t


def columns(w, x):
    part = w[:, 64:]
    torch._dynamo.graph_break()
    return F.linear(x[:, 64:], part)


def intermediate(w, x):
    copy = w.clone()
    return copy[2:], copy, F.linear(x, copy[:2])


@pytest.mark.parametrize("dynamic", [None, True])
@MODES
@pytest.mark.parametrize("fn", [fused, rows_of_t, columns, intermediate], ids=lambda fn: fn.__name__)
def test_a_graph_break_between_a_slice_and_its_use(fn, mode, dynamic):
    w, x = weight(6, 128), torch.randn(2, 128)
    with mode():
        same(torch.compile(fn, backend="aot_eager", dynamic=dynamic)(w, x), fn(w, x))


def test_experts_of_a_module_with_a_graph_break():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight(3, 6, 128), requires_grad=False)

        def forward(self, x):
            parts = [self.weight[i] for i in range(3)]
            torch._dynamo.graph_break()
            return torch.stack([F.linear(x, part) for part in parts])

    model, x = Experts(), torch.randn(2, 128)
    same(torch.compile(model, backend="aot_eager")(x), model(x))


def through_a_slice(w, new):
    w[2:].copy_(new[2:])
    return F.linear(new, w)


def through_a_returned_slice(w, new):
    part = w[2:]
    part.copy_(new[2:])
    return part, F.linear(new, w)


def through_a_slice_of_another_graph(w, new):
    part = w[2:]
    torch._dynamo.graph_break()
    part.copy_(new[2:])
    torch._dynamo.graph_break()
    return F.linear(new, w)


def between_slices(w, new):
    w[:2].copy_(w[2:4])
    return F.linear(new, w)


def into_columns(w, new):
    w[:, 64:].copy_(new[:, 64:])
    return F.linear(new, w)


@MODES
@pytest.mark.parametrize(
    "fn",
    [
        through_a_slice,
        through_a_returned_slice,
        through_a_slice_of_another_graph,
        between_slices,
        into_columns,
    ],
    ids=lambda fn: fn.__name__,
)
def test_a_write_through_an_alias(fn, mode):
    new = torch.randn(6, 128)
    w = weight(6, 128)
    twin = w.clone()
    with mode():
        same(torch.compile(fn, backend="aot_eager")(w, new), fn(twin, new))
    assert torch.equal(w, twin)


def test_two_arguments_that_alias():
    def fn(w, part):
        return F.linear(torch.ones(1, 128), w), part[1:]

    w = weight(6, 128)
    same(torch.compile(fn, backend="aot_eager")(w, w[2:]), fn(w, w[2:]))

    def write(w, part):
        part.copy_(torch.ones(part.shape))
        return F.linear(torch.ones(1, 128), w)

    before = w.clone()
    with pytest.raises(Exception, match="several views of one quantized weight as arguments"):
        torch.compile(write, backend="aot_eager")(w, w[2:])
    assert torch.equal(w, before)
