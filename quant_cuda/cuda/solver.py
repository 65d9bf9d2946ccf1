"""The solver's inner loops by CUDA kernels: a launch for a block of columns, or for a group."""

from collections.abc import Callable

import torch
from torch import Tensor

from quant_cuda.columns import GroupedColumns, SweepColumns
from quant_cuda.cuda.library import Launch, current

LONGEST = 128
"""Columns that a block of a sweep, or a group of a refinement, may have."""

FindGrid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(columns of w, their block of H) -> scales and zeros (out,)."""


def sweep(
    columns: SweepColumns,
    *,
    factors: tuple[float, ...],
    bits: int,
    sym: bool,
    find_grid: FindGrid,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.solver.sweep, for float32 tensors of a GPU, on its current stream.

    columns: w is used up. find_grid: for a group longer than LONGEST.
    launch: where the kernel runs, by default on the current stream of w's GPU.
    Raises ValueError for a block longer than LONGEST.
    """
    longest = max(stop - start for start, stop in columns.blocks)
    if longest > LONGEST:
        raise ValueError(f"a block of {longest} columns is too long; the kernel takes {LONGEST}")
    device = columns.w.device
    w, H, U = columns.w.contiguous(), columns.H.contiguous(), columns.U.contiguous()
    inputs, outputs = w.shape
    scales, zeros = columns.grids or w.new_empty((2, columns.groups, outputs))
    scales, zeros = scales.contiguous(), zeros.contiguous()
    ends = {} if columns.grids is not None else dict(columns.runs)
    run_end = torch.zeros(inputs, dtype=torch.int32)
    for start, stop in ends.items():
        run_end[start] = stop if stop - start <= LONGEST else 0
    run_end = run_end.to(device)
    labels = columns.labels.to(torch.int32).contiguous()
    tried = torch.tensor(factors, dtype=torch.float32, device=device)
    q = torch.empty((inputs, outputs), dtype=torch.uint8, device=device)
    launch = current(w) if launch is None else launch
    with torch.cuda.device_of(w):
        for start, stop in columns.blocks:
            end = ends.get(start, start)
            if end - start > LONGEST:
                label = int(labels[start])
                scales[label], zeros[label] = find_grid(w[start:end], H[start:end, start:end])
            errors = w.new_empty((stop - start, outputs))
            tensors = (w, H, U, labels, run_end, tried, scales, zeros, q, errors)
            sizes = (inputs, outputs, start, stop, len(factors), bits, int(sym))
            launch("sweep_block", *tensors, *sizes)
            w[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return q, scales, zeros


def refine(
    columns: GroupedColumns, *, bits: int, rounds: int, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """As cpu.solver.refine, for float32 tensors of a GPU, on its current stream.

    launch: as for `sweep`. Returns q uint8 (in, out) and scales float32 (groups, out), both new.
    Raises ValueError for a group longer than LONGEST.
    """
    if columns.longest > LONGEST:
        raise ValueError(
            f"a group of {columns.longest} columns is too long; the kernel takes {LONGEST}"
        )
    inputs, outputs = columns.w.shape
    H, zeros = columns.H.contiguous(), columns.zeros.contiguous()
    scales = columns.scales.clone(memory_format=torch.contiguous_format)
    q = columns.q.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
    error = columns.w.clone(memory_format=torch.contiguous_format)
    groups = list(zip(columns.runs, columns.labels, strict=True))
    for (start, stop), label in groups:
        error[start:stop] -= (q[start:stop] - zeros[label]) * scales[label]
    gradient = H @ error
    in_order = columns.runs == sorted(columns.runs)
    change = error[: columns.longest]  # its memory: the error is not needed any more
    launch = current(columns.w) if launch is None else launch
    with torch.cuda.device_of(columns.w):
        for turn in range(rounds):
            for (start, stop), label in groups:
                tensors = (H, gradient, zeros[label], scales[label], q, change)
                launch("refine_group", *tensors, inputs, outputs, start, stop, bits)
                # In the last round what was visited is not visited again.
                first = stop if turn + 1 == rounds and in_order else 0
                gradient[first:].addmm_(H[first:, start:stop], change[: stop - start], alpha=-1)
    return q, scales
