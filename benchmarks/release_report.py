"""The release table as text, JSON, Markdown and a picture, with the figures of BELLE's own."""

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gptq.files.atomic import whole_file

GIB = 2**30
# BELLE's README: file size and GPU memory, by shape and bits. Its G are GiB.
PUBLISHED = {
    ("bloom-7b1", 16): (27.0, 28.2),
    ("bloom-7b1", 8): (9.7, 11.4),
    ("bloom-7b1", 4): (6.9, 8.4),
    ("llama-7b", 16): (26.0, 15.0),
    ("llama-7b", 8): (6.8, 8.9),
    ("llama-7b", 4): (3.8, 5.6),
}


@dataclass(frozen=True)
class Row:
    """One model or file."""

    name: str
    file_bytes: int
    bits_per_weight: float
    """Bytes of the whole file, over all weights of the model."""
    peak_memory: int
    """Bytes while generating: of the GPU's allocator, or the process's peak resident memory."""
    on_gpu: bool
    computed_memory: int
    """Bytes of the tensors as a GPU would hold them, with keys and values of `tokens` tokens."""
    tokens: int
    load_seconds: float
    seconds_a_token: tuple[float, ...]
    """Sorted; a batch of one."""
    perplexity: float | None
    random: bool = False
    """Whether its weights are random."""
    published: tuple[float, float] | None = None
    """GiB of the file and of GPU memory that BELLE's release states for a model of this kind."""

    @property
    def tokens_per_second(self) -> float:
        return 1 / statistics.median(self.seconds_a_token)

    @property
    def spread(self) -> tuple[float, float]:
        """Tokens a second at the upper and the lower quartile of the times."""
        low, _, high = statistics.quantiles(self.seconds_a_token, n=4, method="inclusive")
        return 1 / high, 1 / low


HEADINGS = (
    "model",
    "file GiB",
    "published",
    "bits a weight",
    "GPU GiB",
    "published",
    "resident GiB",
    "load s",
    "tokens/s (quartiles)",
    "perplexity",
)


def cells(row: Row) -> tuple[str, ...]:
    """What stands under HEADINGS."""
    gpu = row.peak_memory if row.on_gpu else row.computed_memory
    file, memory = row.published or (None, None)
    low, high = row.spread
    return (
        row.name + (" (random weights)" if row.random else ""),
        f"{row.file_bytes / GIB:.2f}",
        _or_dash(file, ".1f"),
        f"{row.bits_per_weight:.2f}",
        f"{gpu / GIB:.2f}" + ("" if row.on_gpu else " computed"),
        _or_dash(memory, ".1f"),
        _or_dash(None if row.on_gpu else row.peak_memory / GIB, ".2f"),
        f"{row.load_seconds:.1f}",
        f"{row.tokens_per_second:.2f} ({low:.2f} to {high:.2f})",
        _or_dash(row.perplexity, ".3f"),
    )


def line(row: Row) -> str:
    """A row for the terminal, while others are still being measured."""
    named = zip(HEADINGS[1:], cells(row)[1:], strict=True)
    return f"{cells(row)[0]}: " + ", ".join(f"{name} {value}" for name, value in named)


def markdown(rows: list[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)]
    table = "\n".join("| " + " | ".join(values) + " |" for values in lines)
    return f"{table}\n\n{notes(rows)}\n"


def notes(rows: list[Row]) -> str:
    """How to read the table."""
    tokens = sorted({row.tokens for row in rows})
    sentences = [f"Measured on {machine()}; {', '.join(map(str, tokens))} tokens one by one."]
    if any(not row.on_gpu for row in rows):
        sentences.append(
            "GPU memory is computed where it says so: the bytes that a GPU's allocator holds for "
            "the same tensors and for keys and values of these tokens. Resident memory is the "
            "process's peak on the CPU, with Python and torch in it, and is not to be compared "
            "with published GPU memory."
        )
    if any(row.random for row in rows):
        sentences.append(
            "Random weights: one block stands for all, rounded to nearest. Sizes, memory and "
            "times do not depend on the weights; perplexity would, and is left out."
        )
    if any(row.published for row in rows):
        sentences.append("Published: the release table of BELLE's README, whose G are GiB.")
    return " ".join(sentences)


def write(rows: list[Row], path: Path) -> None:
    """`path` with the endings .json, .md and .png."""
    record = {"machine": machine(), "torch": torch.__version__, "rows": [asdict(r) for r in rows]}
    for ending, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", markdown(rows))):
        with whole_file(Path(f"{path}{ending}")) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    chart(rows, Path(f"{path}.png"))


def chart(rows: list[Row], path: Path) -> None:
    """Bars of file size and GPU memory, published ones behind ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.55 * len(rows)), sharey=True)
    titles = ("file, GiB", "GPU memory, GiB" + ("" if rows[0].on_gpu else " (computed)"))
    for place, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for height, row in enumerate(rows):
            gpu = row.peak_memory if row.on_gpu else row.computed_memory
            ours = (row.file_bytes, gpu)[place] / GIB
            if row.published:
                axis.barh(height + 0.2, row.published[place], 0.38, color="#c9cdd3")
            axis.barh(height - 0.2, ours, 0.38, color="#2b6cb0")
            axis.text(ours, height - 0.2, f" {ours:.2f}", va="center", fontsize=8)
        axis.set(title=title, yticks=range(len(rows)), yticklabels=[row.name for row in rows])
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0].invert_yaxis()
    bars = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in ("#2b6cb0", "#c9cdd3")]
    figure.legend(bars, ["this package", "published by BELLE"], loc="lower center", ncols=2)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    pyplot.close(figure)


def machine() -> str:
    """The processor's or GPU's own name, and how many threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [text for text in info.read_text().splitlines() if text.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
