"""Which CUDA kernel multiplies what.

To add one, write csrc/cuda/x.cu and a row of KERNELS. `variants` has other tiles of them, which a
tuned table may choose.
"""

import torch
from torch import Tensor

from quant_cuda.cuda.launches import (
    TYPES,
    Kernel,
    Product,
    dense,
    dequantized,
    plain,
    splits_for,
    tiled,
)
from quant_cuda.cuda.layout import COLUMNS, KernelWeight, Plain, Tiled
from quant_cuda.cuda.library import LIBRARY, Launch, available, current, load
from quant_cuda.cuda.tuned import Table
from quant_cuda.cuda.variants import VARIANTS

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

# The most rows of x that each kernel takes. For more of them, dequantizing the weight and a dense
# matmul is faster, as measured with 8192 x 8192 weights on an H200, see benchmarks/results.
GEMV_ROWS = 32
GEMM_ROWS = 127
GEMM_ROWS_BEFORE_WGMMA = 64
WGMMA_ROWS = 512


def matmul(
    x: Tensor, weight: KernelWeight, bias: Tensor | None = None, kernel: str | None = None
) -> Tensor:
    """x times a weight of `layout.prepare`, on x's device and its current stream.

    x: float16, bfloat16 or float32 (..., in), on a GPU, any strides. bias: floating (out,).
    kernel: a name in KERNELS or `variants`; None for the one that `kernel_for` chooses.
    Returns x's dtype (..., out). Sums are formed in float32, in an order that depends on the
    shapes and the GPU alone: the same call gives the same bits.
    Raises ValueError for a shape or device that does not fit, RuntimeError if a launch fails.
    """
    launch = _launch_on(x, weight)
    with torch.cuda.device(x.device):
        return launch_matmul(launch, x, weight, bias, kernel)


def chosen_for(x: Tensor, weight: KernelWeight) -> Kernel:
    """The kernel that `matmul` launches for x (rows, in) on its GPU."""
    launch = _launch_on(x, weight)
    return kernel_for(len(x), x.dtype, weight, launch.wgmma, launch.tuned)


def dequantize(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """The dequantized weight: float16, bfloat16 or float32 (in, out), on its GPU."""
    words = packed_words(weight)
    launch = _launch_on(words, weight)
    with torch.cuda.device(words.device):
        return launch_dequantize(launch, weight, dtype)


def packed_words(weight: KernelWeight) -> Tensor:
    return weight.words if isinstance(weight, Tiled) else weight.qweight


def kernel_for(
    rows: int,
    dtype: torch.dtype,
    weight: KernelWeight,
    wgmma: bool,
    tuned: Table | None = None,
) -> Kernel:
    """The kernel that takes so many rows of x in this dtype.

    tuned: what was measured on this GPU. Without it, or where it has nothing, the first of KERNELS
    that takes the matmul.
    """
    product = Product(rows, dtype, weight, wgmma)
    if tuned is not None and product.is_tiled:
        name = tuned.kernel(weight.bits, weight.in_features, weight.out_features, rows)
        # An entry serves fewer rows than were measured too, for which a variant need not be meant.
        if name is not None and runs(named(name), product):
            return named(name)
    return next(kernel for kernel in KERNELS if kernel.takes(product))


def runs(kernel: Kernel, product: Product) -> bool:
    """Whether a kernel computes a product, be it meant for it or not."""
    return (kernel.runs or kernel.takes)(product)


def named(name: str) -> Kernel:
    """The kernel or variant of this name. Raises ValueError if there is none."""
    if name in VARIANTS:
        return VARIANTS[name]
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    known = [*(kernel.name for kernel in KERNELS), *VARIANTS]
    raise ValueError(f"there is no kernel {name!r}; choose one of {known}")


def launch_matmul(
    launch: Launch,
    x: Tensor,
    weight: KernelWeight,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """`matmul` on a stream of the current device."""
    if x.dtype not in TYPES:
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
        chosen = kernel_for(len(rows), x.dtype, weight, launch.wgmma, launch.tuned)
    else:
        chosen = named(kernel)
    return chosen.launch(chosen, launch, rows, weight, bias).view(shape)


def launch_dequantize(launch: Launch, weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize` on a stream of the current device."""
    if dtype not in TYPES:
        raise TypeError(f"a weight is written out as float16, bfloat16 or float32, not {dtype}")
    dense = dequantized(launch, weight, dtype)
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


# Grids of thread blocks: see `launches.Grid` ------------------------------------------------------


def _gemv_grid(rows: int, weight: Tiled, processors: int) -> tuple[int, tuple[int, ...]]:
    blocks = weight.words.shape[1]
    return splits_for(weight.columns // COLUMNS, blocks // 8, 2 * processors), ()


def _gemm_grid(rows: int, weight: Tiled, processors: int) -> tuple[int, tuple[int, ...]]:
    row_tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    thread_blocks = _blocks(rows, row_tile, weight.columns, 128)
    return splits_for(thread_blocks, weight.words.shape[1] // 4, processors), (row_tile,)


def _wgmma_grid(rows: int, weight: Tiled, processors: int) -> tuple[int, tuple[int, ...]]:
    column_tile = _column_tile(rows, weight.columns, processors)
    thread_blocks = _blocks(rows, 128, weight.columns, column_tile)
    return splits_for(thread_blocks, weight.words.shape[1] // 4, processors), (column_tile,)


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
        launch=tiled(_gemv_grid),
    ),
    Kernel(
        name="gemm",
        signature="ii pppppp iiiiiii p",
        takes=_takes_gemm,
        launch=tiled(_gemm_grid),
    ),
    Kernel(
        name="wgmma",
        signature="ii pppppp iiiiiii p",
        takes=lambda product: product.is_tiled and product.wgmma and product.rows <= WGMMA_ROWS,
        launch=tiled(_wgmma_grid),
    ),
    Kernel(
        name="plain_multiply",
        signature="i pppppp iiiii p",
        takes=lambda product: isinstance(product.weight, Plain) and product.rows <= GEMM_ROWS,
        launch=plain,
    ),
    Kernel(name="dense", signature=None, takes=lambda product: True, launch=dense),
]
