"""The compiled CPU code: a shared library beside this file, called through ctypes."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_native.so")


def fields(pointers: str, numbers: str) -> list[tuple[str, type]]:
    """Fields of a ctypes record by their names: addresses, then int32."""
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int32) for name in numbers.split()),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None if it was not built."""
    if not LIBRARY.exists():
        return None
    found = ctypes.CDLL(str(LIBRARY))
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    found.quant_cuda_instruction_set.restype = ctypes.c_char_p
    for solver in (found.quant_cuda_sweep, found.quant_cuda_refine):
        solver.restype = None
        solver.argtypes = (number, pointer)
    found.quant_cuda_blocks.restype = None
    found.quant_cuda_blocks.argtypes = (number, pointer, number)
    found.quant_cuda_product.restype = None
    found.quant_cuda_product.argtypes = (
        *(number, pointer, pointer, pointer, pointer, pointer),
        *(long, number, number, number),
    )
    found.quant_cuda_halves.restype = None
    found.quant_cuda_halves.argtypes = (
        *(number, pointer, pointer, pointer),
        *(long, long, long, number, number),
    )
    found.quant_cuda_read.restype = ctypes.c_uint64
    found.quant_cuda_read.argtypes = (pointer, long, number)
    found.quant_cuda_tiles_bytes.restype = long
    found.quant_cuda_tiles_bytes.argtypes = (pointer,)
    found.quant_cuda_tiles_rows.restype = None
    found.quant_cuda_tiles_rows.argtypes = (*[pointer] * 4, long, number)
    found.quant_cuda_tiles_numbers.restype = None
    found.quant_cuda_tiles_numbers.argtypes = (*[pointer] * 3, number, number, number)
    for name in ("pack", "unpack"):
        function = getattr(found, f"quant_cuda_tiles_{name}")
        function.restype = None
        function.argtypes = (*[pointer] * 5, number)
    return found


def required() -> ctypes.CDLL:
    """The library. Raises ValueError if it was not built."""
    found = library()
    if found is None:
        raise ValueError(
            "the compiled CPU code is not there: run pip install . with a C++ compiler"
        )
    return found


@functools.cache
def compiled() -> tuple[str, ...]:
    """Names of the instruction sets there is code for, best first; empty if nothing was built."""
    found = library()
    names: list[str] = []
    while found is not None and (name := found.quant_cuda_instruction_set(len(names))):
        names.append(name.decode())
    return tuple(names)


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those of `compiled()` that run on this processor."""
    found = library()
    if found is None:
        return ()
    return tuple(name for i, name in enumerate(compiled()) if found.quant_cuda_runs_here(i))


@functools.cache
def best() -> int:
    """Index in `compiled()` of the best that runs here."""
    return compiled().index(instruction_sets()[0])


def read(data: Tensor) -> int:
    """The exclusive or of a tensor's 64-bit words, which measures how fast memory is read.

    data: contiguous, of a multiple of 64 bytes.
    """
    found = library()
    if found is None or data.nbytes % 64 or not data.is_contiguous():
        raise ValueError("reading needs the compiled code and a contiguous multiple of 64 bytes")
    return found.quant_cuda_read(data.data_ptr(), data.nbytes, torch.get_num_threads())
