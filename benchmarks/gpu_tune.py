"""Finds the fastest kernel for each shape and number of rows, and writes the table that
quant_cuda/cuda/tuned.py reads. A part of benchmarks/gpu.py.

    python -m benchmarks.gpu tune [--bits 4 8] [--shapes 8192x8192 ...] [--rows 1 8 ...]

Every kernel and variant that takes a matmul is compared with float64 first, in a process of its
own. One that crashes it, takes too long, fails, or has more than twice the error of the dense
float16 product, is named and left out of the whole table; the others are timed.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.gpu_facts import facts, is_usable
from benchmarks.common.workers import Event, Events, Limits, supervise
from benchmarks.gpu_check import DEAD, compare, truth_of
from benchmarks.gpu_models import random_weight
from gptq.files.atomic import whole_file
from quant_cuda import reference
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout, tuned
from quant_cuda.cuda.variants import VARIANTS
from quant_cuda.cuda.variants import variants as all_variants

# The most telling first: a run that is cut off has all of those, at every width.
SHAPES = ((8192, 8192), (4096, 11008), (11008, 4096), (4096, 4096))
ROWS = (1, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 256, 512, 1024)
COLD_BYTES = 512 << 20
REPEATS = 5
# Of a variant; those between are not much slower than the nearest of these.
SPLITS = (1, 2, 3, 4, 6, 8)
# A kernel replaces the one that is chosen without a table if it is faster by this factor.
BETTER = 1.02
# What takes longer than the best by this factor once is not timed again.
CLOSE = 1.3

LIMITS = Limits(start=180, step=10)
WORKER = (sys.executable, "-m", "benchmarks.gpu_tune")

Timer = Callable[[], float]
"""Runs a kernel; seconds a call."""


def names(rows: int, weight: layout.KernelWeight, wgmma: bool) -> list[str]:
    """The kernels and variants of a float16 matmul to time; first the one that is chosen untuned.

    Where variants of bulk.cu take it, those of other kernels are left out: bulk.cu is meant to
    replace them, and these kernels are timed as they are.
    """
    product = cuda.Product(rows, torch.float16, weight, wgmma)
    variants = [
        it for it in all_variants() if it.splits in SPLITS and VARIANTS[it.name].takes(product)
    ]
    bulk = [it for it in variants if it.kernel.startswith("bulk")]
    taking = [kernel.name for kernel in cuda.KERNELS if kernel.takes(product)]
    taking += [it.name for it in bulk or variants]
    chosen = cuda.kernel_for(rows, torch.float16, weight, wgmma).name
    return [chosen, *(name for name in taking if name != chosen)]


def fastest(timers: Mapping[str, Timer], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each of those that may be the fastest, timed in turn; the best first.

    The first of `timers` is kept in any case.
    """
    once = {name: timer() for name, timer in timers.items()}
    first, best = next(iter(once)), min(once.values())
    close = [name for name, seconds in once.items() if name == first or seconds <= CLOSE * best]
    seconds: dict[str, list[float]] = {name: [] for name in close}
    for _ in range(repeats):
        for name in close:
            seconds[name].append(timers[name]())
    medians = {name: statistics.median(all_of) for name, all_of in seconds.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def entry(timed: Mapping[str, Any], failed: Mapping[str, str]) -> dict[str, Any] | None:
    """A row of the table; None if nothing that was timed may be used.

    timed: "seconds" by kernel, the best first, and "untuned", what is chosen without a table.
    failed: kernels that may not be used, also if they failed after this was timed.
    """
    seconds = {name: s for name, s in timed["seconds"].items() if name not in failed}
    if not seconds:
        return None
    untuned = timed["untuned"]
    best = next(iter(seconds))
    if untuned in seconds and seconds[best] * BETTER > seconds[untuned]:
        best = untuned
    before = seconds.get(untuned)
    return {
        **{key: timed[key] for key in ("bits", "inputs", "outputs", "rows")},
        "kernel": best,
        "microseconds": round(1e6 * seconds[best], 2),
        "untuned": untuned,
        "untuned_microseconds": None if before is None else round(1e6 * before, 2),
    }


def write(entries: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Write the table of the GPU that `about` names, whole, in place of an older one."""
    path = tuned.path_of(about["gpu"])
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(about | {"entries": entries}, indent=1) + "\n", "utf-8")
    return path


def work(events: Events, bits: int, shape: tuple[int, int], all_rows: Sequence[int]) -> None:
    """Time what takes one weight, for each number of rows, as far as that was not done."""
    inputs, outputs = shape
    left = [rows for rows in all_rows if _item(bits, shape, rows) not in events.finished]
    if not left:
        return
    count = max(2, math.ceil(COLD_BYTES / (inputs * outputs * bits / 8)))
    weights = [random_weight(bits, inputs, outputs, "cuda") for _ in range(count)]
    exact = reference.dequantize(weights[0], torch.float64)
    tiled = [layout.prepare(weight) for weight in weights]
    for rows in left:
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
        item = _item(bits, shape, rows)
        chosen, *others = names(rows, tiled[0], cuda.current(x).wgmma)
        timers = dict(_timers(events, item, [chosen, *others], (x, exact, tiled)))
        seconds = fastest(timers) if timers else {}
        sizes = {"bits": bits, "inputs": inputs, "outputs": outputs, "rows": rows}
        events.finish(item, **sizes, untuned=chosen, seconds=seconds)


def _item(bits: int, shape: tuple[int, int], rows: int) -> str:
    return f"{bits} bits, {shape[0]} x {shape[1]}, {rows} rows"


def _timers(
    events: Events,
    item: str,
    kernels: Sequence[str],
    product: tuple[Tensor, Tensor, list[layout.KernelWeight]],
) -> Iterator[tuple[str, Timer]]:
    """Those of the kernels that are right; one that is not is named.

    product: x (rows, in), the first weight in float64 (in, out), and the weights.
    """
    x, exact, tiled = product
    truth, pool = truth_of(x, exact), torch.cuda.graph_pool_handle()
    for name in kernels:
        if events.leaves_out(name):
            continue

        def run(weight: layout.KernelWeight, name: str = name) -> Tensor:
            return cuda.matmul(x, weight, kernel=name)

        events.begin(name, item)
        try:
            compare(lambda run=run: run(tiled[0]), truth)  # type: ignore[misc]
            timer = _replays(run, tiled[:4] if name == "dense" else tiled, pool)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            usable = is_usable()
            events.fail(name, f"{item}: {reason}", crashed=not usable)
            if not usable:
                sys.exit(DEAD)
            continue
        yield name, _watched(events, item, name, timer)


def _watched(events: Events, item: str, name: str, timer: Timer) -> Timer:
    """The timer, noted before each use: what was right once may still hang."""

    def seconds() -> float:
        # Not printed: the log would have little else.
        events.begin(name, item, quietly=True)
        return timer()

    return seconds


def _replays(
    run: Callable[[layout.KernelWeight], Tensor], weights: list[layout.KernelWeight], pool: Any
) -> Timer:
    """Times a graph of one call for each weight, so that none is in the second-level cache."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for weight in weights:
            run(weight)

    def seconds() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / len(weights)

    seconds()
    return seconds


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu tune")
    made.add_argument("--bits", type=int, nargs="+", choices=(4, 8), default=[4, 8])
    made.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="as 4096x11008")
    made.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of x")
    made.add_argument("--events", type=Path, help=argparse.SUPPRESS)
    return made


def _shape(text: str) -> tuple[int, int]:
    """Inputs and outputs. Raises ValueError for what is no shape of whole blocks of inputs."""
    inputs, outputs = map(int, text.split("x"))
    if inputs < 128 or inputs % 128 or outputs < 1:
        raise ValueError(f"{text}: give inputs, a multiple of 128, and outputs, as 4096x11008")
    return inputs, outputs


def main(arguments: list[str]) -> int:
    """Tune, and write the table after every row; 1 if a kernel may not be used."""
    asked = parser().parse_args(arguments)
    all_rows = sorted(set(asked.rows))
    weights = [(bits, shape) for shape in asked.shapes for bits in asked.bits]
    if asked.events is not None:
        events = Events(asked.events)
        for bits, shape in weights:
            work(events, bits, shape, all_rows)
        events.end()
        return 0
    about, timed = facts(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"

        def watch(event: Event) -> None:
            if "seconds" in event:
                timed.append(event)
                _write_timed(timed, Events(path).failed, about)
                print(_line(event), flush=True)

        worker = [*WORKER, *arguments, "--events", str(path)]
        failed = supervise(worker, path, LIMITS, watch)
    written = _write_timed(timed, failed, about)
    for name, reason in failed.items():
        print(f"FAILED: {name}: {reason}")
    wanted = len(weights) * len(all_rows)
    print(f"{written} of {wanted} rows of the table written to {tuned.path_of(about['gpu'])}")
    return 1 if failed or written < wanted else 0


def _write_timed(
    timed: Sequence[Mapping[str, Any]], failed: Mapping[str, str], about: dict[str, Any]
) -> int:
    """Write the table of what was timed, less what failed; the number of its rows."""
    entries = [row for it in timed if (row := entry(it, failed)) is not None]
    if entries:
        write(entries, about)
    return len(entries)


def _line(timed: Mapping[str, Any]) -> str:
    row = entry(timed, {})
    if row is None:
        return f"{timed['finished']}: nothing may be used"
    return (
        f"{timed['finished']}: {row['kernel']} {row['microseconds']} us; "
        f"{row['untuned']} {row['untuned_microseconds']} us"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
