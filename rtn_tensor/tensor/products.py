"""Products with a quantized weight: each checks its operands, and ends in an op."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rtn_tensor import _torch, ops, registration
from rtn_tensor._torch import tree_leaves
from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.tensor.errors import named_error
from rtn_tensor.tensor.quantized import RTNQuantizedTensor, aten, by_plane, on_function, on_op
from rtn_tensor.wording import with_article


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where `x` is, None where it is off."""
    device = x.device.type
    # torch refuses the question for meta.
    return (
        torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    )


def _cast_by_autocast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`t` in the dtype that autocast asks for, if it does; like torch's own it leaves float64, integers and
    complex numbers alone."""
    return t.to(dtype) if dtype and t.is_floating_point() and t.dtype is not torch.float64 else t


def _check_operand(x: Tensor, w: RTNQuantizedTensor, size: int) -> Tensor:
    """`x` as the kernel takes it: cast under autocast, else of the weight's dtype; its last dim is contracted
    with `size`."""
    if isinstance(x, RTNQuantizedTensor):
        raise named_error(
            w,
            "a quantized tensor cannot multiply a quantized tensor; call .dequantize() on the activation",
            TypeError,
        )
    if x.is_nested or x.layout is not torch.strided:
        _check_kind("x", x, w)
    if x.device != w.qdata.device:  # 0.2 us; the weight's own goes through the dispatcher, and takes 1.9
        raise _other_device("x", x, w)
    autocast = _autocast_dtype(x)
    if autocast:
        x = _cast_by_autocast(x, autocast)
    if x.dtype != (dtype := w.float_dtype or w.scale.dtype) and x.dtype != autocast:
        _check_kind("x", x, w)
        other = f" or weight.to({x.dtype})" if x.dtype in FLOAT_DTYPES else ""
        raise named_error(w, f"x is {x.dtype} but the weight is {dtype}; use x.to({dtype}){other}", TypeError)
    if (x.size(-1) if x.dim() else -1) != size:  # half the time of `shape`
        raise named_error(
            w,
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(w.shape)}: "
            f"its last dim must be {size}",
        )
    return x


def _check_kind(what: str, t: Tensor, w: RTNQuantizedTensor) -> None:
    """Raises TypeError for a tensor that is not dense, unless it is nested by a class of its own, whose
    values are."""
    if (why := registration.unfit(t)) and t.layout is not torch.jagged:
        raise named_error(w, f"{what} is {why}", TypeError)
    if t.is_complex():
        raise named_error(
            w,
            f"{what} is {t.dtype}, but a weight stands for real numbers; use it on "
            f"{what}.real and {what}.imag",
            TypeError,
        )


def _check_device(what: str, t: Tensor, w: RTNQuantizedTensor) -> None:
    if t.device != w.qdata.device:
        raise _other_device(what, t, w)


def _other_device(what: str, t: Tensor, w: RTNQuantizedTensor) -> Exception:
    device = w.qdata.device
    if t.is_meta:
        why = (
            f"{what} is on meta, where tensors have no numbers, but the weight is on {device}; "
            f"make {what} on {device}"
        )
    elif device.type == "meta":
        why = (
            f"the weight is on meta, where tensors have no numbers, but {what} is on {t.device}; "
            "load the weight first"
        )
    else:
        why = (
            f"{what} is on {t.device} but the weight is on {device}; use {what}.to('{device}') or "
            f"weight.to('{t.device}')"
        )
    return named_error(w, why)


def _check_bias(bias: Tensor, x: Tensor, w: RTNQuantizedTensor) -> Tensor:
    """`bias` in the dtype of `x`, which `_check_operand` has seen: cast under autocast, else refused if it is
    another."""
    _check_device("bias", bias, w)
    if bias.dtype != x.dtype or bias.layout is not torch.strided:
        _check_kind("bias", bias, w)
        bias = _cast_by_autocast(bias, _autocast_dtype(x))
        if bias.dtype != x.dtype:
            raise named_error(
                w, f"bias is {bias.dtype} but x is {x.dtype}; use bias.to({x.dtype})", TypeError
            )
    return bias


def _check_indices(what: str, t: Tensor, w: RTNQuantizedTensor) -> None:
    """Raises unless `t` holds int32 or int64 numbers where the weight lies."""
    if not isinstance(t, Tensor):
        raise named_error(
            w,
            f"{what} is {with_article(type(t).__name__)}; give a tensor of torch.int64 or torch.int32",
            TypeError,
        )
    _check_kind(what, t, w)
    if t.dtype not in (torch.int64, torch.int32):
        raise named_error(w, f"{what} is {t.dtype}; it must be torch.int64 or torch.int32", TypeError)
    _check_device(what, t, w)


def _project(x: Tensor, w: RTNQuantizedTensor, bias: Tensor | None, over_in_features: bool) -> Tensor:
    """x @ w'^T + bias where `over_in_features`, else x @ w' + bias, with w' `[N, K]` as the planes hold
    it."""
    qdata, scale, zero = w.qdata, w.scale, w.zero
    if qdata.dim() != 2:
        raise named_error(
            w,
            f"linear needs a 2-D weight, got shape {tuple(w.shape)}; for experts use bmm or "
            "grouped_mm, or select one",
        )
    x = _check_operand(x, w, w.in_features if over_in_features else qdata.shape[0])
    if bias is not None:
        bias = _check_bias(bias, x, w)
    if over_in_features:
        # Only a bias [N] is fused: addmm may bring one of another shape.
        fused = bias if bias is not None and bias.shape == (qdata.shape[0],) else None
        y = ops.linear(x, qdata, scale, fused, w.bits, w.group_size, zero, w.activations is not None)
        return y if bias is None or fused is bias else _plus(y, bias, w)
    y = ops.linear_dx(x, qdata, scale, w.bits, w.group_size, w.in_features, zero)
    return y if bias is None else _plus(y, bias, w)


def _plus(y: Tensor, bias: Tensor, w: RTNQuantizedTensor) -> Tensor:
    """The product `y` and `bias`, which `_check_bias` has seen."""
    fits = bias.dim() <= y.dim() and all(
        b in (1, n) for b, n in zip(reversed(bias.shape), reversed(y.shape), strict=False)
    )
    if not fits:
        raise named_error(
            w,
            f"bias of shape {tuple(bias.shape)} does not fit a product of shape {tuple(y.shape)}; it must be "
            f"[{y.shape[-1]}]",
            RuntimeError,  # as torch raises of a dense weight
        )
    return y + bias


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return _into(out, linear, input, weight, bias)
    if not isinstance(weight, RTNQuantizedTensor):
        raise _no_weight("linear", input=input, bias=bias)
    return _project(input, weight, bias, not weight.transposed)


def _no_weight(name: str, **operands: Tensor | None) -> Exception:
    """The error of a product that has a quantized tensor among `operands`, and none as its weight."""
    what, w = next((what, t) for what, t in operands.items() if isinstance(t, RTNQuantizedTensor))
    return named_error(
        w,
        f"{name} takes a quantized tensor as its weight only, and here it is the {what}; call .dequantize() "
        "on that",
        TypeError,
    )


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(b, RTNQuantizedTensor):
        if b.dim() == 3:
            return _bmm(a, b)
        return _project(a, b, bias, b.transposed)
    assert isinstance(a, RTNQuantizedTensor)
    if a.dim() == 3:
        return _bmm(a, b)
    if bias is not None:  # a @ b + bias, with the weight first
        y = _matmul(a, b)
        return _plus(y, _check_bias(bias, y, a), a)
    if b.dim() == 1:
        return _project(b, a, None, not a.transposed)
    return _project(b.mT, a, None, not a.transposed).mT


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not (isinstance(mat1, RTNQuantizedTensor) or isinstance(mat2, RTNQuantizedTensor)):
        raise _no_weight("addmm", input=input)
    if beta == 1 and alpha == 1:
        return _matmul(mat1, mat2, input)
    y = _matmul(mat1, mat2)
    w = mat1 if isinstance(mat1, RTNQuantizedTensor) else mat2
    assert isinstance(w, RTNQuantizedTensor)
    return alpha * y if beta == 0 else _plus(alpha * y, beta * _check_bias(input, y, w), w)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    w = b if isinstance(b, RTNQuantizedTensor) else a
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]:
        raise named_error(
            w,
            "bmm needs x [E, M, K] and a weight of E experts, or the weight first, got shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}; give x a row of experts, or select one expert",
        )
    if w is a:
        return _bmm(b.mT, a.mT).mT
    assert isinstance(b, RTNQuantizedTensor)
    experts, m = a.shape[:2]
    offs = torch.arange(1, experts + 1, dtype=torch.int32, device=a.device) * m
    return _grouped_mm(a.flatten(0, 1), b, offs).unflatten(0, (experts, m))


def _grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    a, b = mat_a, mat_b
    if not isinstance(b, RTNQuantizedTensor) or b.dim() != 3 or a.dim() != 2 or offs is None:
        raise named_error(
            b,
            "grouped_mm needs x [M, K], a quantized weight [E, K, N] and offs [E]; got shapes "
            f"{tuple(a.shape)}, {tuple(b.shape)}",
        )
    a = _check_operand(a, b, b.shape[-2])
    _check_indices("offs", offs, b)
    if b.transposed:
        int8_x = b.activations is not None
        y = ops.grouped(a, b.qdata, b.scale, offs, b.bits, b.group_size, b.zero, int8_x)
    else:
        y = ops.grouped_dx(a, b.qdata, b.scale, offs, b.bits, b.group_size, b.in_features, b.zero)
    if bias is not None:
        y = _plus(y, _check_bias(bias, y, b), b)
    return y if out_dtype is None else y.to(out_dtype)


def _embedding(
    input: Tensor,
    weight: RTNQuantizedTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not isinstance(weight, RTNQuantizedTensor):
        raise _no_weight("embedding", input=input)
    if max_norm is not None:
        raise named_error(
            weight, "embedding with max_norm rewrites the weight, which a quantized one cannot; drop max_norm"
        )
    if weight.transposed or weight.dim() != 2:
        raise named_error(weight, f"embedding needs a 2-D weight that is not transposed, got {weight!r}")
    _check_indices("input", input, weight)
    rows = weight.qdata.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise named_error(weight, f"padding_idx={padding_idx} is out of range: the weight has {rows} rows")
    if weight.float_dtype is not None:  # the op gives rows in the dtype of the scale, and so rounds twice
        return _rows(weight, input).dequantize()
    try:
        return ops.embedding(
            input,
            weight.qdata,
            weight.scale,
            weight.bits,
            weight.group_size,
            weight.in_features,
            weight.zero,
        )
    except IndexError as error:
        raise named_error(weight, str(error), IndexError) from None


def _rows(w: RTNQuantizedTensor, indices: Tensor) -> RTNQuantizedTensor:
    """The rows of a matrix that `indices [...]` name, `[..., K]`."""
    rows = len(w.qdata)
    if indices.device.type == "cpu" and indices.numel() and not _torch.tracing(indices):
        low, high = (int(n) for n in indices.aminmax())
        if low < 0 or high >= rows:
            raise named_error(
                w, f"index {low if low < 0 else high} is out of range for {rows} rows", IndexError
            )
    return by_plane(w, lambda plane: plane[indices])


def _into(out: Tensor | None, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What `product` gives, written into `out` where there is one."""
    if isinstance(out, RTNQuantizedTensor):
        raise named_error(
            out,
            "a product cannot be written into a quantized tensor by out=; copy_ it into the tensor, "
            "which quantizes",
            TypeError,
        )
    y = product(*args, **kwargs)
    if out is None:
        return y
    if out.dtype != y.dtype or (out.shape != y.shape and out.numel()):
        raise named_error(
            next((t for t in args if isinstance(t, RTNQuantizedTensor)), None),
            f"out is {out.dtype} of shape {tuple(out.shape)}, but the product is {y.dtype} of "
            f"shape {tuple(y.shape)}; make it so, or leave it out",
        )
    return out.resize_(y.shape).copy_(y)


# Caught here, above autograd and autocast: one op with its own backward, the weight's scale never cast, and 3
# us per call.
for _torch_fns, _handler in (
    ([F.linear], linear),
    ([torch.mm, Tensor.mm], lambda input, mat2, *, out=None: _into(out, _matmul, input, mat2)),
    (
        [torch.matmul, Tensor.matmul, Tensor.__matmul__],
        lambda input, other, *, out=None: _into(out, _matmul, input, other),
    ),
    ([Tensor.__rmatmul__], lambda other, input: _matmul(input, other)),
    ([torch.addmm, Tensor.addmm], lambda *args, out=None, **kwargs: _into(out, _addmm, *args, **kwargs)),
    ([torch.bmm, Tensor.bmm], lambda input, mat2, *, out=None: _into(out, _bmm, input, mat2)),
    ([_torch.old_grouped_mm, F.grouped_mm], _grouped_mm),
    ([F.embedding], _embedding),
):

    @on_function(_torch_fns)
    def call_product(func, types, args, kwargs, _handler=_handler):
        return _handler(*args, **(kwargs or {}))


@on_function(torch.einsum)
def einsum(func, types, args, kwargs):
    """torch takes it apart, and what comes of that may be a product of ours."""
    try:
        with _torch.without_overrides():
            return func(*args, **(kwargs or {}))
    except (ValueError, NotImplementedError) as error:
        w = next(t for t in tree_leaves(args) if isinstance(t, RTNQuantizedTensor))
        raise named_error(
            w,
            f"einsum({args[0]!r}) comes to more than a product with the weight; use F.linear(x, weight) or x "
            "@ weight, or give einsum "
            "weight.dequantize()",
            NotImplementedError,
        ) from error


# The same below autograd, where DTensor and C++ callers arrive.
for _aten_op, _handler in (
    (aten.linear.default, linear),
    (aten.mm.default, _matmul),
    (aten.matmul.default, _matmul),
    (aten.addmm.default, _addmm),
    (aten.bmm.default, _bmm),
    (aten._grouped_mm.default, _grouped_mm),
    (aten.embedding.default, lambda weight, indices, *args: _embedding(indices, weight)),
):

    @on_op(_aten_op)
    def call_product_below_autograd(func, types, args, kwargs, _handler=_handler):
        return _handler(*args, **kwargs)
