"""How close quantized models stay to the original: method by method, on text not calibrated on.

    python -m benchmarks.quality [--models NAME...] [--settings NAME...] [--methods NAME...]

The measure is the gap, ln(perplexity quantized) - ln(perplexity full), in nats a token, both
computed in float32. Every result is appended to a file at once, with the version that made it and
the machine. What is in the file is not measured again without --fresh; of two results for the same
model, setting and method the later counts.
Other toolkits run in environments of their own: --gptqmodel PYTHON, --autoround PYTHON, --llamacpp
PYTHON. llama.cpp's settings are its types, which the other methods do not have.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.common.measures import machine
from benchmarks.quality.making import Workshop, toolkit_version
from benchmarks.quality.methods import METHODS, OURS, PACKAGES, SETTINGS, refusal
from benchmarks.quality.results import RESULTS, Result, add, chart, read_results, table
from benchmarks.quality.subjects import MODELS, log_perplexities, subject, windows_of
from gptq.errors import UserError


def measure(args: argparse.Namespace) -> Iterator[Result]:
    """Quantize and evaluate everything that was asked for and is not in the file; with --fresh also
    what is."""
    pythons = {toolkit: getattr(args, toolkit) for toolkit in PACKAGES}
    measured = set() if args.fresh else {row.key for row in read_results(args.results)}
    pairs = chosen_pairs(args)
    for name in args.models:
        wanted = [pair for pair in pairs if (name, *pair) not in measured]
        if not wanted:
            continue
        it = subject(name, args.cache)
        calibration, evaluation = windows_of(it)
        workshop = Workshop(it, calibration, pythons)
        full = log_perplexities(it.folder, None, evaluation)
        for setting, method in wanted:
            with tempfile.TemporaryDirectory(prefix="quality-") as folder:
                made = workshop.make(method, setting, Path(folder))
                quantized = log_perplexities(made.folder, made.checkpoint, evaluation)
            yield Result(
                model=name,
                setting=setting,
                method=method,
                gaps={text: quantized[text] - full[text] for text in quantized},
                bits_per_weight=made.bits_per_weight,
                cpu_seconds=made.cpu_seconds,
                threads=torch.get_num_threads(),
                version=toolkit_version(method, pythons),
                machine=machine(),
            )


def chosen_pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(setting, method) of each row that was asked for; a line about those that there cannot be, if
    both were asked for by name. Raises UserError if there is none."""
    settings, methods = args.settings or [*SETTINGS], args.methods or args.possible
    chosen, refused = [], []
    for pair in product(settings, methods):
        reason = refusal(*pair)
        if reason is None:
            chosen.append(pair)
        else:
            refused.append(f"{', '.join(pair)}: {reason}")
    if not chosen:
        raise UserError(f"nothing to measure: {refused[0]}; choose other --settings or --methods")
    for line in refused if args.settings and args.methods else ():
        print(f"skipped {line}", file=sys.stderr, flush=True)
    return chosen


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="What quantization costs, by method, in nats a token on held-out text.",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:3], metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=None, metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=None, metavar="NAME")
    for toolkit in PACKAGES:
        parser.add_argument(
            f"--{toolkit}", metavar="PYTHON", help="python of an environment with it"
        )
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to add to")
    parser.add_argument("--chart", type=Path, help="draw gap against bits into this picture")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args(argv)
    missing = {
        name: method.toolkit
        for name, method in METHODS.items()
        if method.toolkit != OURS and not getattr(args, method.toolkit)
    }
    for name in args.methods or ():
        if name in missing:
            parser.error(f"{name} needs --{missing[name]} PYTHON")
    for toolkit in PACKAGES:
        python = getattr(args, toolkit)
        if python is not None and shutil.which(python) is None:
            parser.error(f"--{toolkit} {python}: no such program")
    args.possible = [name for name in METHODS if name not in missing]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    try:
        if args.chart is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--chart needs matplotlib: pip install '.[report]' first")
        for result in measure(args):
            add(args.results, result)
            gaps = ", ".join(f"{text} {gap:.4f}" for text, gap in result.gaps.items())
            print(f"{result.model}, {result.setting}, {result.method}: {gaps}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = read_results(args.results)
    for model in dict.fromkeys(row.model for row in results):
        console.print(table(results, model))
    if args.chart is not None and results:
        chart(results, args.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
