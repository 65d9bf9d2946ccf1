"""Models whose layers have different widths: 2, 3, 4 and 8 bits, groups of 32, 64, 128 and all."""

from itertools import cycle

from gptq.config import Width
from gptq.models import ModelSpec

WIDTHS = tuple(
    Width(bits, size) for bits, size in ((4, 32), (2, 64), (8, -1), (3, 128), (4, 64), (3, 32))
)


def mixed_widths(
    spec: ModelSpec, blocks: int = 2, widths: tuple[Width, ...] = WIDTHS
) -> dict[str, Width]:
    """A table for a model: the next width in turn for each group of layers."""
    turn = cycle(widths)
    groups = [(block, group) for block in range(blocks) for group in spec.groups]
    return {
        f"{spec.block(block)}.{name}": width
        for (block, group), width in zip(groups, turn, strict=False)
        for name in group.layers
    }
