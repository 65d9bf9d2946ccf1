"""How much memory a quantization takes, told from shapes before it begins."""

from dataclasses import dataclass

import torch

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.config import QuantConfig
from gptq.errors import UserError

GIB = 2**30
# Python, torch, the packed layers and one batch on its way through a block.
FIXED = GIB
# float32 matrices that a group of layers takes: as wide and high as its inputs, moments and what a
# solve makes of them at one time; and of the size of its weights, what the solve makes of those.
MOMENTS, SQUARES, COPIES = 2, 2, 8


@dataclass(frozen=True)
class Needs:
    """Bytes at the most demanding group of layers."""

    least: int
    """The block's weights and the group's moments; the solve's own work comes on top."""
    most: int
    """With everything but the activations."""
    activations: int
    """Of all windows, between two groups of layers."""


def needs(source: ModelSource, config: QuantConfig, tokens: int, dtype: torch.dtype) -> Needs:
    """What quantizing `source` takes with that many calibration tokens and activations of dtype."""
    spec = source.spec
    model = empty_model.build(source.config, spec, torch.device("cpu"))
    block = model.get_submodule(spec.block(0))
    shapes = {name: empty_model.linear(block, name).weight.shape for name in spec.linears}
    held = sum(weight.numel() for weight in block.parameters()) * dtype.itemsize
    squares = 1 if config.method == "gptq" else 0
    least = most = widest = 0
    for number, group in enumerate(spec.groups):
        rows, columns = sum(shapes[name][0] for name in group), shapes[group[0]][1]
        new = rows * columns * dtype.itemsize
        # What feedback takes: of a layer that writes to the hidden states, as large as its weight.
        beside = (rows if number % 2 else columns) * columns if config.feeds_back else 0
        moments = 4 * squares * (MOMENTS * columns**2 + beside)
        work = 4 * (squares * SQUARES * columns**2 + COPIES * rows * columns)
        least, most = max(least, new + moments), max(most, new + moments + work)
        widest = max(widest, columns)
    width = source.config.hidden_size + widest
    streams = 2 if config.feeds_back else 1
    return Needs(
        least=held + least,
        most=held + most + FIXED,
        activations=streams * tokens * width * dtype.itemsize,
    )


def fits(needed: Needs, limit: int, given: str | None) -> bool:
    """Whether activations can stay in memory under `limit` bytes.

    given: the limit in the user's words. Raises UserError where one is too small for any way.
    """
    if given is not None and limit < needed.least:
        raise UserError(
            f"--max-memory {given} is too little: one layer of this model with its block takes "
            f"{needed.least / GIB:.1f} GiB, and the solve as much again"
        )
    return needed.most + needed.activations <= limit
