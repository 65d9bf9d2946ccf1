"""Whole files of one size: uniform bits with an embedding of 8, and what `--size` chooses.

    python -m benchmarks.file_sizes [--settings NAME...] [--results FILE]

SmolLM2 is quantized by a uniform setting, as the command line does it, and then for a size of as
many bytes. Every row is appended to the file of results at once; the table in docs/algorithm.md is
made from all that are in it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.common.measures import machine, version
from benchmarks.common.page import markdown, write
from benchmarks.quality.methods import GRIDS
from benchmarks.quality.results import RESULTS
from benchmarks.quality.subjects import SEED, Subject, log_perplexities, subject, windows_of
from gptq import QuantConfig, api
from gptq.allocation.target import EMBEDDING_CHOICES, Target
from gptq.errors import UserError

SIZES = RESULTS.with_name("file-sizes.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "algorithm.md"
PART = "files of one size"
SETTINGS = ("W4 g128", "W3 g128", "W2 g64")
UNIFORM, CHOSEN = "uniform", "chosen for its bytes"


@dataclass(frozen=True)
class Row:
    """One file."""

    setting: str
    how: str
    """UNIFORM or CHOSEN."""
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


def measure(settings: Sequence[str], cache: Path) -> Iterator[Row]:
    """Two files for each setting: uniform, and of as many bytes."""
    if not settings:
        return
    model = subject("smollm2", cache)
    evaluation = windows_of(model)[1]
    full = log_perplexities(model.folder, None, evaluation, device="cpu", dtype="float32")
    for setting in settings:
        bits, group_size = GRIDS[setting]
        config = QuantConfig(bits=bits, group_size=group_size)
        with tempfile.TemporaryDirectory(prefix="file-sizes-") as folder:
            path = Path(folder, "model.pt")
            size = None
            for how in (UNIFORM, CHOSEN):
                started = process_time()
                report = _quantize(model, config, size, path)
                seconds = process_time() - started
                size = size or path.stat().st_size
                found = log_perplexities(
                    model.folder, path, evaluation, device="cpu", dtype="float32"
                )
                yield Row(
                    setting,
                    how,
                    path.stat().st_size,
                    {text: found[text] - full[text] for text in found},
                    report.config.embedding_bits,
                    {str(width): count for width, count in report.widths.items()},
                    cpu_seconds=seconds,
                    version=version(),
                    machine=machine(),
                )


def _quantize(model: Subject, config: QuantConfig, size: int | None, path: Path) -> api.Report:
    """Write a file by `config`, or the best of at most `size` bytes."""
    path.unlink(missing_ok=True)
    target = None if size is None else Target(size, embedding_bits=EMBEDDING_CHOICES)
    job = api.Job(
        config,
        api.Outputs(path),
        model.calibration,
        nsamples=model.nsamples,
        seqlen=model.seqlen,
        seed=SEED,
        target=target,
    )
    return api.run(api.open_full(model.folder, "cpu", "float32"), job)


def table(rows: Sequence[Row]) -> str:
    """Of two rows for the same file the later counts."""
    last = {(row.setting, row.how): row for row in rows}
    lines = []
    order = [(setting, how) for setting in SETTINGS for how in (UNIFORM, CHOSEN)]
    for row in (last[key] for key in order if key in last):
        widths = ", ".join(f"{count} of {width}" for width, count in row.layers.items())
        cells = [row.setting, row.how, f"{row.size / 1e6:.1f}"]
        cells += [f"{gap:.3f}" for gap in row.gaps.values()]
        lines.append([*cells, str(row.embedding_bits), widths, f"{row.cpu_seconds:.0f}"])
    header = ["setting", "widths", "MB", "gap, encyclopedia", "gap, web pages"]
    return markdown([*header, "bits of the embedding", "layers", "CPU s"], lines)


def read(path: Path) -> list[Row]:
    """The rows of a file of results."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.file_sizes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--settings",
        nargs="*",
        choices=SETTINGS,
        default=SETTINGS,
        metavar="NAME",
        help=f"{', '.join(SETTINGS)}; without a name only the table is made",
    )
    parser.add_argument("--results", type=Path, default=SIZES, help="file to add to")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args(arguments)
    try:
        for row in measure(args.settings, args.cache):
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(f"{row.setting}, {row.how}: {row.size} bytes, {row.gaps}", flush=True)
        if args.results == SIZES:
            write(PAGE, {PART: table(read(SIZES))})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
