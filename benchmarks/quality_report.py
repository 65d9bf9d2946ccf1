"""Puts what benchmarks.quality measured into docs/algorithm.md and both READMEs.

python -m benchmarks.quality_report [benchmarks/results/quality.jsonl]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from benchmarks.common.page import markdown, write
from benchmarks.quality.methods import METHODS, SETTINGS
from benchmarks.quality.results import RESULTS, Result, read_results
from gptq.errors import UserError

ROOT = Path(__file__).parents[1]
# Rows at the sizes of llama.cpp's types and of other grids, all of one machine, maybe another.
SIZES = RESULTS.with_name("quality-sizes.jsonl")
PAGE = ROOT / "docs" / "algorithm.md"
MODELS = ("smollm2", "llama-tiny", "bloom-tiny")
COLUMNS = {"wiki": "gap, encyclopedia", "c4": "gap, web pages", "held out": "gap"}
# Tables of the READMEs, by the name of the part; their rows are those of `Front.methods`.
SHOWN = {"4 bit": "W4 g128 asym", "3 bit": "W3 g128 asym"}


@dataclass(frozen=True)
class Front:
    """A README: its file and words."""

    path: Path
    heading: str
    """Of the first column, with the bits, the group size and the bits a weight."""
    columns: Sequence[str]
    methods: dict[str, str]
    """By their names in METHODS; {} is the version of another toolkit."""


ENGLISH = Front(
    ROOT / "README.md",
    "{} bit, groups of {}, {:.2f} bits a weight",
    (*list(COLUMNS.values())[:2], "CPU s"),
    {
        "GPTQModel, its best": "GPTQModel {}, act-order and mse",
        "AutoRound, 50 steps, tokens of tune": "AutoRound {}, 50 steps",
        "AutoRound, 200 steps, tokens of tune": "AutoRound {}, 200 steps",
        "+ Hessian-aware grids": "ours, `--quality fast`",
        "default": "ours",
        "default, rotated": "ours, `--rotate`",
        "tune": "ours, `--quality tune`",
        "tune, rotated": "ours, `--quality tune --rotate`",
    },
)
CHINESE = Front(
    ROOT / "README.zh.md",
    "{} 位，每组 {}，每权重 {:.2f} 位",
    ("差距（百科）", "差距（网页）", "CPU 秒"),
    {
        "GPTQModel, its best": "GPTQModel {}，act-order 与 mse",
        "AutoRound, 50 steps, tokens of tune": "AutoRound {}，50 步",
        "AutoRound, 200 steps, tokens of tune": "AutoRound {}，200 步",
        "+ Hessian-aware grids": "本项目，`--quality fast`",
        "default": "本项目",
        "default, rotated": "本项目，`--rotate`",
        "tune": "本项目，`--quality tune`",
        "tune, rotated": "本项目，`--quality tune --rotate`",
    },
)


def quality_table(rows: Sequence[Result]) -> str:
    """All rows of a model: settings in their order, and in each the methods in theirs."""
    texts = list(rows[0].gaps)
    header = ["setting", "method", *(COLUMNS[text] for text in texts)]
    lines = []
    methods, settings = list(METHODS), list(SETTINGS)
    ordered = sorted(rows, key=lambda it: (settings.index(it.setting), methods.index(it.method)))
    for setting, group in groupby(ordered, lambda it: it.setting):
        for number, row in enumerate(group):
            cells = [setting if number == 0 else "", row.method, *_gaps(row, 4)]
            cells += [f"{row.bits_per_weight:.2f}", f"{row.cpu_seconds:.0f}", row.version]
            lines.append(cells)
    return markdown([*header, "bits a weight", "CPU s", "version"], lines)


def front_table(rows: Sequence[Result], setting: str, front: Front) -> str:
    """The rows of one setting that a README shows. Raises UserError if one is not measured."""
    measured = {row.method: row for row in rows if row.setting == setting}
    if missing := [name for name in front.methods if name not in measured]:
        raise UserError(f"has no row {setting}, {missing[0]}")
    config = SETTINGS[setting].config
    bits = measured["default"].bits_per_weight
    lines = []
    for name, label in front.methods.items():
        row = measured[name]
        cells = [label.format(row.version.rpartition(" ")[2]), *_gaps(row, 3)]
        lines.append([*cells, f"{row.cpu_seconds:.0f}"])
    heading = front.heading.format(config["bits"], config["group_size"], bits)
    return markdown([heading, *front.columns], lines)


def _gaps(row: Result, digits: int) -> list[str]:
    return [f"{gap:.{digits}f}" for gap in row.gaps.values()]


def pages(results: Sequence[Result], sizes: Sequence[Result]) -> dict[Path, dict[str, str]]:
    """The parts of each page. Raises UserError if a model or a row of a README is not there.

    sizes: the rows of SIZES.
    """
    of_model = {name: [row for row in results if row.model == name] for name in MODELS}
    if missing := [name for name, rows in of_model.items() if not rows]:
        raise UserError(f"has no rows of {missing[0]}")
    if not sizes:
        raise UserError(f"has no rows beside it, in {SIZES}")
    made = {PAGE: {f"quality of {name}": quality_table(rows) for name, rows in of_model.items()}}
    made[PAGE]["quality at the sizes of llama.cpp"] = quality_table(sizes)
    for front in (ENGLISH, CHINESE):
        made[front.path] = {
            f"quality at {part}": front_table(of_model["smollm2"], setting, front)
            for part, setting in SHOWN.items()
        }
    return made


def main(arguments: list[str]) -> int:
    path = Path(arguments[0]) if arguments else RESULTS
    try:
        if not path.exists():
            raise UserError("is not there")
        for page, parts in pages(read_results(path), read_results(SIZES)).items():
            write(page, parts)
            print(f"{page}: written from {path}")
    except (OSError, ValueError, TypeError, UserError) as error:
        print(f"error: {path}: {error}; measure with python -m benchmarks.quality", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
