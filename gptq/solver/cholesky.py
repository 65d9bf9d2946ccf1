"""The Hessian H made fit to solve with, and the Cholesky factor of its inverse.

Each matrix of a wide layer is hundreds of megabytes, so that none is copied without need.
"""

import torch
from torch import Tensor

DAMP_STEP = 10.0
DAMP_LIMIT = 1e4
# Rows that are put in order at once, and up to what size a triangle is not cut further.
STRIP = 256
TRIANGLE = 192


def repair_dead(H: Tensor) -> tuple[Tensor, Tensor]:
    """H with an ordinary diagonal at dead inputs (zero on all tokens), and which those are: bool
    (in,). H itself is returned if there are none."""
    diagonal, dead = repaired(H.diagonal())
    if not bool(dead.any()):
        return H, dead
    H = H.clone()
    H.diagonal().copy_(diagonal)
    return H, dead


def repaired(diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of H (in,), each zero replaced by the mean of the others or by 1, and where the
    zeros were: bool (in,)."""
    dead = diagonal == 0
    ordinary = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    return torch.where(dead, ordinary, diagonal), dead


def mean_live(diagonal: Tensor, dead: Tensor) -> Tensor:
    """The mean of a repaired diagonal (in,) over the live inputs, or over all if none is live."""
    return (diagonal if bool(dead.all()) else diagonal[~dead]).mean()


def permuted(H: Tensor, order: Tensor) -> Tensor:
    """H (n, n) with its rows and columns in another order, int64 (n,); makes one copy and no
    more."""
    out = torch.empty_like(H)
    for start in range(0, len(H), STRIP):
        rows = H[order[start : start + STRIP]]
        torch.index_select(rows, 1, order, out=out[start : start + STRIP])
    return out


def damped(H: Tensor, added: Tensor, order: Tensor | None = None) -> Tensor:
    """A copy of H (n, n) with `added` on its diagonal, in another order if one is given."""
    H = H.clone() if order is None else permuted(H, order)
    H.diagonal().add_(added)
    return H


def inverse_factor(
    H: Tensor, dead: Tensor, percdamp: float, order: Tensor | None = None
) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damp)^-1, and the damping used.

    H: (in, in), symmetric; dead: bool (in,), columns left out of the mean diagonal; order: int64
        (in,), which of H's rows and columns each of U's belongs to, by default the same.
    Damping starts at percdamp times the mean diagonal. With P the reversal of rows and L the
    Cholesky factor of P H P, U is P L^-1 P: one factorization and one triangular inverse.
    """
    reverse = torch.arange(len(H), device=H.device) if order is None else order
    reverse = reverse.flip(0)
    mean = mean_live(H.diagonal(), dead)
    while True:
        L = permuted(H, reverse).T  # the layout that LAPACK factors in place
        L.diagonal().add_(percdamp * mean)
        failed = torch.empty((), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(L, out=(L, failed))
        if not failed:
            U = lower_inverse(L)
            del L
            U = U.flip(0, 1)
            if bool(torch.isfinite(U).all()):
                return U, percdamp
        percdamp = max(percdamp, 1e-4) * DAMP_STEP
        if percdamp > DAMP_LIMIT:
            raise ValueError("H cannot be made positive definite; its inputs may have overflowed")


def lower_inverse(L: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: LAPACK's own is half as fast, and solves
    for the zeros too."""
    n = len(L)
    if n <= TRIANGLE:
        eye = torch.eye(n, dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, eye, upper=False)
    half = n // 2
    first, second = lower_inverse(L[:half, :half]), lower_inverse(L[half:, half:])
    inverse = torch.zeros_like(L)
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = -(second @ (L[half:, :half] @ first))
    return inverse
