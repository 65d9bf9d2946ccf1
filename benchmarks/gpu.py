"""Kernels, decoding and quantization on the GPU of this machine; run by benchmarks/gpu.sh.

    python -m benchmarks.gpu check [FAMILY...]    every kernel against float64 or torch
    python -m benchmarks.gpu tune [--shapes ...] [--rows ...]    the table of the fastest kernels
    python -m benchmarks.gpu measure [PART...]    tables, and benchmarks/results/<gpu>.json
    python -m benchmarks.gpu peers [marlin|humming|gemlite...]    adds those that are installed

Weights are random and made on the device. A kernel is timed as a CUDA graph of calls that go
through more weights than the second-level cache holds.
"""

import re
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import gpu_check, gpu_tune
from benchmarks.common.gpu_facts import facts
from benchmarks.common.gpu_results import Row, Run, add, read, write
from benchmarks.gpu_models import (
    GROUP_SIZE,
    WIDTHS,
    decode,
    quantization,
    random_weight,
    released,
)
from benchmarks.gpu_peers import DISTRIBUTIONS, PEERS, Case, peers, torch_int4
from gptq.config import QuantConfig
from gptq.solver.hessian import Hessian
from gptq.solver.layer import solve_layer
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout, operator

RESULTS = Path(__file__).parent / "results"
# What kernels are timed for, the most telling first: a run that is cut off has that.
CASES = (
    Case(4, (8192, 8192), (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)),
    Case(4, (4096, 11008), (1, 16, 32, 64, 128, 256, 512)),
    Case(8, (8192, 8192), (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)),
)
COLD_BYTES = 512 << 20  # ten times the second-level cache of an H100
REPEATS = 5
# Ways to take a product, and the most rows of x that each is meant for.
OURS = {"gemv": 32, "gemm": 512, "wgmma": 8192, "dense": 8192}
# Settings that some blocks are quantized with, and whether activations are in the machine's memory;
# the first is taken twice, since it also takes what is done once in a process.
BLOCKS = (("fast", False), ("fast", False), ("fast", True), ("default", False), ("default", True))
WAYS = (*OURS, "triton", "legacy_style", "torch_int4", "cublas_fp16")


def time_graph(calls: list[Callable[[], Any]]) -> float:
    """Seconds a call, the median of REPEATS replays of all of them in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return statistics.median(seconds)


def limits() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of cuBLAS in float16."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    # A kernel: the copy engine that a copy becomes in a graph is slower.
    copied = time_graph([lambda: torch.neg(source, out=target)] * 4)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    b = torch.empty_like(a)
    multiplied = time_graph([lambda: torch.mm(a, a, out=b)] * 4)
    return {"copy": 2 * source.nbytes / copied, "matrix": 2 * 8192**3 / multiplied}


def kernels(case: Case) -> Iterator[Row]:
    """Times of one product for each number of rows, by each way to take it."""
    bits, (inputs, outputs) = case.bits, case.shape
    count = max(4, COLD_BYTES // (inputs * outputs * bits // 8))
    weights = [random_weight(bits, inputs, outputs, "cuda") for _ in range(count)]
    tiled = [layout.prepare(weight) for weight in weights]
    plain = [layout.plain(weight) for weight in weights[:4]]
    dense = [torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) for _ in range(4)]
    stored = sum(t.nbytes for t in operator.prepare(weights[0]).tensors)
    del weights
    for rows in case.rows:
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
        chosen = cuda.chosen_for(x, tiled[0]).name
        row: Row = {"bits": bits, "inputs": inputs, "outputs": outputs, "rows": rows}
        row["chosen"] = chosen
        for name, calls in _ways(x, tiled, plain, dense).items():
            row[name] = time_graph(calls)
        row["bytes"] = stored + x.nbytes + 2 * rows * outputs
        row["flop"] = 2 * rows * inputs * outputs
        yield row


def _ways(
    x: Tensor, tiled: list[layout.KernelWeight], plain: list[layout.Plain], dense: list[Tensor]
) -> dict[str, list[Callable[[], Tensor]]]:
    """Calls for each way of taking the product, as far as it is meant for so many rows."""
    ways: dict[str, list[Any]] = {
        "cublas_fp16": [partial(nn.functional.linear, x, w) for w in dense]
    }
    chosen = cuda.chosen_for(x, tiled[0]).name
    if chosen not in OURS:
        ways[chosen] = [partial(cuda.matmul, x, w, kernel=chosen) for w in tiled]
    for name, most in OURS.items():
        here = name != "wgmma" or cuda.current(x).wgmma
        if len(x) <= most and here:
            weights = tiled[:8] if name == "dense" else tiled
            ways[name] = [partial(cuda.matmul, x, w, kernel=name) for w in weights]
    weight = tiled[0]
    if weight.bits == 4:
        calls = torch_int4(x, weight.in_features, weight.out_features, len(tiled))
        ways |= {"torch_int4": calls} if calls else {}
    if len(x) <= 8:
        ways["legacy_style"] = [partial(cuda.matmul, x, w) for w in plain]
    if "triton" in operator.engines() and len(x) <= 256:
        from quant_cuda.cuda import triton

        ways["triton"] = [partial(triton.matmul, x, w) for w in tiled[:8]]
    return ways


def solving() -> Iterator[dict[str, Any]]:
    """Seconds to solve one layer of each shape of a LLaMA-7B block, those of one input together."""
    for inputs, outputs in ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)):
        x = torch.randn(2 * inputs, inputs, device="cuda")
        H = x.T @ x / len(x)
        W = torch.randn(outputs, inputs, device="cuda") * 0.02
        for search in ("minmax", "hessian"):
            config = QuantConfig(bits=4, group_size=GROUP_SIZE, scale_search=search)
            torch.cuda.synchronize()
            started = perf_counter()
            solve_layer(W, Hessian(H), config)
            torch.cuda.synchronize()
            shape = {"inputs": inputs, "outputs": outputs, "search": search}
            yield {**shape, "seconds": perf_counter() - started}


def result_path() -> Path:
    name = torch.cuda.get_device_properties(0).name.lower()
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


def measure(console: Console, wanted: list[str]) -> bool:
    """Print and write each part that is wanted; whether none failed."""
    about = facts() | {"group_size": GROUP_SIZE, "limits": limits()}
    rates = about["limits"]
    console.print(f"{about['gpu']}: copy {rates['copy'] / 1e9:.0f} GB/s, ", end="")
    console.print(f"cuBLAS float16 {rates['matrix'] / 1e12:.0f} TFLOP/s")
    good = True
    for name in wanted:
        rows: list[Row] = []
        before = read(result_path())
        run: Run = {"about": about, "finished": False, "rows": rows}
        try:
            for row in PARTS[name]():
                rows.append(row)
                # Written at once, so that results survive a failure or an interruption.
                write(result_path(), add(before, name, run))
                console.print(f"{name}: {len(rows)} measured")
            run["finished"] = True
        # The other parts are measured even if one fails.
        except Exception:
            console.print(f"FAILED: {name}\n{traceback.format_exc()}", markup=False)
            good = False
        if rows:
            write(result_path(), add(before, name, run))
            console.print(table(name, rows, rates))
        if name == "decode" and len(rows) == sum(map(len, WIDTHS.values())):
            console.print(table("released", released(rows), rates))
    return good


# A quarter of the 64 steps of `--quality tune`: each takes as long.
PARTS: dict[str, Callable[[], Iterable[Row]]] = {
    "kernels": lambda: chain.from_iterable(map(kernels, CASES)),
    "decode": decode,
    "blocks": lambda: (quantization(setting, 4, host) for setting, host in BLOCKS),
    "solving": solving,
    "quantization": lambda: (
        quantization(setting, 32, host) for setting in ("fast", "default") for host in (False, True)
    ),
    "tuning": lambda: [quantization("fast", 32, steps=16)],
}


@torch.no_grad()
def add_peers(console: Console, names: list[str]) -> None:
    """Measure other packages, and write each time as soon as it is known."""
    about = facts(DISTRIBUTIONS[name] for name in names) | {"group_size": GROUP_SIZE}
    rows: list[Row] = []
    before = read(result_path())
    run: Run = {"about": about, "finished": False, "rows": rows}
    for row in peers(names, CASES, COLD_BYTES, time_graph):
        rows.append(row)
        run["finished"] = len(rows) == len(names) * sum(len(case.rows) for case in CASES)
        write(result_path(), add(before, "peers", run, lambda row: row["peer"] in names))
    if rows:
        console.print(table("peers", rows, {}))


def table(name: str, rows: list[dict[str, Any]], rates: dict[str, float]) -> Table:
    """One line a row; kernels' times in microseconds, with their share of the limits."""
    made = Table(title=name)
    if name != "kernels":
        for key in rows[0]:
            made.add_column(key)
        for row in rows:
            made.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        return made
    for key in (
        "bits",
        "shape",
        "rows",
        *(f"{way} us" for way in WAYS),
        "chosen",
        "copy rate",
        "matrix rate",
    ):
        made.add_column(key)
    for row in rows:
        times = [f"{1e6 * row[way]:.1f}" if way in row else "" for way in WAYS]
        best = min(row[way] for way in (*OURS, row["chosen"]) if way in row)
        shares = (row["bytes"] / best / rates["copy"], row["flop"] / best / rates["matrix"])
        chosen = f"{row['chosen']} {1e6 * row[row['chosen']]:.1f} us"
        shape = f"{row['inputs']} x {row['outputs']}"
        shown = (str(row["bits"]), shape, str(row["rows"]), *times, chosen)
        made.add_row(*shown, *(f"{s:.0%}" for s in shares))
    return made


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("error: torch finds no GPU here; run this where there is one", file=sys.stderr)
        return 2
    if "cuda" not in operator.engines():
        print("error: no CUDA kernels; run benchmarks/gpu.sh, which builds them", file=sys.stderr)
        return 2
    if arguments[:1] == ["check"]:
        return gpu_check.main(arguments[1:])
    console = Console(width=160)
    if arguments[:1] == ["tune"]:
        return gpu_tune.main(arguments[1:])
    if arguments[:1] == ["peers"] and set(arguments[1:]) <= set(PEERS):
        add_peers(console, arguments[1:] or list(PEERS))
        return 0
    if arguments[:1] == ["measure"] and set(arguments[1:]) <= set(PARTS):
        good = measure(console, arguments[1:] or list(PARTS))
        console.print(f"written to {result_path()}")
        return 0 if good else 1
    print(
        f"error: say check, tune, peers, or measure with some of {', '.join(PARTS)}: "
        "python -m benchmarks.gpu measure kernels",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
