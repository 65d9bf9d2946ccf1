"""The packed layout: literal words, a bit-by-bit reference, every value in every lane."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracles import pack_bits, pack_columns, signed, unpack_bits

from quant_cuda.packing import pack, pack_zeros, unpack, unpack_zeros

BITS = (2, 3, 4, 8)

# (bits, values, words), each derived by hand; docs/format.md shows the same table.
EXAMPLES = [
    # 0,1,2,3 is the byte 11 10 01 00 = 0xE4; four of them fill a word.
    (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    # 11 10 01 = 0x39: three values leave the upper 26 bits zero.
    (2, [1, 2, 3], [0x00000039]),
    # Seventeen values: the last opens a second word.
    (2, [3] * 17, [0xFFFFFFFF, 0x00000003]),
    # Octal 76543210 = 0xFAC688 holds eight values in 24 bits. Four of them are the bytes
    # 88 C6 FA 88 | C6 FA 88 C6 | FA 88 C6 FA, and words are little-endian.
    (3, [0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    # Value 10 is bits 30, 31 of word 0 and bit 0 of word 1. 5 = 101: bit 30 set, 31 clear, 32 set.
    (3, [0] * 10 + [5] + [0] * 21, [0x40000000, 0x00000001, 0x00000000]),
    # Value 21 is bit 31 of word 1 and bits 0, 1 of word 2. 5 = 101: bit 63 set, 64 clear, 65 set.
    (3, [0] * 21 + [5] + [0] * 10, [0x00000000, 0x80000000, 0x00000002]),
    # Value 31 is the top three bits of word 2.
    (3, [0] * 31 + [6], [0x00000000, 0x00000000, 0xC0000000]),
    # One hexadecimal digit a value, the first value rightmost.
    (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
    (4, [8, 9, 10, 11, 12, 13, 14, 15, 1], [0xFEDCBA98, 0x00000001]),
    # One byte a value, the first value rightmost.
    (8, [1, 2, 3, 4], [0x04030201]),
    (8, [255, 128, 127, 0, 254], [0x007F80FF, 0x000000FE]),
]

# (bits, zero of every output, stored word pattern with zero_offset 1, with zero_offset 0)
ZERO_EXAMPLES = [
    (2, 2, [0x55555555], [0xAAAAAAAA]),  # 01 and 10 repeated
    # 011 and 100 repeated: octal 33333333 = 0x6DB6DB and 44444444 = 0x924924.
    (3, 4, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
    (4, 8, [0x77777777], [0x88888888]),
    (8, 128, [0x7F7F7F7F], [0x80808080]),
]


def int32(words: list[int]) -> torch.Tensor:
    return torch.tensor([signed(word) for word in words], dtype=torch.int32)


@pytest.mark.parametrize(("bits", "values", "words"), EXAMPLES)
def test_literal_words(bits, values, words):
    packed = pack(torch.tensor(values)[:, None], bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (len(words), 1)
    assert [word & 0xFFFFFFFF for word in packed[:, 0].tolist()] == words
    unpacked = unpack(int32(words)[:, None], bits, len(values))
    assert unpacked.dtype == torch.uint8
    assert unpacked[:, 0].tolist() == values


@pytest.mark.parametrize(("bits", "zero", "v1", "v2"), ZERO_EXAMPLES)
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_literal_zeros(bits, zero, v1, v2, zero_offset):
    words = v1 if zero_offset == 1 else v2
    n_out = 32 * len(words) // bits
    zeros = torch.full((3, n_out), zero)
    packed = pack_zeros(zeros, bits, zero_offset)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, int32(words).expand(3, -1))
    read = unpack_zeros(packed, bits, n_out, zero_offset)
    assert read.dtype == torch.int32
    assert torch.equal(read, zeros.int())


def test_the_format_document_shows_these_very_words():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `([\d, x]+)` \| `([0-9A-F ]+)` \|$", text, flags=re.M)
    found = []
    for bits, values, words in rows:
        expanded: list[int] = []
        for item in values.split(", "):  # "3 x 17" is seventeen threes
            value, _, times = item.partition(" x ")
            expanded += [int(value)] * int(times or 1)
        found.append((int(bits), expanded, [int(word, 16) for word in words.split()]))
    assert found == EXAMPLES
    rows = re.findall(r"^\| (\d) \| (\d+) \| `([0-9A-F ]+)` \| `([0-9A-F ]+)` \|$", text, re.M)
    assert [
        (int(b), int(z), [int(w, 16) for w in v1.split()], [int(w, 16) for w in v2.split()])
        for b, z, v1, v2 in rows
    ] == ZERO_EXAMPLES


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 11, 16, 21, 22, 31, 32, 33, 63, 97, 128, 131])
def test_against_bit_by_bit_reference(bits, n):
    values = np.random.default_rng(bits * 1000 + n).integers(0, 2**bits, (n, 5))
    words = pack(torch.from_numpy(values), bits)
    assert torch.equal(words, torch.from_numpy(pack_columns(values, bits)))
    assert torch.equal(unpack(words, bits, n), torch.from_numpy(values.astype(np.uint8)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n_words", [3, 6])
def test_any_word_can_be_read_and_written_back(bits, n_words):
    words = np.random.default_rng(bits).integers(-(2**31), 2**31, (n_words, 7)).astype(np.int32)
    n = 32 * n_words // bits
    values = unpack(torch.from_numpy(words), bits, n)
    for column in range(7):
        unsigned = [int(word) & 0xFFFFFFFF for word in words[:, column]]
        assert values[:, column].tolist() == unpack_bits(unsigned, bits, n)
    assert torch.equal(pack(values, bits), torch.from_numpy(words))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("background", ["zeros", "ones"])
def test_every_value_in_every_lane(bits, background):
    lanes, maxq = 32, 2**bits - 1
    fill = 0 if background == "zeros" else maxq
    values = np.full((lanes, lanes * (maxq + 1)), fill)
    for lane in range(lanes):
        for value in range(maxq + 1):
            values[lane, lane * (maxq + 1) + value] = value
    words = pack(torch.from_numpy(values), bits)
    # A whole column as one big integer says where each field must be, without any loop over bits.
    empty = sum(fill << (bits * k) for k in range(lanes))
    for column in range(values.shape[1]):
        lane, value = divmod(column, maxq + 1)
        whole = empty ^ ((fill ^ value) << (bits * lane))
        expected = [whole >> (32 * i) & 0xFFFFFFFF for i in range(bits)]
        assert [word & 0xFFFFFFFF for word in words[:, column].tolist()] == expected
    assert torch.equal(unpack(words, bits, lanes), torch.from_numpy(values.astype(np.uint8)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes_and_strides(dtype):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 16, (24, 40)))
    expected = torch.from_numpy(pack_columns(values.numpy(), 4))
    strided = values.to(dtype).T.contiguous().T
    before = strided.clone()
    assert torch.equal(pack(strided, 4), expected)
    assert torch.equal(strided, before)
    words = expected.T.contiguous().T
    assert torch.equal(unpack(words, 4, 24), values.to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", ["below", "above"])
def test_values_out_of_range(bits, bad):
    values = torch.zeros(32, 3, dtype=torch.int64)
    values[17, 1] = -1 if bad == "below" else 2**bits
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        pack(values, bits)


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_unsupported_bits(bits):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        pack(torch.zeros(32, 1, dtype=torch.int64), bits)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        unpack(torch.zeros(3, 1, dtype=torch.int32), bits, 1)


def test_too_few_words():
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        unpack(torch.zeros(3, 2, dtype=torch.int32), 3, 33)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("n_out", [1, 5, 16, 32, 37, 96])
def test_zeros_pack_along_the_outputs(bits, zero_offset, n_out):
    rng = np.random.default_rng(n_out)
    zeros = rng.integers(1, 2**bits, (4, n_out))  # 1..maxq: legal for both conventions
    packed = pack_zeros(torch.from_numpy(zeros), bits, zero_offset)
    assert packed.shape == (4, -(-n_out * bits // 32))
    for group in range(4):
        words = [word & 0xFFFFFFFF for word in packed[group].tolist()]
        assert words == pack_bits([int(z) - zero_offset for z in zeros[group]], bits)
    read = unpack_zeros(packed, bits, n_out, zero_offset)
    assert torch.equal(read, torch.from_numpy(zeros).int())


@pytest.mark.parametrize("bits", BITS)
def test_zero_of_zero(bits):
    zeros = torch.full((1, 32), 1, dtype=torch.int32)
    zeros[0, 3] = 0
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        pack_zeros(zeros, bits, 1)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits, 0), bits, 32, 0), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_zero_above_the_field(bits):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        pack_zeros(torch.full((1, 32), 2**bits), bits, 0)


@pytest.mark.parametrize("bits", BITS)
def test_a_full_v1_field_reads_one_past_the_range(bits):
    words = torch.full((1, bits), -1, dtype=torch.int32)
    assert unpack_zeros(words, bits, 32, 1).tolist() == [[2**bits] * 32]
    assert unpack_zeros(words, bits, 32, 0).tolist() == [[2**bits - 1] * 32]
