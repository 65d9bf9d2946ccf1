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


class _SweepArgs(ctypes.Structure):
    """The record of csrc/cpu/solver_args.h."""

    _fields_ = fields(
        "w H Ut labels run_end blocks factors scales zeros q",
        "inputs outputs groups block_count factor_count bits sym is_static threads",
    )


class _RefineArgs(ctypes.Structure):
    """The record of csrc/cpu/solver_args.h."""

    _fields_ = fields("w H ends labels scales zeros q", "inputs outputs groups bits rounds threads")


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


def sweep(
    w: Tensor,
    H: Tensor,
    U: Tensor,
    labels: Tensor,
    runs: list[tuple[int, int]],
    blocks: list[tuple[int, int]],
    static: tuple[Tensor, Tensor] | None,
    factors: tuple[float, ...],
    bits: int,
    sym: bool,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The GPTQ column sweep of gptq/solver/sweep.py in one call, on torch's number of threads.

    w: float32 (in, out), columns of W in solving order; it is left as it is.
    H, U: float32 (in, in) in the same order; U^T U is the inverse of the damped H.
    labels: integer (in,), the group of each column; runs: (start, stop) of each group that is a
        run of columns; blocks: a partition of the columns that respects the runs.
    static: scales and zeros (groups, out) found beforehand; None to find them on the way.
    factors: shares of a group's range to try under H; none for the range itself. A negative one
        makes the scale of a symmetric grid negative.
    Returns q uint8 (in, out), scales and zeros float32 (groups, out).
    Raises ValueError for an instruction set that does not run here.
    """
    inputs, outputs = w.shape
    groups = int(labels.max()) + 1
    run_end = torch.zeros(inputs, dtype=torch.int32)
    for start, stop in runs if static is None else ():
        run_end[start] = stop
    scales = w.new_empty((groups, outputs)) if static is None else static[0].contiguous()
    zeros = w.new_empty((groups, outputs)) if static is None else static[1].contiguous()
    tensors = {
        "w": w.contiguous(),
        "H": H.contiguous(),
        "Ut": U.T.contiguous(),
        "labels": labels.to(torch.int32).contiguous(),
        "run_end": run_end,
        "blocks": torch.tensor([0, *(stop for _, stop in blocks)], dtype=torch.int32),
        "factors": torch.tensor(factors, dtype=torch.float32),
        "scales": scales,
        "zeros": zeros,
        "q": torch.empty((inputs, outputs), dtype=torch.uint8),
    }
    numbers = {
        "inputs": inputs,
        "outputs": outputs,
        "groups": groups,
        "block_count": len(blocks),
        "factor_count": len(factors),
        "bits": bits,
        "sym": int(sym),
        "is_static": int(static is not None),
        "threads": torch.get_num_threads(),
    }
    _call("quant_cuda_sweep", _SweepArgs, tensors, numbers, instruction_set)
    return tensors["q"], scales, zeros


def refine(
    w: Tensor,
    H: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    runs: list[tuple[int, int]],
    labels: list[int],
    bits: int,
    rounds: int,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The refinement of gptq/solver/refine.py in one call, on torch's number of threads.

    w: float32 (in, out), columns of W group by group; H: float32 (in, in), positive definite, in
    the same order; q: whole numbers (in, out); scales, zeros: float32 (groups, out).
    runs: (start, stop) of each group, one after another; labels: each run's row in scales.
    Returns q uint8 (in, out) and scales float32 (groups, out), both new.
    Raises ValueError for an instruction set that does not run here.
    """
    inputs, outputs = w.shape
    tensors = {
        "w": w.contiguous(),
        "H": H.contiguous(),
        "ends": torch.tensor([0, *(stop for _, stop in runs)], dtype=torch.int32),
        "labels": torch.tensor(labels, dtype=torch.int32),
        "scales": scales.clone(memory_format=torch.contiguous_format),
        "zeros": zeros.contiguous(),
        "q": q.to(torch.uint8, copy=True, memory_format=torch.contiguous_format),
    }
    numbers = {
        "inputs": inputs,
        "outputs": outputs,
        "groups": len(runs),
        "bits": bits,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    _call("quant_cuda_refine", _RefineArgs, tensors, numbers, instruction_set)
    return tensors["q"], tensors["scales"]


def _call(
    function: str,
    record: type[ctypes.Structure],
    tensors: dict[str, Tensor],
    numbers: dict[str, int],
    instruction_set: str | None,
) -> None:
    found = library()
    chosen = instruction_set or next(iter(instruction_sets()), None)
    if found is None or chosen not in instruction_sets():
        raise ValueError(f"instruction set {chosen!r} does not run here: {instruction_sets()}")
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    arguments = record(**pointers, **numbers)
    getattr(found, function)(compiled().index(chosen), ctypes.byref(arguments))


def read(data: Tensor) -> int:
    """The exclusive or of a tensor's 64-bit words, which measures how fast memory is read.

    data: contiguous, of a multiple of 64 bytes.
    """
    found = library()
    if found is None or data.nbytes % 64 or not data.is_contiguous():
        raise ValueError("reading needs the compiled code and a contiguous multiple of 64 bytes")
    return found.quant_cuda_read(data.data_ptr(), data.nbytes, torch.get_num_threads())
