"""A layer to be quantized, and a candidate for its solution.

Everything here is transposed, (in, out): a column of W, which holds one input's weights for all
outputs, is then one piece of memory, as it is in the packed format.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.cholesky import damped, mean_live, repair_dead
from gptq.solver.grid import Grid, dequantize

# Rows of H whose product is taken at once.
STRIP = 256
# Outputs that are refined and measured at once, on a CPU and on a GPU, which more keep busy.
ROWS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Problem:
    """Minimise tr((W - Q) H (W - Q)^T) over Q on a grid."""

    w: Tensor
    """(in, out): W transposed; at dead inputs no larger than an output's other weights."""
    H: Tensor | None
    """(in, in): mean of x x^T, undamped, with an ordinary diagonal at dead inputs. None if no
    inputs are known."""
    dead: Tensor
    """bool (in,): inputs that were zero on all tokens."""
    config: QuantConfig
    damp: float = 0.0
    """Share of the mean diagonal that is added to H."""

    @property
    def hessian(self) -> Tensor:
        """H where it has to be there."""
        assert self.H is not None
        return self.H

    @property
    def added(self) -> Tensor:
        """The number that damping adds to the diagonal of H."""
        return self.damp * mean_live(self.hessian.diagonal(), self.dead)

    def damped(self, order: Tensor | None = None) -> Tensor:
        """A damped copy of H, in another order if one is given."""
        return damped(self.hessian, self.added, order)

    def row_loss(self, error: Tensor) -> Tensor:
        """error^T H error of each output, H undamped; plain squares without H.

        error: (in, out), which is used up.
        """
        if self.H is None:
            return error.square_().sum(0)
        # A dead input carries nothing, whatever H has there to be invertible.
        error[self.dead] = 0
        return quadratic(self.H, error)

    def strips(self) -> list[slice]:
        """Outputs to work on together if each step makes copies; no output depends on another."""
        outputs = self.w.shape[1]
        size = ROWS.get(self.w.device.type, ROWS["cpu"])
        return [slice(start, min(start + size, outputs)) for start in range(0, outputs, size)]


@dataclass(frozen=True)
class Candidate:
    """Integers and their grids, columns in the layer's own order."""

    q: Tensor
    """(in, out), whole numbers in the working dtype."""
    scales: Tensor
    """(groups, out) in the working dtype, exactly float16 numbers."""
    zeros: Tensor
    """(groups, out), whole numbers in the working dtype."""
    g_idx: Tensor
    """Integer (in,): the group of each input."""

    def grid(self, outputs: slice = slice(None)) -> Grid:
        """The grid of every weight, (in, out)."""
        return Grid(self.scales[self.g_idx, outputs], self.zeros[self.g_idx, outputs])

    def error(self, w: Tensor) -> Tensor:
        """Dequantized values less w, (in, out)."""
        return dequantize(self.q, self.grid()).sub_(w)


def make_problem(W: Tensor, H: Tensor | None, config: QuantConfig) -> Problem:
    """W (out, in) and H (in, in) as the solver takes them; neither is changed.

    The arithmetic is in H's dtype, on H's device; without H in float32 on W's device.
    Raises ValueError if W or H holds NaN or infinity.
    """
    check_finite(W, H)
    device, dtype = (W.device, torch.float32) if H is None else (H.device, H.dtype)
    w = W.detach().to(device, dtype).T.clone(memory_format=torch.contiguous_format)
    dead = torch.zeros(w.shape[0], dtype=torch.bool, device=device)
    if H is not None:
        H, dead = repair_dead(H)
        if bool(dead.any()) and not bool(dead.all()):
            # Nothing is known of dead inputs but that their weights must not widen a group's range
            # at the cost of the others. H has zeros beside their diagonal: no other column's error
            # reaches them, and they are rounded to nearest.
            bound = w[~dead].abs().amax(0)
            w[dead] = torch.minimum(torch.maximum(w[dead], -bound), bound)
    return Problem(w, H, dead, config)


def check_finite(W: Tensor, H: Tensor | None) -> None:
    """Raise ValueError if W or H holds NaN or infinity."""
    if not bool(torch.isfinite(W).all()):
        raise ValueError("the weight holds NaN or infinity")
    if H is not None and not bool(torch.isfinite(H).all()):
        raise ValueError("the inputs hold NaN or infinity")


def quadratic(H: Tensor, error: Tensor) -> Tensor:
    """error^T H error for each output: H symmetric (in, in), error (in, out), to (out,).

    A strip of H's rows at a time: the strip on the diagonal, and twice what lies right of it.
    """
    loss = torch.zeros_like(error[0])
    for start in range(0, len(H), STRIP):
        stop = min(start + STRIP, len(H))
        product = 2 * (H[start:stop, stop:] @ error[stop:])
        product += H[start:stop, start:stop] @ error[start:stop]
        loss += product.mul_(error[start:stop]).sum(0)
    return loss
