"""JSON as programs exchange it: of a size that a program reads, with finite numbers only."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

# Ten times any model's; a megabyte can become twenty in memory.
MAX_BYTES = 1 << 24


def read_text(path: Path) -> str:
    """A small UTF-8 file. Raises OSError, or ValueError if it is long or not UTF-8."""
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES >> 20} MiB")
    return raw.decode()


def parse(text: str) -> Any:
    """The value that a text has. Raises ValueError or RecursionError if it is not JSON.

    NaN and infinity are not, though Python's reader takes them: as a setting they would become a
    model that answers nonsense. A number beyond float64 is infinity.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)
