"""What the circle came to, read from the files of its steps, as one self-contained HTML page."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.filesize import decimal

from belle.finetune.output import ABOUT
from belle.generation.command import JOURNAL, OUTPUT, REFUSED
from belle.release import REPORT
from benchmarks.common.measures import machine, version
from gptq.files.atomic import whole_file

PAGE, TEMPLATE = "index.html", "page.html.jinja"
# Of the chart of losses, in units of its drawing.
WIDTH, HEIGHT = 640, 200
SAMPLE = 80


def write_page(
    folder: Path, model: Path, scales: Sequence[int], times: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Write `index.html` into the folder of a finished circle; returns its path.

    times: seconds, CPU seconds and command of each step.
    """
    environment = Environment(
        loader=PackageLoader("benchmarks.miniature", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = decimal
    training = read_json(folder / "trained" / str(max(scales)) / ABOUT)
    batch = training["recipe"]["batch"]
    facts = {
        "model": model.stem,
        "version": version(),
        "machine": machine(),
        "generation": generation(folder / "data"),
        "release": release(folder / "release"),
        "training": training,
        "curve": curve(training["losses"], [scale // batch for scale in scales]),
        "scales": scales,
        "scores": read_json(folder / "comparison.json"),
        "samples": samples(folder),
        "sizes": sizes(folder, model),
        "times": times,
    }
    with whole_file(folder / PAGE) as unfinished:
        text = environment.get_template(TEMPLATE).render(facts)
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / PAGE


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generation(folder: Path) -> dict[str, Any]:
    """Counts of requests, tokens and written tasks; of refused ones by reason, and one of each."""
    lines, refused = read_lines(folder / JOURNAL), read_lines(folder / REFUSED)
    counts = Counter(it["reason"] for it in refused)
    first = {it["reason"]: it for it in reversed(refused)}
    return {
        "requests": sum("request" in line for line in lines),
        "tokens": sum(line.get("tokens", 0) for line in lines),
        "written": len(read_json(folder / OUTPUT)),
        "refused": [
            (reason, count, short(f"{first[reason]['instruction']} → {first[reason]['output']}"))
            for reason, count in counts.most_common()
        ],
    }


def release(folder: Path) -> dict[str, Any]:
    """Counts of records that were read and kept; of removed ones by filter, and one of each."""
    report = read_json(folder / REPORT)
    rows = []
    for name, entry in report["filters"].items():
        record = (entry["first"] or {}).get("record", {})
        sample = short(f"{record['instruction']} → {record['output']}") if record else ""
        rows.append((name, entry["removed"], sample))
    return {"read": report["read"], "kept": report["kept"], "removed": rows}


def short(text: str) -> str:
    return text if len(text) <= SAMPLE else f"{text[:SAMPLE]}…"


def curve(losses: Sequence[float], marks: Sequence[int]) -> dict[str, Any]:
    """A line through the losses as points of a drawing, and the steps after which a model was
    written, with their places."""
    top = max(losses)

    def place(step: int) -> tuple[float, float]:
        loss = losses[step - 1]
        across = (step - 1) / max(len(losses) - 1, 1)
        return round(across * WIDTH, 1), round(HEIGHT - loss / top * HEIGHT, 1)

    points = [place(step) for step in range(1, len(losses) + 1)]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "top": top,
        "points": " ".join(f"{x},{y}" for x, y in points),
        # A model that is written after a step does not know that step's loss yet.
        "marks": [(step, *place(min(step, len(losses)))) for step in marks],
    }


def samples(folder: Path) -> list[dict[str, Any]]:
    """The first question of each kind, and what each model wrote to it."""
    asked = read_json(folder / "evaluation.json")
    first = {it["class"]: number for number, it in reversed(list(enumerate(asked)))}
    written: dict[int, dict[str, str]] = {}
    for line in read_lines(folder / "comparison.jsonl"):
        if "scored" in line:
            scored = line["scored"]
            written.setdefault(line["number"], {})[scored["model"]] = scored["written"]
    return [
        {"kind": kind, **asked[number], "answers": written[number]}
        for kind, number in reversed(first.items())
    ]


def sizes(folder: Path, model: Path) -> dict[str, int]:
    """Bytes of the weights of each model."""
    folders = [*sorted((folder / "trained").iterdir(), key=lambda it: int(it.name))]
    folders += sorted((folder / "packed").iterdir(), reverse=True)
    result = {model.name: folder_bytes(model)}
    return result | {f"{it.parent.name}/{it.name}": folder_bytes(it) for it in folders}


def folder_bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
