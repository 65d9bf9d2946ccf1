"""Whole files of one size: their record, a table and a chart."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.page import markdown
from benchmarks.quality.methods import LLAMA_CPP_TYPES
from benchmarks.quality.results import RESULTS, Result
from gptq.errors import UserError

SIZES = RESULTS.with_name("file-sizes.jsonl")
UNIFORM_SETTINGS = ("W4 g128", "W3 g128", "W2 g64")
# Halfway between the bytes of two uniform files, which a line joins.
BETWEEN, ENDS = "between W4 and W3 g128", UNIFORM_SETTINGS[:2]
SETTINGS = (*LLAMA_CPP_TYPES, ENDS[0], BETWEEN, *UNIFORM_SETTINGS[1:])
UNIFORM, CHOSEN, LINE = "uniform", "chosen for its bytes", "uniform, on the line"
THEIRS = ("llama.cpp", "llama.cpp, importance matrix")
HOW = (*THEIRS, UNIFORM, LINE, CHOSEN)
# Methods of benchmarks.quality that leave the embedding at 16 bits, which is most of their files of
# SmolLM2: weights of its linear layers, and all others.
OTHERS = ("GPTQModel, its best", "AutoRound, 200 steps, tokens of tune")
LAYER_WEIGHTS, OTHER_WEIGHTS = 106_168_320, 28_346_688


@dataclass(frozen=True)
class Row:
    """One file."""

    setting: str
    how: str
    """One of HOW, but LINE."""
    size: int
    """Bytes."""
    gaps: dict[str, float]
    """Nats a token, by text."""
    embedding_bits: int
    layers: dict[str, int]
    """How many have each width, that of the most first."""
    cpu_seconds: float
    version: str
    machine: str

    @property
    def mean(self) -> float:
        return sum(self.gaps.values()) / len(self.gaps)


def read(path: Path) -> list[Row]:
    """The rows of a file of results; of two for the same file the later."""
    if not path.exists():
        return []
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({(row.setting, row.how): row for row in rows}.values())


def middle(rows: Sequence[Row]) -> int:
    """Bytes halfway between the two uniform files. Raises UserError if one is missing."""
    return sum(row.size for row in _ends(rows)) // len(ENDS)


def _ends(rows: Sequence[Row]) -> list[Row]:
    """The latest rows of the two uniform files."""
    last = {row.setting: row for row in rows if row.how == UNIFORM}
    if missing := [name for name in ENDS if name not in last]:
        raise UserError(f"{BETWEEN} has the bytes of {missing[0]}; measure that first")
    return [last[name] for name in ENDS]


def table(rows: Sequence[Row]) -> str:
    """Settings in their order, in each the files in that of HOW."""
    ordered = sorted(rows, key=lambda row: (SETTINGS.index(row.setting), HOW.index(row.how)))
    lines = [line for row in ordered for line in _lines(row, rows)]
    header = ["setting", "widths", "MB", "gap, encyclopedia", "gap, web pages"]
    return markdown([*header, "bits of the embedding", "layers", "CPU s"], lines)


def _lines(row: Row, rows: Sequence[Row]) -> Iterator[list[str]]:
    if row.setting == BETWEEN:
        line = {text: sum(end.gaps[text] for end in _ends(rows)) / len(ENDS) for text in row.gaps}
        yield [BETWEEN, LINE, f"{middle(rows) / 1e6:.1f}", *_gaps(line), "8", "", ""]
    widths = ", ".join(f"{count} of {width}" for width, count in row.layers.items())
    cells = [row.setting, row.how, f"{row.size / 1e6:.1f}", *_gaps(row.gaps)]
    yield [*cells, str(row.embedding_bits), widths, f"{row.cpu_seconds:.0f}"]


def _gaps(gaps: dict[str, float]) -> list[str]:
    return [f"{gap:.3f}" for gap in gaps.values()]


def chart(rows: Sequence[Row], quality: Sequence[Result], path: Path) -> None:
    """Gap against megabytes of the whole file.

    quality: of benchmarks.quality, for toolkits whose files are not among `rows`.
    Gaps are drawn on a logarithmic axis, so only those above 0.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    named = {CHOSEN: "ours, --size", UNIFORM: "ours, uniform bits"}
    for how, style in ((CHOSEN, "o-"), (UNIFORM, "s-"), (THEIRS[0], "D"), (THEIRS[1], "D")):
        points = sorted((row.size / 1e6, row.mean) for row in rows if row.how == how)
        _draw(axis, points, style, named.get(how, how))
    for method in OTHERS:
        points = sorted(_point(it) for it in quality if _is_of(it, method))
        _draw(axis, points, "^--", f"{method.partition(',')[0]}, embedding of 16 bits")
    axis.set(title="SmolLM2-135M", xlabel="file, MB", ylabel="gap, nats a token", yscale="log")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axis: Any, points: Sequence[tuple[float, float]], style: str, label: str) -> None:
    above = [(size, gap) for size, gap in points if gap > 0]
    if above:
        axis.plot(*zip(*above, strict=True), style, label=label)


def _is_of(result: Result, method: str) -> bool:
    return result.model == "smollm2" and result.method == method


def _point(result: Result) -> tuple[float, float]:
    size = result.bits_per_weight * LAYER_WEIGHTS / 8 + 2 * OTHER_WEIGHTS
    return size / 1e6, sum(result.gaps.values()) / len(result.gaps)
