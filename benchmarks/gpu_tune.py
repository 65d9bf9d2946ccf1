"""Finds the fastest kernel for each shape and number of rows, and writes the table that
quant_cuda/cuda/tuned.py reads. A part of benchmarks/gpu.py.

    python -m benchmarks.gpu tune [--bits 4 8] [--shapes 8192x8192 ...] [--rows 1 8 ...]

Every kernel and variant that takes a matmul is compared with float64 first. One that fails, or has
more than twice the error of the dense float16 product, is named and left out.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common.gpu_facts import facts
from benchmarks.gpu_models import random_weight
from gptq.files.atomic import whole_file
from quant_cuda import reference
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout, tuned
from quant_cuda.cuda.variants import VARIANTS

SHAPES = ((8192, 8192), (4096, 11008), (11008, 4096), (4096, 4096))
ROWS = (1, 8, 16, 32, 64, 96, 128, 176, 256, 512)
COLD_BYTES = 512 << 20
REPEATS = 9
# A kernel replaces the one that is chosen without a table if it is faster by this factor.
BETTER = 1.02
# What takes longer than the best by this factor once is not timed again.
CLOSE = 1.3

Timer = Callable[[], float]
"""Runs a kernel; seconds a call."""


class Failed(NamedTuple):
    """A kernel that may not be used."""

    kernel: str
    reason: str


def names(rows: int, weight: layout.KernelWeight, wgmma: bool) -> list[str]:
    """The kernels and variants that take a float16 matmul; first the one that is chosen untuned."""
    product = cuda.Product(rows, torch.float16, weight, wgmma)
    every = [*cuda.KERNELS, *VARIANTS.values()]
    taking = [kernel.name for kernel in every if kernel.takes(product)]
    chosen = cuda.kernel_for(rows, torch.float16, weight, wgmma).name
    return [chosen, *(name for name in taking if name != chosen)]


class Truth(NamedTuple):
    """What a product is compared with."""

    y: Tensor
    """float64 (rows, out)."""
    allowed: float
    """The norm of an error that a kernel may make."""


def truth_of(x: Tensor, exact: Tensor) -> Truth:
    """x: float16 (rows, in). exact: the weight, float64 (in, out)."""
    y = x.double() @ exact
    naive = x @ exact.to(x.dtype)
    return Truth(y, 2 * float((naive.double() - y).norm()) + 5e-4 * float(y.norm()))


def reason_against(run: Callable[[], Tensor], truth: Truth) -> str | None:
    """Why a kernel's product, (rows, out), may not be used; None if it may."""
    try:
        made = float((run().double() - truth.y).norm())
    except RuntimeError as error:
        return str(error)
    # Not "more than": a sum that is not a number may not be used either.
    if made <= truth.allowed:
        return None
    return f"error {made:.3g}, more than {truth.allowed:.3g}"


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


def entry(bits: int, shape: tuple[int, int], rows: int, timers: Mapping[str, Timer]) -> dict:
    """A row of the table. The first of `timers` is what is chosen without one."""
    untuned = next(iter(timers))
    seconds = fastest(timers)
    best = next(iter(seconds))
    if seconds[best] * BETTER > seconds[untuned]:
        best = untuned
    return {
        "bits": bits,
        "inputs": shape[0],
        "outputs": shape[1],
        "rows": rows,
        "kernel": best,
        "microseconds": round(1e6 * seconds[best], 2),
        "untuned": untuned,
        "untuned_microseconds": round(1e6 * seconds[untuned], 2),
    }


def write(entries: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Write the table of the GPU that `about` names, whole, in place of an older one."""
    path = tuned.path_of(about["gpu"])
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(about | {"entries": entries}, indent=1) + "\n", "utf-8")
    return path


def tune(
    bits: int, shape: tuple[int, int], all_rows: list[int]
) -> tuple[list[dict[str, Any]], list[Failed]]:
    """The table's rows for one weight, and what may not be used, on this machine's GPU."""
    inputs, outputs = shape
    count = max(2, math.ceil(COLD_BYTES / (inputs * outputs * bits / 8)))
    weights = [random_weight(bits, inputs, outputs, "cuda") for _ in range(count)]
    exact = reference.dequantize(weights[0], torch.float64)
    tiled = [layout.prepare(weight) for weight in weights]
    entries, failed = [], []
    for rows in all_rows:
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
        truth, pool = truth_of(x, exact), torch.cuda.graph_pool_handle()
        timers: dict[str, Timer] = {}
        for name in names(rows, tiled[0], cuda.current(x).wgmma):

            def run(weight: layout.KernelWeight, name: str = name, x: Tensor = x) -> Tensor:
                return cuda.matmul(x, weight, kernel=name)

            reason = reason_against(lambda run=run: run(tiled[0]), truth)  # type: ignore[misc]
            if reason is not None:
                failed.append(Failed(f"{name}, {rows} rows", reason))
                continue
            timers[name] = _replays(run, tiled[:4] if name == "dense" else tiled, pool)
        entries.append(entry(bits, shape, rows, timers))
    return entries, failed


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
    return made


def _shape(text: str) -> tuple[int, int]:
    """Inputs and outputs. Raises ValueError for what is no shape of whole blocks of inputs."""
    inputs, outputs = map(int, text.split("x"))
    if inputs < 128 or inputs % 128 or outputs < 1:
        raise ValueError(f"{text}: give inputs, a multiple of 128, and outputs, as 4096x11008")
    return inputs, outputs


def main(arguments: list[str], console: Console) -> int:
    """Tune and write the table, after every shape; 1 if a kernel may not be used."""
    wanted = parser().parse_args(arguments)
    about, entries, failures = facts(), [], []
    for bits in wanted.bits:
        for shape in wanted.shapes:
            made, failed = tune(bits, shape, sorted(set(wanted.rows)))
            entries += made
            failures += failed
            for row in made:
                console.print(
                    f"{bits} bits, {shape[0]} x {shape[1]}, {row['rows']} rows: {row['kernel']} "
                    f"{row['microseconds']} us; {row['untuned']} {row['untuned_microseconds']} us"
                )
            path = write(entries, about)
    for kernel, reason in failures:
        console.print(f"FAILED: {kernel}: {reason}", markup=False)
    console.print(f"written to {path}")
    return 1 if failures else 0
