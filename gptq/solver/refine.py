"""Refinement of a solved layer: integers and scales improved in turn, each step exactly.

The sweep decides every integer once, and every scale before its integers. Afterwards each can be
looked at again with all others fixed: the best integer of one weight and the best scale of one
group are known in closed form (coordinate descent on integers: QuantEase, Behdin et al. 2023,
arXiv 2309.01885; scales by least squares: arXiv 2602.02126). No step raises the objective.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gptq.solver.grid import to_stored
from quant_cuda.cpu import library
from quant_cuda.cuda import kernels
from quant_cuda.cuda import refine as cuda_refine

# Columns of a group whose changes reach the rest of the group by one product.
PIECE = 128


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
) -> tuple[Tensor, Tensor]:
    """Lower tr(E^T H E), E = w - dequantized q, by `rounds` passes over all groups.

    w: floating (in, out), columns of W ordered so that each group is a run; H: (in, in), positive
        definite, in the same order and dtype; q: (in, out) whole numbers, of any dtype; scales,
        zeros: (groups, out) in w's dtype, scales exactly float16 numbers of either sign.
    runs: (start, stop) of each group in the order they are visited; labels: each run's group.
    Returns q and scales anew, in the types given. Zero points stay, and the signs of scales.
    In compiled code where it was built, for float32; else in torch, as on a GPU where a group is
    longer than its kernel takes.
    """
    if rounds == 0 or not runs:
        return q, scales
    given = (w, H, q, scales, zeros, runs, labels, bits, rounds)
    compiled = _compiled_for(w, runs)
    if compiled is None:
        return torch_refine(*given)
    found, scales = compiled(*given)
    return found.to(q.dtype), scales


def _compiled_for(
    w: Tensor, runs: list[tuple[int, int]]
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    if w.dtype != torch.float32:
        return None
    if w.device.type == "cpu" and library.instruction_sets():
        return library.refine
    longest = max(stop - start for start, stop in runs)
    fits = w.device.type == "cuda" and kernels.available() and longest <= cuda_refine.LONGEST
    return cuda_refine.refine if fits else None


def torch_refine(
    w: Tensor,
    H: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    runs: list[tuple[int, int]],
    labels: list[int],
    bits: int,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """`refine` on any device and in any floating type."""
    scales = scales.clone()
    group = torch.empty(len(w), dtype=torch.long, device=w.device)
    for (start, stop), label in zip(runs, labels, strict=True):
        group[start:stop] = label
    steps = q.to(w.dtype) - zeros[group]
    gradient = H @ (w - steps * scales[group])
    for _ in range(rounds):
        for (start, stop), label in zip(runs, labels, strict=True):
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
