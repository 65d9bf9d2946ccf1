"""The solver's inner loops in compiled code for CPUs (csrc/cpu/sweep.h, csrc/cpu/refine.h)."""

import ctypes

import torch
from torch import Tensor

from quant_cuda.columns import GroupedColumns, SweepColumns
from quant_cuda.cpu.library import compiled, fields, instruction_sets, library


class _SweepArgs(ctypes.Structure):
    """The record of csrc/cpu/solver_args.h."""

    _fields_ = fields(
        "w H Ut labels run_end blocks factors scales zeros q",
        "inputs outputs groups block_count factor_count bits sym is_static threads",
    )


class _RefineArgs(ctypes.Structure):
    """The record of csrc/cpu/solver_args.h."""

    _fields_ = fields("w H ends labels scales zeros q", "inputs outputs groups bits rounds threads")


def sweep(
    columns: SweepColumns,
    *,
    factors: tuple[float, ...],
    bits: int,
    sym: bool,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The column sweep of gptq/solver/sweep.py in one call, on torch's number of threads.

    columns: float32, on the CPU; they are not changed.
    factors: shares of a group's range to try under H; none for the range itself. A negative one
        makes the scale of a symmetric grid negative.
    Returns q uint8 (in, out), scales and zeros float32 (groups, out).
    Raises ValueError for an instruction set that does not run here.
    """
    inputs, outputs = columns.w.shape
    run_end = torch.zeros(inputs, dtype=torch.int32)
    for start, stop in columns.runs if columns.grids is None else ():
        run_end[start] = stop
    scales, zeros = columns.grids or columns.w.new_empty((2, columns.groups, outputs))
    tensors = {
        "w": columns.w.contiguous(),
        "H": columns.H.contiguous(),
        "Ut": columns.U.T.contiguous(),
        "labels": columns.labels.to(torch.int32).contiguous(),
        "run_end": run_end,
        "blocks": torch.tensor([0, *(stop for _, stop in columns.blocks)], dtype=torch.int32),
        "factors": torch.tensor(factors, dtype=torch.float32),
        "scales": scales.contiguous(),
        "zeros": zeros.contiguous(),
        "q": torch.empty((inputs, outputs), dtype=torch.uint8),
    }
    numbers = {
        "inputs": inputs,
        "outputs": outputs,
        "groups": columns.groups,
        "block_count": len(columns.blocks),
        "factor_count": len(factors),
        "bits": bits,
        "sym": int(sym),
        "is_static": int(columns.grids is not None),
        "threads": torch.get_num_threads(),
    }
    _call("quant_cuda_sweep", _SweepArgs(**_addresses(tensors), **numbers), instruction_set)
    return tensors["q"], tensors["scales"], tensors["zeros"]


def refine(
    columns: GroupedColumns, *, bits: int, rounds: int, instruction_set: str | None = None
) -> tuple[Tensor, Tensor]:
    """The refinement of gptq/solver/refine.py in one call, on torch's number of threads.

    columns: w, H, scales and zeros float32, on the CPU; runs one after another.
    Returns q uint8 (in, out) and scales float32 (groups, out), both new.
    Raises ValueError for an instruction set that does not run here.
    """
    inputs, outputs = columns.w.shape
    tensors = {
        "w": columns.w.contiguous(),
        "H": columns.H.contiguous(),
        "ends": torch.tensor([0, *(stop for _, stop in columns.runs)], dtype=torch.int32),
        "labels": torch.tensor(columns.labels, dtype=torch.int32),
        "scales": columns.scales.clone(memory_format=torch.contiguous_format),
        "zeros": columns.zeros.contiguous(),
        "q": columns.q.to(torch.uint8, copy=True, memory_format=torch.contiguous_format),
    }
    numbers = {
        "inputs": inputs,
        "outputs": outputs,
        "groups": len(columns.runs),
        "bits": bits,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    _call("quant_cuda_refine", _RefineArgs(**_addresses(tensors), **numbers), instruction_set)
    return tensors["q"], tensors["scales"]


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _call(function: str, record: ctypes.Structure, instruction_set: str | None) -> None:
    chosen = instruction_set or next(iter(instruction_sets()), None)
    loaded = library()
    if loaded is None or chosen not in instruction_sets():
        raise ValueError(f"instruction set {chosen!r} does not run here: {instruction_sets()}")
    getattr(loaded, function)(compiled().index(chosen), ctypes.byref(record))
