"""What calibration decides about a layer before it is solved: its damping, and how far its weight
is corrected for the errors of quantized layers before it."""

import math

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.cholesky import inverse_factor, mean_live, mend_dead, mended, permuted
from gptq.solver.solve import column_order

# What choose_damp multiplies the damping by, and how many columns it judges by.
DAMP_FACTORS = (1, 3, 10, 30, 100)
DAMP_COLUMNS = 96


def choose_damp(H: Tensor, held: Tensor, config: QuantConfig) -> float:
    """The damping under which a sweep's errors cost least on inputs it is not computed from.

    H: (in, in), sum of a layer's x x^T; held: (in, in), the part of it that judges. Tries
    `percdamp` and DAMP_FACTORS times as much.
    With few tokens the small eigenvalues of H are too small, and a solve with little damping puts
    its errors there. The sweep leaves W - Q = e U, where e_j = r_j / U_jj and r_j is the rounding
    error of column j. If those are independent and alike, held-out inputs see an error of
    sum_j (U held U^T)_jj / U_jj^2, up to a factor; no weight has to be quantized to know it.
    """
    n = len(H)
    diagonal, dead = mended(H.diagonal() - held.diagonal())
    order = column_order(diagonal, config)[0].flip(0)
    fitted = permuted(H, order).sub_(permuted(held, order))
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
        rows = rows[place]  # held's are in the order that it came in
        found = float((((held @ rows) * rows).sum(0) / pivots**2).sum())
        return found if math.isfinite(found) else math.inf

    return min((factor * config.percdamp for factor in DAMP_FACTORS), key=loss)


def feed_back(W: Tensor, H: Tensor, missing: Tensor, share: float, percdamp: float) -> Tensor:
    """Correct a weight for the error that quantized layers before it have brought about.

    W: floating (out, in); H: (in, in), mean of x x^T over the quantized model's inputs x;
    missing: (out, in), mean of d x^T, where d is what the layer's output W x lacks of what it
        should be, given the full model's activations.
    share: 1 makes up for all of d; a share below 1 shrinks the correction, which few calibration
        tokens determine poorly.
    Returns W + share * missing (H + damp)^-1 in H's dtype: for 1, the least-squares solution of
    asymmetric calibration (Li et al. 2025, GPTAQ, arXiv 2504.02692; LoaQ, arXiv 2509.06297).
    """
    H, dead = mend_dead(H)
    U, _ = inverse_factor(H, dead, percdamp)
    missing = missing.to(H.device, H.dtype).masked_fill(dead, 0)
    return W.to(H.device, H.dtype) + share * (missing @ U.T) @ U
