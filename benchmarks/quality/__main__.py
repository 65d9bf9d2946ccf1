"""How close quantized models stay to the original: method by method, on text not calibrated on.

    python -m benchmarks.quality [--models NAME...] [--settings NAME...] [--methods NAME...]

NAME of a model is one of this benchmark's own, or a folder or hub name of any other. Those are
measured by the protocol of published rows: calibrated on 128 windows of 2048 tokens of c4, judged
on wikitext2 and c4, 2048 tokens at a time, on one GPU if there is one. Published perplexities of
Llama-2-7B on wikitext2 (Chen et al. 2024, arXiv 2407.11062), the full model's being 5.47, are those
of W4 g128, W3 g128 and W2 g64: GPTQ 5.61, 6.29, 20.9; EfficientQAT 5.53, 5.81, 6.86.

The measure is the gap, ln(perplexity quantized) - ln(perplexity full), in nats a token; of this
benchmark's own models both are computed in float32. Every result is appended to a file at once,
with the version that made it and the machine. What is in the file is not measured again without
--fresh; of two results for the same model, setting and method the later counts.
Other toolkits run in environments of their own: --gptqmodel PYTHON, --autoround PYTHON, --llamacpp
PYTHON. llama.cpp's settings are its types, which the other methods do not have.
"""

import argparse
import importlib.util
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.common.measures import machine
from benchmarks.quality.making import Workshop, toolkit_version
from benchmarks.quality.methods import METHODS, OURS, PACKAGES, SETTINGS, refusal
from benchmarks.quality.results import RESULTS, Result, add, chart, read_results, table
from benchmarks.quality.subjects import (
    MODELS,
    dtype_of,
    log_perplexities,
    standard_subject,
    subject,
    windows_of,
)
from gptq.device import pick_device
from gptq.errors import UserError

WIDTH = 200
"""Characters of a line of a table in a file."""


def measure(args: argparse.Namespace) -> Iterator[Result]:
    """Quantize and evaluate everything that was asked for and is not in the file; with --fresh also
    what is."""
    pythons = {toolkit: getattr(args, toolkit) for toolkit in PACKAGES}
    measured = set() if args.fresh else {row.key for row in read_results(args.results)}
    pairs = chosen_pairs(args)
    others = {model: standard_subject(model) for model in args.models if model not in MODELS}
    for model in args.models:
        name = others[model].name if model in others else model
        wanted = [pair for pair in pairs if (name, *pair) not in measured]
        if not wanted:
            continue
        it = others[model] if model in others else subject(model, args.cache)
        calibration, evaluation = windows_of(it)
        workshop = Workshop(it, calibration, pythons, args.device)
        judged: dict[str, Any] = {"device": args.device, "dtype": dtype_of(it, args.device)}
        full = log_perplexities(it.folder, None, evaluation, **judged)
        for setting, method in wanted:
            with tempfile.TemporaryDirectory(prefix="quality-") as folder:
                started = perf_counter()
                made = workshop.make(method, setting, Path(folder))
                seconds = perf_counter() - started
                quantized = log_perplexities(made.folder, made.checkpoint, evaluation, **judged)
            yield Result(
                model=name,
                setting=setting,
                method=method,
                gaps={text: quantized[text] - full[text] for text in quantized},
                bits_per_weight=made.bits_per_weight,
                cpu_seconds=made.cpu_seconds,
                threads=torch.get_num_threads(),
                version=toolkit_version(method, pythons),
                machine=machine_of(args.device),
                dtype=judged["dtype"],
                seconds=seconds,
                perplexities={text: math.exp(loss) for text, loss in quantized.items()},
                full_perplexities={text: math.exp(loss) for text, loss in full.items()},
            )


def machine_of(device: str | None) -> str:
    """The processor, and the GPU if the device is one."""
    where = pick_device(device)
    gpu = [torch.cuda.get_device_name(where)] if where.type == "cuda" else []
    return ", ".join([machine(), *gpu])


def chosen_pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(setting, method) of each row that was asked for; a line for each setting about methods that
    cannot have it, if both were asked for by name. Raises UserError if there is no row."""
    settings, methods = args.settings or [*SETTINGS], args.methods or args.possible
    chosen: list[tuple[str, str]] = []
    refused: dict[tuple[str, str], list[str]] = {}
    for setting, method in product(settings, methods):
        reason = refusal(setting, method)
        if reason is None:
            chosen.append((setting, method))
        else:
            refused.setdefault((setting, reason), []).append(method)
    lines = [f"{it[0]} by {'; '.join(names)}: {it[1]}" for it, names in refused.items()]
    if not chosen:
        raise UserError(f"nothing to measure: {lines[0]}; choose other --settings or --methods")
    for line in lines if args.settings and args.methods else ():
        print(f"skipped {line}", file=sys.stderr, flush=True)
    return chosen


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="What quantization costs, by method, in nats a token on held-out text.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=MODELS[:3],
        metavar="NAME",
        help=f"{', '.join(MODELS)}; or a folder or hub name",
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=None, metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=None, metavar="NAME")
    for toolkit in PACKAGES:
        parser.add_argument(
            f"--{toolkit}", metavar="PYTHON", help="python of an environment with it"
        )
    parser.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
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
        if (python := getattr(args, toolkit)) is not None:
            if (found := shutil.which(python)) is None:
                parser.error(f"--{toolkit} {python}: no such program")
            # They run in another folder. A link stays one: by it Python knows its environment.
            setattr(args, toolkit, os.path.abspath(found))
    args.possible = [name for name in METHODS if name not in missing]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
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
