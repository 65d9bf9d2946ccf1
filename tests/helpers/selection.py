"""Which cases `make test` runs, and which only the whole run has.

Of a test function's cases the corners are the first, the last, and so many that every pair of
values of two parameters occurs: a mistake that needs three particular values at once is rare. A
test marked `every_case` keeps all its cases, one marked `thorough` leaves all to the whole run.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import pytest

CHOICES = ("all", "corners", "rest")

# Cases on a GPU are skipped without one, and must not stand in for those that run.
DEVICES = ("gpu", "cuda")


def select(items: Sequence[pytest.Item], cases: str) -> list[pytest.Item]:
    """The items that a run of these cases (one of CHOICES) has, in their order."""
    if cases == "all":
        return list(items)
    tests: dict[tuple[str, bool], list[pytest.Item]] = defaultdict(list)
    for item in items:
        on_gpu = any(value in DEVICES for value in _params(item).values() if type(value) is str)
        tests[item.nodeid.partition("[")[0], on_gpu].append(item)
    kept: set[pytest.Item] = set()
    for same in tests.values():
        candidates = [item for item in same if not item.get_closest_marker("thorough")]
        if any(item.get_closest_marker("every_case") for item in candidates):
            kept.update(candidates)
        else:
            kept.update(candidates[i] for i in corners([_params(item) for item in candidates]))
    return [item for item in items if (item in kept) == (cases == "corners")]


def corners(cases: Sequence[dict[str, object]]) -> list[int]:
    """Indices of cases, names of parameters with their values, that have every pair of values.

    Greedily: next comes the case with the most pairs that none before it has.
    """
    if not cases:
        return []
    pairs = [_pairs(case) for case in cases]
    kept = list(dict.fromkeys((0, len(cases) - 1)))
    left = set().union(*pairs).difference(*(pairs[i] for i in kept))
    while left:
        kept.append(max(range(len(cases)), key=lambda i: len(pairs[i] & left)))
        left -= pairs[kept[-1]]
    return sorted(kept)


def _pairs(case: dict[str, object]) -> set[tuple[Hashable, ...]]:
    """Of a single parameter, its value."""
    values = [(name, _key(value)) for name, value in sorted(case.items())]
    return set(combinations(values, min(2, len(values))))


def _key(value: object) -> Hashable:
    """Equal for equal values; what cannot be hashed is equal to itself."""
    try:
        hash(value)
    # A tuple or a frozen record of what cannot be hashed is an instance of Hashable, too.
    except TypeError:
        return (type(value), id(value))
    return (type(value), value)


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}
