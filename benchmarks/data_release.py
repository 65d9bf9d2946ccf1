"""Time of `belle.release` and the near duplicates that it finds, on made records.

    python -m benchmarks.data_release 10000 100000 1000000 --workers 2

Records are random Chinese or English text of the lengths that instruction data has. One in twenty
is an exact copy of an earlier one, and one in ten a copy with some characters replaced, at Jaccard
similarities of 5-grams of 0.5 to 0.99.
"""

import argparse
import json
import os
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from belle.release import REMOVED
from belle.release.blocks import Source
from belle.release.duplicates import jaccard
from belle.release.filters import filters, normalized
from belle.release.pipeline import Cluster, Plan, run

BINS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 1.0)
EXACT, NEAR = 0.05, 0.1
_HAN = np.array([chr(code) for code in range(0x4E00, 0x4E00 + 4000)])
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz    "))


def texts(count: int, seed: int = 0) -> Iterator[tuple[str, int | None]]:
    """Texts, and the number of the text that each is a copy of, if it is one."""
    generator = np.random.default_rng(seed)
    earlier: list[tuple[int, str]] = []
    for number in range(count):
        kind = generator.random()
        if kind >= EXACT + NEAR or not earlier:
            letters = _HAN if generator.random() < 0.6 else _LETTERS
            size = int(np.clip(generator.lognormal(5.3, 0.6), 60, 4000))
            # Some characters are far more common than others.
            picked = (generator.random(size) ** 2 * len(letters)).astype(int)
            text, copied = "".join(letters[picked]), None
        else:
            copied, text = earlier[int(generator.integers(len(earlier)))]
            if kind >= EXACT:
                text = changed(text, generator.uniform(0.5, 0.99), generator)
        if copied is None and number % 4 == 0:
            earlier.append((number, text))
        yield text, copied


def changed(text: str, similarity: float, generator: np.random.Generator) -> str:
    """A text with characters replaced, to about a Jaccard similarity of 5-grams."""
    count = round(len(text) * (1 - similarity) / (5 * (1 + similarity)))
    letters = list(text)
    for place in np.linspace(2, len(text) - 3, max(count, 1)).astype(int):
        letters[place] = chr(0x4E00 + 4000 + int(generator.integers(8000)))
    return "".join(letters)


def measure(count: int, workers: int, folder: Path) -> dict[str, Any]:
    """Seconds of each stage, and of the copies in each bin the share that was found."""
    made = list(texts(count))
    data, out = folder / "data.jsonl", folder / "out"
    with data.open("w", encoding="utf-8") as file:
        for text, _ in made:
            cut = len(text) // 4
            record = {"instruction": text[:cut], "input": "", "output": text[cut:]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    ends: dict[str, float] = {}
    started, cpu_started = perf_counter(), process_time()

    def show(done: int, total: int, name: str) -> None:
        ends[name] = perf_counter() - started

    questions = [text for text, _ in made[:1000:2]]
    plan = Plan(
        [Source.of(data)],
        out,
        {**filters(), "contamination": filters(questions=questions)["contamination"]},
        {"form": "instruction", "seed": 0, "scales": [count // 10, count // 2]},
    )
    work = folder / "work"
    run(plan, Cluster(workers=workers), work, show)
    seconds, cpu_seconds = perf_counter() - started, process_time() - cpu_started
    with (out / REMOVED).open(encoding="utf-8") as file:
        removed = [json.loads(line) for line in file]
    gone = {int(entry["place"].rsplit(" ", 1)[1]) - 1: entry["filter"] for entry in removed}
    starts = [0.0, *ends.values()]
    return {
        "records": count,
        "bytes": data.stat().st_size,
        "seconds": round(seconds, 1),
        # With several workers, those of this process alone.
        "CPU seconds": round(cpu_seconds, 1),
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "stages": {
            name: round(end - start, 1)
            for (name, end), start in zip(ends.items(), starts, strict=False)
        },
        "removed": dict(Counter(gone.values())),
        "found": _found(made, gone),
    }


def _found(made: list[tuple[str, int | None]], gone: dict[int, str]) -> dict[str, str]:
    planted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for number, (text, copied) in enumerate(made):
        if copied is None or text == made[copied][0]:
            continue
        similarity = jaccard(normalized(text), normalized(made[copied][0]))
        name = next(f"to {bound}" for bound in BINS if similarity <= bound)
        planted[name] += 1
        found[name] += (
            gone.get(number) == "near duplicates" or gone.get(copied) == "near duplicates"
        )
    return {name: f"{found[name]} of {planted[name]}" for name in sorted(planted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    for count in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(count, arguments.workers, Path(folder))
        print(json.dumps({**result, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
