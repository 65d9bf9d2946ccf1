"""Where the time of quantizing goes, compared with the least it can take and with GPTQModel.

    python -m benchmarks.quantize [--settings NAME...] [--repeats N] [--threads N]
        [--gptqmodel PYTHON] [--model FOLDER] [--output FILE]

SmolLM2-135M on 16 x 512 tokens, 4 bits, groups of 64; --model takes another model; only its
speed is measured. Runs take turns, so that other load on the machine affects all alike. Seconds are
processor time with one thread and wall time with more.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.common.measures import machine, version
from benchmarks.common.stopwatch import SETTINGS, Stopwatch
from benchmarks.limits import Rates, measured_rates, operations
from benchmarks.quality.making import PEERS
from benchmarks.quality.subjects import Subject, log_perplexities, subject, windows_of
from gptq import QuantConfig, api
from gptq.errors import UserError

PEER = "GPTQModel"
RESULTS = Path(__file__).parent / "results" / "quantize.json"
GRID: dict[str, Any] = {"bits": 4, "group_size": 64}


@dataclasses.dataclass
class Run:
    """One quantization, measured."""

    method: str
    seconds: float
    cpu_seconds: float
    """Of all threads."""
    stages: dict[str, float]
    """Seconds; what is in none of them is not listed."""
    gaps: dict[str, float]
    """Nats a token by text; empty if they were not asked for."""


def run_ours(it: Subject, method: str, out: Path) -> tuple[Run, Path]:
    """Quantize from reading to writing."""
    watch = Stopwatch(thread_time if torch.get_num_threads() == 1 else perf_counter)
    config = QuantConfig(**GRID, **SETTINGS[method])
    path = out / "model.pt"
    started, cpu_started = perf_counter(), process_time()
    with watch.watching():
        api.quantize(
            it.folder,
            it.calibration,
            config,
            save=path,
            nsamples=it.nsamples,
            seqlen=it.seqlen,
            dtype="float32",
        )
    seconds, cpu_seconds = perf_counter() - started, process_time() - cpu_started
    return Run(method, seconds, cpu_seconds, watch.seconds, {}), path


def run_peer(it: Subject, python: str, tokens: Path, out: Path, threads: int) -> tuple[Run, Path]:
    """GPTQModel's defaults; only its quantizing is timed, not its reading and writing."""
    command = [python, str(PEERS / "gptqmodel_run.py"), str(it.folder.resolve()), str(tokens)]
    done = subprocess.run(
        [*command, str(out / "peer"), json.dumps(GRID)],
        capture_output=True,
        text=True,
        check=False,
        cwd=out,  # it writes logs where it runs
        # With fewer than two workers it stops with an error.
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "GPTQMODEL_CPU_WORKERS": str(max(2, threads)),
        },
    )
    if done.returncode:
        raise UserError(f"{PEER} failed: {done.stderr.strip().splitlines()[-1:]}")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    folder = next(path.parent for path in sorted((out / "peer").rglob("*.safetensors")))
    return Run(PEER, report["seconds"], report["cpu_seconds"], {}, {}), folder


def measure(it: Subject, args: argparse.Namespace) -> Iterator[Run]:
    """Every method once a repeat, in turn; the first time its gap is measured too."""
    calibration, evaluation = windows_of(it)
    full = log_perplexities(it.folder, None, evaluation) if args.quality else {}
    methods = [*args.settings, *([PEER] if args.gptqmodel else [])]
    for repeat in range(args.repeats):
        for method in methods:
            with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
                out = Path(folder)
                if method == PEER:
                    tokens = out / "tokens.json"
                    tokens.write_text(json.dumps(calibration.tolist()))
                    run, path = run_peer(it, args.gptqmodel, tokens, out, args.threads)
                else:
                    run, path = run_ours(it, method, out)
                if args.quality and repeat == 0:
                    quantized = log_perplexities(it.folder, path, evaluation)
                    run.gaps = {text: quantized[text] - full[text] for text in quantized}
            yield run


def best(runs: list[Run], method: str) -> Run:
    """The run of least processor time, with the gaps of the first."""
    own = [run for run in runs if run.method == method]
    return dataclasses.replace(min(own, key=lambda run: run.cpu_seconds), gaps=own[0].gaps)


def stage_table(run: Run, least: dict[str, float], rates: Rates, threads: int) -> Table:
    """Seconds by stage, the least each can take, and what share of the time that is."""
    made = Table(title=f"{run.method} in float32: stages")
    for heading in ("stage", "seconds", "least", "share of the limit"):
        made.add_column(heading, justify="left" if heading == "stage" else "right")
    total = run.cpu_seconds if threads == 1 else run.seconds
    rest = {"all else": total - sum(run.stages.values())}
    for stage, seconds in {**run.stages, **rest}.items():
        limit = least.get(stage, 0.0) / rates.operations
        share = f"{limit / seconds:.0%}" if limit else ""
        made.add_row(stage, f"{seconds:.1f}", f"{limit:.1f}" if limit else "", share)
    limit = sum(least.values()) / rates.operations
    made.add_section()
    made.add_row("all", f"{total:.1f}", f"{limit:.1f}", f"{limit / total:.0%}")
    return made


def summary(runs: list[Run], model: str) -> Table:
    """Processor seconds and gaps of one model side by side, and ratios to the peer."""
    made = Table(title=model, caption="gap: nats a token; best of the repeats")
    texts = list(runs[0].gaps)
    headings = ("method", "CPU s", "wall s", "times faster", *(f"gap {text}" for text in texts))
    for heading in headings:
        made.add_column(heading, justify="left" if heading == "method" else "right")
    methods = list(dict.fromkeys(run.method for run in runs))
    peer = best(runs, PEER).cpu_seconds if PEER in methods else math.nan
    for method in methods:
        run = best(runs, method)
        ratio = "" if math.isnan(peer) else f"{peer / run.cpu_seconds:.2f}"
        gaps = [f"{run.gaps[text]:.4f}" for text in texts]
        made.add_row(method, f"{run.cpu_seconds:.1f}", f"{run.seconds:.1f}", ratio, *gaps)
    return made


def write(path: Path, it: Subject, runs: list[Run], rates: Rates) -> None:
    record = {
        "model": it.name,
        "version": version(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "rates": dataclasses.asdict(rates),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize",
        description="Where the time of quantizing goes, compared with the least it can take.",
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--repeats", type=int, default=1, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="python of an environment with it")
    parser.add_argument("--model", type=Path, help="another model, for its speed alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args(argv)
    args.quality = args.model is None
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    runs = []
    try:
        it = subject("smollm2", args.cache)
        if args.model is not None:
            it = dataclasses.replace(it, name=args.model.name, folder=args.model)
        config = api.open_model(it.folder, weights=False).config
        rates = measured_rates()
        for run in measure(it, args):
            runs.append(run)
            print(f"{run.method}: {run.cpu_seconds:.1f} processor seconds", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for method in args.settings:
        settings = QuantConfig(**GRID, **SETTINGS[method])
        least = operations(config, settings, it.nsamples, it.seqlen)
        console.print(stage_table(best(runs, method), least, rates, args.threads))
    console.print(summary(runs, it.name))
    speed = f"{rates.operations / 1e9:.0f} GFLOP/s"
    console.print(f"{version()}, {machine()}, {args.threads} threads, {speed}")
    write(args.output, it, runs, rates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
