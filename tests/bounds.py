"""The weight a kernel sees, in fp64, and the element-wise bound that its product is held to."""

from typing import NamedTuple

import torch
from torch import Tensor

from rtn_tensor import reference
from rtn_tensor.formats import unpack

# u: the one rounding to the output dtype; c: fp32 accumulation in any order; a: half the smallest subnormal.
TOLERANCE = {
    torch.bfloat16: (2**-8, 2**-16, 0.0),
    torch.float16: (2**-11, 2**-16, 2**-25),
    torch.float32: (2**-22, 2**-20, 0.0),
}


class Planes(NamedTuple):
    """A quantized weight `[..., N, k]` as kernels take it."""

    qdata: Tensor
    scale: Tensor
    bits: int
    group_size: int
    k: int
    zero: Tensor | None = None

    def exact(self, rounded_to: torch.dtype | None = None) -> Tensor:
        """(q - zero) * S in fp64; for kernels that round the weight first, as fp32 and then `rounded_to`
        would hold it."""

        def of_columns(plane: Tensor) -> Tensor:
            plane = plane.double()
            return (
                plane
                if self.group_size == -1
                else plane.repeat_interleave(self.group_size, -1)[..., : self.k]
            )

        q = unpack(self.qdata, self.bits, self.k).double()
        w = (q if self.zero is None else q - of_columns(self.zero)) * of_columns(
            reference.widened(self.scale)
        )
        return w if rounded_to is None else w.float().to(rounded_to).double()


def apart(w: Planes) -> Tensor | None:
    """(|q| + |zero|) |S| in fp64, by which the error of a kernel is measured that sums q x and zero x apart;
    None of a weight without zero points."""
    if w.zero is None:
        return None
    integers = w._replace(zero=None).exact().abs()
    return integers + w._replace(qdata=torch.zeros_like(w.qdata)).exact().abs()


def random_planes(
    *shape: int,
    bits: int = 4,
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    method: str = "absmax",
) -> Planes:
    w = torch.randn(shape, device=device)
    qdata, scale, *zero = reference.quantize(w, bits, group_size, method, dtype)
    return Planes(qdata, scale, bits, group_size, shape[-1], *zero)


def activations(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Zero-mean, as a positive bias would hide errors behind |ref|, with an outlier column, as real
    activations have."""
    x = torch.randn(m, k, device=device)
    x[:, k // 2] *= 20
    return x.to(dtype)


def assert_linear_close(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    terms: Tensor | None = None,
    int8_x: bool = False,
) -> None:
    """Asserts |y - ref| <= u |ref| + c (|x| @ |w|^T) + a for every element, ref = x @ w^T + bias in fp64; NaN
    never passes.

    `w [N, K]` is fp64: `Planes.exact()`, or for a kernel that rounds the weight first,
        `Planes.exact(x.dtype)`. `terms`: what is in the place of |w|, where a kernel sums other terms.
    `int8_x`: whether x is to be what it is rounded to.
    """
    u, c, a = TOLERANCE[x.dtype]
    dtype, x = x.dtype, reference.rounded_to_int8(x) if int8_x else x
    ref = x.double() @ w.mT
    if bias is not None:
        ref = ref + bias.double()
    assert (y.shape, y.dtype) == (ref.shape, dtype)
    error = (y.double() - ref).abs()
    allowed = u * ref.abs() + c * (x.double().abs() @ (w.abs() if terms is None else terms).mT) + a
    wrong = ~(error <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are out of bound; the first, {at}, is "
            f"{y[at]:.6g}, "
            f"but {ref[at]:.6g} +- {allowed[at]:.2g} is allowed"
        )
