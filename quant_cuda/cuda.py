"""The CUDA kernels, where they were built: found beside this file, called through ctypes.

What launches takes tensors of whatever memory the library reads, so that tests hand it a library
of the same source built for the host.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from quant_cuda.tiles import COLUMNS, Plain, Prepacked, Tiled, prepack, unprepack

__all__ = ["available", "dequantize", "matmul", "prepack", "unprepack"]

LIBRARY = Path(__file__).with_name("_cuda.so")

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_GEMV_ROWS = 8
# Rows from which writing the weight out and a dense product is the better way. Not measured.
DENSE_ROWS = 256

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "gemv": "ii ppppp iiiiii p",
    "gemm": "ii ppppp iiiiiii p",
    "dequantize": "ii ppp iiii p",
    "add_partials": "i pp ii p",
    "plain_multiply": "i pppppp iiiii p",
    "plain_dequantize": "ii ppppp iii p",
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


@functools.cache
def available() -> bool:
    """Whether the kernels were built and there is a GPU that runs them (compute capability 8.0)."""
    if not LIBRARY.exists() or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def matmul(x: Tensor, weight: Prepacked) -> Tensor:
    """x times a prepacked weight, on x's device and its current stream.

    x: float16, bfloat16 or float32 (..., in), on a GPU, any strides.
    Returns x's dtype (..., out). Sums are formed in float32, in an order that depends on the
    shapes and the GPU alone: the same call gives the same bits.
    Raises ValueError for a shape or device that does not fit, RuntimeError where a launch fails.
    """
    library, stream = _place(x, weight)
    with torch.cuda.device(x.device):
        return launch_matmul(library, x, weight, stream, _processors(x.device.index))


def dequantize(weight: Prepacked, dtype: torch.dtype) -> Tensor:
    """The weight as numbers: dtype (in, out), on its GPU; float16, bfloat16 or float32."""
    words = weight.words if isinstance(weight, Tiled) else weight.weight.qweight
    library, stream = _place(words, weight)
    with torch.cuda.device(words.device):
        return launch_dequantize(library, weight, dtype, stream)


def launch_matmul(
    library: ctypes.CDLL, x: Tensor, weight: Prepacked, stream: int, processors: int
) -> Tensor:
    """`matmul` on a stream of the current device, which has this many multiprocessors."""
    if x.dtype not in _TYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32 on a GPU, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of {weight.in_features} inputs"
        )
    rows = x.reshape(-1, weight.in_features)
    count = rows.shape[0]
    if count == 0 or weight.out_features == 0:
        return x.new_zeros((*x.shape[:-1], weight.out_features))
    if isinstance(weight, Plain):
        if count >= DENSE_ROWS:
            y = rows @ launch_dequantize(library, weight, x.dtype, stream)
        else:
            y = _plain(library, rows, weight, stream, processors)
        return y.view(*x.shape[:-1], -1)
    if weight.order is not None:
        rows = rows.index_select(1, weight.order)
    if count >= DENSE_ROWS or x.dtype == torch.float32:
        y = rows @ _tiled_dense(library, weight, x.dtype, stream)
    else:
        y = _tiled(library, _aligned(rows), weight, stream, processors)
    return y.view(*x.shape[:-1], -1)


def launch_dequantize(
    library: ctypes.CDLL, weight: Prepacked, dtype: torch.dtype, stream: int
) -> Tensor:
    """`dequantize` on a stream of the current device."""
    if dtype not in _TYPES:
        raise TypeError(f"a weight is written out as float16, bfloat16 or float32, not {dtype}")
    if isinstance(weight, Tiled):
        dense = _tiled_dense(library, weight, dtype, stream)
        if weight.order is None:
            return dense
        natural = torch.empty_like(dense)
        natural[weight.order] = dense
        return natural
    packed = weight.weight
    dense = weight.scales.new_empty((packed.in_features, packed.out_features), dtype=dtype)
    arguments = (*_plain_weight(weight), dense.data_ptr(), *_plain_sizes(weight), stream)
    _call(library, "plain_dequantize", packed.bits, _TYPES[dtype], *arguments)
    return dense


def _tiled(library: ctypes.CDLL, x: Tensor, weight: Tiled, stream: int, processors: int) -> Tensor:
    """x: (rows, in padded to a multiple of 8), contiguous and aligned."""
    count, blocks = x.shape[0], weight.words.shape[1]
    few = count <= _GEMV_ROWS
    row_tile = 8 if few else 16 if count <= 16 else 32 if count <= 32 else 64
    if few:
        splits = _splits(weight.columns // COLUMNS, blocks // 8, 2 * processors)
    else:
        thread_blocks = -(-weight.columns // 128) * -(-count // row_tile)
        splits = _splits(thread_blocks, blocks // 4, processors)
    y, partial = _outputs(x, weight.out_features, splits)
    _call(
        library,
        "gemv" if few else "gemm",
        weight.bits,
        _TYPES[x.dtype],
        x.data_ptr(),
        weight.words.data_ptr(),
        weight.table.data_ptr(),
        y.data_ptr(),
        None if partial is None else partial.data_ptr(),
        *x.shape,
        weight.out_features,
        weight.columns,
        weight.shift,
        splits,
        *(() if few else (row_tile,)),
        stream,
    )
    return _finished(library, y, partial, stream)


def _plain(library: ctypes.CDLL, x: Tensor, weight: Plain, stream: int, processors: int) -> Tensor:
    blocks = -(-weight.out_features // 128) * -(-x.shape[0] // 8)
    splits = _splits(blocks, -(-weight.in_features // 64), 8 * processors)
    numbers = x.float().contiguous()
    partial = numbers.new_empty((splits, x.shape[0], weight.out_features))
    _call(
        library,
        "plain_multiply",
        weight.bits,
        numbers.data_ptr(),
        *_plain_weight(weight),
        partial.data_ptr(),
        x.shape[0],
        *_plain_sizes(weight),
        splits,
        stream,
    )
    y = x.new_empty((x.shape[0], weight.out_features))
    return _finished(library, y, partial, stream)


def _plain_weight(weight: Plain) -> tuple[int | None, ...]:
    packed = weight.weight
    return (
        packed.qweight.data_ptr(),
        weight.scales.data_ptr(),
        weight.zeros.data_ptr(),
        None if packed.g_idx is None else packed.g_idx.data_ptr(),
    )


def _plain_sizes(weight: Plain) -> tuple[int, int, int]:
    packed = weight.weight
    size = packed.in_features if packed.group_size == -1 else packed.group_size
    return packed.in_features, packed.out_features, size


def _tiled_dense(library: ctypes.CDLL, weight: Tiled, dtype: torch.dtype, stream: int) -> Tensor:
    """(in, out), inputs in the order of the words: a view of a contiguous (out, in)."""
    dense = weight.words.new_empty((weight.out_features, weight.in_features), dtype=dtype)
    _call(
        library,
        "dequantize",
        weight.bits,
        _TYPES[dtype],
        weight.words.data_ptr(),
        weight.table.data_ptr(),
        dense.data_ptr(),
        weight.in_features,
        weight.out_features,
        weight.columns,
        weight.shift,
        stream,
    )
    return dense.T


def _outputs(x: Tensor, outputs: int, splits: int) -> tuple[Tensor, Tensor | None]:
    """Room for the product, and for partial sums of it where the inputs are split."""
    y = x.new_empty((x.shape[0], outputs))
    if splits == 1:
        return y, None
    return y, x.new_empty((splits, x.shape[0], outputs), dtype=torch.float32)


def _finished(library: ctypes.CDLL, y: Tensor, partial: Tensor | None, stream: int) -> Tensor:
    if partial is not None:
        arguments = (partial.data_ptr(), y.data_ptr(), partial.shape[0], y.numel(), stream)
        _call(library, "add_partials", _TYPES[y.dtype], *arguments)
    return y


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


def _call(library: ctypes.CDLL, name: str, *arguments: int | None) -> None:
    code = getattr(library, f"quant_cuda_{name}")(*arguments)
    if code:
        raise RuntimeError(f"{name} failed: {library.quant_cuda_error(code).decode()}")


def _place(x: Tensor, weight: Prepacked) -> tuple[ctypes.CDLL, int]:
    there = weight.words if isinstance(weight, Tiled) else weight.weight.qweight
    if not x.is_cuda or x.device != there.device:
        raise ValueError(f"x is on {x.device}, the weight on {there.device}; both must be a GPU's")
    library = _library()
    if library is None:
        raise RuntimeError("the CUDA kernels were not built; install again where nvcc is")
    return library, torch.cuda.current_stream(x.device).cuda_stream


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
