"""The compiled CPU code: a shared library beside this file, called through ctypes."""

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from quant_cuda import sources

LIBRARY = Path(__file__).with_name("_native.so")
_NOT_BUILT = "the compiled CPU code was not built: pip install . with a C++ compiler"
_NO_MEMORY = 1
# The library notices forks by itself once it is loaded, which may be in a child only.
_IMPORTED_BY = os.getpid()


def fields(pointers: str, numbers: str) -> list[tuple[str, type]]:
    """Fields of a ctypes record by their names: addresses, then int32."""
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int32) for name in numbers.split()),
    ]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is not there. Warns if there is one that cannot be used."""
    if not LIBRARY.exists():
        return None, _NOT_BUILT
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        reason = f"the compiled CPU code cannot be loaded ({error}); build it again: pip install ."
    else:
        if not sources.is_stale(found, "cpu"):
            _declare(found)
            if os.getpid() != _IMPORTED_BY:
                found.quant_cuda_after_fork()
            return found, ""
        reason = sources.stale_text(LIBRARY)
    warnings.warn(reason, stacklevel=4)
    return None, reason


def _declare(found: ctypes.CDLL) -> None:
    """Set the types of the library's functions."""
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    found.quant_cuda_instruction_set.restype = ctypes.c_char_p
    found.quant_cuda_error.restype = ctypes.c_char_p
    found.quant_cuda_tiles_bytes.restype = long
    found.quant_cuda_tiles_bytes.argtypes = (pointer,)
    arguments = {
        "sweep": (number, pointer),
        "refine": (number, pointer),
        "blocks": (number, pointer, number),
        "product": (number, *[pointer] * 5, long, number, number, number),
        "halves": (number, *[pointer] * 3, long, long, long, number, number),
        "read": (pointer, long, number, pointer),
        "tiles_rows": (*[pointer] * 4, long, number),
        "tiles_numbers": (*[pointer] * 3, number, number, number),
        "tiles_pack": (*[pointer] * 5, number),
        "tiles_unpack": (*[pointer] * 5, number),
    }
    for name, types in arguments.items():
        function = getattr(found, f"quant_cuda_{name}")
        function.argtypes = types
        function.errcheck = _raise_error


def _raise_error(code: int, function: object, arguments: tuple) -> None:
    """Raise what a C function returned as a code of csrc/cpu/boundary.h."""
    if code == _NO_MEMORY:
        raise MemoryError("the compiled CPU code ran out of memory")
    if code:
        raise RuntimeError(
            f"the compiled CPU code failed: {required().quant_cuda_error().decode()}"
        )


def library() -> ctypes.CDLL | None:
    """The library; None if it was not built, or from other sources than those beside it."""
    return _load()[0]


def problem() -> str:
    """Why there is no library."""
    return _load()[1] or _NOT_BUILT


def required() -> ctypes.CDLL:
    """The library. Raises ValueError if there is none that can be used."""
    found, reason = _load()
    if found is None:
        raise ValueError(reason)
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
    result = ctypes.c_uint64()
    address, threads = ctypes.byref(result), torch.get_num_threads()
    found.quant_cuda_read(data.data_ptr(), data.nbytes, threads, address)
    return result.value
