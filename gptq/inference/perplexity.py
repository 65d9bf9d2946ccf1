"""Perplexity, block by block, so that the model may be larger than memory."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.blockwise import empty_model
from gptq.errors import UserError
from gptq.models import ModelSpec

# Tokens whose logits are in memory at once.
LOGIT_TOKENS = 1024


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    windows: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean cross entropy in nats of each token given those before it in its window.

    model: without weights, from `skeleton.build`, with packed layers in place where `tensors`
        has them; its blocks are filled and freed in turn.
    windows: int64 (n, seqlen).
    progress: called with (blocks done, blocks in all).
    Raises UserError where the result is not a number.
    """
    batches = empty_model.batches(windows, device)
    stream = empty_model.embed(model, spec, tensors, batches, device, dtype)
    count = empty_model.block_count(model, spec)
    for index in range(count):
        block = empty_model.fill(model, spec, spec.block(index), tensors, device, dtype)
        stream.through(block)
        empty_model.drop(block)
        if progress is not None:
            progress(index + 1, count)
    norm, head = (
        empty_model.fill(model, spec, name, tensors, device, dtype)
        for name in (spec.norm, spec.head)
    )
    losses = []
    for tokens, (hidden,) in zip(batches, stream.hidden, strict=True):
        losses += [_window_loss(norm, head, *pair) for pair in zip(tokens, hidden, strict=True)]
    for part in (norm, head):
        empty_model.drop(part)
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise UserError(
            f"perplexity is {mean}: activations overflow in {dtype}; try --dtype float32"
        )
    return math.exp(mean)


def _window_loss(norm: nn.Module, head: nn.Module, tokens: Tensor, hidden: Tensor) -> float:
    """Mean cross entropy of one window: tokens (seq,), hidden (seq, hidden)."""
    total = 0.0
    targets = tokens[1:].to(hidden.device)
    for start in range(0, len(targets), LOGIT_TOKENS):
        target = targets[start : start + LOGIT_TOKENS]
        logits = head(norm(hidden[start : start + len(target)])).float()
        total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
    return total / len(targets)
