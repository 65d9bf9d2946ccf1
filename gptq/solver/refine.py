"""Refinement of a solved layer: integers and scales improved in turn, each step exactly.

The sweep decides every integer once, and every scale before its integers. Afterwards each can be
looked at again with all others fixed: the best integer of one weight and the best scale of one
group are known in closed form (coordinate descent on integers: QuantEase, Behdin et al. 2023,
arXiv 2309.01885; scales by least squares: arXiv 2602.02126). No step raises the objective.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gptq.solver.grid import to_stored
from gptq.solver.order import by_group
from gptq.solver.problem import Candidate, Problem
from quant_cuda.columns import GroupedColumns
from quant_cuda.cpu import library
from quant_cuda.cpu import solver as cpu_solver
from quant_cuda.cuda import kernels
from quant_cuda.cuda import solver as cuda_solver

# Columns of a group whose changes reach the rest of the group by one product.
PIECE = 128


def refine(problem: Problem, candidate: Candidate) -> Candidate:
    """The candidate after the rounds of refinement that the settings ask for.

    Zero points stay, and the signs of scales.
    """
    config = problem.config
    if config.refine == 0:
        return candidate
    order, runs, labels = by_group(problem.hessian.diagonal(), candidate.g_idx)
    H, q, scales = problem.damped(order), candidate.q.clone(), candidate.scales.clone()
    for outputs in problem.strips():
        columns = GroupedColumns(
            w=problem.w[order, outputs],
            H=H,
            q=q[order, outputs],
            scales=scales[:, outputs],
            zeros=candidate.zeros[:, outputs],
            runs=runs,
            labels=labels,
        )
        q[order, outputs], scales[:, outputs] = refine_columns(columns, config.bits, config.refine)
    return replace(candidate, q=q, scales=scales)


def refine_columns(columns: GroupedColumns, bits: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Lower tr(E^T H E), E = w - dequantized q, by `rounds` passes over all groups.

    Returns q (in, out) and scales (groups, out), both new and of the dtypes given. In compiled
    code if it was built, for float32; else in torch, as on a GPU if a group is longer than the
    kernel takes.
    """
    if rounds == 0 or not columns.runs:
        return columns.q, columns.scales
    compiled = _compiled_for(columns)
    if compiled is None:
        return torch_refine(columns, bits, rounds)
    q, scales = compiled(columns, bits=bits, rounds=rounds)
    return q.to(columns.q.dtype), scales


def _compiled_for(columns: GroupedColumns) -> Callable[..., tuple[Tensor, Tensor]] | None:
    if columns.w.dtype != torch.float32:
        return None
    if columns.w.device.type == "cpu" and library.instruction_sets():
        return cpu_solver.refine
    fits = columns.w.is_cuda and kernels.available() and columns.longest <= cuda_solver.LONGEST
    return cuda_solver.refine if fits else None


def torch_refine(columns: GroupedColumns, bits: int, rounds: int) -> tuple[Tensor, Tensor]:
    """`refine_columns` on any device and in any floating dtype."""
    w, H, q, zeros = columns.w, columns.H, columns.q, columns.zeros
    scales = columns.scales.clone()
    runs_and_labels = list(zip(columns.runs, columns.labels, strict=True))
    group = torch.empty(len(w), dtype=torch.long, device=w.device)
    for (start, stop), label in runs_and_labels:
        group[start:stop] = label
    steps = q.to(w.dtype) - zeros[group]
    gradient = H @ (w - steps * scales[group])
    for _ in range(rounds):
        for (start, stop), label in runs_and_labels:
            run = slice(start, stop)
            scale, zero = scales[label], zeros[label]
            before = steps[run] * scale
            _improve_steps(H[run, run], gradient[run], steps[run], scale, zero, bits)
            scales[label] = _improve_scale(H[run, run], gradient[run], steps[run], scale)
            change = steps[run] * scales[label] - before
            gradient[:start].addmm_(H[:start, run], change, alpha=-1)
            gradient[stop:].addmm_(H[stop:, run], change, alpha=-1)
    return (steps + zeros[group]).to(q.dtype), scales


def _improve_steps(
    H: Tensor, gradient: Tensor, steps: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> None:
    """Each integer of a group in turn becomes the best, all others as they are."""
    low, high = -zero, 2**bits - 1 - zero
    for start in range(0, len(steps), PIECE):
        stop = min(start + PIECE, len(steps))
        piece = slice(start, stop)
        before = steps[piece] * scale
        for j in range(start, stop):
            best = torch.round(steps[j] + gradient[j] / (H[j, j] * scale))
            best = torch.minimum(torch.maximum(best, low), high)
            gradient[piece].addr_(H[j, piece], (best - steps[j]) * scale, alpha=-1)
            steps[j] = best
        change = steps[piece] * scale - before
        gradient[:start].addmm_(H[:start, piece], change, alpha=-1)
        gradient[stop:].addmm_(H[stop:, piece], change, alpha=-1)


def _improve_scale(H: Tensor, gradient: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """The best float16 scale of each output's group; `gradient` follows."""
    effect = H @ steps
    curvature = (steps * effect).sum(0)
    slope = (steps * gradient).sum(0)
    step = torch.where(curvature > 0, slope / curvature, 0.0)
    found = torch.copysign(to_stored((scale + step) * scale.sign()), scale)
    change = found - scale
    # Rounding to float16 can overshoot; such a step is left out.
    found = torch.where(change * (2 * slope - change * curvature) > 0, found, scale)
    gradient -= effect * (found - scale)
    return found
