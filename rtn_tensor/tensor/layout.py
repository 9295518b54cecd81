"""Shapes and strides of planes, and of the weight that they are of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.formats import FORMATS


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor, as torch has them for sizes of 0, too."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * max(shape[i], 1)
    return strides


def layout_of(
    qdata: Tensor, bits: int, in_features: int, transposed: bool
) -> tuple[list[int], list[int], Any]:
    """The size, strides and storage offset that a tensor over `qdata` shows, from which `as_strided` finds
    the planes again.

    A compiled function gives back a view of its input as nothing but these three numbers. They are those of
    the plain weight, unless in_features is padded: then the padding counts in the offset, and in the strides
    of what is not contiguous.
    """
    shape, strides, elements = (
        [*qdata.shape[:-1], in_features],
        list(qdata.stride()),
        FORMATS[bits].elements_per_byte,
    )
    if strides == contiguous_strides(qdata.shape):
        strides = contiguous_strides(shape)
    else:
        strides = [*(stride * elements for stride in strides[:-1]), strides[-1]]
    if transposed:
        shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
    return shape, strides, qdata.storage_offset() * elements


def padded_plane(plane: Tensor, rows: int) -> Tensor:
    """`plane` with zeros after it, up to `rows`; they lie there already where FSDP2 made it."""
    if len(plane) == rows:
        return plane
    size, stride, start = (rows, *plane.shape[1:]), plane.stride(), plane.storage_offset()
    end = (start + rows * stride[0]) * plane.itemsize
    if plane.is_contiguous() and end <= plane.untyped_storage().nbytes():
        return plane.as_strided(size, stride, start)
    return torch.cat([plane, plane.new_zeros(rows - len(plane), *plane.shape[1:])])
