"""What was measured on one kind of GPU: a file with the runs of each part, each with its own facts.

    {"decode": [{"about": {"gpu": ..., "commit": ...}, "finished": true, "rows": [...]}, ...], ...}

The newest run comes first. A run that was cut off keeps its rows, and older ones those rows that it
did not measure again.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptq.files.atomic import whole_file

Row = dict[str, Any]
Run = dict[str, Any]
""""about", the facts that hold for "rows"; "finished", whether it was measured to its end."""
Results = dict[str, list[Run]]

# What tells the rows of one part apart; a name that a row has not got counts as one that differs.
KEYS = {
    "kernels": ("bits", "inputs", "outputs", "rows"),
    "peers": ("peer", "bits", "inputs", "outputs", "rows"),
    "decode": ("model", "bits"),
    "solving": ("inputs", "outputs", "search"),
    "blocks": ("setting", "blocks", "activations"),
    "quantization": ("setting", "blocks", "activations"),
    "tuning": ("setting", "blocks", "activations"),
}
# Facts that are named where a run has them.
VERSIONS = ("driver", "commit", "gptqmodel", "humming-kernels", "gemlite")


def read(path: Path) -> Results:
    """{} if there is no such file. Raises ValueError if it is no JSON."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, results: Results) -> None:
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def add(
    results: Results, part: str, run: Run, replaces: Callable[[Row], bool] = lambda _: True
) -> Results:
    """The results with a run of a part before those that there are.

    replaces: the older rows that a finished run takes the place of even if it has no such row.
    """
    key = KEYS[part]
    measured = {_key(row, key) for row in run["rows"]}

    def stays(row: Row) -> bool:
        return _key(row, key) not in measured and not (run["finished"] and replaces(row))

    older = [it | {"rows": list(filter(stays, it["rows"]))} for it in results.get(part, [])]
    return results | {part: [run, *(it for it in older if it["rows"])]}


def rows_of(results: Results, part: str) -> list[Row]:
    """All rows of a part, the newest run's first."""
    return [row for _, row in with_facts(results, part)]


def with_facts(results: Results, part: str) -> Iterator[tuple[Run, Row]]:
    """Each row of a part, and the run that it is from."""
    for run in results.get(part, []):
        for row in run["rows"]:
            yield run, row


def ran_on(run: Run) -> str:
    """The GPU and what ran on it."""
    facts = run["about"]
    named = [f"torch {facts['torch'].partition('+')[0]}", f"CUDA {facts['cuda']}"]
    named += [f"{name} {facts[name]}" for name in VERSIONS if facts.get(name)]
    return f"{gpu(run)}: {', '.join(named)}"


def gpu(run: Run) -> str:
    return run["about"]["gpu"].removeprefix("NVIDIA ")


def _key(row: Row, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)
