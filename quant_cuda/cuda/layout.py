"""The GPU kernels' layout of a weight, made of a packed weight and turned back into one.

csrc/layout.h defines the order of words. A table holds scales and zero points.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_cuda import reference
from quant_cuda.packing import pack, pack_zeros, unpack, unpack_zeros
from quant_cuda.weight import PackedWeight, group_count, group_length, natural_groups

TILE = 16
COLUMNS = 32
"""Outputs are padded to a multiple of this."""
BLOCK_WORDS = 256
SMALLEST_UNIT = 32
# Columns whose integers are reordered at a time, to bound the memory that takes.
_CHUNK = 1024


@dataclass(frozen=True)
class Tiled:
    """A weight of 4 or 8 bits for the fast kernels."""

    words: Tensor
    """int32 (columns / 16, blocks, 256), as csrc/layout.h places them; padding is zero."""
    table: Tensor
    """int32 (units, columns): bits of a float16 scale below, zero point above; padding is zero."""
    order: Tensor | None
    """int64 (in,): the input of x that is the i-th of the words; None for the natural order."""
    bits: int
    shift: int
    """A row of the table serves 2**shift inputs."""
    in_features: int
    out_features: int
    group_size: int
    zero_offset: int
    scales_dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Outputs with their padding."""
        return self.table.shape[1]


@dataclass(frozen=True)
class Plain:
    """A weight whose words are as in a checkpoint, for the kernels that take any weight."""

    qweight: Tensor
    """int32 (in * bits / 32, out)."""
    scales: Tensor
    """float32 (groups, out)."""
    zeros: Tensor
    """float32 (groups, out)."""
    g_idx: Tensor | None
    """int32 (in,); None for runs of group_size."""
    bits: int
    in_features: int
    out_features: int
    group_size: int
    zero_offset: int
    scales_dtype: torch.dtype


KernelWeight = Tiled | Plain


def prepare(weight: PackedWeight) -> KernelWeight:
    """Reorder a weight, on its device, for the CUDA and Triton kernels.

    `Tiled` for 4 and 8 bits in groups that are runs of a multiple of 32 inputs, once the inputs
    are sorted by group, with scales that float16 holds exactly; `Plain` otherwise.
    """
    shift = table_shift(weight.group_size, weight.in_features)
    half = weight.scales.to(torch.float16)
    exact = bool((half.to(weight.scales.dtype) == weight.scales).all())
    order, in_runs = _order(weight)
    if weight.bits not in (4, 8) or shift is None or not exact or not in_runs:
        return plain(weight)
    zeros = unpack_zeros(weight.qzeros, weight.bits, weight.out_features, weight.zero_offset)
    entries = (half.view(torch.int16).to(torch.int32) & 0xFFFF) | (zeros << 16)
    units = -(-weight.in_features // (1 << shift))
    size = group_length(weight.in_features, weight.group_size)
    starts = torch.arange(units, device=entries.device) * (1 << shift)
    return Tiled(
        words=_to_tiles(_ordered_words(weight, order), weight.bits, weight.in_features),
        table=_pad(entries[starts // size], units, _padded(weight.out_features)),
        order=order,
        bits=weight.bits,
        shift=shift,
        in_features=weight.in_features,
        out_features=weight.out_features,
        group_size=weight.group_size,
        zero_offset=weight.zero_offset,
        scales_dtype=weight.scales.dtype,
    )


def plain(weight: PackedWeight) -> Plain:
    """The weight itself, with its scales and zero points as float32."""
    zeros = unpack_zeros(weight.qzeros, weight.bits, weight.out_features, weight.zero_offset)
    return Plain(
        qweight=weight.qweight.contiguous(),
        scales=weight.scales.float().contiguous(),
        zeros=zeros.float().contiguous(),
        g_idx=None if weight.g_idx is None else weight.g_idx.contiguous(),
        bits=weight.bits,
        in_features=weight.in_features,
        out_features=weight.out_features,
        group_size=weight.group_size,
        zero_offset=weight.zero_offset,
        scales_dtype=weight.scales.dtype,
    )


def restore(weight: KernelWeight) -> PackedWeight:
    """Undo `prepare`. A g_idx that was natural order spelled out comes back as None."""
    if isinstance(weight, Plain):
        return PackedWeight(
            qweight=weight.qweight,
            qzeros=pack_zeros(weight.zeros, weight.bits, weight.zero_offset),
            scales=weight.scales.to(weight.scales_dtype),
            g_idx=weight.g_idx,
            bits=weight.bits,
            group_size=weight.group_size,
            in_features=weight.in_features,
            zero_offset=weight.zero_offset,
        )
    bits, inputs, outputs = weight.bits, weight.in_features, weight.out_features
    size = group_length(inputs, weight.group_size)
    groups = group_count(inputs, weight.group_size)
    starts = torch.arange(groups, device=weight.table.device) * size
    entries = weight.table[starts >> weight.shift, :outputs]
    qweight = _from_tiles(weight.words, bits, inputs)[:, :outputs].contiguous()
    g_idx = None
    if weight.order is not None:
        natural = torch.arange(inputs, device=weight.order.device)
        inverse = torch.empty_like(weight.order)
        inverse[weight.order] = natural
        qweight = _reordered(qweight, bits, inputs, inverse)
        g_idx = (inverse // size).to(torch.int32)
    return PackedWeight(
        qweight=qweight,
        qzeros=pack_zeros(entries >> 16, bits, weight.zero_offset),
        scales=entries.to(torch.int16).view(torch.float16).to(weight.scales_dtype),
        g_idx=g_idx,
        bits=bits,
        group_size=weight.group_size,
        in_features=inputs,
        zero_offset=weight.zero_offset,
    )


def rows(weight: KernelWeight, columns: Tensor) -> Tensor:
    """The weights of some outputs, int64 (n,), as float32 (n, in), without waiting for the GPU."""
    bits, inputs = weight.bits, weight.in_features
    natural = natural_groups(inputs, weight.group_size, columns.device)
    if isinstance(weight, Plain):
        q = unpack(weight.qweight[:, columns], bits, inputs)
        group = natural if weight.g_idx is None else weight.g_idx
        zeros, scales = weight.zeros[:, columns], weight.scales[:, columns]
        return reference.dequantized(q, zeros, scales, group)
    # The whole tile of each column is gathered; its other columns are then left out.
    words = _from_tiles(weight.words[columns // TILE], bits, inputs)
    places = torch.arange(len(columns), device=columns.device) * TILE + columns % TILE
    entries = weight.table[:, columns]
    scales = entries.to(torch.int16).view(torch.float16)
    # A row of the table may serve less than a group.
    row = torch.arange(inputs, device=columns.device) >> weight.shift
    values = reference.dequantized(
        unpack(words[:, places], bits, inputs), entries >> 16, scales, row
    )
    if weight.order is None:
        return values
    ordered = torch.empty_like(values)
    ordered[:, weight.order] = values
    return ordered


def _order(weight: PackedWeight) -> tuple[Tensor | None, bool]:
    """The order that sorts inputs by group, None if they are sorted; and whether sorted groups are
    runs of the group size."""
    if weight.g_idx is None:
        return None, True
    natural = natural_groups(weight.in_features, weight.group_size, weight.g_idx.device)
    if torch.equal(weight.g_idx.long(), natural):
        return None, True
    ordered, order = torch.sort(weight.g_idx.long(), stable=True)
    return order, torch.equal(ordered, natural)


def table_shift(group_size: int, inputs: int) -> int | None:
    """log2 of the inputs that a row of the table serves: the largest that divides a group."""
    if group_size == -1 or group_size >= inputs:
        return 30
    if group_size % SMALLEST_UNIT:
        return None
    return (group_size & -group_size).bit_length() - 1


def _ordered_words(weight: PackedWeight, order: Tensor | None) -> Tensor:
    if order is None:
        return weight.qweight
    return _reordered(weight.qweight, weight.bits, weight.in_features, order)


def _reordered(qweight: Tensor, bits: int, inputs: int, order: Tensor) -> Tensor:
    """Words of the same columns with their inputs in another order."""
    chunks = [
        pack(unpack(columns, bits, inputs)[order], bits) for columns in qweight.split(_CHUNK, 1)
    ]
    return torch.cat(chunks, 1)


def _padded(outputs: int) -> int:
    return -(-outputs // COLUMNS) * COLUMNS


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    padded = matrix.new_zeros((rows, columns))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _to_tiles(qweight: Tensor, bits: int, inputs: int) -> Tensor:
    """(words, out) in the order of docs/format.md to (tiles, blocks, 256)."""
    blocks = -(-inputs * bits // (BLOCK_WORDS * 32 // TILE))
    padded = _pad(qweight, blocks * BLOCK_WORDS // TILE, _padded(qweight.shape[1]))
    per_run = bits // 4  # words of a lane in a run of 32 inputs
    # block, run, lane t, word, tile, half, lane g  ->  tile, block, half, g, t, run, word
    split = _interleave(padded, bits).view((blocks, 4 // per_run, 4, per_run, -1, 2, 8))
    return split.permute((4, 0, 5, 6, 2, 1, 3)).reshape(-1, blocks, BLOCK_WORDS).contiguous()


def _from_tiles(words: Tensor, bits: int, inputs: int) -> Tensor:
    """Undo `_to_tiles`, but for the padding of columns."""
    tiles, blocks, _ = words.shape
    per_run = bits // 4
    split = words.view((tiles, blocks, 2, 8, 4, 4 // per_run, per_run))
    rows = split.permute((1, 5, 4, 6, 0, 2, 3)).reshape(blocks * BLOCK_WORDS // TILE, tiles * TILE)
    return _deinterleave(rows, bits)[: inputs * bits // 32]


def _interleave(words: Tensor, bits: int) -> Tensor:
    """4-bit value e of a word to bits 16 * (e % 2) + 4 * (e // 2); 8-bit words are left alone."""
    if bits == 8:
        return words
    moved = torch.zeros_like(words)
    for e in range(8):
        moved |= (words >> (4 * e) & 15) << (16 * (e % 2) + 4 * (e // 2))
    return moved


def _deinterleave(words: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return words
    moved = torch.zeros_like(words)
    for e in range(8):
        moved |= (words >> (16 * (e % 2) + 4 * (e // 2)) & 15) << (4 * e)
    return moved
