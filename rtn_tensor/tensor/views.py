"""Views: slices, transposes and joins of a weight are those of its planes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import _torch
from rtn_tensor._torch import return_and_correct_aliasing
from rtn_tensor.formats import FORMATS, groups
from rtn_tensor.tensor.callers import called_by
from rtn_tensor.tensor.errors import named_error, or_float
from rtn_tensor.tensor.layout import contiguous_strides
from rtn_tensor.tensor.quantized import (
    RTNQuantizedTensor,
    aten,
    by_plane,
    dim_of_planes,
    is_packed,
    on_function,
    on_op,
    rebuilt,
    same_format,
)


def sliced(w: RTNQuantizedTensor, dim: int, start: Any, end: Any, step: int = 1) -> RTNQuantizedTensor:
    size = w.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    dim = dim_of_planes(w, dim)
    if dim < w.qdata.dim() - 1:
        return by_plane(w, lambda plane: aten.slice.Tensor(plane, dim, start, end, step))
    k = max(end - start, 0)
    fmt = FORMATS[w.bits]
    unit = fmt.chunk if w.group_size == -1 else w.group_size
    if k and (step != 1 or start % unit or (end % unit and end != size)):
        raise named_error(
            w,
            f"cannot slice columns {start}:{end}{f':{step}' if step != 1 else ''}; with bits={w.bits} and "
            f"group_size={w.group_size} "
            f"cuts must be multiples of {unit}, or at the end, {size}",
        )
    start = start if k else 0
    first, count = (0, 1) if w.group_size == -1 else (groups(start, unit), groups(k, unit))
    planes = {name: plane.narrow(dim, first, count) for name, plane in w.planes.items() if name != "qdata"}
    planes["qdata"] = w.qdata.narrow(dim, fmt.row_bytes(start), fmt.row_bytes(k))
    out = rebuilt(w, planes, in_features=k)
    if w.group_size == -1 and k < size:
        out._shares_scale = True
    return out


@on_op(aten.slice.Tensor)
def slice_op(func, types, args, kwargs):
    w, dim, start, end, step = [*args, *(None, 0, None, None, 1)[len(args) :]]
    return return_and_correct_aliasing(func, args, kwargs, sliced(w, dim, start, end, step))


@on_op([aten.split.Tensor, aten.split_with_sizes.default])
def split_op(func, types, args, kwargs):
    w, sizes = args[:2]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    total = w.shape[dim]
    if isinstance(sizes, int | torch.SymInt):
        sizes = [min(sizes, total - i * sizes) for i in range(-(-total // sizes))] if total else [0]
    elif sum(sizes) != total:
        raise named_error(w, f"split sizes {list(sizes)} do not add up to {total}, the size of dim {dim}")
    parts, start = [], 0
    for size in sizes:
        parts.append(sliced(w, dim, start, start + size))
        start += size
    return return_and_correct_aliasing(func, args, kwargs, parts)


def selected(w: RTNQuantizedTensor, dim: int, index: int) -> RTNQuantizedTensor:
    plane_dim = dim_of_planes(w, dim)
    if plane_dim == w.dim() - 1:
        raise named_error(
            w,
            f"cannot select along dim {dim}: one column of a packed weight is no tensor; slice whole "
            "groups, or dequantize()",
        )
    # Without its rows a weight has no two dims to stand swapped.
    transposed = w.transposed and plane_dim != w.dim() - 2
    return by_plane(w, lambda plane: aten.select.int(plane, plane_dim, index), transposed=transposed)


@on_op(aten.select.int)
def select_op(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, selected(*args))


@on_op(aten.unbind.int)
def unbind_op(func, types, args, kwargs):
    w, dim = [*args, 0][:2]
    return return_and_correct_aliasing(func, args, kwargs, [selected(w, dim, i) for i in range(w.shape[dim])])


@on_op([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def view_op(func, types, args, kwargs):
    w, size = args[0], list(args[1])
    # FSDP2 and DistributedDataParallel flatten a weight whole and only ever make views of it again: the
    # tensor with its shape kept serves.
    flat = size == [-1] and called_by("torch.distributed.", "torch.nn.parallel.")
    if -1 in size and not flat:
        known = -math.prod(size)
        size[size.index(-1)] = w.numel() // known if known else 0
    same_shape = flat or size == list(w.shape)
    if not same_shape and (
        w.transposed or not size or size[-1] != w.in_features or math.prod(size) != w.numel()
    ):
        raise named_error(
            w,
            f"cannot view shape {tuple(w.shape)} as {tuple(args[1])}; a view keeps the packed last dim, "
            f"in_features={w.in_features}",
        )
    if same_shape:
        out = by_plane(w, lambda plane: plane.view(plane.shape))
        out._is_flat = flat
    else:
        out = by_plane(w, lambda plane: func(plane, [*size[:-1], plane.shape[-1]]))
    return return_and_correct_aliasing(func, args, kwargs, out)


def _as_strided(
    w: RTNQuantizedTensor, size: list[Any], stride: list[Any], offset: Any
) -> RTNQuantizedTensor | None:
    """The part of `w` that `layout_of` shows with these numbers, None where there is none."""
    if not size or len(size) != len(stride) or offset < 0:
        return None
    # A compiler may hold these as symbols.
    transposed = bool(
        len(size) > 1
        and stride[-2] == 1
        and (stride[-1] != 1 or size[-1] != 1 or (size[-2] == 1 and w.transposed))
    )
    if transposed:
        size, stride = [*size[:-2], *size[:-3:-1]], [*stride[:-2], *stride[:-3:-1]]
    fmt, k = FORMATS[w.bits], size[-1]
    elements = fmt.elements_per_byte
    if stride == contiguous_strides(size):
        strides, uneven = contiguous_strides([*size[:-1], fmt.row_bytes(k)]), []
    else:
        strides, uneven = (
            [*(s // elements for s in stride[:-1]), stride[-1]],
            [s % elements for s in stride[:-1]],
        )
    # The smallest step from row to row of `w`, in qdata and in the planes beside it; every other one must be
    # a multiple, and the same multiple in all.
    of_groups = {name: plane for name, plane in w.planes.items() if name != "qdata"}
    beside = zip(*(plane.stride() for plane in of_groups.values()), strict=True)
    steps = [
        (q, n, s)
        for n, q, s in zip(w.qdata.shape[:-1], w.qdata.stride(), beside, strict=False)
        if n > 1 and q
    ]
    row, _, rows = min(steps, default=(0, 1, (0,) * len(of_groups)))
    shift = offset // elements - w.qdata.storage_offset()
    first = shift // row if row else 0
    column = (shift - first * row) * elements
    unit = fmt.chunk if w.group_size == -1 else w.group_size
    wanted = [(n, s) for n, s in zip(size[:-1], strides, strict=False) if n > 1]
    last = first * row + sum((n - 1) * s for n, s in wanted)
    whole = stride[-1] == 1 and offset % elements == 0 and not any(uneven)
    alike = all(q * r == s * row for q, _, beside in steps for s, r in zip(beside, rows, strict=True))
    rows_lie_in_w = (
        all(s % row == 0 if row else s == 0 for _, s in wanted)
        and 0 <= first
        and last <= sum((n - 1) * q for q, n, _ in steps)
    )
    columns_lie_in_w = (
        0 <= column <= w.in_features - k
        and column % unit == 0
        and (k % unit == 0 or column + k == w.in_features)
    )
    if not (whole and alike and (rows_lie_in_w or 0 in size) and columns_lie_in_w):
        return None
    group = 0 if w.group_size == -1 else column // unit
    planes = {"qdata": w.qdata.as_strided([*size[:-1], fmt.row_bytes(k)], strides, offset // elements)}
    for (name, plane), step in zip(of_groups.items(), rows, strict=True):
        planes[name] = plane.as_strided(
            [*size[:-1], groups(k, w.group_size)],
            [*(s // row * step if row else 0 for s in strides[:-1]), plane.stride(-1)],
            plane.storage_offset() + first * step + group * plane.stride(-1),
        )
    out = rebuilt(w, planes, in_features=k, transposed=transposed)
    if w.group_size == -1 and k < w.in_features:
        out._shares_scale = True
    return out


@on_op(aten.as_strided.default)
def as_strided_op(func, types, args, kwargs):
    w, size, stride = args[0], list(args[1]), list(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    out = _as_strided(w, size, stride, w.storage_offset() if offset is None else offset)
    if out is None:
        raise named_error(
            w,
            f"as_strided gives rows and whole groups of columns that lie in {w!r}, not size {size}, stride "
            f"{stride} and offset {offset}; "
            "use slices, or dequantize()",
        )
    return return_and_correct_aliasing(func, args, kwargs, out)


@on_function([Tensor.as_strided, torch.as_strided])
def as_strided_function(func, types, args, kwargs):
    """What a compiled function gives back comes through here. As a view in autograd's eyes (a weight has no
    gradient) it would be made anew, under symbolic shapes, from symbols that torch has no guard for."""
    with _torch.below_autograd(), _torch.without_overrides():
        return func(*args, **kwargs)


@on_op(aten.unsqueeze.default)
def unsqueeze_op(func, types, args, kwargs):
    w, dim = args
    plane_dim = dim % (w.dim() + 1)
    if plane_dim > w.dim() - (2 if w.transposed else 1):
        raise named_error(
            w,
            f"cannot unsqueeze at dim {dim}: the last {2 if w.transposed else 1} dim(s) of "
            f"{tuple(w.shape)} must stay last{or_float(w)}",
        )
    return return_and_correct_aliasing(func, args, kwargs, by_plane(w, lambda plane: func(plane, plane_dim)))


@on_op([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims])
def squeeze_op(func, types, args, kwargs):
    w = args[0]
    dims = range(w.dim()) if len(args) == 1 else [args[1]] if isinstance(args[1], int) else args[1]
    leading = w.dim() - (2 if w.transposed else 1)
    squeezed = [d % w.dim() for d in dims if w.shape[d] == 1]
    if any(d >= leading for d in squeezed):
        raise named_error(
            w,
            f"cannot squeeze dim(s) {squeezed} of shape {tuple(w.shape)}: only the first "
            f"{leading} dim(s) may go",
        )
    out = by_plane(w, lambda plane: aten.squeeze.dims(plane, squeezed))
    return return_and_correct_aliasing(func, args, kwargs, out)


def permuted(w: RTNQuantizedTensor, order: Sequence[int]) -> RTNQuantizedTensor:
    plane_order = [dim_of_planes(w, d) for d in order]
    last = w.dim() - 1
    if last > 0 and set(plane_order[-2:]) == {last - 1, last}:
        transposed = plane_order[-1] != last
        plane_order[-2:] = [last - 1, last]
    elif plane_order[-1] == last and not w.transposed:
        transposed = False
    else:
        raise named_error(
            w,
            f"cannot permute {tuple(w.shape)} to {tuple(order)}: the last two dims may swap, and the "
            "others among themselves",
        )
    return by_plane(w, lambda plane: aten.permute.default(plane, plane_order), transposed=transposed)


@on_op([aten.t.default, aten.transpose.int, aten.permute.default])
def transpose_op(func, types, args, kwargs):
    w = args[0]
    order = list(range(w.dim()))
    if func is aten.permute.default:
        order = args[1]
    elif w.dim() > 1:
        a, b = (0, 1) if func is aten.t.default else args[1:3]
        order[a], order[b] = order[b], order[a]
    return return_and_correct_aliasing(func, args, kwargs, permuted(w, order))


@on_function([Tensor.mT.__get__, Tensor.mH.__get__])  # type: ignore[attr-defined]
def matrix_transpose(func, types, args, kwargs):
    """As a method: in a frame that Dynamo gave up, torchao's dispatcher is a graph of its own, which asks for
    a property without end."""
    return args[0].transpose(-2, -1)


@on_function([Tensor.T.__get__, Tensor.H.__get__])  # type: ignore[attr-defined]
def reversed_dims(func, types, args, kwargs):
    if args[0].dim() == 2:
        return args[0].t()
    with _torch.without_overrides():
        return func(*args)


@on_op(aten.expand.default)
def expand_op(func, types, args, kwargs):
    w, size = args[0], list(args[1])
    if size[-2:] not in ([-1, -1], list(w.shape[-2:])):
        raise named_error(
            w, f"cannot expand {tuple(w.shape)} to {tuple(size)}: the last two dims must stay as they are"
        )
    # vmap over a weight asks for it
    return return_and_correct_aliasing(
        func, args, kwargs, by_plane(w, lambda plane: func(plane, [*size[:-2], -1, -1]))
    )


@on_op(aten.index.Tensor)
def index_op(func, types, args, kwargs):
    w, indices = args
    covered = sum(1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim() for i in indices)
    free = w.dim() - (2 if w.transposed else 1)
    if covered > free:
        raise named_error(
            w,
            f"cannot index {covered} dim(s) of shape {tuple(w.shape)} by tensors: only the first {free} "
            f"can be{or_float(w)}",
        )
    return by_plane(w, lambda plane: func(plane, indices))


@on_op(aten.index_select.default)
def index_select_op(func, types, args, kwargs):
    w, dim, index = args
    if is_packed(w, dim):
        raise named_error(
            w, f"cannot index_select along dim {dim} of {tuple(w.shape)}: it is packed; dequantize() first"
        )
    return by_plane(w, lambda plane: func(plane, dim_of_planes(w, dim), index))


@on_op([aten.cat.default, aten.stack.default])
def join_op(func, types, args, kwargs):
    tensors = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = next(t for t in tensors if isinstance(t, RTNQuantizedTensor))
    name = "stack" if func is aten.stack.default else "cat"
    for t in tensors:
        if not isinstance(t, RTNQuantizedTensor) or not same_format(t, first):
            other = (
                repr(t)
                if isinstance(t, RTNQuantizedTensor)
                else f"a plain {t.dtype} tensor of shape {tuple(t.shape)}"
            )
            raise named_error(
                first,
                f"cannot {name} {first!r} with {other}: format and dtype must be the same{or_float(first)}",
                TypeError,
            )
    if func is aten.stack.default:
        plane_dim = dim % (first.dim() + 1)
        if plane_dim > first.dim() - (2 if first.transposed else 1):
            raise named_error(
                first,
                f"cannot stack along dim {dim}: the packed dims of {tuple(first.shape)} must stay "
                f"last{or_float(first)}",
            )
        in_features = first.in_features
        same = [t.in_features == in_features for t in tensors]
    elif is_packed(first, dim):
        plane_dim = first.dim() - 1
        unit = first.group_size
        if unit == -1:
            raise named_error(
                first,
                "cannot cat along in_features with group_size=-1: every part has a scale of its own; "
                "dequantize() first",
            )
        if bad := [t.in_features for t in tensors[:-1] if t.in_features % unit]:
            raise named_error(
                first,
                f"cannot cat parts of {bad[0]} columns; all but the last must be "
                f"multiples of group_size={unit}",
            )
        in_features = sum(t.in_features for t in tensors)
        same = [True]
    else:
        plane_dim = dim_of_planes(first, dim)
        in_features = first.in_features
        same = [t.in_features == in_features for t in tensors]
    if not all(same):
        raise named_error(
            first,
            f"cannot {name} weights of in_features {[t.in_features for t in tensors]} along dim "
            f"{dim}; they must be the same",
        )
    planes = {name: func([t.planes[name] for t in tensors], plane_dim) for name in first.planes}
    return rebuilt(first, planes, in_features=in_features)
