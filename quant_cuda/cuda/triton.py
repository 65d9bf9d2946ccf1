"""Matmul with a tiled weight in Triton, for when no CUDA kernels were built and to check them.

Imports triton, so import this module only where it is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_cuda import reference
from quant_cuda.cuda.layout import BLOCK_WORDS, TILE, KernelWeight, Plain, Tiled, restore

__all__ = ["matmul", "variants"]


@triton.jit
def product(
    x,
    words,
    table,
    y,
    rows,
    inputs,
    outputs,
    columns,
    blocks,
    shift,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x (rows, inputs) times a weight whose words csrc/layout.h places, BLOCK_K inputs of one
    group at a time, STEPS times. y: (splits, rows, outputs); splits is the grid's third dimension.

    STEPS is a constant, because Triton's interpreter cannot loop over an argument's value.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first = tl.arange(0, BLOCK_K // PER_WORD) * PER_WORD  # the first input of each word
    field = tl.arange(0, PER_WORD)
    field_shift = 16 * (field % 2) + 4 * (field // 2) if BITS == 4 else 8 * field
    has_column = n < columns
    column_at = (n // 16).to(tl.int64) * blocks * 256 + n % 16 // 8 * 128 + n % 8 * 16

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(STEPS):
        start = (step * tl.num_programs(2) + tl.program_id(2)) * BLOCK_K
        i = start + first
        run = i % BLOCK_INPUTS // 32
        word_at = i // BLOCK_INPUTS * 256 + i % 32 // 8 * 4 + run * (BITS // 4) + i % 8 // PER_WORD
        has_word = (i[:, None] < inputs) & has_column[None, :]
        w = tl.load(words + word_at[:, None] + column_at[None, :], mask=has_word, other=0)
        q = (w[:, None, :] >> field_shift[None, :, None]) & ((1 << BITS) - 1)
        q = tl.reshape(q, (BLOCK_K, BLOCK_N))
        entry_at = (start >> shift) * columns + n
        # A block is compared, because newer interpreters take no scalar's comparison for a mask.
        has_entry = has_column & (start + 0 * n < inputs)
        entry = tl.load(table + entry_at, mask=has_entry, other=0)
        scale = (entry & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        steps = (q - (entry >> 16)[None, :]).to(x.dtype.element_ty)
        has_x = (m[:, None] < rows) & (start + k[None, :] < inputs)
        row_at = m[:, None].to(tl.int64) * inputs + start + k[None, :]
        a = tl.load(x + row_at, mask=has_x, other=0.0)
        total += tl.dot(a, steps, input_precision="ieee") * scale[None, :]

    y_at = (tl.program_id(2).to(tl.int64) * rows + m[:, None]) * outputs + n[None, :]
    is_result = (m[:, None] < rows) & (n[None, :] < outputs)
    tl.store(y + y_at, total.to(y.dtype.element_ty), mask=is_result)


def matmul(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """x times a weight of `layout.prepare`, on x's device and its current stream.

    x: float16, bfloat16 or float32 (..., in), any strides. bias: floating (out,).
    Returns x's dtype (..., out), of sums formed in float32. A weight that is not tiled is
    dequantized and multiplied by torch.
    Raises TypeError or ValueError for an x that does not fit.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x must be float16, bfloat16 or float32 on a GPU, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of {weight.in_features} inputs"
        )
    if isinstance(weight, Plain):
        return reference.matmul(x, restore(weight), bias)
    rows = x.reshape(-1, weight.in_features)
    if weight.order is not None:
        rows = rows.index_select(1, weight.order)
    if rows.shape[0] == 0 or weight.out_features == 0:
        return x.new_zeros((*x.shape[:-1], weight.out_features))
    y = _launch(rows.contiguous(), weight, x.dtype if bias is None else torch.float32)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)


def variants(bits: int, shift: int, rows: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's constants for rows of x times a weight with 2**shift inputs a table row."""
    block_inputs = BLOCK_WORDS * 32 // bits // TILE
    # Tensor cores do not multiply float32: larger blocks would only take longer to compile.
    most = 16 if dtype == torch.float32 else 64
    block_m = max(16, min(most, 1 << (rows - 1).bit_length()))
    return {
        "BITS": bits,
        "BLOCK_INPUTS": block_inputs,
        "BLOCK_M": block_m,
        "BLOCK_N": 32 if block_m == 16 else 64,
        "BLOCK_K": min(block_inputs, 1 << shift),
    }


def _launch(x: Tensor, weight: Tiled, dtype: torch.dtype) -> Tensor:
    """x: (rows, in), contiguous, in the order of the words. Returns `dtype` (rows, out)."""
    constants = variants(weight.bits, weight.shift, x.shape[0], x.dtype)
    blocks_n = triton.cdiv(weight.columns, constants["BLOCK_N"])
    blocks_m = triton.cdiv(x.shape[0], constants["BLOCK_M"])
    # With few columns and rows the GPU is filled by splitting the inputs too.
    steps = triton.cdiv(weight.in_features, constants["BLOCK_K"])
    splits = max(1, min(256 // (blocks_n * blocks_m), steps // 4))
    stored = dtype if splits == 1 else torch.float32
    y = x.new_empty((splits, x.shape[0], weight.out_features), dtype=stored)
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device_of(x):
        product[(blocks_n, blocks_m, splits)](
            x,
            weight.words,
            weight.table,
            y,
            rows=x.shape[0],
            inputs=weight.in_features,
            outputs=weight.out_features,
            columns=weight.columns,
            blocks=weight.words.shape[1],
            shift=weight.shift,
            STEPS=triton.cdiv(steps, splits),
            **constants,
        )
    return y[0] if splits == 1 else y.sum(0).to(dtype)
