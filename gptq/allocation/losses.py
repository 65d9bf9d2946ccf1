"""What a change costs a model: by its next-token distribution, and by the error of a layer."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gptq.config import QuantConfig, Width, with_width
from gptq.solver.layer import rounded
from gptq.solver.problem import make_problem

# Outputs of a group that are rounded to know the error of a width that is not measured.
ROWS = 256
# Tokens of a window whose logits are in memory at once.
LOGIT_TOKENS = 256
# Next tokens that stand for all of a distribution. Of 120 groups of SmolLM2, on 512 tokens, 64 tell
# the divergence within 1.2% (standard deviation; 32: 2.1%, 128: 0.9%).
SAMPLES = 64


def divergence(full: Tensor, logits: Tensor) -> float:
    """The sum over tokens of the KL divergence from one distribution to another, in nats.

    full: logarithms of probabilities, float32 (..., vocabulary). logits: of the other distribution,
    floating, of the same shape.
    """
    # ---------------------------------------------------------------------------------------------
    # Why not entropy and cross entropy: their difference is small, and the rounding of both large
    # sums is -2e-4 nats for the logits of a real model, as much as what 4 bits cost a layer. Here
    # each term is at least 0; exp(d) - 1 counts what rounding leaves of the sums of probabilities,
    # so that it does not show in first order.
    # ---------------------------------------------------------------------------------------------
    less = logits.float().log_softmax(-1).sub_(full)
    terms = less.expm1().sub_(less).mul_(full.exp())
    return float(terms.sum(dtype=torch.float64))


def sample_tokens(probabilities: Tensor, count: int) -> Tensor:
    """Tokens that stand for a distribution, each for 1 / count of it: int64 (..., count).

    They are the quantiles of the distribution over the tokens in their order (systematic sampling),
    so that a token comes count times its probability, rounded up or down.
    probabilities: float32 (..., vocabulary).
    """
    # Whole numbers, because the order in which a GPU adds differs from run to run.
    shares = probabilities.mul(2**30).round_().to(torch.int32)
    sums = shares.cumsum(-1, dtype=torch.int32)
    middles = 2 * torch.arange(count, device=sums.device) + 1
    quantiles = middles * sums[..., -1:].long() // (2 * count)
    tokens = torch.searchsorted(sums, quantiles.to(torch.int32), right=True)
    # What is no distribution, because logits are not finite, has no quantiles.
    return tokens.clamp_(max=sums.shape[-1] - 1)


def sampled_divergence(full: Tensor, logits: Tensor) -> float:
    """`divergence` from the logits of what `sample_tokens` draws from the first distribution.

    full, logits: floating (..., count).
    With d = logits - full and means over the first distribution it is log(mean(exp(d))) - mean(d).
    """
    change = logits.double() - full.double()
    count = change.shape[-1]
    terms = change.logsumexp(-1) - math.log(count) - change.mean(-1)
    return float(terms.sum())


def relative_errors(
    weight: Tensor, H: Tensor, config: QuantConfig, widths: Sequence[Width], reference: Width
) -> list[float]:
    """The output's mean squared error for each width, as a share of that for the reference.

    The share of its bits, at the reference's group size, times the share of its group size. Of
    plain rounding, for which H need not be factored: the solve lowers the errors of all widths by
    nearly the same factor (within 10% of it for 12 groups of SmolLM2, mostly 3%). Of ROWS of the
    outputs, which tell it for all: they share the inputs and the shape.
    """
    count = min(ROWS, len(weight))
    sample = weight[torch.arange(count, device=weight.device) * len(weight) // count]
    problem = make_problem(sample, H, config)
    losses: dict[Width, float] = {}

    def share(width: Width) -> float:
        for each in (width, reference):
            if each not in losses:
                part = replace(problem, config=with_width(config, each))
                losses[each] = float(part.row_loss(rounded(part).error(part.w)).sum())
        return losses[width] / max(losses[reference], torch.finfo(torch.float32).tiny)

    return [
        share(Width(width.bits, reference.group_size))
        * share(Width(reference.bits, width.group_size))
        for width in widths
    ]
