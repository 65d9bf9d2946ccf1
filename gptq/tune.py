"""Tune a solved block as a whole: its integers and scales against the full block's output.

Solving layer by layer cannot see what attention and activation functions make of an error. Here
signed gradient steps on the block's output move what each integer was rounded from, and each
scale (Cheng et al. 2023, SignRound, arXiv 2309.05516); they start from a solution of the solver,
where that method starts from plain rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptq.grid import to_stored
from gptq.solver import Solution

Batch = tuple[Tensor, Mapping[str, Any]]

STEPS = 48
# How far an integer's origin can move in the first step, in quantization steps; falls to zero.
ROUNDING_RATE = 0.02
# The same for a scale, as a share of it.
SCALE_RATE = 0.002


@dataclass
class _Layer:
    """A layer on its way: integers are `origin` rounded."""

    origin: Tensor
    """float32 (out, in)."""
    scales: Tensor
    """float32 (groups, out); they are used as float16."""
    rate: Tensor
    """(groups, out): SCALE_RATE of the scales as they were."""
    zeros: Tensor
    """float32 (out, in)."""
    g_idx: Tensor
    """int64 (in,)."""
    max_q: int

    def steps(self) -> Tensor:
        """q - zero, (out, in)."""
        return self.origin.round().clamp_(0, self.max_q).sub_(self.zeros)

    def move(self, gradient: Tensor, steps: Tensor, fraction: float) -> None:
        """One signed step against the gradient (out, in) of the dequantized weight."""
        by_group = torch.zeros_like(self.scales).index_add_(0, self.g_idx, (gradient * steps).T)
        self.scales -= fraction * self.rate * by_group.sign_()
        self.origin.sub_(gradient.sign(), alpha=fraction * ROUNDING_RATE)
        # No further out than where one step brings it back.
        self.origin.clamp_(-0.5, self.max_q + 0.5)


def tune(
    block: nn.Module,
    solutions: Mapping[str, Solution],
    batches: Sequence[Batch],
    targets: Sequence[Tensor],
    bits: int,
    seed: int,
    steps: int = STEPS,
) -> dict[str, Solution]:
    """Better integers and scales for the block's linear layers; zeros and groups stay.

    block: holds everything but those layers' weights, which are not read; it is not changed.
    solutions: of its linear layers, by their names in the block, `origin` given.
    batches: hidden states (batch, seq, hidden) of the quantized model, with the block's other
        arguments; targets: what the full model's block gives for the same tokens.
    A token's error counts in relation to the size of the full model's hidden state there: the
    norms that later blocks begin with see it so.
    """
    layers = {name: _start(solution, bits) for name, solution in solutions.items()}
    order = _order(len(batches), seed)
    for step in range(steps):
        index = next(order)
        hidden, arguments = batches[index]
        numbers = {name: layer.steps() for name, layer in layers.items()}
        weights = {
            f"{name}.weight": _dequantized(layer, numbers[name], hidden.dtype)
            for name, layer in layers.items()
        }
        with torch.enable_grad():
            output = functional_call(block, weights, (hidden,), dict(arguments))
            output = output[0] if isinstance(output, tuple) else output
            gradients = torch.autograd.grad(_loss(output, targets[index]), list(weights.values()))
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            layer.move(gradient.float(), numbers[name], 1 - step / steps)
    return {name: _finished(solutions[name], layer) for name, layer in layers.items()}


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token over the square of the token, meaned."""
    target = target.float()
    size = target.square().mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((output.float() - target).square() / size).mean()


def _start(solution: Solution, bits: int) -> _Layer:
    if solution.origin is None:
        raise ValueError("tuning needs what the integers were rounded from")
    scales, g_idx = solution.scales.float(), solution.g_idx.long()
    zeros = solution.zeros.float()[g_idx].T.contiguous()
    return _Layer(solution.origin.clone(), scales, SCALE_RATE * scales, zeros, g_idx, 2**bits - 1)


def _dequantized(layer: _Layer, steps: Tensor, dtype: torch.dtype) -> Tensor:
    weight = steps * to_stored(layer.scales)[layer.g_idx].T
    return weight.to(dtype).requires_grad_(True)


def _finished(solution: Solution, layer: _Layer) -> Solution:
    q = layer.origin.round().clamp_(0, layer.max_q).to(torch.uint8)
    return replace(solution, q=q, scales=to_stored(layer.scales).to(torch.float16))


def _order(count: int, seed: int) -> Iterator[int]:
    """Batches in a new random order each round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
