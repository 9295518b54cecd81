"""How integers lie in `qdata`: the one file that knows where a nibble is.

A row is a run of 16-byte chunks and nothing crosses a row. A chunk is eight little-endian 16-bit words; field `i` of word `t`
(bits `[bits * i, bits * (i + 1))`, two's complement) holds the element

    k = (128 / bits) * chunk + 8 * i + t        t = 0..7,  i = 0 .. 16 / bits - 1

so a chunk is one `ldmatrix` row on NVIDIA GPUs and a 4x4 transpose of 128-bit lanes on AVX-512: every device reads the same bytes.
K is padded to the next chunk with zero fields. Adding a bit width is adding one line to `FORMATS`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 16
VERSION = 1  # of all this; files carry it


def check_version(version: int) -> None:
    """Raises ValueError for planes of a later version of the format than this library reads."""
    if version > VERSION:
        raise ValueError(f"the weight is of version {version} of the format, and this rtn-tensor reads up to {VERSION}; upgrade rtn-tensor")


@dataclass(frozen=True)
class Format:
    """Two's complement integers of `bits` bits, packed into 16-byte chunks."""

    bits: int

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

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` elements, padded to whole chunks."""
        return CHUNK_BYTES * -(-k // self.chunk)


FORMATS = {bits: Format(bits) for bits in (4, 8)}


def groups(k: int, group_size: int) -> int:
    """Scales of a row of `k` elements: ceil(k / group_size), or one where `group_size` is -1."""
    return 1 if group_size == -1 else -(-k // group_size)


def pack(q: Tensor, bits: int) -> Tensor:
    """Packs `q [..., K]` int8, each in [qmin, qmax], into `qdata [..., row_bytes(K)]` uint8."""
    fmt = FORMATS[bits]
    q = F.pad(q, (0, -q.shape[-1] % fmt.chunk))
    fields = q.to(torch.int16).unflatten(-1, (-1, 16 // bits, 8)) & (2**bits - 1)
    words = fields[..., 0, :]
    for i in range(1, 16 // bits):
        words = words | (fields[..., i, :] << (bits * i))
    return words.flatten(-2).contiguous().view(torch.uint8)


def unpack(qdata: Tensor, bits: int, k: int) -> Tensor:
    """Unpacks `qdata [..., row_bytes(K)]` uint8 into `q [..., K]` int8."""
    words = qdata.view(torch.int16).unflatten(-1, (-1, 8))
    # Shifting a field to the top and back extends its sign.
    fields = [((words << (16 - bits * (i + 1))) >> (16 - bits)).to(torch.int8) for i in range(16 // bits)]
    return torch.stack(fields, dim=-2).flatten(-3)[..., :k]


def pack_gptq(q: Tensor, bits: int) -> Tensor:
    """Packs `q [..., K]` int8, each in [qmin, qmax], into `[..., K * bits / 32]` int32, as GPTQ checkpoints do: a word holds 32 / bits
    consecutive elements, the first in its lowest bits, each as q - qmin. K is a multiple of 32 / bits."""
    fields = (q - FORMATS[bits].qmin).view(torch.uint8)  # int8 wraps around where qmin is -128
    if bits == 4:
        fields = fields[..., ::2] | (fields[..., 1::2] << 4)
    return fields.contiguous().view(torch.int32)
