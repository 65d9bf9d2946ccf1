"""What was measured: its record, the file of records, a table and a chart."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.quality.methods import METHODS, OURS, SETTINGS

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
# The version and machine of results from before these were kept.
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Result:
    """One quantized model measured. Appended to the file as a line of JSON."""

    model: str
    setting: str
    method: str
    gaps: dict[str, float]
    """Nats a token, by text."""
    bits_per_weight: float
    """Of the quantized layers, with scales, zeros and group indices."""
    cpu_seconds: float
    """Processor time of quantizing, all threads together."""
    threads: int
    version: str = UNKNOWN
    """Of this package, with its commit; of another toolkit, its name and version."""
    machine: str = UNKNOWN
    """The processor and the number of its cores, and the GPU if it ran on one."""
    dtype: str = "float32"
    """Of activations while perplexities were measured."""
    seconds: float | None = None
    """Wall time of quantizing."""
    perplexities: dict[str, float] = field(default_factory=dict)
    """Of the quantized model, by text."""
    full_perplexities: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What a table has one row for."""
        return self.model, self.setting, self.method


def read_results(path: Path) -> list[Result]:
    """The results in a file, of equal keys only the last; none if there is no file."""
    if not path.exists():
        return []
    rows = [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({row.key: row for row in rows}.values())


def add(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def table(results: list[Result], model: str) -> Table:
    """One row a setting and method, best reading order: settings, then methods as listed."""
    rows = [row for row in results if row.model == model]
    texts = list(rows[0].gaps)
    made = Table(title=_title(rows), caption=_caption(rows))
    shown = [text for text in texts if any(text in row.perplexities for row in rows)]
    for heading in ("setting", "method"):
        made.add_column(heading)
    measures = (*(f"gap {text}" for text in texts), *(f"perplexity {text}" for text in shown))
    for heading in (*measures, "bits a weight", "CPU s", "threads"):
        made.add_column(heading, justify="right")
    for heading in ("version", "machine"):
        made.add_column(heading)
    order = {name: place for place, name in enumerate(METHODS)}
    places = {name: place for place, name in enumerate(SETTINGS)}
    for row in sorted(rows, key=lambda row: (places[row.setting], order[row.method])):
        gaps = [f"{row.gaps[text]:.4f}" for text in texts]
        own = [_perplexity(row.perplexities, text) for text in shown]
        costs = f"{row.bits_per_weight:.2f}", f"{row.cpu_seconds:.0f}", str(row.threads)
        origin = row.version, row.machine
        made.add_row(row.setting, row.method, *gaps, *own, *costs, *origin)
    return made


def _title(rows: list[Result]) -> str:
    """The model, and its perplexities if they were kept."""
    full = next((row.full_perplexities for row in rows if row.full_perplexities), {})
    parts = [f"{text} {_perplexity(full, text)}" for text in full]
    return f"{rows[0].model}, full: {', '.join(parts)}" if parts else rows[0].model


def _perplexity(perplexities: Mapping[str, float], text: str) -> str:
    return f"{perplexities[text]:.2f}" if text in perplexities else ""


def _caption(rows: list[Result]) -> str:
    kinds = " or ".join(dict.fromkeys(row.dtype for row in rows))
    return f"gap: ln perplexity above the full model's, nats a token; both run in {kinds}"


def chart(results: list[Result], path: Path) -> None:
    """Gap against bits a weight, a panel for each model, a line for each method on uniform
    asymmetric grids, and points for widths that differ by layer and for llama.cpp's types.

    A gap that is not above 0, which is noise, has no place on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in results))
    figure, axes = pyplot.subplots(1, len(models), figsize=(8 * len(models), 5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for number, name in enumerate(METHODS):
            rows = [row for row in results if (row.model, row.method) == (model, name)]
            # After twenty methods they begin again: those have other markers.
            colour = pyplot.get_cmap("tab20")(number % 20)
            _draw(axis, name, rows, colour)
        axis.set(title=model, xlabel="bits a weight", ylabel="gap, nats a token", yscale="log")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axis: Any, method: str, rows: list[Result], colour: Any) -> None:
    """One method: its rows on uniform asymmetric grids as a line, its others as points."""
    lines: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for row in rows:
        setting = SETTINGS[row.setting]
        uniform = "bits" in setting.config
        if not uniform or not setting.config["sym"]:
            mean = sum(row.gaps.values()) / len(row.gaps)
            if mean > 0:
                lines[uniform].append((row.bits_per_weight, mean))
    ours = METHODS[method].toolkit == OURS
    for uniform, style, marker in (
        (True, "-", "o" if ours else "s"),
        (False, "", "*" if ours else "D"),
    ):
        if points := sorted(lines[uniform]):
            label = method if uniform or not ours else f"{method}, widths chosen"
            columns = zip(*points, strict=True)
            axis.plot(*columns, linestyle=style, marker=marker, color=colour, label=label)
