"""Training the scales of one block, so that its output comes closest to the full model's.

Block-wise training as in EfficientQAT (Chen et al. 2024, arXiv 2407.11062, section 3.2), but with
fixed integers, and from a solved block instead of a rounded one.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gptq.blockwise.model import Block
from gptq.tuning.streams import Streams, autocast
from gptq.tuning.trainable import TrainableLinear, trainable_block, trainable_layers

STEPS = 16
"""At most, each on another batch."""
RATE = 1e-2
"""Of Adam at the beginning, in shares of a scale; it falls with a cosine to 0."""
BETAS = (0.9, 0.95)
LEAST_GAIN = 0.06
"""Share by which the held-out loss must fall for trained scales to be kept: on so few tokens less
does not carry over to other text (docs/algorithm.md)."""


def tune_block(block: Block, tensors: Mapping[str, Tensor], streams: Streams) -> dict[str, Tensor]:
    """Train the scales of a solved block.

    tensors: the packed tensors of its layers, by their names in the model.
    streams: `quantized` before the block, `full` after it; neither is changed.
    Returns new scales, float16 (groups, out) by their names in the model: the trained ones if their
    loss on the held-out windows is lower by LEAST_GAIN, otherwise the solve's own.
    """
    device = next(block.module.parameters()).device
    module = trainable_block(block, tensors, device)
    layers = dict(trainable_layers(module))
    optimizer = torch.optim.Adam((it.factors for it in layers.values()), betas=BETAS)
    solved, before = _scales(layers), _held_out_loss(block, module, streams)
    numbers = streams.training[:STEPS]
    for step, number in enumerate(numbers):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(step, len(numbers))
        _loss(block, module, streams, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers.values():
        layer.round()
    better = _held_out_loss(block, module, streams) < (1 - LEAST_GAIN) * before
    scales = _scales(layers) if better else solved
    return {f"{block.name}.{name}.scales": it.cpu() for name, it in scales.items()}


def cosine(step: int, steps: int) -> float:
    """The share of a rate at a step of `steps`: from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))


def _scales(layers: Mapping[str, TrainableLinear]) -> dict[str, Tensor]:
    return {name: layer.rounded_scales() for name, layer in layers.items()}


def _loss(block: Block, module: nn.Module, streams: Streams, number: int) -> Tensor:
    """The squared error of the block's output as a share of the target's square."""
    (hidden,), (target,) = streams.quantized.hidden.get(number), streams.full.hidden.get(number)
    arguments = streams.quantized.arguments[len(hidden)][block.index]
    with autocast(hidden.device, streams.compute):
        output = module(hidden, **arguments)
    output = output[0] if isinstance(output, tuple) else output
    error = (output.float() - target.float()).square().mean()
    return error / target.float().square().mean()


@torch.no_grad()
def _held_out_loss(block: Block, module: nn.Module, streams: Streams) -> float:
    losses = [float(_loss(block, module, streams, number)) for number in streams.held_out]
    return sum(losses) / len(losses)
