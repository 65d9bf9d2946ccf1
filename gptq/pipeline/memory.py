"""How much memory a quantization takes, told from shapes before it begins."""

from dataclasses import dataclass

from gptq.blockwise.empty_model import linear
from gptq.blockwise.model import BlockwiseModel
from gptq.config import QuantConfig, Widths, config_of_layer
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
    training: int = 0
    """With everything but the activations, if the run trains after the solve."""


def needs(
    model: BlockwiseModel, config: QuantConfig, tokens: int, widths: Widths | None = None
) -> Needs:
    """What quantizing a model takes of one process, which runs that many calibration tokens.

    widths: of layers that do not have the bits and group size of `config`.
    """
    spec, itemsize = model.spec, model.dtype.itemsize
    block = model.module.get_submodule(spec.block(0))
    shapes = {name: linear(block, name).weight.shape for name in spec.linears}
    block_bytes = sum(weight.numel() for weight in block.parameters()) * itemsize
    squares = 1 if tokens else 0
    least = most = widest = kept = 0
    for group in spec.groups:
        rows, columns = sum(shapes[name][0] for name in group.layers), shapes[group.layers[0]][1]
        new = rows * columns * itemsize
        # Error feedback takes a matrix as large as H, or as the weight if the layer writes to the
        # hidden states.
        feedback = (rows if group.writes_residual else columns) * columns
        moments = 4 * squares * (MOMENTS * columns**2 + feedback * config.feeds_back)
        first = group.layers[0]
        more = max(
            _more_squares(columns, config_of_layer(config, widths, f"{spec.block(index)}.{first}"))
            for index in range(model.block_count)
        )
        work = 4 * squares * (SQUARES * columns**2 + more)
        work += 4 * COPIES * rows * columns
        # If layers are not solved in turn, all groups have their moments first.
        before = 0 if config.true_sequential else kept
        least = max(least, new + before + moments)
        most = max(most, new + before + moments + work)
        kept += moments
        widest = max(widest, columns)
    width = model.source.config.hidden_size + widest
    streams = 1 + config.feeds_back + (not config.true_sequential)
    return Needs(
        least=block_bytes + least,
        most=block_bytes + most + FIXED,
        activations=streams * tokens * width * itemsize,
    )


def _more_squares(columns: int, config: QuantConfig) -> int:
    """Elements of H that are copied beside those of one sweep.

    If all grids are searched before the sweep, of each group the rows, and of those its columns:
    one group of all inputs copies H twice. So does a sweep after the first (measured).
    """
    if config.sweeps > 1:
        return 2 * columns**2
    if not config.static_groups and config.method == "gptq":
        return 0
    size = columns if config.group_size == -1 else min(config.group_size, columns)
    return size * (columns + size)


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
