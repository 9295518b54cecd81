import pytest
import torch

from rtn_tensor.formats import FORMATS, groups, pack, pack_gptq, unpack


def position(bits: int, k: int) -> tuple[int, int]:
    """The byte of a row and the bit in it where element k starts, as the design writes it."""
    if bits == 4:
        return 16 * (k >> 5) + 2 * (k & 7) + ((k >> 4) & 1), 4 * ((k >> 3) & 1)
    return 16 * (k >> 4) + 2 * (k & 7) + ((k >> 3) & 1), 0


@pytest.mark.parametrize(
    ("bits", "value", "field"),
    [(4, 1, 0x1), (4, -1, 0xF), (4, -8, 0x8), (8, 1, 0x01), (8, -1, 0xFF), (8, -128, 0x80)],
)
@pytest.mark.parametrize("k", [1, 31, 32, 33, 100])
def test_every_element_lies_where_the_formula_says(bits, value, field, k):
    """Row i holds one nonzero, at element i: every bit of the row is pinned, for every position."""
    expected = torch.zeros(k, -(-k * bits // 128) * 16, dtype=torch.uint8)
    for i in range(k):
        byte, shift = position(bits, i)
        expected[i, byte] = field << shift
    q = (torch.eye(k) * value).to(torch.int8)
    assert torch.equal(pack(q, bits), expected)
    assert torch.equal(unpack(expected, bits, k), q)


# fmt: off
BYTES = [
    # q = k mod 16: the low and the high nibble of a byte hold elements 8 apart.
    (4, [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1],
     "80 80 91 91 a2 a2 b3 b3 c4 c4 d5 d5 e6 e6 f7 f7"),
    # q = k div 2: even bytes hold the first 16 elements, odd bytes the last.
    (4, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, -8, -8, -7, -7, -6, -6, -5, -5, -4, -4, -3, -3, -2, -2, -1, -1],
     "40 c8 40 c8 51 d9 51 d9 62 ea 62 ea 73 fb 73 fb"),
    # K = 33: a second chunk, all padding but one nibble.
    (4, [0] * 32 + [7],
     "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 07 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"),
    # K = 10: padding within the chunk.
    (4, [1, 2, 3, 4, 5, 6, 7, -8, -7, -6],
     "91 00 a2 00 03 00 04 00 05 00 06 00 07 00 08 00"),
    (8, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
     "00 08 01 09 02 0a 03 0b 04 0c 05 0d 06 0e 07 0f"),
    (8, [-128, -127, -2, -1, 0, 1, 126, 127, 16, 32, 48, 64, 80, 96, 112, -16, 85],
     "80 10 81 20 fe 30 ff 40 00 50 01 60 7e 70 7f f0 55 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"),
]
# fmt: on


@pytest.mark.parametrize(("bits", "q", "packed"), BYTES)
def test_literal_bytes(bits, q, packed):
    q = torch.tensor(q, dtype=torch.int8)
    assert bytes(pack(q, bits).tolist()).hex(" ") == packed
    assert torch.equal(unpack(torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8), bits, len(q)), q)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 100, 576, 1000])
@pytest.mark.parametrize("rows", [(), (5,), (0,), (2, 3), (3, 0), (2, 1, 3)])
def test_round_trip(bits, k, rows):
    fmt = FORMATS[bits]
    q = torch.randint(fmt.qmin, fmt.qmax + 1, (*rows, k), dtype=torch.int8)
    qdata = pack(q, bits)
    assert qdata.dtype == torch.uint8
    assert qdata.shape == (*rows, fmt.row_bytes(k))
    assert qdata.is_contiguous()
    assert torch.equal(unpack(qdata, bits, k), q)
    padded = unpack(qdata, bits, fmt.row_bytes(k) * 8 // bits)
    assert not padded[..., k:].any()


@pytest.mark.parametrize("bits", FORMATS)
def test_every_value_survives_at_every_place(bits):
    fmt = FORMATS[bits]
    values = torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.int8)
    assert len(values) == 2**bits
    q = values[:, None].expand(-1, 2 * fmt.chunk)
    assert torch.equal(unpack(pack(q, bits), bits, 2 * fmt.chunk), q)


@pytest.mark.parametrize("bits", FORMATS)
def test_non_contiguous(bits):
    fmt = FORMATS[bits]
    k = 4 * fmt.chunk
    q = torch.randint(fmt.qmin, fmt.qmax + 1, (6, k), dtype=torch.int8)
    qdata = pack(q, bits)
    assert torch.equal(pack(q.t().contiguous().t(), bits), qdata)
    assert torch.equal(unpack(qdata[::2], bits, k), q[::2])
    # A cut between chunks is a cut of the plane: rows stay strided, and the ragged end is the caller's.
    cut = qdata[1:, 16:48]
    assert not cut.is_contiguous()
    assert torch.equal(unpack(cut, bits, 2 * fmt.chunk - 1), q[1:, fmt.chunk : 3 * fmt.chunk - 1])


@pytest.mark.parametrize("bits", FORMATS)
def test_channels_last(bits):
    q = torch.randint(-8, 8, (2, 3, 4, 40), dtype=torch.int8)
    assert torch.equal(pack(q.to(memory_format=torch.channels_last), bits), pack(q, bits))


@pytest.mark.parametrize("bits", FORMATS)
def test_gptq(bits):
    """Against Python's own integers."""
    fmt, each = FORMATS[bits], 32 // bits
    q = torch.arange(fmt.qmin, fmt.qmax + 1).repeat(2, 5 * each)[:, : 5 * each].to(torch.int8)
    words = [
        [sum((int(x) - fmt.qmin) << (bits * i) for i, x in enumerate(word)) for word in row.split(each)]
        for row in q
    ]
    assert torch.equal(pack_gptq(q, bits), torch.tensor(words).to(torch.int32))


@pytest.mark.parametrize(
    ("k", "int4", "int8"),
    [(0, 0, 0), (1, 16, 16), (16, 16, 16), (17, 16, 32), (32, 16, 32), (33, 32, 48), (1000, 512, 1008)],
)
def test_row_bytes(k, int4, int8):
    assert (FORMATS[4].row_bytes(k), FORMATS[8].row_bytes(k)) == (int4, int8)


@pytest.mark.parametrize(
    ("k", "group_size", "expected"),
    [(0, 32, 0), (0, -1, 1), (1, 32, 1), (32, 32, 1), (33, 32, 2), (100, 96, 2), (1000, -1, 1)],
)
def test_groups(k, group_size, expected):
    assert groups(k, group_size) == expected
