"""How much memory a quantization takes, told from shapes before it begins."""

from dataclasses import dataclass

from gptq.blockwise.empty_model import linear
from gptq.blockwise.model import BlockwiseModel
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


def needs(model: BlockwiseModel, config: QuantConfig, tokens: int) -> Needs:
    """What quantizing a model takes with that many calibration tokens."""
    spec, itemsize = model.spec, model.dtype.itemsize
    block = model.module.get_submodule(spec.block(0))
    shapes = {name: linear(block, name).weight.shape for name in spec.linears}
    block_bytes = sum(weight.numel() for weight in block.parameters()) * itemsize
    squares = 1 if config.method == "gptq" else 0
    least = most = widest = 0
    for group in spec.groups:
        rows, columns = sum(shapes[name][0] for name in group.layers), shapes[group.layers[0]][1]
        new = rows * columns * itemsize
        # Error feedback takes a matrix as large as H, or as the weight if the layer writes to the
        # hidden states.
        feedback = (rows if group.writes_residual else columns) * columns
        moments = 4 * squares * (MOMENTS * columns**2 + feedback * config.feeds_back)
        work = 4 * (squares * SQUARES * columns**2 + COPIES * rows * columns)
        least, most = max(least, new + moments), max(most, new + moments + work)
        widest = max(widest, columns)
    width = model.source.config.hidden_size + widest
    streams = 2 if config.feeds_back else 1
    return Needs(
        least=block_bytes + least,
        most=block_bytes + most + FIXED,
        activations=streams * tokens * width * itemsize,
    )


def fits(needed: Needs, limit: int, spelled: str | None) -> bool:
    """Whether activations can stay in memory under `limit` bytes.

    spelled: the limit as the user wrote it, if there is one. Raises UserError if it is too small
        for any way.
    """
    if spelled is not None and limit < needed.least:
        raise UserError(
            f"--max-memory {spelled} is too little: one layer of this model with its block takes "
            f"{needed.least / GIB:.1f} GiB, and the solve as much again"
        )
    return needed.most + needed.activations <= limit
