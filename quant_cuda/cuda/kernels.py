"""Which CUDA kernel multiplies what, and how each is launched.

To add one, write csrc/cuda/x.cu and a row of KERNELS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quant_cuda.cuda.layout import COLUMNS, KernelWeight, Plain, Tiled
from quant_cuda.cuda.library import LIBRARY, Launch, available, current, load
from quant_cuda.weight import group_length

__all__ = [
    "KERNELS",
    "LIBRARY",
    "Kernel",
    "Launch",
    "Product",
    "available",
    "current",
    "dequantize",
    "kernel_for",
    "launch_dequantize",
    "launch_matmul",
    "load",
    "matmul",
]

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# The most rows of x that each kernel takes. For more of them, dequantizing the weight and a dense
# matmul is faster, as measured with 8192 x 8192 weights on an H200, see benchmarks/results.
GEMV_ROWS = 32
GEMM_ROWS = 127
GEMM_ROWS_BEFORE_WGMMA = 64
WGMMA_ROWS = 512


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
    """Its launcher in csrc/cuda is `quant_cuda_<name>`."""
    signature: str | None
    """The launcher's C arguments: p for a pointer, i for an int; the last one is the stream."""
    takes: Callable[[Product], bool]
    launch: "_LaunchFunction"
    """(kernel, launch, x, weight, bias) -> y in x's dtype (rows, out); chooses the grid.

    x: (rows, in), rows at least 1, inputs in the order of the weight's words.
    bias: floating (out,) or None.
    """

    def __call__(self, launch: Launch, *arguments: int | Tensor | None) -> None:
        """Call the launcher."""
        launch(self.name, *arguments, signature=self.signature)


_LaunchFunction = Callable[[Kernel, Launch, Tensor, KernelWeight, Tensor | None], Tensor]


def matmul(
    x: Tensor, weight: KernelWeight, bias: Tensor | None = None, kernel: str | None = None
) -> Tensor:
    """x times a weight of `layout.prepare`, on x's device and its current stream.

    x: float16, bfloat16 or float32 (..., in), on a GPU, any strides. bias: floating (out,).
    kernel: a name in KERNELS; None for the one that `kernel_for` chooses.
    Returns x's dtype (..., out). Sums are formed in float32, in an order that depends on the
    shapes and the GPU alone: the same call gives the same bits.
    Raises ValueError for a shape or device that does not fit, RuntimeError if a launch fails.
    """
    launch = _launch_on(x, weight)
    with torch.cuda.device(x.device):
        return launch_matmul(launch, x, weight, bias, kernel)


def dequantize(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """The dequantized weight: float16, bfloat16 or float32 (in, out), on its GPU."""
    words = packed_words(weight)
    launch = _launch_on(words, weight)
    with torch.cuda.device(words.device):
        return launch_dequantize(launch, weight, dtype)


def packed_words(weight: KernelWeight) -> Tensor:
    return weight.words if isinstance(weight, Tiled) else weight.qweight


def kernel_for(rows: int, dtype: torch.dtype, weight: KernelWeight, wgmma: bool) -> Kernel:
    """The first of KERNELS that takes so many rows of x in this dtype."""
    product = Product(rows, dtype, weight, wgmma)
    return next(kernel for kernel in KERNELS if kernel.takes(product))


def named(name: str) -> Kernel:
    """The kernel of this name. Raises ValueError if there is none."""
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"there is no kernel {name!r}; choose one of {[k.name for k in KERNELS]}")


def launch_matmul(
    launch: Launch,
    x: Tensor,
    weight: KernelWeight,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """`matmul` on a stream of the current device."""
    if x.dtype not in _TYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32 on a GPU, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of {weight.in_features} inputs"
        )
    rows = x.reshape(-1, weight.in_features)
    shape = (*x.shape[:-1], weight.out_features)
    if rows.shape[0] == 0 or weight.out_features == 0:
        return x.new_zeros(shape)
    if isinstance(weight, Tiled) and weight.order is not None:
        rows = rows.index_select(1, weight.order)
    if kernel is None:
        chosen = kernel_for(len(rows), x.dtype, weight, launch.wgmma)
    else:
        chosen = named(kernel)
    return chosen.launch(chosen, launch, rows, weight, bias).view(shape)


def launch_dequantize(launch: Launch, weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize` on a stream of the current device."""
    if dtype not in _TYPES:
        raise TypeError(f"a weight is written out as float16, bfloat16 or float32, not {dtype}")
    dense = _dequantized(launch, weight, dtype)
    if isinstance(weight, Plain) or weight.order is None:
        return dense
    natural = torch.empty_like(dense)
    natural[weight.order] = dense
    return natural


def _launch_on(x: Tensor, weight: KernelWeight) -> Launch:
    device = packed_words(weight).device
    if not x.is_cuda or x.device != device:
        raise ValueError(f"x is on {x.device}, the weight on {device}; both must be a GPU's")
    return current(x)


# Grids: thread blocks that share the inputs (split K), and the launcher's own last arguments -----


def _gemv_grid(rows: int, weight: Tiled, processors: int) -> tuple[int, tuple[int, ...]]:
    blocks = weight.words.shape[1]
    return _splits(weight.columns // COLUMNS, blocks // 8, 2 * processors), ()


def _gemm_grid(rows: int, weight: Tiled, processors: int) -> tuple[int, tuple[int, ...]]:
    row_tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    thread_blocks = _blocks(rows, row_tile, weight.columns, 128)
    return _splits(thread_blocks, weight.words.shape[1] // 4, processors), (row_tile,)


def _wgmma_grid(rows: int, weight: Tiled, processors: int) -> tuple[int, tuple[int, ...]]:
    column_tile = _column_tile(rows, weight.columns, processors)
    thread_blocks = _blocks(rows, 128, weight.columns, column_tile)
    return _splits(thread_blocks, weight.words.shape[1] // 4, processors), (column_tile,)


def _blocks(rows: int, row_tile: int, columns: int, column_tile: int) -> int:
    return -(-rows // row_tile) * -(-columns // column_tile)


def _column_tile(rows: int, columns: int, processors: int) -> int:
    """Columns of a thread block of wgmma.cu.

    The wider, the fewer times x is read; but if wide tiles are too few to fill the GPU, narrow ones
    are faster.
    """

    def cost(tile: int) -> float:
        waves = -(-_blocks(rows, 128, columns, tile) // max(processors, 1))
        return waves * tile * (1.25 if tile == 128 else 1.0)

    return min((256, 128), key=cost)


def _splits(thread_blocks: int, most: int, wanted: int) -> int:
    """Thread blocks that share the inputs, so that there are nearly `wanted` in all."""
    return max(1, min(wanted // thread_blocks, most))


# Launches -----------------------------------------------------------------------------------------


def _tiled(grid: Callable[[int, Tiled, int], tuple[int, tuple[int, ...]]]) -> _LaunchFunction:
    """`Kernel.launch` of a kernel that takes tiles."""

    def launch_tiled(
        kernel: Kernel, launch: Launch, x: Tensor, weight: KernelWeight, bias: Tensor | None
    ) -> Tensor:
        assert isinstance(weight, Tiled)
        x, bias = _aligned(x), _float32(bias)
        splits, last = grid(x.shape[0], weight, launch.processors)
        y = x.new_empty((x.shape[0], weight.out_features))
        partial = x.new_empty((splits, *y.shape), dtype=torch.float32) if splits > 1 else None
        tensors = (x, weight.words, weight.table, bias, y, partial)
        sizes = (*x.shape, weight.out_features, weight.columns, weight.shift, splits, *last)
        kernel(launch, weight.bits, _TYPES[x.dtype], *tensors, *sizes)
        if partial is not None:
            _add_partials(launch, partial, bias, y)
        return y

    return launch_tiled


def _plain(
    kernel: Kernel, launch: Launch, x: Tensor, weight: KernelWeight, bias: Tensor | None
) -> Tensor:
    """`Kernel.launch` of plain.cu, which takes float32 x."""
    assert isinstance(weight, Plain)
    y = x.new_empty((x.shape[0], weight.out_features))
    x = x.float().contiguous()
    blocks = -(-weight.out_features // 128) * -(-x.shape[0] // 8)
    splits = _splits(blocks, -(-weight.in_features // 64), 8 * launch.processors)
    partial = x.new_empty((splits, *y.shape))
    tensors = (x, weight.qweight, weight.scales, weight.zeros, weight.g_idx, partial)
    group_size = group_length(weight.in_features, weight.group_size)
    sizes = (*x.shape, weight.out_features, group_size, splits)
    kernel(launch, weight.bits, *tensors, *sizes)
    _add_partials(launch, partial, _float32(bias), y)
    return y


def _dense(
    kernel: Kernel, launch: Launch, x: Tensor, weight: KernelWeight, bias: Tensor | None
) -> Tensor:
    """`Kernel.launch` of torch's matmul with the dequantized weight."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, _dequantized(launch, weight, x.dtype).T, bias)


def _dequantized(launch: Launch, weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """(in, out), inputs in the order of the words."""
    inputs, outputs = weight.in_features, weight.out_features
    kinds = (weight.bits, _TYPES[dtype])
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
    launch("add_partials", _TYPES[y.dtype], partial, bias, y, *sizes)


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous, a multiple of 8 wide and 16-byte aligned, because the kernels load 16 bytes."""
    short = -rows.shape[1] % 8
    if short:
        return torch.nn.functional.pad(rows, (0, short))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


# The table ----------------------------------------------------------------------------------------


def _takes_gemm(product: Product) -> bool:
    return product.is_tiled and product.rows <= (
        GEMM_ROWS_BEFORE_WGMMA if product.wgmma else GEMM_ROWS
    )


# The first that takes a matmul launches it; the last takes all.
KERNELS = [
    Kernel(
        name="gemv",
        signature="ii pppppp iiiiii p",
        takes=lambda product: product.is_tiled and product.rows <= GEMV_ROWS,
        launch=_tiled(_gemv_grid),
    ),
    Kernel(
        name="gemm",
        signature="ii pppppp iiiiiii p",
        takes=_takes_gemm,
        launch=_tiled(_gemm_grid),
    ),
    Kernel(
        name="wgmma",
        signature="ii pppppp iiiiiii p",
        takes=lambda product: product.is_tiled and product.wgmma and product.rows <= WGMMA_ROWS,
        launch=_tiled(_wgmma_grid),
    ),
    Kernel(
        name="plain_multiply",
        signature="i pppppp iiiii p",
        takes=lambda product: isinstance(product.weight, Plain) and product.rows <= GEMM_ROWS,
        launch=_plain,
    ),
    Kernel(name="dense", signature=None, takes=lambda product: True, launch=_dense),
]
