"""Copies and changes: what is written into a weight is quantized, and what is made like one is empty."""

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import _torch, ops, registration
from rtn_tensor._torch import return_and_correct_aliasing
from rtn_tensor.formats import FLOAT_DTYPES, SCALE8, format_of, new_planes, wide_method
from rtn_tensor.reference import round_scale, widened
from rtn_tensor.tensor.attributes import ATTRIBUTES, OPTIONAL_PLANES, PLANES
from rtn_tensor.tensor.callers import called_by
from rtn_tensor.tensor.errors import named_error, or_float
from rtn_tensor.tensor.quantized import (
    RTNQuantizedTensor,
    aten,
    by_plane,
    check_dtype,
    on_function,
    on_op,
    rebuilt,
    same_format,
)
from rtn_tensor.wording import with_article


@on_op([aten.detach.default, aten.alias.default, aten.clone.default])
def alias_or_clone_op(func, types, args, kwargs):
    # Planes are always laid out row by row, whatever memory format is asked for.
    out = by_plane(args[0], func)
    return out if func is aten.clone.default else return_and_correct_aliasing(func, args, kwargs, out)


@on_function(Tensor.contiguous)
def contiguous(func, types, args, kwargs):
    w = args[0]
    whole = all(plane.is_contiguous() for plane in w.planes.values())
    return w if whole else by_plane(w, Tensor.contiguous)


def converted_scale(w: RTNQuantizedTensor, dtype: torch.dtype) -> Tensor:
    if dtype == w.scale.dtype:
        return w.scale
    check_dtype(dtype, w)
    if (
        not _torch.tracing(w.scale)
        and not (w.scale.float().abs().nan_to_num(0.0) <= torch.finfo(dtype).max).all()
    ):
        raise named_error(
            w,
            f"a scale of {w.scale.abs().max().item():.3g} overflows {dtype}; keep "
            f"{w.scale.dtype}, or use torch.bfloat16",
        )
    return round_scale(w.scale.float(), dtype)


def with_wide_scales(t: Tensor) -> Tensor:
    """`t`; of a weight whose scales have 8 bits, the same numbers with scales in its dtype, which holds
    them all."""
    if not isinstance(t, RTNQuantizedTensor) or t.scale.dtype != SCALE8:
        return t
    planes = t.planes | {"scale": widened(t.scale).to(t.dtype)}
    return rebuilt(t, planes, scale_method=wide_method(t.scale_method), version=None, float_dtype=None)


@on_op(aten.dequantize.self)
def dequantize_op(func, types, args, kwargs):
    return args[0].dequantize()


@on_op(aten._to_copy.default)
def to_copy_op(func, types, args, kwargs):
    w = args[0]
    to = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking", "pin_memory")}
    dtype, planes = kwargs.get("dtype"), w.planes
    changed: dict[str, Any] = {}
    if w.float_dtype is None:
        planes = planes | {"scale": converted_scale(w, dtype or w.scale.dtype)}
    elif dtype is not None:  # the scales stay those that the checkpoint has
        check_dtype(dtype, w)
        changed = {"float_dtype": dtype, "version": None}
    return rebuilt(w, {name: func(plane, **to) for name, plane in planes.items()}, **changed)


@on_op(aten.copy_.default)
def copy_op(func, types, args, kwargs):
    dst, src = args[:2]
    if src.is_nested:
        raise named_error(dst, f"the tensor to copy is {registration.unfit(src)}", TypeError)
    if dst.shape != src.shape:
        raise named_error(
            dst, f"cannot copy_ a tensor of shape {tuple(src.shape)} into one of shape {tuple(dst.shape)}"
        )
    if not isinstance(dst, RTNQuantizedTensor):
        return dst.copy_(src.dequantize(dst.dtype if dst.dtype in FLOAT_DTYPES else None))
    if dst._shares_scale:
        raise named_error(
            dst,
            "cannot copy_ into some columns of a weight with group_size=-1: its other columns share the "
            "scale; copy whole rows",
        )
    if isinstance(src, RTNQuantizedTensor):
        formats = [
            (w.bits, w.group_size, w.transposed, w.scale.dtype == SCALE8, [*w.planes]) for w in (dst, src)
        ]
        if formats[0] != formats[1]:
            raise named_error(
                dst,
                f"cannot copy_ {src!r} into {dst!r}: the formats differ; copy_ from src.dequantize() to "
                "requantize",
                TypeError,
            )
        planes = src.planes | {"scale": converted_scale(src, dst.scale.dtype)}
        for name, plane in dst.planes.items():
            plane.copy_(planes[name])
    else:
        if why := registration.unfit(src):
            raise named_error(dst, f"the tensor to copy is {why}", TypeError)
        if src.is_meta and not dst.qdata.is_meta:
            raise named_error(
                dst,
                "cannot copy_ a tensor on meta, where tensors have no numbers, into one on "
                f"{dst.qdata.device}; make it there",
            )
        # Below autograd nothing else than copy_ looks at what a tensor is a view of.
        if src.is_neg() or src._is_zerotensor():
            src = torch.empty(src.shape, dtype=src.dtype, device=src.device).copy_(src)
        w = src.to(dst.qdata.device)
        check_dtype(w.dtype, dst)
        ops.quantize_(
            w.mT if dst.transposed else w,
            [*dst.planes.values()],
            dst.bits,
            dst.group_size,
            dst.scale_method,
        )
    return dst


@on_op([aten.zero_.default, aten.fill_.Scalar])
def fill_op(func, types, args, kwargs):
    """Zeros only, which are exact; loaders fill with them the rows that no token has."""
    w = args[0]
    if any(value != 0 for value in args[1:]):
        raise named_error(
            w, f"cannot fill_ a quantized weight with {args[1]}, only with 0; copy_ a float tensor into it"
        )
    return w.copy_(torch.zeros(w.shape, dtype=w.dtype, device=w.device))


@on_op(
    [
        *(aten.add_.Tensor, aten.add_.Scalar, aten.sub_.Tensor, aten.sub_.Scalar),
        *(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar),
        *(aten.addmm_.default, aten.addcmul_.default, aten.addcdiv_.default),
    ]
)
def arithmetic_op(func, types, args, kwargs):
    """In place, as where PEFT merges: the result is quantized as `copy_` does; of a number only the scale is
    a multiple."""
    w, *others = args
    name = func._schema.name.removeprefix("aten::")
    if isinstance(w, RTNQuantizedTensor) and w._shares_scale:
        raise named_error(
            w,
            f"cannot {name} some columns of a weight with group_size=-1: its other columns share the "
            "scale; take whole rows",
        )
    quantized = next((t for t in [*others, *kwargs.values()] if isinstance(t, RTNQuantizedTensor)), None)
    if quantized is not None:
        raise named_error(
            quantized,
            f"{name} does not take a quantized operand; give it .dequantize(), a plain tensor (an average of "
            "quantized weights would be "
            "rounded anew at each step: average the float ones)",
            TypeError,
        )
    if name in ("mul_", "div_") and not isinstance(others[0], Tensor) and others[0] and not kwargs:
        w.scale.copy_(round_scale(func(widened(w.scale), others[0]), w.scale.dtype))
        return w
    before = w.dequantize()
    after = func(before.clone(), *others, **kwargs)
    fresh: Any = w.clone().copy_(after)
    # What is quantized twice is another number; so rows that stay as they are keep their bits, as where an
    # optimizer adds zeros.
    changed = (after != before).any(-2 if w.transposed else -1)[..., None]
    for name, plane in w.planes.items():
        plane.copy_(torch.where(changed, fresh.planes[name], plane))
    return w


@on_op(aten.lerp_.Scalar)
def lerp_op(func, types, args, kwargs):
    w, end = args[:2]
    if not torch.equal(w, end):
        raise named_error(
            w if isinstance(w, RTNQuantizedTensor) else end,
            "an average (lerp_) of quantized weights would be rounded anew at each step; average only what "
            "is trained, or a model after "
            "dequantize_(model)",
            NotImplementedError,
        )
    return w  # the average of a frozen weight with itself, as AveragedModel has it


@on_op([aten._foreach_lerp_.Scalar, aten._foreach_copy_.default])
def foreach_op(func, types, args, kwargs):
    one = {aten._foreach_lerp_.Scalar: Tensor.lerp_, aten._foreach_copy_.default: Tensor.copy_}[func]
    for pair in zip(*args[:2], strict=True):
        one(*pair, *args[2:], **kwargs)


@on_op(aten.full_like.default)
def full_like_op(func, types, args, kwargs):
    raise named_error(
        args[0],
        "a quantized weight holds no one number everywhere; use torch.full_like(weight.dequantize(), value), "
        "and give an optimizer "
        "(Adagrad asks for it) only the parameters that require a gradient",
        NotImplementedError,
    )


@on_op([aten.empty_like.default, aten.zeros_like.default, aten.new_empty.default, aten.new_zeros.default])
def new_op(func, types, args, kwargs):
    w = args[0]
    shape = list(args[1]) if len(args) > 1 else list(w.shape)
    if w.transposed:
        if len(shape) < 2:
            raise named_error(
                w, f"cannot make a transposed tensor of shape {tuple(shape)}; it needs at least 2 dims"
            )
        shape[-2:] = shape[:-3:-1]
    dtype = kwargs.get("dtype") or w.float_dtype or w.scale.dtype
    check_dtype(dtype, w)
    scale_dtype = dtype if w.float_dtype is None else w.scale.dtype
    to = {"device": kwargs.get("device") or w.qdata.device, "pin_memory": kwargs.get("pin_memory") or False}
    factory = torch.zeros if func in (aten.zeros_like.default, aten.new_zeros.default) else torch.empty
    planes = new_planes(factory, shape, w.bits, w.group_size, scale_dtype, w.zero is not None, **to)
    new = rebuilt(w, planes, in_features=shape[-1], float_dtype=dtype, version=None)
    # FSDP2 asks for a shard with its padding, and then for the part that is no padding.
    if func == aten.new_zeros.default:
        new._padded_rows = shape[0]
    return new


@on_op(aten.equal.default)
def equal_op(func, types, args, kwargs):
    a, b = args
    if not (isinstance(a, RTNQuantizedTensor) and isinstance(b, RTNQuantizedTensor)):
        return False  # transformers asks it of a tied pair of which one is quantized
    return (
        a.shape == b.shape
        and same_format(a, b)
        and all(plane.equal(b.planes[name]) for name, plane in a.planes.items())
    )


@on_op(aten.is_pinned.default)
def is_pinned_op(func, types, args, kwargs):
    return all(plane.is_pinned() for plane in args[0].planes.values())


@on_op(aten._pin_memory.default)
def pin_memory_op(func, types, args, kwargs):
    return by_plane(args[0], Tensor.pin_memory)


@on_function(Tensor.data.__get__)  # type: ignore[attr-defined]
def get_data(func, types, args, kwargs):
    """As a method, for the reason that `mT` has."""
    return args[0].detach()


@on_function(Tensor.data.__set__)  # type: ignore[attr-defined]
def set_data(func, types, args, kwargs):
    w, new = args
    if not isinstance(new, Tensor):
        raise named_error(
            w, f"cannot set .data to {with_article(type(new).__name__)}; give a tensor", TypeError
        )
    if new.is_meta and not w.qdata.is_meta:
        raise named_error(
            w,
            "cannot set .data to a tensor on meta, where tensors have no numbers; put a new parameter in the "
            "place of this one, as module.to('meta') does",
            RuntimeError,  # as torch raises of a dense weight
        )
    if not isinstance(new, RTNQuantizedTensor):
        if new.shape != w.shape and (w.transposed or new.dim() != 2 or new.shape[1:] != w.shape[1:]):
            raise named_error(
                w,
                f"cannot set .data to a tensor of shape {tuple(new.shape)}; the weight is {tuple(w.shape)}, "
                "and only the rows of a matrix "
                "may become more or fewer",
            )
        check_dtype(new.dtype, w)
        # In planes of its own: who kept the old `.data` keeps what it held, as with a plain tensor.
        given = (new.mT if w.transposed else new).detach()
        # Scales of another dtype than the weight's keep it; those of 8 bits have no other.
        of_scale = None if w.float_dtype is None or w.scale.dtype == SCALE8 else w.scale.dtype
        fresh = type(w).empty(
            *given.shape, **format_of(w), dtype=new.dtype, device=new.device, scale_dtype=of_scale
        )
        fresh.copy_(given)
        # As transformers' resize_token_embeddings does: the rows that stay keep their bits.
        if new.shape != w.shape:
            rows = min(len(new), len(w))
            kept = (new[:rows] == w[:rows].dequantize(new.dtype)).all(-1).nonzero().flatten()
            for name, plane in fresh.planes.items():
                plane[kept] = w.planes[name][kept].to(plane.dtype)
        new = fresh.mT if w.transposed else fresh
    with _torch.without_overrides():
        func(w, new)  # size, strides, dtype and device
    for name in (*PLANES, *OPTIONAL_PLANES, *ATTRIBUTES, "_shares_scale"):
        setattr(w, name, getattr(new, name))


@on_function(_torch.can_set_data)
def can_set_data(func, types, args, kwargs):
    """`nn.Module.to` and the like ask this before they swap tensors, which they do whatever is said, and
    cannot do to a held one."""
    w, new = args
    if isinstance(w, RTNQuantizedTensor) and isinstance(new, RTNQuantizedTensor):
        weakly = bool(weakref.getweakrefs(w))
        if weakly or _torch.references(w) > 1:
            holder = "a weak reference (torch.export leaves one for good)" if weakly else "a view or a trace"
            raise named_error(
                w,
                f"torch cannot convert or move {w!r} while {holder} holds it; let go of that first, or "
                "convert a copy "
                "(copy.deepcopy(model).to(...)), or set p.data = p.data.to(...) for each parameter p, and "
                "views keep the old numbers",
                RuntimeError,
            )
    return type(w) is type(new) and w.shape == new.shape


@on_function(_torch.get_base)
def get_base(func, types, args, kwargs):
    with _torch.without_overrides():
        base = func(*args)
    if base is None and called_by("torch._functorch._aot_autograd.runtime_wrappers"):
        # There it is asked for arguments that share memory, of which the graph writes one; without a base,
        # torch gives up in a riddle.
        raise named_error(
            args[0],
            f"a compiled graph has several views of one quantized weight as arguments ({args[0]!r} is one), "
            "and writes into one of them; "
            "take the slices in the graph itself (after a graph break, again), write outside of the compiled "
            "function, or put what writes "
            "into a function under torch.compiler.disable",
            RuntimeError,
        )
    return base


@on_function(Tensor.share_memory_)
def share_memory(func, types, args, kwargs):
    for plane in args[0].planes.values():
        plane.share_memory_()
    return args[0]


@on_function(Tensor.is_shared)
def is_shared(func, types, args, kwargs):
    return all(plane.is_shared() for plane in args[0].planes.values())


@on_function(Tensor.data_ptr)
def data_ptr(func, types, args, kwargs):
    # accelerate and others tell tied weights by it, so it must be one of its own; and no address, where one
    # would read floats.
    return -args[0].qdata.data_ptr()


@on_function(Tensor.untyped_storage)
def untyped_storage(func, types, args, kwargs):
    # Which tells by it what shares memory; elsewhere `set_` would read at address 0.
    if not called_by("torch."):
        args[0].storage()
    with _torch.without_overrides():
        return func(*args)


_torch.check_before_dlpack(RTNQuantizedTensor)


@on_function(torch.norm_except_dim)
def norm_except_dim(func, types, args, kwargs):
    # No NotImplementedError, which torch's parametrizations take for a weight that has no inverse, to fail in
    # the forward.
    raise named_error(
        args[0],
        "weight_norm would train a length and a direction of a quantized weight; leave the weight float, or "
        "dequantize()",
        TypeError,
    )


@on_function([Tensor.numpy, Tensor.__array__, Tensor.tolist])
def no_array(func, types, args, kwargs):
    raise named_error(
        args[0],
        "a quantized weight is no numpy array (accelerate asks for one to offload to disk: offload to the "
        "CPU, where it takes a fraction "
        "of the float weight); use .dequantize().numpy(), or .qdata and .scale",
        TypeError,
    )


@on_op(aten.view.dtype)
def view_dtype_op(func, types, args, kwargs):
    raise named_error(
        args[0],
        f"a quantized weight has no elements to view as {args[1]} (accelerate does so to offload to disk: "
        "offload to the CPU, where it "
        "takes a fraction of the float weight); view .dequantize(), or .qdata and .scale",
        TypeError,
    )


@on_function([Tensor.requires_grad_, Tensor.requires_grad.__set__])  # type: ignore[attr-defined]
def requires_grad(func, types, args, kwargs):
    # Ignored, not refused: `nn.Parameter(w)` and `load_state_dict(assign=True)` ask for it of their own
    # accord.
    w, wanted = [*args, *kwargs.values(), True][:2]
    if wanted and called_by("peft."):
        warnings.warn(
            f"{getattr(w, 'fqn', repr(w))} is quantized and will not be trained (PEFT's "
            f"modules_to_save){or_float(w)}",
            stacklevel=4,
        )
    return w
