"""How much memory a quantization takes, told from shapes before it begins."""

from dataclasses import dataclass
from math import prod

import torch

from gptq import skeleton
from gptq.config import QuantConfig
from gptq.errors import UserError
from gptq.source import ModelSource

GIB = 2**30
# Python, torch, the packed layers and one batch on its way through a block.
FIXED = GIB
# float32 matrices as wide as the widest layer's inputs: the moments, and all that a solve makes.
MOMENTS, WORK = 4, 6


@dataclass(frozen=True)
class Needs:
    """Bytes at the most demanding layer."""

    least: int
    """The block's weights and the layer's moments; the solve's own work comes on top."""
    most: int
    """With everything but the activations."""
    activations: int
    """Of all windows, between two groups of layers."""


def needs(source: ModelSource, config: QuantConfig, tokens: int, dtype: torch.dtype) -> Needs:
    """What quantizing `source` takes with that many calibration tokens and activations of dtype."""
    spec = source.spec
    model = skeleton.build(source.config, spec, torch.device("cpu"))
    block = model.get_submodule(spec.block(0))
    weights = {name: skeleton.linear(block, name).weight.shape for name in spec.linears}
    group = max(sum(prod(weights[name]) for name in names) for names in spec.groups)
    widest = max(columns for _, columns in weights.values())
    square = 4 * widest**2 if config.method == "gptq" else 0
    held = (sum(weight.numel() for weight in block.parameters()) + group) * dtype.itemsize
    width = source.config.hidden_size + widest
    streams = 2 if config.feeds_back else 1
    return Needs(
        least=held + MOMENTS * square,
        most=held + (MOMENTS + WORK) * square + FIXED,
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
