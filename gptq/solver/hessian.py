"""The Hessian of a group of linear layers: statistics of its inputs over calibration tokens."""

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
    """(batch, seq, out): the hidden states that the group's output is added to, if it is."""
    product: Tensor | None = None
    """(batch, seq, out): the output without its bias, in a run that is ahead of its layer."""


@dataclass
class Hessian:
    """Statistics of what a group of layers receives: means over tokens, float32 (in, in)."""

    H: Tensor
    """Of x x^T, x being the quantized model's inputs."""
    cross: Tensor | None = None
    """Of (x_full - x) x^T, if the full-precision model runs as well and `target` is not known."""
    held_out: Tensor | None = None
    """The part of H, as a share of the same mean, that comes from held-out tokens."""
    target: Tensor | None = None
    """(out, in) of y x^T, y being what the layer's product with x should be: for a layer that
    writes to the hidden states, in place of `cross`."""

    @property
    def has_target(self) -> bool:
        """Whether the full-precision model was run as well as the quantized one."""
        return self.cross is not None or self.target is not None

    def take_outputs(self, outputs: slice) -> "Hessian":
        """The statistics for some of the layer's outputs; tensors are shared, not copied.

        `held_out` moves to the result: it is as large as H, and the solve frees it once the damping
        is chosen, unless somebody else holds it.
        """
        target = None if self.target is None else self.target[outputs]
        held_out, self.held_out = self.held_out, None
        return Hessian(self.H, self.cross, held_out, target)

    def target_error(self, weight: Tensor) -> Tensor:
        """(out, in), the mean of d x^T, d being what the product of `weight` (out, in) and x lacks
        of what it should be. Needs `has_target`."""
        if self.target is not None:
            return self.target - weight.to(self.H.dtype) @ self.H
        assert self.cross is not None
        return weight.to(self.H.dtype) @ self.cross


def accumulate_hessian(
    inputs: Iterator[Inputs],
    full_precision: Iterator[Inputs] | None,
    held_out: float,
    residual_feedback: bool = True,
) -> Hessian | None:
    """Statistics over batches of inputs, and of the full-precision model's if it runs; None of
    no batches.

    inputs, full_precision: x floating (batch, seq, in), the same tokens in both.
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
            add_upper(total("held_out", x.shape[1], x), x[cut:])
        if full_precision is not None:
            full = next(full_precision)
            if full.product is None:
                add("cross", full.x - batch.x, x)
            elif residual_feedback and full.residual is not None and batch.residual is not None:
                add("target", full.product + (full.residual - batch.residual), x)
            else:
                add("target", full.product, x)
    if not sums:
        return None
    if "held_out" in sums:
        sums["H"] += sums["held_out"]
    for name in ("H", "held_out"):
        if name in sums:
            mirror_upper(sums[name])
    return Hessian(**{name: sum_.div_(tokens) for name, sum_ in sums.items()})


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
