"""2, 3, 4 and 8 bit integers in 32-bit words: the one normative definition of the layout.

Each column of a packed matrix is one little-endian stream of bits: value k of the column takes
bits [k*bits, (k+1)*bits) of the stream, whose word w holds bits [32*w, 32*(w+1)), lowest first.
3-bit values may straddle two words. docs/format.md shows the same in pictures and examples.
"""

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def words_for(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` values of `bits` bits; the last may be part full."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers along the first dimension.

    values: any integer dtype, (n, m), each in 0..2**bits - 1.
    Returns int32 (ceil(n * bits / 32), m); spare bits of the last word are zero.
    Raises ValueError for a value out of range or bits not in 2, 3, 4, 8.
    """
    _check_bits(bits)
    n, m = values.shape
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
        raise ValueError(
            f"a value to pack lies outside 0..{(1 << bits) - 1}, the range of {bits} bits"
        )
    if bits != 3:
        return _pack_bytes(values, bits)
    # One period is the smallest run of values that ends on a word boundary.
    per_period, words = _period(bits)
    periods = -(-n // per_period)
    padded = values.new_zeros((periods * per_period, m), dtype=torch.int64)
    padded[:n] = values
    padded = padded.view(periods, per_period, m)
    packed = torch.zeros((periods, words, m), dtype=torch.int64, device=values.device)
    for k in range(per_period):
        word, shift = divmod(k * bits, 32)
        packed[:, word] |= padded[:, k] << shift
        if shift + bits > 32:
            packed[:, word + 1] |= padded[:, k] >> (32 - shift)
    packed = packed.view(periods * words, m)[: words_for(n, bits)] & 0xFFFFFFFF
    # Words above 2**31 - 1 become negative int32 of the same bits.
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _pack_bytes(values: Tensor, bits: int) -> Tensor:
    """`pack` where no value crosses a byte's edge: by way of bytes, which is eight times less
    memory than whole words of each value."""
    n, m = values.shape
    words = words_for(n, bits)
    padded = torch.zeros((words * 32 // bits, m), dtype=torch.uint8, device=values.device)
    padded[:n] = values
    fields = padded.view(words * 4, 8 // bits, m)
    packed = fields[:, 0].clone()
    for k in range(1, 8 // bits):
        packed |= fields[:, k] << (k * bits)
    # The four bytes of a word, lowest first, side by side: int32 on a little-endian machine.
    turned = torch.empty((words, m, 4), dtype=torch.uint8, device=values.device)
    turned.copy_(packed.view(words, 4, m).transpose(1, 2))
    return turned.view(torch.int32).view(words, m)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`.

    words: int32 (ceil(count * bits / 32), m). Returns uint8 (count, m).
    Raises ValueError when the number of words does not fit `count`.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.shape[0] != words_for(count, bits):
        raise ValueError(
            f"{count} values of {bits} bits take {words_for(count, bits)} int32 words a column, "
            f"not {words.shape[0]} of {words.dtype}"
        )
    m = words.shape[1]
    per_period, per_words = _period(bits)
    mask = (1 << bits) - 1
    if per_words == 1:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        # The mask removes what the arithmetic shift of a negative word draws in.
        values = (words.unsqueeze(1) >> shifts.view(1, -1, 1)).bitwise_and_(mask)
        return values.to(torch.uint8).reshape(-1, m)[:count]
    periods = -(-count // per_period)
    padded = words.new_zeros((periods * per_words, m))
    padded[: words.shape[0]] = words
    padded = padded.view(periods, per_words, m)
    values = words.new_empty((periods, per_period, m), dtype=torch.uint8)
    for k in range(per_period):
        word, shift = divmod(k * bits, 32)
        value = padded[:, word] >> shift
        if shift + bits > 32:
            low = 32 - shift
            value = (value & ((1 << low) - 1)) | (padded[:, word + 1] << low)
        values[:, k] = (value & mask).to(torch.uint8)
    return values.view(-1, m)[:count]


def fields(words: Tensor, bits: int, columns: Tensor) -> Tensor:
    """The fields of some outputs alone, out of words that are packed along the outputs.

    words: int32 (groups, ceil(out * bits / 32)), as `qzeros`; columns: int64 (n,), each in
    0..out - 1. Returns int32 (groups, n).
    """
    first = columns * bits
    word, shift = first // 32, first % 32
    low = words[:, word].to(torch.int64) & 0xFFFFFFFF
    # The next word matters only to a 3-bit field that straddles two, and is then there.
    high = words[:, (word + 1).clamp(max=words.shape[1] - 1)].to(torch.int64) & 0xFFFFFFFF
    return ((low | high << 32) >> shift & ((1 << bits) - 1)).to(torch.int32)


def pack_zeros(zeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Pack zero points along the output dimension, less the offset of the format's era.

    zeros: integer (groups, out), each in zero_offset..2**bits - 1 + zero_offset.
    zero_offset: 1 for the "gptq" format (v1), 0 for "gptq_v2".
    Returns int32 (groups, ceil(out * bits / 32)).
    Raises ValueError for a zero that the era cannot store.
    """
    stored = zeros.to(torch.int64) - zero_offset
    if stored.numel() and int(stored.min()) < 0:
        raise ValueError(
            f"a zero point of {int(zeros.min())} cannot be stored with an offset of {zero_offset}"
        )
    return pack(stored.T, bits).T.contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, out_features: int, zero_offset: int) -> Tensor:
    """Undo `pack_zeros`: int32 (groups, ceil(out * bits / 32)) to int32 (groups, out).

    The offset is added without wrapping around: a v1 field of all ones reads as 2**bits.
    """
    return unpack(qzeros.T.contiguous(), bits, out_features).T.to(torch.int32) + zero_offset


def _period(bits: int) -> tuple[int, int]:
    """Values and words in the shortest run of values that ends on a word boundary."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{bits} bits cannot be packed; choose one of 2, 3, 4, 8")
