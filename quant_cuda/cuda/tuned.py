"""Which kernel is the fastest on a kind of GPU: tables that `python -m benchmarks.gpu tune` writes.

A table is one JSON file in `FOLDER`. Without one `kernels.KERNELS` is the rule.
"""

import functools
import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).with_name("tuned")


class Entry(NamedTuple):
    """The fastest kernel for one shape."""

    bits: int
    inputs: int
    outputs: int
    rows: int
    """Of x, which was float16."""
    kernel: str
    """A name in `kernels.KERNELS` or `variants.VARIANTS`."""


@dataclass(frozen=True, eq=False)
class Table:
    """What was measured on one kind of GPU."""

    entries: tuple[Entry, ...]
    _found: dict[tuple[int, int, int, int], str | None] = field(default_factory=dict)

    def kernel(self, bits: int, inputs: int, outputs: int, rows: int) -> str | None:
        """The kernel of the nearest shape, at the fewest measured rows that are `rows` or more.

        None for a number of bits that was not measured, or for more rows than were.
        """
        key = (bits, inputs, outputs, rows)
        if key not in self._found:
            self._found[key] = _nearest(self.entries, *key)
        return self._found[key]


def path_of(gpu: str) -> Path:
    """The table's file for a GPU of this name, as torch gives it."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@functools.cache
def table_for(gpu: str) -> Table | None:
    """The table of this kind of GPU; None if there is none. Warns of one that cannot be read."""
    path = path_of(gpu)
    if not path.exists():
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path} cannot be read ({error}) and is not used: write it again with "
            "python -m benchmarks.gpu tune",
            stacklevel=2,
        )
        return None


def read(path: Path) -> Table:
    """A table. Raises OSError, ValueError, KeyError or TypeError if it cannot be read."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Table(tuple(Entry(*(row[name] for name in Entry._fields)) for row in content["entries"]))


def _nearest(
    entries: tuple[Entry, ...], bits: int, inputs: int, outputs: int, rows: int
) -> str | None:
    enough = [entry for entry in entries if entry.bits == bits and entry.rows >= rows]

    def distance(entry: Entry) -> tuple[float, int]:
        shape = abs(math.log(entry.inputs / inputs)) + abs(math.log(entry.outputs / outputs))
        return shape, entry.rows

    return min(enough, key=distance).kernel if enough else None
