"""How integers lie in `qdata`: the one file that knows where a nibble is.

A row is a run of 16-byte chunks and nothing crosses a row. A chunk is eight little-endian 16-bit words; field
`i` of word `t` (bits `[bits * i, bits * (i + 1))`, two's complement) holds the element

    k = (128 / bits) * chunk + 8 * i + t        t = 0..7,  i = 0 .. 16 / bits - 1

so a chunk is one `ldmatrix` row on NVIDIA GPUs and a 4x4 transpose of 128-bit lanes on AVX-512: every device
reads the same bytes. K is padded to the next chunk with zero fields. Adding a bit width is adding one line to
`FORMATS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rtn_tensor.wording import with_article

CHUNK_BYTES = 16
VERSION = 3  # the latest of all this; weights, and so files, carry the earliest that has what they have
MAX_GROUP_SIZE = 1 << 30  # no row is as long; kernels multiply it by 8 without a thought of overflow
SCALE_METHODS = ("absmax", "signed", "search", "minmax", "search8")
SCALES_OF_8_BITS = {"search8": "search"}  # those of them whose scales have 8 bits, and how these are found
# The scale methods of weights whose scales, and zero points, another library found.
GIVEN, GIVEN_ASYMMETRIC = "given", "given_asymmetric"
ASYMMETRIC = ("minmax", GIVEN_ASYMMETRIC)  # those whose weights have a plane `zero`
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A scale of 8 bits is that of a float8_e4m3fn, times the unit: so it has four significant bits from 2^-13 on,
# and reaches 3.5, for weights of at most 28. In four models a group's scales lie between 2^-11.5 and 1.2, but
# for one in a million. The plane is uint8, as torch can neither send nor pickle float8 (2.13).
SCALE8, SCALE8_UNIT = torch.uint8, 2.0**-7
SCALE_DTYPES = (*FLOAT_DTYPES, SCALE8)
LARGEST_OF_8_BITS = 28.0
FORMAT_KEYS = ("bits", "group_size", "scale_method", "activations")  # of a config, in the order of a rule's
ACTIVATIONS = (None, "int8")  # what products round their activations to, if anything


@dataclass(frozen=True)
class Format:
    """Two's complement integers of `bits` bits, packed into 16-byte chunks; and the group size and scale
    method of weights of which nothing else is said."""

    bits: int
    group_size: int = 128
    scale_method: str = "absmax"

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def chunk(self) -> int:
        """Elements in one 16-byte chunk."""
        return 8 * CHUNK_BYTES // self.bits

    @property
    def elements_per_byte(self) -> int:
        return 8 // self.bits

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` elements, padded to whole chunks."""
        return CHUNK_BYTES * -(-k // self.chunk)


# Of what costs 4.25 bits per weight without data, groups of 64 with searched scales lose least in four
# models; at 8 bits no scale method loses less than another, and "absmax" is the fastest.
FORMATS = {4: Format(4, 64, "search"), 8: Format(8)}


def format_of(weight: Any) -> dict[str, Any]:
    """What a config asks for, or a weight has, by the names of `RTNConfig`'s arguments."""
    return {name: getattr(weight, name) for name in FORMAT_KEYS}


def or_default(bits: int, group_size: int | None, scale_method: str | None) -> tuple[int, str]:
    """The group size and the scale method; where one is None, that of `bits`."""
    of_bits = FORMATS.get(bits, Format(bits))
    return (
        of_bits.group_size if group_size is None else group_size,
        of_bits.scale_method if scale_method is None else scale_method,
    )


def computing(bits: int, scale_method: str) -> str:
    """The scale method by which a weight of `scale_method` is quantized anew."""
    anew = {GIVEN: FORMATS[bits].scale_method, GIVEN_ASYMMETRIC: "minmax"}
    return anew.get(scale_method, scale_method)


def wide_method(scale_method: str) -> str:
    """The scale method of the same scales before they are rounded to 8 bits."""
    return SCALES_OF_8_BITS.get(scale_method, scale_method)


def scale_dtype_of(scale_method: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales of a weight that is made of one of `dtype`."""
    return SCALE8 if scale_method in SCALES_OF_8_BITS else dtype


def embedding_dtype(scale_dtype: torch.dtype) -> torch.dtype:
    """The dtype of what the op `embedding` gives: the scale's, and fp32 where that has 8 bits."""
    return torch.float32 if scale_dtype == SCALE8 else scale_dtype


def version_of(
    zero: Tensor | None, float_dtype: torch.dtype | None = None, activations: str | None = None
) -> int:
    """The earliest version of the format that has such planes, shows such a dtype, and takes such
    activations."""
    if activations is not None:
        return 3
    return 1 if zero is None and float_dtype is None else 2


def shown_apart(scale: Tensor, float_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a weight shows, by itself or by its name; None where it is that of its scale.

    Raises:
        ValueError: no weight can have it.
    """
    if float_dtype is None:
        return None
    for dtype in FLOAT_DTYPES:
        if float_dtype in (dtype, str(dtype).removeprefix("torch.")):
            return None if dtype == scale.dtype else dtype
    raise ValueError(
        f"float_dtype={str(float_dtype)[:100]!r} is not supported; use {', '.join(map(str, FLOAT_DTYPES))}"
    )


def check_version(version: int) -> None:
    """Raises ValueError for planes of another version of the format than this library reads."""
    if type(version) is not int or version < 1:
        raise ValueError(
            f"version={version!r} is no version of the format; they are the integers from 1 to {VERSION}"
        )
    if version > VERSION:
        raise ValueError(
            f"the weight is of version {version} of the format, and this rtn-tensor reads up to "
            f"{VERSION}; upgrade rtn-tensor"
        )


def check_activations(activations: Any) -> None:
    """Raises ValueError unless products can take their activations so."""
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"activations={activations!r} is not supported; use 'int8', to round them to 8 bits before a "
            "product, or None, to leave them as they are"
        )


def check_format(bits: int, group_size: int, scale_method: str) -> None:
    """Raises ValueError unless the three name a format this library stores."""
    if type(bits) is not int or bits not in FORMATS:
        raise ValueError(f"bits={bits!r} is not supported; use {' or '.join(map(str, FORMATS))}")
    if type(group_size) is not int or (
        group_size != -1 and (not 0 < group_size <= MAX_GROUP_SIZE or group_size % 32)
    ):
        raise ValueError(
            f"group_size={group_size!r} is not supported; use a multiple of 32 (32, 64 and 128 are usual), "
            "or -1 for one group per row"
        )
    if scale_method not in (*SCALE_METHODS, GIVEN, GIVEN_ASYMMETRIC):
        raise ValueError(
            f"scale_method={scale_method!r} is not supported; use one of "
            f"{', '.join(map(repr, SCALE_METHODS))}"
        )


def groups(k: int, group_size: int) -> int:
    """Scales of a row of `k` elements: ceil(k / group_size), or one where `group_size` is -1."""
    return 1 if group_size == -1 else -(-k // group_size)


def new_planes(
    factory: Callable[..., Tensor],
    shape: Sequence[int],
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    zero: bool,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The planes of a weight of `shape`, by name, with one of zero points or without."""
    *rows, k = shape
    of_groups = {"scale": dtype} | ({"zero": torch.int8} if zero else {})
    return {
        "qdata": factory((*rows, FORMATS[bits].row_bytes(k)), dtype=torch.uint8, **kwargs),
        **{
            name: factory((*rows, groups(k, group_size)), dtype=of, **kwargs)
            for name, of in of_groups.items()
        },
    }


def check_planes(
    qdata: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    k: int,
    scale_method: str = SCALE_METHODS[0],
    transposed: bool = False,
    version: int = VERSION,
    zero: Tensor | None = None,
    float_dtype: torch.dtype | None = None,
    activations: str | None = None,
) -> None:
    """Raises TypeError or ValueError unless these are the planes of one weight `[..., N, k]`: `qdata [..., N,
    row_bytes(k)]` uint8, `scale [..., N, groups(k, group_size)]` float, and where it is asymmetric `zero`
    int8 of the shape of `scale`, on one device, and what is said of them is a format. Kernels read by it:
    planes from outside come through here first."""
    check_version(version)
    check_format(bits, group_size, scale_method)
    check_activations(activations)
    if not isinstance(k, int | torch.SymInt) or isinstance(k, bool) or k < 0:
        raise ValueError(
            f"in_features={k!r} is no number of columns; it must be an integer, and not negative"
        )
    of_8_bits = scale_method in SCALES_OF_8_BITS
    planes = [
        ("qdata", qdata, (torch.uint8,)),
        ("scale", scale, (SCALE8,) if of_8_bits else FLOAT_DTYPES),
    ]
    if zero is not None:
        planes.append(("zero", zero, (torch.int8,)))
    for name, plane, dtypes in planes:
        if not isinstance(plane, Tensor):
            raise TypeError(f"{name} is {with_article(type(plane).__name__)}; it must be a tensor")
        if plane.dtype not in dtypes or plane.layout is not torch.strided or plane.is_nested:
            layout = "nested" if plane.is_nested else plane.layout
            raise TypeError(
                f"{name} is {plane.dtype}, {layout}; it must be a strided tensor of "
                f"{' or '.join(map(str, dtypes))}"
            )
    for name, plane, _ in planes:
        if plane.device != qdata.device:
            raise ValueError(
                f"qdata is on {qdata.device} and {name} on {plane.device}; move both to one device"
            )
    if not isinstance(transposed, bool) or (transposed and qdata.dim() < 2):
        raise ValueError(
            f"transposed={transposed!r} of planes of {qdata.dim()} dims; it must be a bool, and False where "
            "there are no two dims"
        )
    q_shape, s_shape = qdata.shape, scale.shape
    if not (
        q_shape
        and s_shape
        and q_shape[:-1] == s_shape[:-1]
        and q_shape[-1] == FORMATS[bits].row_bytes(k)
        and s_shape[-1] == groups(k, group_size)
    ):
        raise ValueError(
            f"qdata of shape {tuple(q_shape)} and scale of shape {tuple(s_shape)} are not the planes of a "
            f"weight of {k} columns with "
            f"bits={bits} and group_size={group_size}; they must be [..., N, {FORMATS[bits].row_bytes(k)}] "
            "and "
            f"[..., N, {groups(k, group_size)}], with the same leading sizes"
        )
    if zero is not None and zero.shape != s_shape:
        raise ValueError(
            f"zero is of shape {tuple(zero.shape)} and scale of shape {tuple(s_shape)}; there must be one "
            "zero per scale"
        )
    if version < (since := version_of(zero, float_dtype, activations)):
        has = (
            "activations as they are only"
            if activations is not None
            else "no plane zero"
            if zero is not None
            else "no dtype but that of the scale"
        )
        raise ValueError(f"version={version} of the format has {has}; it came with version {since}")
    if of_8_bits and float_dtype is None:
        raise ValueError(
            f"scale_method={scale_method!r} makes scales of 8 bits, which say nothing of the weight's dtype; "
            f"give float_dtype, one of {', '.join(map(str, FLOAT_DTYPES))}"
        )
    if (zero is not None) != (scale_method in ASYMMETRIC):
        raise ValueError(
            f"scale_method={scale_method!r} makes {'no' if zero is not None else 'a'} plane zero, and there "
            f"is {'one' if zero is not None else 'none'}"
        )


def pack(q: Tensor, bits: int) -> Tensor:
    """Packs `q [..., K]` int8, each in [qmin, qmax], into `qdata [..., row_bytes(K)]` uint8."""
    fmt = FORMATS[bits]
    k, fresh = q.shape[-1], torch.contiguous_format
    q = F.pad(q, (0, -k % fmt.chunk)).contiguous() if k % fmt.chunk else q.clone(memory_format=fresh)
    # Eight elements at a time, field i of all eight words: loops over eight bytes each take ten times as
    # long.
    eights = q.view(torch.int64) if k else q.to(torch.int64)
    fields = (eights & 0x0101010101010101 * (2**bits - 1)) if bits < 8 else eights
    fields = fields.unflatten(-1, (-1, 2, fmt.elements_per_byte))
    packed = fields[..., 0]
    for i in range(1, fmt.elements_per_byte):
        packed = packed | fields[..., i] << (bits * i)
    low, high = (
        half.clone(memory_format=fresh).view(torch.uint8).to(torch.int16) for half in packed.unbind(-1)
    )
    return (low | high << 8).view(torch.uint8)


def unpack(qdata: Tensor, bits: int, k: int) -> Tensor:
    """Unpacks `qdata [..., row_bytes(K)]` uint8 into `q [..., K]` int8."""
    words = qdata.view(torch.int16).unflatten(-1, (-1, 8))
    # Shifting a field to the top and back extends its sign.
    fields = [((words << (16 - bits * (i + 1))) >> (16 - bits)).to(torch.int8) for i in range(16 // bits)]
    return torch.stack(fields, dim=-2).flatten(-3)[..., :k]


def pack_gptq(q: Tensor, bits: int) -> Tensor:
    """Packs `q [..., K]` int8, each in [qmin, qmax], into `[..., ceil(K * bits / 32)]` int32, as GPTQ and
    compressed-tensors do: a word holds 32 / bits consecutive elements, the first in its lowest bits, each as
    q - qmin; the last is filled with zeros."""
    fields = (q - FORMATS[bits].qmin).view(torch.uint8)  # int8 wraps around where qmin is -128
    fields = F.pad(fields, (0, -fields.shape[-1] % (32 // bits)))
    count = FORMATS[bits].elements_per_byte
    packed = fields[..., ::count]
    for i in range(1, count):
        packed = packed | (fields[..., i::count] << (bits * i))
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)
