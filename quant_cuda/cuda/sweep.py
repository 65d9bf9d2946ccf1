"""The solver's column sweep by a CUDA kernel, one launch for a block of columns."""

from collections.abc import Callable

import torch
from torch import Tensor

from quant_cuda.cuda import kernels

LONGEST = 128
"""Columns that a block may have."""


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
    find_grid: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """As native.sweep, for float32 tensors of a GPU, on its current stream; w is used up.

    find_grid: scales and zeros (out,) of a group longer than LONGEST, from its columns of w and its
        block of H.
    Raises ValueError for a block longer than LONGEST.
    """
    launch = kernels.current(w)
    with torch.cuda.device(w.device):
        return launch_sweep(
            launch, w, H, U, labels, runs, blocks, static, factors, bits, sym, find_grid
        )


def launch_sweep(
    launch: kernels.Launch,
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
    find_grid: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """`sweep` on a stream of the current device."""
    longest = max(stop - start for start, stop in blocks)
    if longest > LONGEST:
        raise ValueError(f"a block of {longest} columns is too long; the kernel takes {LONGEST}")
    inputs, outputs = w.shape
    groups = int(labels.max()) + 1
    scales = w.new_empty((groups, outputs)) if static is None else static[0].contiguous()
    zeros = w.new_empty((groups, outputs)) if static is None else static[1].contiguous()
    ends = {} if static is not None else dict(runs)
    run_end = torch.zeros(inputs, dtype=torch.int32)
    for start, stop in ends.items():
        run_end[start] = stop if stop - start <= LONGEST else 0
    w, H, U = w.contiguous(), H.contiguous(), U.contiguous()
    labels = labels.to(torch.int32).contiguous()
    run_end = run_end.to(w.device)
    tried = torch.tensor(factors, dtype=torch.float32, device=w.device)
    q = torch.empty((inputs, outputs), dtype=torch.uint8, device=w.device)
    for start, stop in blocks:
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
