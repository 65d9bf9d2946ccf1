"""How much damping a layer gets: the share that costs least on inputs it is not computed from."""

import math

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.cholesky import mean_live, permuted, repaired
from gptq.solver.order import column_order

# What choose_damping multiplies `percdamp` by, and by how many columns it judges.
DAMP_FACTORS = (1, 3, 10, 30, 100)
DAMP_COLUMNS = 96


def choose_damping(H: Tensor, held_out: Tensor, config: QuantConfig) -> float:
    """The damping under which a sweep's errors cost least on held-out inputs.

    H: (in, in), mean of a layer's x x^T; held_out: (in, in), the part of it that judges. Tries
    `percdamp` times each of DAMP_FACTORS.
    With few tokens the small eigenvalues of H are too small, and a solve with little damping puts
    its errors there. The sweep leaves W - Q = e U, where e_j = r_j / U_jj and r_j is the rounding
    error of column j. If those are independent and alike, held-out inputs see an error of
    sum_j (U held_out U^T)_jj / U_jj^2, up to a factor; no weight has to be quantized to know it.
    """
    n = len(H)
    diagonal, dead = repaired(H.diagonal() - held_out.diagonal())
    order = column_order(diagonal, config)[0].flip(0)
    fitted = permuted(H, order).sub_(permuted(held_out, order))
    fitted.diagonal().copy_(diagonal[order])
    place = torch.argsort(order)
    columns = torch.arange(n % max(1, n // DAMP_COLUMNS), n, max(1, n // DAMP_COLUMNS))
    columns = columns.to(H.device)
    unit = torch.zeros(n, len(columns), dtype=H.dtype, device=H.device)
    unit[columns, torch.arange(len(columns), device=H.device)] = 1
    mean = mean_live(diagonal, dead)

    def loss(percdamp: float) -> float:
        L = fitted.T.clone()  # in the layout that LAPACK factors in place
        L.diagonal().add_(percdamp * mean)
        failed = torch.empty((), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(L, out=(L, failed))
        if failed:
            return math.inf
        # Rows of L^-1, which is U with rows and columns reversed.
        rows = torch.linalg.solve_triangular(L.T, unit, upper=True)
        pivots = rows[columns, torch.arange(len(columns), device=H.device)]
        rows = rows[place]  # in the order of held_out
        total = float((((held_out @ rows) * rows).sum(0) / pivots**2).sum())
        return total if math.isfinite(total) else math.inf

    return min((factor * config.percdamp for factor in DAMP_FACTORS), key=loss)
