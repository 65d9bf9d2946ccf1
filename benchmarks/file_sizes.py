"""Whole files of one size: uniform bits, llama.cpp's types, and what `--size` chooses.

    python -m benchmarks.file_sizes [--settings NAME...] [--llamacpp PYTHON] [--results FILE]
        [--chart FILE]

SmolLM2 is quantized by a setting, as the command line does it or as llama.cpp does, and then for a
size of as many bytes. PYTHON is of an environment with llama-cpp-python and gguf; without it its
types are left out. Every row is appended to the file of results at once; the table in
docs/algorithm.md and the chart are made from all that are in it.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import torch

from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.common.measures import children_seconds, machine, version
from benchmarks.common.page import write
from benchmarks.file_sizes_report import (
    BETWEEN,
    CHOSEN,
    SETTINGS,
    SIZES,
    THEIRS,
    UNIFORM,
    UNIFORM_SETTINGS,
    Row,
    chart,
    middle,
    read,
    table,
)
from benchmarks.llama_cpp_files import Peer, full_file, importance
from benchmarks.quality.methods import GRIDS, LLAMA_CPP, LLAMA_CPP_TYPES
from benchmarks.quality.results import RESULTS, read_results
from benchmarks.quality.subjects import SEED, Subject, log_perplexities, subject, windows_of
from gptq import QuantConfig, api
from gptq.allocation.target import EMBEDDING_CHOICES, Target
from gptq.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "algorithm.md"
PART = "files of one size"


@dataclass(frozen=True)
class Made:
    """A quantized model in one file."""

    how: str
    folder: Path
    """The model's, or a .gguf file that is complete in itself."""
    checkpoint: Path | None
    embedding_bits: int
    layers: dict[str, int]
    cpu_seconds: float
    version: str

    @property
    def size(self) -> int:
        return (self.checkpoint or self.folder).stat().st_size


def measure(
    settings: Sequence[str], cache: Path, python: str | None, known: Sequence[Row] = ()
) -> Iterator[Row]:
    """For each setting its own files, and the best of as many bytes.

    known: rows that were measured before.
    """
    if not settings:
        return
    model, rows = subject("smollm2", cache), list(known)
    evaluation = windows_of(model)[1]
    full = log_perplexities(model.folder, None, evaluation, device="cpu", dtype="float32")
    for setting in settings:
        with tempfile.TemporaryDirectory(prefix="file-sizes-") as temporary:
            for made in _files(model, setting, Path(temporary), python, rows):
                found = log_perplexities(
                    made.folder, made.checkpoint, evaluation, device="cpu", dtype="float32"
                )
                row = Row(
                    setting,
                    made.how,
                    made.size,
                    {text: found[text] - full[text] for text in found},
                    made.embedding_bits,
                    made.layers,
                    cpu_seconds=made.cpu_seconds,
                    version=made.version,
                    machine=machine(),
                )
                rows.append(row)
                yield row


def _files(
    model: Subject, setting: str, folder: Path, python: str | None, rows: Sequence[Row]
) -> Iterator[Made]:
    """The files of a setting, the chosen one last. rows: what is measured so far, these too."""
    size = sys.maxsize
    if setting == BETWEEN:
        size = middle(rows)
    elif setting in LLAMA_CPP_TYPES:
        for file in _theirs(model, setting, folder, str(python)):
            yield file
            size = min(size, file.size)
    else:
        bits, group_size = GRIDS[setting]
        yield (file := _ours(model, folder, QuantConfig(bits=bits, group_size=group_size)))
        size = file.size
    yield _ours(model, folder, QuantConfig(), Target(size, embedding_bits=EMBEDDING_CHOICES))


def _ours(model: Subject, folder: Path, config: QuantConfig, target: Target | None = None) -> Made:
    how = UNIFORM if target is None else CHOSEN
    job = api.Job(
        config,
        api.Outputs(path := folder / f"{how}.pt"),
        model.calibration,
        nsamples=model.nsamples,
        seqlen=model.seqlen,
        seed=SEED,
        target=target,
    )
    started = process_time()
    report = api.run(api.open_full(model.folder, "cpu", "float32"), job)
    seconds = process_time() - started
    layers = {str(width): count for width, count in report.widths.items()}
    return Made(
        how,
        model.folder,
        path,
        report.config.embedding_bits,
        layers,
        cpu_seconds=seconds,
        version=version(),
    )


def _theirs(model: Subject, kind: str, folder: Path, python: str) -> Iterator[Made]:
    """llama.cpp's type, without and with an importance matrix; the embedding as it chooses."""
    peer = Peer(python, folder, torch.get_num_threads(), f"--{LLAMA_CPP}")
    full = full_file(model.folder, folder / "full.gguf")
    for how in THEIRS:
        path, extra = folder / f"{how}.gguf", []
        started, before = process_time(), children_seconds()
        if how == THEIRS[1]:
            matrix = folder / "importance.npz"
            extra = [importance(model.folder, windows_of(model)[0], matrix)]
        about = peer("quantize", full, path, kind.lower(), "default", *extra)
        seconds = process_time() - started + children_seconds() - before
        origin = f"llama-cpp-python {about['version']}"
        yield Made(
            how,
            path,
            None,
            about["embedding_bits"],
            about["types"],
            cpu_seconds=seconds,
            version=origin,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.file_sizes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--settings",
        nargs="*",
        choices=SETTINGS,
        metavar="NAME",
        help=f"{', '.join(SETTINGS)}; without a name only the table and the chart are made",
    )
    parser.add_argument(
        f"--{LLAMA_CPP}", metavar="PYTHON", help="of an environment with llama-cpp-python and gguf"
    )
    parser.add_argument("--results", type=Path, default=SIZES, help="file to add to")
    parser.add_argument("--chart", type=Path, help="draw gap against megabytes into this picture")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args(arguments)
    settings = args.settings
    if settings is None:
        # The last has bytes between those of two before it.
        own = (*UNIFORM_SETTINGS, BETWEEN)
        settings = (*LLAMA_CPP_TYPES, *own) if args.llamacpp else own
    try:
        if args.chart is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--chart needs matplotlib: pip install '.[report]' first")
        if args.llamacpp is None and (types := set(settings) & set(LLAMA_CPP_TYPES)):
            raise UserError(f"{types.pop()} is llama.cpp's; give --{LLAMA_CPP} PYTHON")
        for row in measure(settings, args.cache, args.llamacpp, read(args.results)):
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(f"{row.setting}, {row.how}: {row.size} bytes, {row.gaps}", flush=True)
        rows = read(args.results)
        if args.results == SIZES:
            write(PAGE, {PART: table(rows)})
        if args.chart is not None:
            chart(rows, read_results(RESULTS), args.chart)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
