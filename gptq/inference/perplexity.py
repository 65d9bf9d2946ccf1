"""Perplexity, block by block, so that the model may be larger than memory."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptq.blockwise.activations import batches, embed
from gptq.blockwise.logits import output_layers
from gptq.blockwise.model import BlockwiseModel, free
from gptq.errors import UserError

# Tokens whose logits are in memory at once.
LOGIT_TOKENS = 1024
# exp of more is beyond a float.
MOST_LOSS = 709.0


@torch.no_grad()
def perplexity(
    model: BlockwiseModel,
    windows: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean cross entropy in nats of each token given those before it in its window.

    model: full or with packed layers in place; its parts are loaded and freed in turn.
    windows: int64 (n, seqlen).
    progress: called with (blocks done, blocks in all).
    Raises UserError if the result is not a number.
    """
    tokens = batches(windows, model.device)
    activations = embed(model, tokens)
    for index in range(model.block_count):
        block = model.load_block(index)
        activations.through(block)
        free(block.module)
        if progress is not None:
            progress(index + 1, model.block_count)
    losses = []
    with output_layers(model) as logits:
        for batch, (hidden,) in zip(tokens, activations.hidden, strict=True):
            pairs = zip(batch, hidden, strict=True)
            losses += [_window_loss(logits, *pair) for pair in pairs]
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise UserError(
            f"perplexity is {mean}: activations overflow in {model.dtype}; try --dtype float32"
        )
    return math.exp(mean) if mean < MOST_LOSS else math.inf


def _window_loss(logits: Callable[[Tensor], Tensor], tokens: Tensor, hidden: Tensor) -> float:
    """Mean cross entropy of one window: tokens (seq,), hidden (seq, hidden)."""
    total = 0.0
    targets = tokens[1:].to(hidden.device)
    for start in range(0, len(targets), LOGIT_TOKENS):
        target = targets[start : start + LOGIT_TOKENS]
        states = hidden[None, start : start + len(target)]
        total += float(nn.functional.cross_entropy(logits(states)[0], target, reduction="sum"))
    return total / len(targets)
