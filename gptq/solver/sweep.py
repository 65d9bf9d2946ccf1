"""The column sweep: each column is rounded, and its error spread over those to come.

Frantar et al. 2022, arXiv 2210.17323, Algorithm 1; docs/algorithm.md says what is solved.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.grid import Grid, dequantize, find_grid, quantize, search_factors
from quant_cuda.cpu import library
from quant_cuda.cuda import kernels, sweep

# Columns whose error is spread one at a time before one matmul spreads it over all the rest.
BLOCK = 128


def sweep_for(w: Tensor, config: QuantConfig) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Compiled code where it was built, for float32 and grids that it can search; else torch."""
    searched = not config.static_groups and config.scale_search == "mse"
    if w.dtype != torch.float32 or searched:
        return torch_sweep
    if w.device.type == "cpu" and library.instruction_sets():
        return native_sweep
    if w.device.type == "cuda" and kernels.available():
        return kernel_sweep
    return torch_sweep


def torch_sweep(
    w: Tensor,
    H: Tensor,
    U: Tensor,
    labels: Tensor,
    runs: list[tuple[int, int]],
    static: tuple[Tensor, Tensor] | None,
    config: QuantConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the columns of w (in, out), given in solving order; w is used up.

    Returns q (in, out) in the same order, and scales and zeros (groups, out) by label.
    """
    count = int(labels.max()) + 1
    scales = w.new_empty((count, w.shape[1]))
    zeros = w.new_empty((count, w.shape[1]))
    if static is not None:
        scales.copy_(static[0])
        zeros.copy_(static[1])
    q = torch.empty_like(w)
    label_of = labels.tolist()
    ends = dict(runs)
    for start, stop in _blocks(runs):
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            label = label_of[j]
            if static is None and j in ends:
                span = slice(j, ends[j])
                # Every earlier column's error has reached these weights: no stale grid.
                grid = find_grid(
                    w[span], config.bits, config.sym, config.scale_search, H[span, span]
                )
                scales[label], zeros[label] = grid.scale, grid.zero
            grid = Grid(scales[label], zeros[label])
            q[j] = quantize(w[j], grid, config.bits)
            error = (w[j] - dequantize(q[j], grid)) / U[j, j]
            errors[j - start] = error
            w[j + 1 : stop].addr_(U[j, j + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return q, scales, zeros


def native_sweep(
    w: Tensor,
    H: Tensor,
    U: Tensor,
    labels: Tensor,
    runs: list[tuple[int, int]],
    static: tuple[Tensor, Tensor] | None,
    config: QuantConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_sweep` in compiled code; sums in another order, so that ties may fall differently."""
    factors = search_factors(config.sym) if config.scale_search == "hessian" else ()
    blocks = list(_blocks(runs))
    q, scales, zeros = library.sweep(
        w, H, U, labels, runs, blocks, static, factors, config.bits, config.sym
    )
    return q.to(w.dtype), scales, zeros


def kernel_sweep(
    w: Tensor,
    H: Tensor,
    U: Tensor,
    labels: Tensor,
    runs: list[tuple[int, int]],
    static: tuple[Tensor, Tensor] | None,
    config: QuantConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_sweep` by a CUDA kernel, each block in one launch. Losses of the search "hessian" are
    sums in another order; all else is rounded alike."""

    def find(columns: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        grid = find_grid(columns, config.bits, config.sym, config.scale_search, block)
        return grid.scale, grid.zero

    factors = search_factors(config.sym) if config.scale_search == "hessian" else ()
    blocks = list(_blocks(runs))
    q, scales, zeros = sweep.sweep(
        w, H, U, labels, runs, blocks, static, factors, config.bits, config.sym, find
    )
    return q.to(w.dtype), scales, zeros


def _blocks(runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut the columns into blocks of about BLOCK such that no group starts before its weights
    are up to date: a block holds whole groups, or is a piece of one group."""
    start = 0
    for index, (begin, stop) in enumerate(runs):
        last = index + 1 == len(runs)
        if stop - begin > BLOCK:
            if start < begin:
                yield start, begin
            yield from ((a, min(a + BLOCK, stop)) for a in range(begin, stop, BLOCK))
            start = stop
        elif last or runs[index + 1][1] - start > BLOCK:
            yield start, stop
            start = stop
