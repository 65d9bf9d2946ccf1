"""The column sweep: each column is rounded, and its error spread over those to come.

Frantar et al. 2022, arXiv 2210.17323, Algorithm 1; docs/algorithm.md says what is solved.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.cholesky import inverse_factor, mean_live
from gptq.solver.grid import Grid, dequantize, find_grid, quantize, search_factors
from gptq.solver.order import column_order, group_labels
from gptq.solver.problem import Candidate, Problem
from quant_cuda.columns import Run, SweepColumns
from quant_cuda.cpu import library
from quant_cuda.cpu import solver as cpu_solver
from quant_cuda.cuda import kernels
from quant_cuda.cuda import solver as cuda_solver
from quant_cuda.weight import natural_groups

# Columns whose error is spread one at a time before one matmul spreads it over all the rest.
BLOCK = 128
# In what orders a layer is swept in turn, if it is swept several times.
SWEEP_ORDERS = ("gar", "act", "natural")

Swept = tuple[Tensor, Tensor, Tensor]
"""q (in, out) in solving order, scales and zeros (groups, out) by label."""


def sweep(problem: Problem) -> tuple[Problem, Candidate]:
    """The first candidate, and the problem with the damping that made H positive definite."""
    config = problem.config
    order, runs = column_order(problem.hessian.diagonal(), config)
    U, damp = inverse_factor(problem.hessian, problem.dead, config.percdamp, order)
    # Grids are found under the damped H too: what damping guards against misleads them as well.
    problem = replace(problem, damp=damp)
    labels = group_labels(order, runs, config)
    grids = None
    if config.static_groups:
        grids = static_grids(problem.w, problem.damped(), config)
    columns = SweepColumns(
        w=problem.w[order],
        H=problem.damped(order),
        U=U,
        labels=labels,
        runs=runs,
        blocks=list(_blocks(runs)),
        grids=grids,
    )
    q, scales, zeros = sweep_for(columns.w, config)(columns, config)
    inverse = torch.argsort(order)
    return problem, Candidate(q[inverse], scales, zeros, labels[inverse])


def sweep_again(problem: Problem, best: Candidate, turn: int) -> Candidate:
    """A candidate swept in another order, on the grids of the best one so far.

    turn: how many sweeps there were before.
    """
    order_name = SWEEP_ORDERS[turn % len(SWEEP_ORDERS)]
    config = replace(problem.config, order=order_name, static_groups=True)
    order, runs = column_order(problem.hessian.diagonal(), config)
    # The same number on the diagonal as before, now a share of the mean over all columns.
    live = torch.zeros_like(problem.dead)
    share = float(problem.added / mean_live(problem.hessian.diagonal(), live))
    U, _ = inverse_factor(problem.hessian, live, share, order)
    columns = SweepColumns(
        w=problem.w[order],
        H=problem.damped(order),
        U=U,
        labels=best.g_idx[order],
        runs=runs,
        blocks=list(_blocks(runs)),
        grids=(best.scales, best.zeros),
    )
    q, _, _ = sweep_for(columns.w, config)(columns, config)
    return replace(best, q=q[torch.argsort(order)])


def sweep_for(w: Tensor, config: QuantConfig) -> Callable[[SweepColumns, QuantConfig], Swept]:
    """Compiled code if it was built, for float32 and grids that it can search; else torch."""
    searched = not config.static_groups and config.scale_search == "mse"
    if w.dtype != torch.float32 or searched:
        return torch_sweep
    if w.device.type == "cpu" and library.instruction_sets():
        return cpu_sweep
    if w.device.type == "cuda" and kernels.available():
        return cuda_sweep
    return torch_sweep


def torch_sweep(columns: SweepColumns, config: QuantConfig) -> Swept:
    """Quantize the columns on any device and in any floating dtype; `columns.w` is used up."""
    w, H, U = columns.w, columns.H, columns.U
    scales = w.new_empty((columns.groups, w.shape[1]))
    zeros = w.new_empty((columns.groups, w.shape[1]))
    if columns.grids is not None:
        scales.copy_(columns.grids[0])
        zeros.copy_(columns.grids[1])
    q = torch.empty_like(w)
    label_of = columns.labels.tolist()
    ends = dict(columns.runs) if columns.grids is None else {}
    for start, stop in columns.blocks:
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            label = label_of[j]
            if j in ends:
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


def cpu_sweep(columns: SweepColumns, config: QuantConfig) -> Swept:
    """`torch_sweep` in compiled code; sums in another order, so that ties may fall differently."""
    q, scales, zeros = cpu_solver.sweep(
        columns, factors=_factors(config), bits=config.bits, sym=config.sym
    )
    return q.to(columns.w.dtype), scales, zeros


def cuda_sweep(columns: SweepColumns, config: QuantConfig) -> Swept:
    """`torch_sweep` by a CUDA kernel, each block in one launch. Losses of the search "hessian" are
    sums in another order; all else is rounded alike."""

    def find(w: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        grid = find_grid(w, config.bits, config.sym, config.scale_search, H)
        return grid.scale, grid.zero

    q, scales, zeros = cuda_solver.sweep(
        columns, factors=_factors(config), bits=config.bits, sym=config.sym, find_grid=find
    )
    return q.to(columns.w.dtype), scales, zeros


def static_grids(w: Tensor, H: Tensor | None, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scales and zeros (groups, out) of the unsolved weight w (in, out), groups of neighbours."""
    groups = natural_groups(w.shape[0], config.group_size, w.device)
    grids = []
    for group in range(int(groups[-1]) + 1):
        member = torch.nonzero(groups == group).squeeze(1)
        grids.append(group_grid(w[member], None if H is None else H[member][:, member], config))
    scales = torch.stack([grid.scale for grid in grids])
    return scales, torch.stack([grid.zero for grid in grids])


def group_grid(w: Tensor, H: Tensor | None, config: QuantConfig) -> Grid:
    """The grid of each output of one group of unsolved weights, w (g, out).

    H: the group's (g, g). Without it the search "hessian" is "minmax".
    """
    search = "minmax" if H is None and config.scale_search == "hessian" else config.scale_search
    if H is None or search != "hessian" or sweep_for(w, config) is not cpu_sweep:
        return find_grid(w, config.bits, config.sym, search, H)
    # A sweep of this group alone that spreads no error.
    runs, labels = [(0, len(w))], torch.zeros(len(w), dtype=torch.int32)
    columns = SweepColumns(w, H, torch.eye(len(w)), labels, runs, list(_blocks(runs)), grids=None)
    _, scales, zeros = cpu_sweep(columns, config)
    return Grid(scales[0], zeros[0])


def _factors(config: QuantConfig) -> tuple[float, ...]:
    return search_factors(config.sym) if config.scale_search == "hessian" else ()


def _blocks(runs: list[Run]) -> Iterator[Run]:
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
