"""Second moments of what a group of linear layers receives, summed over calibration tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of a symmetric product that are computed together, from the diagonal to the right edge:
# wide enough for a fast matrix product, narrow enough to leave out nearly half of it.
NARROWEST, WIDEST, STRIPS = 128, 512, 6


@dataclass(frozen=True)
class Inputs:
    """What a group of linear layers is about to receive."""

    x: Tensor
    """(batch, seq, in)."""
    residual: Tensor | None
    """(batch, seq, out): the hidden states that the group's output is added to, where it is."""
    product: Tensor | None = None
    """(batch, seq, out): the output without its bias, in a run that is ahead of its layer."""


@dataclass
class Moments:
    """Second moments of a layer's inputs, means over all tokens, float32 (in, in)."""

    H: Tensor
    """Of x x^T, x being the quantized model's inputs."""
    C: Tensor | None = None
    """Of (x_full - x) x^T, where the full model runs beside it and R is not known."""
    held: Tensor | None = None
    """The part of H, in the same measure, that comes of held-out tokens."""
    R: Tensor | None = None
    """(out, in) of y x^T, y being what the layer's product with x should be: for a layer that
    writes to the hidden states, in place of C."""

    def missing(self, weight: Tensor) -> Tensor | None:
        """(out, in), the mean of d x^T, d being what the product of `weight` (out, in) and x lacks
        of what it should be; None where no full model runs beside it."""
        if self.R is not None:
            return self.R - weight.float() @ self.H
        return None if self.C is None else weight.float() @ self.C


def moments(
    inputs: Iterator[Inputs],
    beside: Iterator[Inputs] | None,
    held_out: float,
    residual_feedback: bool = True,
) -> Moments | None:
    """Moments over batches of inputs, and of the full model's where it runs; None of none.

    inputs, beside: x floating (batch, seq, in), the same tokens in both.
    held_out: the share of each batch, at its end, whose part of H is kept apart too.
    residual_feedback: whether a layer's product should make up for the error of the hidden states
        that it is added to.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0

    def total(name: str, rows: int, x: Tensor) -> Tensor:
        if name not in sums:
            sums[name] = x.new_zeros((rows, x.shape[1]), dtype=torch.float32)
        return sums[name]

    def add(name: str, left: Tensor, x: Tensor) -> None:
        left = multiplied_as(left.flatten(0, -2))
        add_product(total(name, left.shape[1], x), left, x)

    for batch in inputs:
        x = multiplied_as(batch.x.flatten(0, -2))
        tokens += len(x)
        cut = len(x) - int(held_out * len(x))
        add_upper(total("H", x.shape[1], x), x[:cut])
        if cut < len(x):
            add_upper(total("held", x.shape[1], x), x[cut:])
        if beside is not None:
            full = next(beside)
            if full.product is None:
                add("C", full.x - batch.x, x)
            elif residual_feedback and full.residual is not None and batch.residual is not None:
                add("R", full.product + (full.residual - batch.residual), x)
            else:
                add("R", full.product, x)
    if not sums:
        return None
    if "held" in sums:
        sums["H"] += sums["held"]
    for name in ("H", "held"):
        if name in sums:
            mirror_upper(sums[name])
    return Moments(**{name: sum_.div_(tokens) for name, sum_ in sums.items()})


def multiplied_as(x: Tensor) -> Tensor:
    """x in the type that its products are taken in: float32, or 16 bits as they are on a GPU, whose
    matrix units multiply them exactly and sum in float32."""
    wide = torch.ops.aten.mm
    return x if x.is_cuda and x.itemsize == 2 and hasattr(wide, "dtype") else x.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total` (n, m). left: (tokens, n), right: (tokens, m), of its type or as
    `multiplied_as` gives them."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=torch.float32)  # type: ignore[call-overload]


def add_upper(total: Tensor, x: Tensor) -> None:
    """Add x^T x to float32 `total` (in, in) where the column is not below the row; what lies left
    of the diagonal is undefined. x: (tokens, in), as `multiplied_as` gives it. About half of a
    product's work."""
    n = x.shape[1]
    width = min(max(NARROWEST, -(-n // STRIPS)), WIDEST)
    for start in range(0, n, width):
        stop = min(start + width, n)
        add_product(total[start:stop, start:], x[:, start:stop], x[:, start:])


def mirror_upper(total: Tensor) -> None:
    """Make (in, in) symmetric, in place, by what is on and above its diagonal."""
    n = len(total)
    for start in range(0, n, WIDEST):
        stop = min(start + WIDEST, n)
        corner = total[start:stop, start:stop]
        corner.copy_(torch.triu(corner) + torch.triu(corner, 1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
