"""Blocks against bytes that were written by hand, from the layout's definition."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType

from gptq.files.gguf_blocks import Blocks, join, split

# 0.5 and -0.25 as float16, little-endian: sign 1 bit, exponent 5 (bias 15), fraction 10.
HALF, MINUS_QUARTER = bytes([0x00, 0x38]), bytes([0x00, 0xB4])
# Integer j of a block is in the low half of byte j for j < 16, else in the high half of j - 16.
FOUR_BITS = [i * 7 % 16 for i in range(32)]


def four_bit_bytes() -> bytes:
    return bytes(FOUR_BITS[j] + 16 * FOUR_BITS[j + 16] for j in range(16))


LITERAL = {
    GgmlType.Q4_0: (MINUS_QUARTER + four_bit_bytes(), FOUR_BITS, -0.25, None),
    GgmlType.Q4_1: (HALF + MINUS_QUARTER + four_bit_bytes(), FOUR_BITS, 0.5, -0.25),
    GgmlType.Q8_0: (
        HALF + bytes([0x80, 0xFF, 0x00, 0x01, 0x7F, *[2] * 27]),
        [0, 127, 128, 129, 255, *[130] * 27],
        0.5,
        None,
    ),
}
VALUES = {
    GgmlType.Q4_0: lambda q, d, _m: d * (q - 8),
    GgmlType.Q4_1: lambda q, d, m: d * q + m,
    GgmlType.Q8_0: lambda q, d, _m: d * (q - 128),
}


def blocks(kind: GgmlType, rows: int = 1) -> Blocks:
    """A block of the literal bytes in each row."""
    _, q, d, m = LITERAL[kind]
    minima = None if m is None else torch.full((rows, 1), m, dtype=torch.float16)
    integers = torch.tensor([q] * rows, dtype=torch.uint8)
    return Blocks(integers, torch.full((rows, 1), d, dtype=torch.float16), minima)


@pytest.mark.parametrize("kind", LITERAL)
def test_literal_bytes(kind):
    data, *_ = LITERAL[kind]
    assert bytes(join(kind, blocks(kind)).flatten().tolist()) == data
    got = split(kind, torch.frombuffer(bytearray(data), dtype=torch.uint8)[None])
    for mine, expected in zip(got, blocks(kind), strict=True):
        assert mine is None if expected is None else torch.equal(mine, expected)


def test_a_block_in_full():
    """Q4_0 of the integers 0, 1, ... 15, 15, ... 0 with the scale 1."""
    q = torch.tensor([[*range(16), *range(15, -1, -1)]], dtype=torch.uint8)
    made = join(GgmlType.Q4_0, Blocks(q, torch.ones(1, 1, dtype=torch.float16), None))
    assert bytes(made[0].tolist()).hex() == "003cf0e1d2c3b4a5968778695a4b3c2d1e0f"


@pytest.mark.parametrize("kind", LITERAL)
def test_the_gguf_package_reads_the_same_weights(kind):
    generator = torch.Generator().manual_seed(1)
    most = 256 if kind == GgmlType.Q8_0 else 16
    q = torch.randint(most, (5, 96), generator=generator, dtype=torch.uint8)
    d, m = torch.randn(2, 5, 3, generator=generator).half()
    made = Blocks(q, d, m if kind == GgmlType.Q4_1 else None)
    stored = join(kind, made)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert stored.shape == (5, 96 // block * size)
    wide = [part.float().repeat_interleave(32, 1) for part in (d, m)]
    expected = VALUES[kind](q.float(), *wide)
    got = torch.from_numpy(gguf.dequantize(stored.numpy(), kind))
    assert torch.equal(got, expected)
    for mine, original in zip(split(kind, stored), made, strict=True):
        assert mine is None if original is None else torch.equal(mine, original)


@pytest.mark.parametrize("kind", LITERAL)
def test_blocks_of_the_gguf_package_are_taken_apart(kind):
    weight = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    stored = gguf.quantize(weight, kind)
    q, d, m = split(kind, torch.from_numpy(stored))
    wide = [None if part is None else part.float().repeat_interleave(32, 1) for part in (d, m)]
    assert np.array_equal(VALUES[kind](q.float(), *wide).numpy(), gguf.dequantize(stored, kind))
    assert struct.unpack("<e", bytes(stored[0, :2]))[0] == float(d[0, 0])
