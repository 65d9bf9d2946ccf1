"""The blocks of 32 weights in .gguf files whose integers packed layers have too.

    Q4_0    float16 d, 16 bytes                 weight d * (q - 8)
    Q4_1    float16 d, float16 m, 16 bytes      weight d * q + m
    Q8_0    float16 d, 32 bytes of int8 k       weight d * k, q = k + 128

Byte j of the 16 has integer j of the block in its low half and integer j + 16 in its high half. A
weight (out, in) is stored by outputs; each one's blocks follow each other in the order of inputs.
"""

from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor

BLOCK = 32
"""Weights in a block; they share a scale."""
# Bits of the integers of each type.
BITS = {GgmlType.Q4_0: 4, GgmlType.Q4_1: 4, GgmlType.Q8_0: 8}
# What is subtracted from them; None: a block has a minimum of its own.
ZEROS = {GgmlType.Q4_0: 8, GgmlType.Q4_1: None, GgmlType.Q8_0: 128}


class Blocks(NamedTuple):
    """The parts of a weight's blocks, apart."""

    q: Tensor
    """uint8 (out, in)."""
    d: Tensor
    """Scales, float16 (out, in / 32)."""
    m: Tensor | None
    """Minima, float16 (out, in / 32), of Q4_1 alone."""


def join(kind: GgmlType, blocks: Blocks) -> Tensor:
    """The bytes of a weight, uint8 (out, bytes of a row)."""
    outputs, count = blocks.d.shape
    q = blocks.q.view(outputs, count, BLOCK)
    # int8 k = q - 128 has the bits of q, but the highest one turned over.
    wide = kind == GgmlType.Q8_0
    rest = q ^ 128 if wide else q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4
    halves = [part for part in (blocks.d, blocks.m) if part is not None]
    first = [_as_bytes(part.unsqueeze(-1)) for part in halves]
    return torch.cat([*first, rest], -1).flatten(1)


def row_bytes(kind: GgmlType, inputs: int) -> int:
    """Bytes of one output's blocks."""
    return inputs // BLOCK * (_float_bytes(kind) + BLOCK * BITS[kind] // 8)


def integers(kind: GgmlType, stored: Tensor) -> Tensor:
    """q of `Blocks`. stored: uint8 (out, bytes of a row)."""
    parts = _rows(kind, stored)[..., _float_bytes(kind) :]
    wide = kind == GgmlType.Q8_0
    q = parts ^ 128 if wide else torch.cat([parts & 15, parts >> 4], -1)
    return q.flatten(1)


def floats(kind: GgmlType, stored: Tensor) -> tuple[Tensor, Tensor | None]:
    """d and m of `Blocks`. stored: uint8 (out, bytes of a row)."""
    parts = _rows(kind, stored)[..., : _float_bytes(kind)].contiguous().view(torch.float16)
    return parts[..., 0], parts[..., 1] if ZEROS[kind] is None else None


def split(kind: GgmlType, stored: Tensor) -> Blocks:
    """Undo `join`. stored: uint8 (out, bytes of a row)."""
    return Blocks(integers(kind, stored), *floats(kind, stored))


def _rows(kind: GgmlType, stored: Tensor) -> Tensor:
    """uint8 (out, in / 32, bytes of a block)."""
    return stored.unflatten(1, (-1, row_bytes(kind, BLOCK)))


def _float_bytes(kind: GgmlType) -> int:
    return 4 if ZEROS[kind] is None else 2


def _as_bytes(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.uint8)
