"""Inputs that are not what they seem to be: views that negate, zeros that were never written, other layouts,
no memory, other dtypes.

Each gives what a plain tensor of the same numbers gives, or one sentence, for every argument that a user
hands in.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtn_tensor import RTNQuantizedTensor
from rtn_tensor.ops import tracing

NAME = "layers.0.weight"


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> RTNQuantizedTensor:
    w = RTNQuantizedTensor.from_float(
        torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype), 4, 32
    )
    w.fqn = NAME  # type: ignore[attr-defined]
    return w


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def overlapping(*shape: int) -> Tensor:
    return numbers(sum(shape)).as_strided(shape, (1,) * len(shape))


class Named(Tensor):
    """Of the kind that brings no behaviour of its own."""


VIEWS = {
    "negated": lambda *shape: torch._neg_view(numbers(*shape)),
    "imaginary part": lambda *shape: torch.complex(numbers(*shape), numbers(*shape)).conj().imag,
    "zeros": lambda *shape: torch._efficientzerotensor(shape),
    "one row": lambda *shape: numbers(shape[-1]).expand(shape),
    "one column": lambda *shape: numbers(*shape)[..., :1].expand(shape),
    "overlapping": overlapping,
    "every other": lambda *shape: numbers(*shape[:-1], 2 * shape[-1])[..., ::2],
    "transposed": lambda *shape: numbers(*reversed(shape)).permute(*reversed(range(len(shape)))),
    "reversed": lambda *shape: numbers(*shape).flip(-1),
    "subclass": lambda *shape: numbers(*shape).as_subclass(Named),
    "parameter": lambda *shape: torch.nn.Parameter(numbers(*shape)),
}


def plain(t: Tensor) -> Tensor:
    return torch.empty(t.shape).copy_(t.detach().as_subclass(Tensor))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_views_give_what_their_numbers_give(view: str, mode):
    make = VIEWS[view]
    w, experts = weight(64, 96), weight(2, 64, 96)
    offs = torch.tensor([1, 5], dtype=torch.int32)
    x, bias, w_float = make(5, 96), make(64), make(64, 96)
    x_plain, bias_plain, w_plain = plain(x), plain(bias), plain(w_float)
    with mode():
        pairs = [
            (F.linear(x, w), F.linear(x_plain, w)),
            (F.linear(x_plain, w, bias), F.linear(x_plain, w, bias_plain)),
            (x @ w.t(), x_plain @ w.t()),
            (x[:, :64] @ w, x_plain[:, :64].contiguous() @ w),
            (w @ x.t(), w @ x_plain.t()),
            (torch.addmm(bias, x, w.t()), torch.addmm(bias_plain, x_plain, w.t())),
            (
                torch.bmm(torch.stack([x, x]), experts.mT),
                torch.bmm(torch.stack([x_plain, x_plain]), experts.mT),
            ),
            (F.grouped_mm(x, experts.mT, offs=offs), F.grouped_mm(x_plain, experts.mT, offs=offs)),
            (torch.ops.rtn.linear(x, w.qdata, w.scale, bias, 4, 32), F.linear(x_plain, w, bias_plain)),
            (torch.ops.rtn.linear_dx(bias[None], w.qdata, w.scale, 4, 32, 96), bias_plain[None] @ w),
            (
                RTNQuantizedTensor.from_float(w_float, 4, 32).dequantize(),
                RTNQuantizedTensor.from_float(w_plain, 4, 32).dequantize(),
            ),
            (weight(64, 96).copy_(w_float).dequantize(), weight(64, 96).copy_(w_plain).dequantize()),
        ]
    for i, (got, expected) in enumerate(pairs):
        assert torch.equal(got.as_subclass(Tensor), expected), i


# torch.compile loses a negation of a dense input, too.
@pytest.mark.parametrize("view", ["zeros", "every other", "one row"])
def test_views_in_a_compiled_function(view: str):
    w, x = weight(64, 96), VIEWS[view](5, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(F.linear)(x, w), F.linear(plain(x), w))


def test_indices_that_are_views():
    w, experts, x, i = weight(64, 96), weight(2, 64, 96), numbers(5, 96), torch.tensor([2, 0])
    for indices in (torch._neg_view(-i), i.int(), torch.stack([i, i + 9], 1)[:, 0], torch.ops.aten.alias(i)):
        assert torch.equal(F.embedding(indices, w), w.dequantize()[i])
    zeros = torch._efficientzerotensor((3,), dtype=torch.int64)
    assert torch.equal(F.embedding(zeros, w), w.dequantize()[[0, 0, 0]])
    offs = torch.tensor([1, 5], dtype=torch.int32)
    expected = F.grouped_mm(x, experts.mT, offs=offs)
    for same in (torch._neg_view(-offs), offs.long(), torch.tensor([1, 9, 5, 9], dtype=torch.int32)[::2]):
        assert torch.equal(F.grouped_mm(x, experts.mT, offs=same), expected)
    assert not F.grouped_mm(x, experts.mT, offs=torch._efficientzerotensor((2,), dtype=torch.int32)).any()


UNFIT = {
    "coo": (
        lambda t: t.to_sparse(),
        r"is of torch\.sparse_coo, where a dense tensor is needed; use " r"\.to_dense\(\)",
    ),
    "csr": (lambda t: t.to_sparse_csr(), r"is of torch\.sparse_csr"),
    "mkldnn": (lambda t: t.to_mkldnn(), r"is of torch\._mkldnn"),
    "qint8": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        r"is of torch's own torch\.qint8.*\.dequantize\(\)",
    ),
    "nested": (
        lambda t: torch.nested.nested_tensor([t[:1], t[1:]]),
        "a nested tensor, where a dense one is needed",
    ),
    "complex": (lambda t: t.to(torch.complex64), r"torch\.complex64"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.filterwarnings("ignore")  # torch on its own layouts
def test_unfit_inputs_are_named(kind: str, grad: bool):
    make, message = UNFIT[kind]
    w, x = weight(64, 96), make(numbers(5, 96))
    if grad and kind not in ("qint8", "nested"):
        x.requires_grad_()
    for call in (
        lambda: F.linear(x, w),
        lambda: x @ w.t(),
        lambda: w.copy_(make(numbers(64, 96))),
        lambda: RTNQuantizedTensor.from_float(x, 4, 32),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    with pytest.raises(TypeError, match=f"{NAME}: x is"):
        F.linear(x, w)


def test_unfit_bias():
    w, x = weight(64, 96), numbers(5, 96)
    for bias, message in (
        (numbers(64).to_sparse(), "bias is of torch.sparse_coo"),
        (numbers(64).cfloat(), f"{NAME}: bias is torch.complex64"),
    ):
        with pytest.raises(TypeError, match=message):
            F.linear(x, w, bias)


@pytest.mark.parametrize("grad", [False, True])
def test_memory_that_was_given_back(grad: bool):
    w, x, bias = weight(64, 96), numbers(5, 96), numbers(64)
    with torch.set_grad_enabled(grad):
        for name, call in {
            "x": lambda: F.linear(freed(x).requires_grad_(grad), w),
            "bias": lambda: F.linear(x, w, freed(bias).requires_grad_(grad)),
            "w": lambda: RTNQuantizedTensor.from_float(freed(numbers(64, 96)), 4, 32),
            "indices": lambda: F.embedding(freed(torch.tensor([1])), w),
            "qdata": lambda: torch.ops.rtn.linear(x, freed(w.qdata), w.scale, None, 4, 32),
            "scale": lambda: torch.ops.rtn.dequantize(w.qdata, freed(w.scale), 4, 32, 96, torch.float32),
        }.items():
            with pytest.raises((ValueError, RuntimeError), match=f"the memory of {name} was given back"):
                call()


def test_meta_beside_a_weight_with_numbers():
    w, x = weight(64, 96), numbers(5, 96)
    for call in (
        lambda: F.linear(x.to("meta"), w),
        lambda: F.linear(x, w, torch.empty(64, device="meta")),
        lambda: F.linear(x, w.to("meta")),
        lambda: F.embedding(torch.tensor([1], device="meta"), w),
        lambda: F.grouped_mm(
            x, weight(2, 64, 96).mT, offs=torch.tensor([1, 5], dtype=torch.int32, device="meta")
        ),
        lambda: w.copy_(torch.empty(64, 96, device="meta")),
    ):
        with pytest.raises(ValueError, match=f"{NAME}: .*on meta, where tensors have no numbers"):
            call()


INDICES = {
    "float": (torch.tensor([1.0]), r"is torch\.float32; it must be torch\.int64 or torch\.int32"),
    "bool": (torch.tensor([True]), r"is torch\.bool"),
    "uint8": (torch.tensor([1], dtype=torch.uint8), r"is torch\.uint8"),
    "complex": (torch.tensor([1j]), r"torch\.complex64"),
    "list": ([1], "is a list; give a tensor"),
    "none": (None, "is a NoneType"),
    "sparse": (torch.eye(3).long().to_sparse(), r"is of torch\.sparse_coo"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_what_is_no_index(kind: str):
    indices, message = INDICES[kind]
    with pytest.raises(TypeError, match=f"{NAME}: input .*{message}|{NAME}: input {message}"):
        F.embedding(indices, weight(64, 96))


def test_embedding_out_of_range_names_the_weight():
    with pytest.raises(
        IndexError, match=f"{NAME}: embedding index 64 is out of range: the weight has 64 rows"
    ):
        F.embedding(torch.tensor([64]), weight(64, 96))
    with pytest.raises(ValueError, match=f"{NAME}: padding_idx=64 is out of range"):
        F.embedding(torch.tensor([0]), weight(64, 96), padding_idx=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64])
def test_autocast_casts_what_torch_casts(dtype: torch.dtype):
    """The dense weight refuses these under autocast, too."""
    w, dense = weight(64, 96), numbers(64, 96)
    x = (10 * numbers(5, 96)).to(dtype)
    bias = (10 * numbers(64)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for operands in ((x,), (numbers(5, 96), bias)):
            with pytest.raises(RuntimeError):
                F.linear(operands[0], dense, *operands[1:])
            with pytest.raises(TypeError, match=f"{NAME}: (x|bias) is {dtype}"):
                F.linear(operands[0], w, *operands[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_autocast_casts_other_floats(dtype: torch.dtype):
    w, x = weight(64, 96), numbers(5, 96).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(x, w)
    assert torch.equal(y, F.linear(x.bfloat16(), w.to(torch.bfloat16)).to(y.dtype)) or torch.allclose(
        y.float(), F.linear(x.float(), w.dequantize()), atol=0.1, rtol=0.02
    )
    assert y.dtype == torch.bfloat16


def test_copy_into_other_dtypes():
    w = weight(4, 32)
    for dtype in (torch.float64, torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn):
        expected = torch.empty(4, 32, dtype=dtype).copy_(w.dequantize())
        got = torch.empty(4, 32, dtype=dtype).copy_(w)
        assert torch.equal(
            got.float() if dtype == torch.float8_e4m3fn else got,
            expected.float() if dtype == torch.float8_e4m3fn else expected,
        )
    negated = torch._neg_view(torch.zeros(4, 32))
    assert torch.equal(negated.copy_(w).resolve_neg(), w.dequantize())


def test_plain_tensors_take_the_short_way():
    x = numbers(5, 96)
    with torch.inference_mode():
        inference = numbers(5, 96)
    for t in (x, inference, torch.nn.Parameter(x), torch.nn.Buffer(x), x.t(), x[::2], x.long()):
        assert not tracing(t)
    for special in (
        torch._neg_view(x),
        torch._efficientzerotensor((2,)),
        x.to_sparse(),
        x.to_mkldnn(),
        x.to("meta"),
    ):
        assert tracing(special)
