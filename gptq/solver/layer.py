"""The GPTQ solve of one layer: tensors in, a frozen Solution out.

For a layer with weight W (out, in) and inputs x, minimise tr((W - Q) H (W - Q)^T) with
H = mean of x x^T, over Q on a grid. Frantar et al. 2022, arXiv 2210.17323.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.compensation import compensate
from gptq.solver.damping import choose_damping
from gptq.solver.grid import Grid, quantize
from gptq.solver.hessian import Hessian
from gptq.solver.problem import Candidate, Problem, check_finite, make_problem, quadratic
from gptq.solver.refine import refine
from gptq.solver.solution import Solution, keep_better_rows
from gptq.solver.sweep import static_grids, sweep, sweep_again
from quant_cuda.weight import natural_groups


def solve_layer(weight: Tensor, hessian: Hessian | None, config: QuantConfig) -> Solution:
    """Quantize one layer, or several that share their input with their outputs stacked.

    weight: floating (out, in); hessian: statistics of its inputs, whose H (in, in) is float32 or
        float64; the arithmetic is H's dtype, on H's device. Neither is changed. Without a hessian
        the weight is rounded to nearest.
    If the Cholesky factorization fails, damping is raised tenfold until it succeeds.
    Raises ValueError if the weight or H holds NaN or infinity.
    """
    if hessian is None or config.method == "rtn":
        return round_to_nearest(weight, None if hessian is None else hessian.H, config)
    check_finite(weight, hessian.H)
    if config.adapts_damp and hessian.held_out is not None:
        config = replace(config, percdamp=choose_damping(hessian.H, hessian.held_out, config))
        # As large as H, and not needed any more: this frees it if the caller holds no reference.
        hessian = replace(hessian, held_out=None)
    if config.feeds_back and hessian.has_target:
        target_error = hessian.target_error(weight)
        weight = compensate(weight, hessian.H, target_error, config.error_feedback, config.percdamp)
        del target_error  # as large as the weight in float32
    problem, candidate = sweep(make_problem(weight, hessian.H, config))
    candidate = refine(problem, candidate)
    candidate = improve(problem, candidate)
    return keep_better_rows(problem, candidate)


def improve(problem: Problem, candidate: Candidate) -> Candidate:
    """The best of more sweeps, each in another order and refined.

    Each output keeps the candidate with the least error under the damped H.
    """

    def loss_of(some: Candidate) -> Tensor:
        error = some.error(problem.w)
        return problem.added * error.square().sum(0) + quadratic(problem.hessian, error)

    if problem.config.sweeps == 1:
        return candidate
    loss = loss_of(candidate)
    for turn in range(1, problem.config.sweeps):
        other = refine(problem, sweep_again(problem, candidate, turn))
        other_loss = loss_of(other)
        better = other_loss < loss
        candidate = replace(
            candidate,
            q=torch.where(better, other.q, candidate.q),
            scales=torch.where(better, other.scales, candidate.scales),
        )
        loss = torch.minimum(loss, other_loss)
    return candidate


def round_to_nearest(W: Tensor, H: Tensor | None, config: QuantConfig) -> Solution:
    """Plain rounding of W (out, in) on the grid of each group of inputs.

    H: (in, in) for the losses and for the search "hessian", which falls back to "minmax"
    without it; the losses are then plain squared errors.
    """
    problem = make_problem(W, H, config)
    return keep_better_rows(problem, rounded(problem))


def rounded(problem: Problem) -> Candidate:
    """Plain rounding on the grid of each group of inputs."""
    scales, zeros = static_grids(problem.w, problem.H, problem.config)
    groups = natural_groups(len(problem.w), problem.config.group_size, scales.device)
    q = quantize(problem.w, Grid(scales[groups], zeros[groups]), problem.config.bits)
    return Candidate(q, scales, zeros, groups)
