"""The windows that a run is tuned on, and their activations."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.activations import Activations, embed
from gptq.blockwise.model import Block, BlockwiseModel

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
    """Activations of all windows on their way through a model, those to train on first."""

    quantized: Activations
    """Of the model quantized so far."""
    full: Activations
    """Of the full-precision model."""
    start: ActivationCache
    """Before the first block."""
    training: range
    """Numbers of the batches to train on."""
    held_out: range
    compute: torch.dtype
    """This and `stored` as in TuneWindows."""
    stored: torch.dtype

    def full_through(self, block: Block) -> None:
        """Take the full model's activations through a block that has its own weights."""
        self._through(self.full, block)

    def quantized_through(self, block: Block) -> None:
        """Take the quantized model's through a block that has its dequantized weights."""
        self._through(self.quantized, block)

    def _through(self, activations: Activations, block: Block) -> None:
        device = next(block.module.parameters()).device
        with autocast(device, self.compute):
            activations.through(block)


def open_streams(
    model: BlockwiseModel, windows: TuneWindows, cache: ActivationCache | None
) -> Streams:
    """The embedded windows. cache: decides where activations are kept; by default in memory."""
    windows_in_step = max(1, STEP_TOKENS // windows.training.shape[1])
    training, held_out = (it.split(windows_in_step) for it in (windows.training, windows.held_out))
    own = ActivationCache() if cache is None else cache.empty_like("tuned")
    quantized = embed(model, [*training, *held_out], own)
    first, count = len(training), len(training) + len(held_out)
    return Streams(
        quantized=quantized,
        full=quantized.copy("tuned-full"),
        start=quantized.copy("tuned-start").hidden,
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
