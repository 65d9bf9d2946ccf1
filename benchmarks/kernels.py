"""Products with packed weights, compared with torch's and with reading the weights alone.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --bits 8 --rows 1 --threads 1

Every contender has more than a gigabyte of copies of its weight and uses the next one in each call,
so that no weight is in a cache. Contenders take turns within a row of the table.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import quant_cuda
from quant_cuda import PackedWeight, PreparedWeight
from quant_cuda.cpu import library
from quant_cuda.packing import words_for
from quant_cuda.reference import dequantize

RESULTS = Path(__file__).parent / "results"
ROTATED = 1.1e9  # bytes of weights that each contender goes through
SHAPES = ("4096x4096", "4096x11008", "11008x4096")
ROWS = (1, 2, 4, 8, 16, 32, 64)
GROUP = 128
INT4 = "torch int4"


@dataclass(frozen=True)
class Timing:
    """Seconds of one product, the best and the median of several in turn."""

    best: float
    median: float
    repeats: int


@dataclass(frozen=True)
class Contender:
    name: str
    weight_bytes: int
    call: Callable[[Tensor], object]
    dtype: torch.dtype
    """Of x."""


def random_weight(inputs: int, outputs: int, bits: int) -> PackedWeight:
    def packed(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)

    return PackedWeight(
        qweight=packed(words_for(inputs, bits), outputs),
        qzeros=packed(inputs // GROUP, words_for(outputs, bits)),
        scales=torch.rand(inputs // GROUP, outputs).half() / 2**bits,
        g_idx=None,
        bits=bits,
        group_size=GROUP,
        in_features=inputs,
    )


def turns(copies: Sequence) -> Iterator:
    return itertools.cycle(copies)


def copies_of(tensor: Tensor) -> list[Tensor]:
    return [tensor.clone() for _ in range(max(2, -(-int(ROTATED) // tensor.nbytes)))]


def contenders(weight: PackedWeight) -> list[Contender]:
    """Reading alone, our product in three ways, and torch's."""
    prepared = quant_cuda.prepare(weight)
    assert isinstance(prepared, PreparedWeight)
    data, plan = prepared.tensors
    # One cycle for all that share these copies, so that no contender gets a copy just read.
    ours = turns([dataclasses.replace(prepared, tensors=(it, plan)) for it in copies_of(data)])
    size = data.nbytes
    runners = [
        Contender("reading", size, lambda x: library.read(next(ours).tensors[0]), torch.float32)
    ]
    for name, dtype, int8 in (
        ("ours fp32", torch.float32, False),
        ("ours bf16", torch.bfloat16, False),
        ("ours int8", torch.float32, True),
    ):
        runners.append(Contender(name, size, functools.partial(_ours, ours, int8), dtype))
    for dtype in (torch.bfloat16, torch.float32):
        dense = copies_of(dequantize(weight, dtype).T.contiguous())
        name = "torch bf16" if dtype == torch.bfloat16 else "torch fp32"
        runners.append(dense_contender(name, dense, dtype))
    if weight.bits == 4:
        runners.append(int4_contender(weight))
    return runners


def _ours(weights: Iterator[PreparedWeight], int8: bool, x: Tensor) -> Tensor:
    return quant_cuda.matmul(x, next(weights), int8=int8)


def dense_contender(name: str, copies: list[Tensor], dtype: torch.dtype) -> Contender:
    weights = turns(copies)
    return Contender(
        name, copies[0].nbytes, lambda x: torch.nn.functional.linear(x, next(weights)), dtype
    )


def int4_contender(weight: PackedWeight) -> Contender:
    """torch's weight-only int4 product; its weights are other random integers."""
    shape = weight.out_features, weight.in_features
    q = torch.randint(0, 16, shape, dtype=torch.int32)
    copies = turns(copies_of(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2)))
    scales = torch.rand(weight.in_features // GROUP, weight.out_features, 2).bfloat16()
    return Contender(
        INT4,
        q.numel() // 2 + scales.nbytes,
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(copies), GROUP, scales),
        torch.bfloat16,
    )


@torch.no_grad()
def race(runners: list[Contender], rows: int, inputs: int, seconds: float) -> dict[str, Timing]:
    """Time each in turn for `seconds`, or for five turns if those take longer."""
    xs = {r.name: torch.randn(rows, inputs).to(r.dtype) for r in runners}
    times: dict[str, list[float]] = {r.name: [] for r in runners}
    for runner in runners:
        runner.call(xs[runner.name])
    while any(len(spent) < 5 or sum(spent) < seconds for spent in times.values()):
        for runner in runners:
            spent = times[runner.name]
            if len(spent) >= 5 and sum(spent) >= seconds:
                continue
            started = perf_counter()
            runner.call(xs[runner.name])
            spent.append(perf_counter() - started)
    return {
        name: Timing(min(spent), sorted(spent)[len(spent) // 2], len(spent))
        for name, spent in times.items()
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


def show(results: list[dict], console: Console) -> None:
    names = list(dict.fromkeys(name for row in results for name in row["timings"]))
    table = Table("in x out", "bits", "rows", *(f"{name}, us" for name in names[1:]))
    for head in ("GB/s", "of reading", "x bf16", "x fp32"):
        table.add_column(f"ours {head}")
    for row in results:
        best = {name: timing["best"] for name, timing in row["timings"].items()}
        ours = best["ours fp32"]
        table.add_row(
            *(str(row[key]) for key in ("shape", "bits", "rows")),
            *(f"{best[name] * 1e6:.0f}" if name in best else "" for name in names[1:]),
            f"{row['bytes'] / ours / 1e9:.1f}",
            *(f"{best[name] / ours:.2f}" for name in ("reading", "torch bf16", "torch fp32")),
        )
    console.print(table)


def measure(args: argparse.Namespace) -> list[dict]:
    """Timings by shape, bits and rows."""
    results: list[dict] = []
    for shape, bits in itertools.product(args.shapes, args.bits):
        inputs, outputs = map(int, shape.split("x"))
        runners = contenders(random_weight(inputs, outputs, bits))
        for rows in args.rows:
            timings = race(runners, rows, inputs, args.seconds)
            results.append(
                {
                    "shape": shape,
                    "bits": bits,
                    "rows": rows,
                    "bytes": runners[0].weight_bytes,
                    "timings": {name: dataclasses.asdict(t) for name, t in timings.items()},
                }
            )
        # Before the next weight's copies are made.
        del runners
    return results


def write(path: Path | None, record: dict) -> Path:
    """Write a record, by default to a file named after the processor; returns its path."""
    name = record["processor"].lower()
    slug = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    path = path or RESULTS / f"kernels-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="INxOUT")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contender and row")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kernels-CPU.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=180)
    results = measure(args)
    show(results, console)
    record = {
        "processor": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "backend": quant_cuda.available()[0],
        "load_average": os.getloadavg()[0],
        "command": " ".join(["python -m benchmarks.kernels", *(argv or sys.argv[1:])]),
        "results": results,
    }
    path = write(args.output, record)
    load = f"load {record['load_average']:.1f}"
    console.print(f"{record['processor']}, {args.threads} threads, {load}; written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
