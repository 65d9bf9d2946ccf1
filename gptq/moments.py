"""Second moments of what a group of linear layers receives, summed over calibration tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.stages import Inputs

# Columns of a symmetric product that are computed together, from the diagonal to the right edge:
# wide enough for a fast matrix product, narrow enough to leave out nearly half of it.
NARROWEST, WIDEST, STRIPS = 128, 512, 6


@dataclass
class Moments:
    """Second moments of a layer's inputs, means over all tokens, float32 (in, in)."""

    H: Tensor
    """Of x x^T, x being the quantized model's inputs."""
    C: Tensor | None = None
    """Of (x_full - x) x^T, where the full model runs beside it."""
    held: Tensor | None = None
    """The part of H, in the same measure, that comes of held-out tokens."""
    R: Tensor | None = None
    """(out, in) of (h_full - h) x^T, h being the hidden states that the layer's output is added
    to, for a layer that has such."""


def moments(
    inputs: Iterator[Inputs], beside: Iterator[Inputs] | None, held_out: float
) -> Moments | None:
    """Moments over batches of inputs, and of the full model's where it runs; None of none.

    inputs, beside: x floating (batch, seq, in), the same tokens in both.
    held_out: the share of each batch, at its end, whose part of H is kept apart too.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0

    def total(name: str, rows: int, x: Tensor) -> Tensor:
        if name not in sums:
            sums[name] = x.new_zeros((rows, x.shape[1]))
        return sums[name]

    def add(name: str, left: Tensor, x: Tensor) -> None:
        left = left.flatten(0, -2).float()
        total(name, left.shape[1], x).addmm_(left.T, x)

    for batch in inputs:
        x = batch.x.flatten(0, -2).float()
        tokens += len(x)
        cut = len(x) - int(held_out * len(x))
        add_upper(total("H", x.shape[1], x), x[:cut])
        if cut < len(x):
            add_upper(total("held", x.shape[1], x), x[cut:])
        if beside is not None:
            full = next(beside)
            add("C", full.x - batch.x, x)
            if full.residual is not None and batch.residual is not None:
                add("R", full.residual - batch.residual, x)
    if not sums:
        return None
    if "held" in sums:
        sums["H"] += sums["held"]
    for name in ("H", "held"):
        if name in sums:
            mirror_upper(sums[name])
    return Moments(**{name: sum_.div_(tokens) for name, sum_ in sums.items()})


def add_upper(total: Tensor, x: Tensor) -> None:
    """Add x^T x to `total` (in, in) where the column is not below the row; what lies left of the
    diagonal is undefined. x: (tokens, in), of the same dtype. About half of a product's work."""
    n = x.shape[1]
    width = min(max(NARROWEST, -(-n // STRIPS)), WIDEST)
    for start in range(0, n, width):
        stop = min(start + width, n)
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def mirror_upper(total: Tensor) -> None:
    """Make (in, in) symmetric, in place, by what is on and above its diagonal."""
    n = len(total)
    for start in range(0, n, WIDEST):
        stop = min(start + WIDEST, n)
        corner = total[start:stop, start:stop]
        corner.copy_(torch.triu(corner) + torch.triu(corner, 1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
