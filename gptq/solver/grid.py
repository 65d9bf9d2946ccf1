"""Scale and zero point of a group, and rounding on the grid they span.

A group is a slice of W transposed: (g, out), one column for each output, and every output has a
grid of its own: the values scale * (q - zero) for q in 0..2**bits - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# From a little over the range of the weights, which can suit a symmetric grid, down to 0.6 of it;
# 1 is among them, so that a search is never worse than the range itself.
SHRINK_FACTORS = tuple(percent / 100 for percent in range(104, 58, -2))
MSE_NORM = 2.4
_HALF = torch.finfo(torch.float16)
_HALF_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Grid:
    scale: Tensor
    """(out,), in the working type but exactly a float16 number; negative where a symmetric grid
    has its one level more on the positive side."""
    zero: Tensor
    """(out,), whole numbers in 1..2**bits - 1, in the working type."""


def quantize(w: Tensor, grid: Grid, bits: int) -> Tensor:
    """Nearest integers of w (..., out) on the grid, in w's dtype; ties go to even."""
    return torch.round(w / grid.scale).add_(grid.zero).clamp_(0, 2**bits - 1)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """The numbers that integers q (..., out) stand for."""
    return (q - grid.zero) * grid.scale


def to_stored(scale: Tensor) -> Tensor:
    """Round a scale to float16, the type checkpoints store, and keep it positive and finite.

    float64 is rounded by way of float32, as torch does.
    """
    return scale.clamp(_HALF_SMALLEST, _HALF.max).to(torch.float16).to(scale.dtype)


def search_factors(sym: bool) -> tuple[float, ...]:
    """What a search multiplies the range by. A symmetric grid has one level more below zero than
    above; with a negative factor its scale is negative, and the level lies above."""
    return SHRINK_FACTORS + tuple(-factor for factor in SHRINK_FACTORS) if sym else SHRINK_FACTORS


def find_grid(w: Tensor, bits: int, sym: bool, search: str, H: Tensor | None = None) -> Grid:
    """The grid of each output for one group of inputs.

    w: floating (g, out).
    search: "minmax" takes the range of the weights; "mse" and "hessian" try `search_factors` of
        it and keep the one with the least sum of |error|**2.4, or the least error^T H error; then
        the zero point's two neighbours, where it is not fixed.
    H: (g, g), the group's block of the Hessian; needed by "hessian" alone.
    Zero points stay in 1..2**bits - 1, which every reader of the "gptq" format agrees on.
    """
    low, high = _range(w)
    best = _grid(low, high, 1.0, bits, sym)
    if search == "minmax":
        return best
    if search == "hessian" and H is None:
        raise ValueError('search "hessian" needs H')
    weight = H if search == "hessian" else None
    best_loss = torch.full_like(low, torch.inf)
    for factor in search_factors(sym):
        grid = _grid(low, high, factor, bits, sym)
        best, best_loss = _better(w, grid, bits, weight, best, best_loss)
    if sym:
        return best
    found = best.zero
    for step in (-1, 1):
        moved = Grid(best.scale, (found + step).clamp_(1, 2**bits - 1))
        best, best_loss = _better(w, moved, bits, weight, best, best_loss)
    return best


def _better(
    w: Tensor, grid: Grid, bits: int, H: Tensor | None, best: Grid, best_loss: Tensor
) -> tuple[Grid, Tensor]:
    """For each output the one of two grids with the lower loss, and that loss.

    The loss is error^T H error, or without H the sum of |error|**2.4.
    """
    steps = torch.div(w, grid.scale).round_()
    error = steps.clamp_(-grid.zero, 2**bits - 1 - grid.zero).mul_(grid.scale).sub_(w)
    loss = error.abs_().pow_(MSE_NORM) if H is None else (H @ error).mul_(error)
    loss = loss.sum(0)
    better = loss < best_loss
    scale = torch.where(better, grid.scale, best.scale)
    zero = torch.where(better, grid.zero, best.zero)
    return Grid(scale, zero), torch.where(better, loss, best_loss)


def _range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each output, zero included; -1 and 1 where all are zero."""
    low = w.amin(0).clamp(max=0)
    high = w.amax(0).clamp(min=0)
    empty = (low == 0) & (high == 0)
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def _grid(low: Tensor, high: Tensor, factor: float, bits: int, sym: bool) -> Grid:
    maxq = 2**bits - 1
    low, high = low * abs(factor), high * abs(factor)
    if sym:
        scale = to_stored(2 * torch.maximum(-low, high) / maxq)
        scale = -scale if factor < 0 else scale
        return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)))
    scale = to_stored((high - low) / maxq)
    zero = torch.round(-low / scale)
    # A zero point of 0 cannot be stored; with 1, the positive side has one level less to reach.
    positive = zero < 1
    scale = torch.where(positive, to_stored(high / (maxq - 1)), scale)
    return Grid(scale, torch.where(positive, 1.0, zero).clamp_(max=maxq))
