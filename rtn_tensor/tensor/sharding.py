"""What FSDP2 gathers of the shards of a quantized weight, and what it makes of that."""

import math
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import _torch
from rtn_tensor.tensor.attributes import ATTRIBUTES
from rtn_tensor.tensor.layout import padded_plane


# With this signature, the older of the two that FSDP2 knows, what is gathered need not have the tensor's
# own padded size.
def pre_all_gather(w: Any, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
    """What FSDP2 gathers of a shard: the planes, padded as those of the other ranks are (0.26 of a bf16
    weight at int4)."""
    rows = getattr(w, "_padded_rows", len(w.qdata))
    planes = tuple(padded_plane(plane, rows) for plane in w.planes.values())
    attributes = {name: getattr(w, name) for name in ATTRIBUTES}
    if mesh.size() > 1:
        return planes, (attributes, None)
    # Of what one rank "gathers" FSDP2 copies the first tensor only.
    return (torch.cat([plane.flatten().view(torch.uint8) for plane in planes]),), (
        attributes,
        [plane.shape for plane in planes],
    )


def post_all_gather(w: Any, outputs: Any, metadata: Any, param_dtype: Any, *, out: Any = None) -> Any:
    """The whole tensor over the gathered planes, its scale in the dtype that a MixedPrecisionPolicy asks
    for."""
    attributes, shapes = metadata
    gathered = outputs
    if shapes is not None:
        dtypes = [plane.dtype for plane in w.planes.values()]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        gathered = [
            part.view(dtype).view(shape)
            for part, dtype, shape in zip(outputs[0].split(sizes), dtypes, shapes, strict=True)
        ]
    planes = dict(zip(w.planes, gathered, strict=True))
    scale = planes["scale"]
    if out is not None:  # over the same memory as the first time, filled again
        out = out.to_local() if hasattr(out, "to_local") else out  # a DTensor, under tensor parallelism
        if out.scale.dtype != scale.dtype:
            # The same numbers again: a backward that saved them is not to see a change.
            with _torch.same_version(out.scale):
                out.scale.copy_(scale[: len(out.scale)])
        return None
    if w.float_dtype is None:
        planes["scale"] = scale.to(param_dtype)
    else:
        attributes = attributes | {"float_dtype": param_dtype}
    return type(w)(**planes, **attributes), outputs
