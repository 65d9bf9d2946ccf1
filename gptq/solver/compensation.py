"""Correcting a weight for the errors of quantized layers before it."""

from torch import Tensor

from gptq.solver.cholesky import inverse_factor, repair_dead


def compensate(W: Tensor, H: Tensor, target_error: Tensor, share: float, percdamp: float) -> Tensor:
    """Correct a weight for the error that quantized layers before it have brought about.

    W: floating (out, in); H: (in, in), mean of x x^T over the quantized model's inputs x;
    target_error: (out, in), mean of d x^T, where d is what the layer's output W x lacks of what it
        should be, given the full-precision model's activations.
    share: 1 makes up for all of d; a share below 1 shrinks the correction, which few calibration
        tokens determine poorly.
    Returns W + share * target_error (H + damp)^-1 in H's dtype: for 1, the least-squares solution
    of asymmetric calibration (Li et al. 2025, GPTAQ, arXiv 2504.02692; LoaQ, arXiv 2509.06297).
    """
    H, dead = repair_dead(H)
    U, _ = inverse_factor(H, dead, percdamp)
    target_error = target_error.to(H.device, H.dtype).masked_fill(dead, 0)
    return W.to(H.device, H.dtype) + share * (target_error @ U.T) @ U
