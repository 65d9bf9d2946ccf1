"""The windows that a run is tuned on, and their activations."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.activations import Activations, embed
from gptq.blockwise.model import BlockwiseModel, free

STEP_TOKENS = 2048
"""Tokens of one step of an optimizer; one window if it is longer."""


@dataclass(frozen=True)
class TuneWindows:
    """Token windows to train on and to judge by, and how they are computed with."""

    training: Tensor
    """int64 (n, seqlen)."""
    held_out: Tensor
    """int64 (m, seqlen), text that `training` does not have."""
    compute: torch.dtype
    """Of matrix products in a forward and backward; weights and sums are float32."""
    stored: torch.dtype
    """16-bit, of norms in the file."""

    @property
    def tokens(self) -> int:
        return self.training.numel() + self.held_out.numel()


@dataclass(frozen=True)
class Streams:
    """Activations of all windows at the ends of the full model, those to train on first."""

    start: ActivationCache
    """Before the first block."""
    full: Activations
    """After the last block."""
    training: range
    """Numbers of the batches to train on."""
    held_out: range
    compute: torch.dtype
    """This and `stored` as in TuneWindows."""
    stored: torch.dtype


def open_streams(
    model: BlockwiseModel, windows: TuneWindows, cache: ActivationCache | None
) -> Streams:
    """Run the full model, one block in memory at a time.

    cache: decides where activations are kept; by default in memory.
    """
    windows_in_step = max(1, STEP_TOKENS // windows.training.shape[1])
    training, held_out = (it.split(windows_in_step) for it in (windows.training, windows.held_out))
    own = ActivationCache() if cache is None else cache.empty_like("tuned")
    full = embed(model, [*training, *held_out], own)
    start = full.copy("tuned-start").hidden
    with autocast(model.device, windows.compute):
        for index in range(model.block_count):
            block = model.load_block(index)
            full.through(block)
            free(block.module)
    first, count = len(training), len(training) + len(held_out)
    return Streams(
        start=start,
        full=full,
        training=range(first),
        held_out=range(first, count),
        compute=windows.compute,
        stored=windows.stored,
    )


def shuffled(batches: range, seed: int) -> Iterator[int]:
    """The numbers of batches in an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    return (batches[int(it)] for it in torch.randperm(len(batches), generator=generator))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype` while it is open; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
