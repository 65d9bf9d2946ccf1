"""The best choice of one option for each item under a budget: a multiple-choice knapsack."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Units that a budget is counted in at most. Sizes that are no whole units are rounded up, so that a
# choice never exceeds the budget.
UNITS = 2**16


@dataclass(frozen=True)
class Option:
    """One way of storing an item."""

    size: int
    """Bytes, at least 0."""
    loss: float


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """For each item the index of an option, so that the losses' sum is least and the sizes' sum is
    at most `budget` bytes.

    Dynamic programming over items and what is spent above the smallest choice; exact if all sizes
    are whole units, otherwise within one unit an item. Of equal losses the smaller size is taken.
    Raises ValueError if the smallest choice exceeds the budget.
    """
    bases = [min(option.size for option in options) for options in items]
    # What each option takes above the smallest of its item.
    above = [
        [option.size - base for option in options]
        for options, base in zip(items, bases, strict=True)
    ]
    extra = budget - sum(bases)
    if extra < 0:
        raise ValueError(f"the smallest choice takes {sum(bases)} of {budget} bytes")
    extra = min(extra, sum(map(max, above)))
    unit = max(math.gcd(*(size for sizes in above for size in sizes)), -(-extra // UNITS), 1)
    spent = [[-(-size // unit) for size in sizes] for sizes in above]
    room = extra // unit
    least = torch.zeros(room + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    for options, units in zip(items, spent, strict=True):
        losses = torch.full((len(options), room + 1), torch.inf, dtype=torch.float64)
        for row, (option, own) in enumerate(zip(options, units, strict=True)):
            if own <= room:
                losses[row, own:] = least[: room + 1 - own] + option.loss
        least, index = losses.min(0)
        taken.append(index)
    # The smallest budget that reaches the least loss.
    left = int(torch.nonzero(least == least[-1])[0])
    chosen: list[int] = []
    for index, units in zip(reversed(taken), reversed(spent), strict=True):
        chosen.append(int(index[left]))
        left -= units[chosen[-1]]
    return chosen[::-1]
