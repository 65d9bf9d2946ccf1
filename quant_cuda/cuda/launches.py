"""How one kernel is launched: what it is given, its scratch memory, and what is done to its result.

`kernels` says which kernel multiplies what.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quant_cuda.cuda.layout import KernelWeight, Plain, Tiled
from quant_cuda.cuda.library import Launch
from quant_cuda.weight import group_length

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class Product(NamedTuple):
    """What a kernel may want to know of a matmul before it takes it."""

    rows: int
    """Of x."""
    dtype: torch.dtype
    """Of x: float16, bfloat16 or float32."""
    weight: KernelWeight
    wgmma: bool
    """Whether the GPU runs the kernel for compute capability 9.0."""

    @property
    def is_tiled(self) -> bool:
        """Whether the tensor-core kernels fit: they take 16-bit x and tiles."""
        return isinstance(self.weight, Tiled) and self.dtype != torch.float32


@dataclass(frozen=True)
class Kernel:
    """One way to multiply."""

    name: str
    """Its launcher in csrc/cuda is `quant_cuda_<name>`, if `launcher` names no other."""
    signature: str | None
    """The launcher's C arguments: p for a pointer, i for an int; the last one is the stream."""
    takes: Callable[[Product], bool]
    """Whether it is meant for the product."""
    launch: "LaunchFunction"
    """(kernel, launch, x, weight, bias) -> y in x's dtype (rows, out); chooses the grid.

    x: (rows, in), rows at least 1, inputs in the order of the weight's words.
    bias: floating (out,) or None.
    """
    launcher: str | None = None
    """The launcher that a variant shares with others."""
    runs: Callable[[Product], bool] | None = None
    """Whether it computes the product, be it the best choice or not; None: what it takes."""

    def __call__(self, launch: Launch, *arguments: int | Tensor | None) -> None:
        """Call the launcher."""
        launch(self.launcher or self.name, *arguments, signature=self.signature)


LaunchFunction = Callable[[Kernel, Launch, Tensor, KernelWeight, Tensor | None], Tensor]


def splits_for(thread_blocks: int, most: int, wanted: int) -> int:
    """Thread blocks that share the inputs, so that there are nearly `wanted` in all."""
    return max(1, min(wanted // thread_blocks, most))


Grid = Callable[[int, Tiled, int], tuple[int, tuple[int, ...]]]
"""(rows of x, weight, multiprocessors) -> thread blocks that share the inputs (split K), and the
launcher's own last arguments."""


def tiled(grid: Grid, adds: bool = False) -> LaunchFunction:
    """`Kernel.launch` of a kernel that takes tiles.

    adds: whether thread blocks that share the inputs add up their sums themselves.
    """

    def launch_tiled(
        kernel: Kernel, launch: Launch, x: Tensor, weight: KernelWeight, bias: Tensor | None
    ) -> Tensor:
        assert isinstance(weight, Tiled)
        x, bias = aligned(x), _float32(bias)
        splits, last = grid(x.shape[0], weight, launch.processors)
        y = x.new_empty((x.shape[0], weight.out_features))
        partial = (
            x.new_empty((splits, *y.shape), dtype=torch.float32)
            if splits > 1 and not adds
            else None
        )
        tensors = (x, weight.words, weight.table, bias, y, partial)
        sizes = (*x.shape, weight.out_features, weight.columns, weight.shift, splits, *last)
        kernel(launch, weight.bits, TYPES[x.dtype], *tensors, *sizes)
        if partial is not None:
            _add_partials(launch, partial, bias, y)
        return y

    return launch_tiled


def plain(
    kernel: Kernel, launch: Launch, x: Tensor, weight: KernelWeight, bias: Tensor | None
) -> Tensor:
    """`Kernel.launch` of plain.cu, which takes float32 x."""
    assert isinstance(weight, Plain)
    y = x.new_empty((x.shape[0], weight.out_features))
    x = x.float().contiguous()
    blocks = -(-weight.out_features // 128) * -(-x.shape[0] // 8)
    splits = splits_for(blocks, -(-weight.in_features // 64), 8 * launch.processors)
    partial = x.new_empty((splits, *y.shape))
    tensors = (x, weight.qweight, weight.scales, weight.zeros, weight.g_idx, partial)
    group_size = group_length(weight.in_features, weight.group_size)
    sizes = (*x.shape, weight.out_features, group_size, splits)
    kernel(launch, weight.bits, *tensors, *sizes)
    _add_partials(launch, partial, _float32(bias), y)
    return y


def dense(
    kernel: Kernel, launch: Launch, x: Tensor, weight: KernelWeight, bias: Tensor | None
) -> Tensor:
    """`Kernel.launch` of torch's matmul with the dequantized weight."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, dequantized(launch, weight, x.dtype).T, bias)


def dequantized(launch: Launch, weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """(in, out), inputs in the order of the words."""
    inputs, outputs = weight.in_features, weight.out_features
    kinds = (weight.bits, TYPES[dtype])
    if isinstance(weight, Tiled):
        dense = weight.words.new_empty((outputs, inputs), dtype=dtype)
        sizes = (inputs, outputs, weight.columns, weight.shift)
        launch("dequantize", *kinds, weight.words, weight.table, dense, *sizes)
        return dense.T
    dense = weight.scales.new_empty((inputs, outputs), dtype=dtype)
    tensors = (weight.qweight, weight.scales, weight.zeros, weight.g_idx, dense)
    group_size = group_length(inputs, weight.group_size)
    launch("plain_dequantize", *kinds, *tensors, inputs, outputs, group_size)
    return dense


def _add_partials(launch: Launch, partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Sum the partial sums (splits, rows, out), in order, and the bias, into y (rows, out)."""
    sizes = (len(partial), y.numel(), y.shape[1])
    launch("add_partials", TYPES[y.dtype], partial, bias, y, *sizes)


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def aligned(rows: Tensor) -> Tensor:
    """Contiguous, a multiple of 8 wide and 16-byte aligned, because the kernels load 16 bytes."""
    short = -rows.shape[1] % 8
    if short:
        return torch.nn.functional.pad(rows, (0, short))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows
