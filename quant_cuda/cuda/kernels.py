"""The CUDA kernels, where they were built: found beside this file, called through ctypes.

What launches takes tensors of whatever memory the library reads, so that tests hand it a library
of the same source built for the host.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant_cuda.cuda.layout import COLUMNS, Plain, Prepacked, Tiled, prepack, unprepack

__all__ = ["available", "dequantize", "matmul", "prepack", "unprepack"]

LIBRARY = Path(__file__).with_name("_cuda.so")

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# The most rows of x that each kernel takes; for more, writing the weight out and a dense product is
# the better way. As measured with 8192 x 8192 weights on an H200, see benchmarks/results.
GEMV_ROWS = 32
GEMM_ROWS = 127
GEMM_ROWS_BEFORE_WGMMA = 64
WGMMA_ROWS = 512

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "gemv": "ii pppppp iiiiii p",
    "gemm": "ii pppppp iiiiiii p",
    "wgmma": "ii pppppp iiiiiii p",
    "dequantize": "ii ppp iiii p",
    "add_partials": "i ppp iii p",
    "plain_multiply": "i pppppp iiiii p",
    "plain_dequantize": "ii ppppp iii p",
    "sweep_block": "pppppppppp iiiiiii p",
    "refine_group": "pppppp iiiii p",
}


def load(path: Path) -> ctypes.CDLL:
    """A library of the kernels, its functions' argument types declared."""
    library = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        kinds = [_POINTER if c == "p" else _INT for c in signature if c != " "]
        getattr(library, f"quant_cuda_{name}").argtypes = kinds
    library.quant_cuda_error.restype = ctypes.c_char_p
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(LIBRARY) if LIBRARY.exists() else None


@dataclass(frozen=True)
class Launch:
    """Where kernels run."""

    library: ctypes.CDLL
    stream: int
    processors: int
    """Multiprocessors of the device."""
    wgmma: bool = False
    """Whether it runs the kernel for compute capability 9.0."""

    def __call__(self, name: str, *arguments: int | Tensor | None) -> None:
        """Call a launcher; a tensor stands for its address."""
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        code = getattr(self.library, f"quant_cuda_{name}")(*plain, self.stream)
        if code:
            raise RuntimeError(f"{name} failed: {self.library.quant_cuda_error(code).decode()}")


@functools.cache
def available() -> bool:
    """Whether the kernels were built and there is a GPU that runs them (compute capability 8.0)."""
    if not LIBRARY.exists() or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def matmul(
    x: Tensor, weight: Prepacked, bias: Tensor | None = None, kernel: str | None = None
) -> Tensor:
    """x times a prepacked weight, on x's device and its current stream.

    x: float16, bfloat16 or float32 (..., in), on a GPU, any strides. bias: floating (out,).
    kernel: as `kernel_for` names it; None for the one it chooses.
    Returns x's dtype (..., out). Sums are formed in float32, in an order that depends on the
    shapes and the GPU alone: the same call gives the same bits.
    Raises ValueError for a shape or device that does not fit, RuntimeError where a launch fails.
    """
    launch = _place(x, weight)
    with torch.cuda.device(x.device):
        return launch_matmul(launch, x, weight, bias, kernel)


def dequantize(weight: Prepacked, dtype: torch.dtype) -> Tensor:
    """The weight as numbers: dtype (in, out), on its GPU; float16, bfloat16 or float32."""
    words = words_of(weight)
    launch = _place(words, weight)
    with torch.cuda.device(words.device):
        return launch_dequantize(launch, weight, dtype)


def words_of(weight: Prepacked) -> Tensor:
    """The packed integers."""
    return weight.words if isinstance(weight, Tiled) else weight.qweight


def kernel_for(rows: int, dtype: torch.dtype, weight: Prepacked, wgmma: bool) -> str:
    """Which kernel multiplies so many rows of x: a name in csrc/cuda, or "dense"."""
    if isinstance(weight, Plain):
        return "plain" if rows <= GEMM_ROWS else "dense"
    if dtype == torch.float32:
        return "dense"
    if rows <= GEMV_ROWS:
        return "gemv"
    if rows <= (GEMM_ROWS_BEFORE_WGMMA if wgmma else GEMM_ROWS):
        return "gemm"
    return "wgmma" if wgmma and rows <= WGMMA_ROWS else "dense"


def launch_matmul(
    launch: Launch,
    x: Tensor,
    weight: Prepacked,
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
    kernel = kernel or kernel_for(len(rows), x.dtype, weight, launch.wgmma)
    if kernel == "dense":
        dense = _dense(launch, weight, x.dtype)
        y = torch.nn.functional.linear(rows, dense.T, None if bias is None else bias.to(x.dtype))
        return y.view(shape)
    bias = None if bias is None else bias.float().contiguous()
    if isinstance(weight, Tiled):
        return _tiled(launch, kernel, rows, weight, bias).view(shape)
    return _plain(launch, rows, weight, bias).view(shape)


def launch_dequantize(launch: Launch, weight: Prepacked, dtype: torch.dtype) -> Tensor:
    """`dequantize` on a stream of the current device."""
    if dtype not in _TYPES:
        raise TypeError(f"a weight is written out as float16, bfloat16 or float32, not {dtype}")
    dense = _dense(launch, weight, dtype)
    if isinstance(weight, Plain) or weight.order is None:
        return dense
    natural = torch.empty_like(dense)
    natural[weight.order] = dense
    return natural


def _tiled(launch: Launch, kernel: str, rows: Tensor, weight: Tiled, bias: Tensor | None) -> Tensor:
    """rows: (rows, in), float16 or bfloat16, in the order of the words."""
    x = _aligned(rows)
    count, blocks, processors = x.shape[0], weight.words.shape[1], launch.processors
    shape: tuple[int, ...] = ()
    if kernel == "gemv":
        splits = _splits(weight.columns // COLUMNS, blocks // 8, 2 * processors)
    elif kernel == "gemm":
        row_tile = 16 if count <= 16 else 32 if count <= 32 else 64
        splits = _splits(_blocks(count, row_tile, weight.columns, 128), blocks // 4, processors)
        shape = (row_tile,)
    else:
        column_tile = _column_tile(count, weight.columns, processors)
        thread_blocks = _blocks(count, 128, weight.columns, column_tile)
        splits = _splits(thread_blocks, blocks // 4, processors)
        shape = (column_tile,)
    y = x.new_empty((count, weight.out_features))
    partial = x.new_empty((splits, *y.shape), dtype=torch.float32) if splits > 1 else None
    tensors = (x, weight.words, weight.table, bias, y, partial)
    sizes = (*x.shape, weight.out_features, weight.columns, weight.shift, splits, *shape)
    launch(kernel, weight.bits, _TYPES[x.dtype], *tensors, *sizes)
    if partial is not None:
        launch("add_partials", _TYPES[y.dtype], partial, bias, y, splits, y.numel(), y.shape[1])
    return y


def _blocks(rows: int, row_tile: int, columns: int, column_tile: int) -> int:
    return -(-rows // row_tile) * -(-columns // column_tile)


def _column_tile(rows: int, columns: int, processors: int) -> int:
    """Columns of a thread block of wgmma.cu: the more, the fewer times x is read, but a GPU that
    wide tiles leave idle is better filled by narrow ones."""

    def cost(tile: int) -> float:
        waves = -(-_blocks(rows, 128, columns, tile) // max(processors, 1))
        return waves * tile * (1.25 if tile == 128 else 1.0)

    return min((256, 128), key=cost)


def _plain(launch: Launch, rows: Tensor, weight: Plain, bias: Tensor | None) -> Tensor:
    x = rows.float().contiguous()
    blocks = -(-weight.out_features // 128) * -(-x.shape[0] // 8)
    splits = _splits(blocks, -(-weight.in_features // 64), 8 * launch.processors)
    y = rows.new_empty((x.shape[0], weight.out_features))
    partial = x.new_empty((splits, *y.shape))
    tensors = (x, weight.qweight, weight.scales, weight.zeros, weight.g_idx, partial)
    sizes = (*x.shape, weight.out_features, _group_size(weight), splits)
    launch("plain_multiply", weight.bits, *tensors, *sizes)
    launch("add_partials", _TYPES[y.dtype], partial, bias, y, splits, y.numel(), y.shape[1])
    return y


def _dense(launch: Launch, weight: Prepacked, dtype: torch.dtype) -> Tensor:
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
    launch("plain_dequantize", *kinds, *tensors, inputs, outputs, _group_size(weight))
    return dense


def _group_size(weight: Plain) -> int:
    return weight.in_features if weight.group_size == -1 else weight.group_size


def _splits(thread_blocks: int, most: int, wanted: int) -> int:
    """Thread blocks that share the inputs, so that there are nearly `wanted` in all."""
    return max(1, min(wanted // thread_blocks, most))


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous, a multiple of 8 wide and 16-byte aligned, as 16-byte loads want it."""
    short = -rows.shape[1] % 8
    if short:
        return torch.nn.functional.pad(rows, (0, short))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def current(x: Tensor) -> Launch:
    """The library on the current stream of x's GPU."""
    library = _library()
    if library is None:
        raise RuntimeError("the CUDA kernels were not built; install again where nvcc is")
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return Launch(library, stream, *_facts(x.device))


def _place(x: Tensor, weight: Prepacked) -> Launch:
    there = words_of(weight).device
    if not x.is_cuda or x.device != there:
        raise ValueError(f"x is on {x.device}, the weight on {there}; both must be a GPU's")
    return current(x)


@functools.cache
def _facts(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors of a GPU, and whether it runs the kernel for compute capability 9.0."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    library = _library()
    has_wgmma = library is not None and bool(library.quant_cuda_has_wgmma())
    return processors, has_wgmma and torch.cuda.get_device_capability(device) == (9, 0)
