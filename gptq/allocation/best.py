"""The widths with which a model is closest to the full one."""

from collections.abc import Callable, Sequence

from gptq.allocation.knapsack import Option, choose
from gptq.allocation.sensitivity import Sensitivity
from gptq.config import Width

# The width to measure at, for up to so many bits a weight: what is measured should be near to what
# is chosen.
_REFERENCES = ((2.7, Width(2, 64)), (3.7, Width(3, 128)), (float("inf"), Width(4, 128)))


def reference_width(bits: float) -> Width:
    """The width to measure at, if the model gets so many bits a weight."""
    return next(width for most, width in _REFERENCES if bits <= most)


def best_widths(
    sensitivities: Sequence[Sensitivity],
    size: Callable[[str, Width], int],
    budget: int,
) -> dict[str, Width]:
    """The width of every layer, by its name, that costs the model least within a budget.

    size: bytes of a layer in a width that its sensitivity has a loss for.
    budget: bytes of all layers together; ValueError if no choice fits.
    """
    items = [
        [
            Option(sum(size(name, width) for name in group.layers), loss)
            for width, loss in group.losses.items()
        ]
        for group in sensitivities
    ]
    chosen = choose(items, budget)
    return {
        name: list(group.losses)[index]
        for group, index in zip(sensitivities, chosen, strict=True)
        for name in group.layers
    }
