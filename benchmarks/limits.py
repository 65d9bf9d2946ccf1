"""The least time that quantizing a model takes: its operations at this machine's measured rate.

    python -m benchmarks.limits MODEL [--plain] [--nsamples N] [--seqlen N] [--threads N]

MODEL is a folder, a .gguf file, or a shape of benchmarks/shapes.py such as llama-7b. Operations are
those of the method (a multiplication and an addition are two), symmetric and triangular matrices
counted by the part that is needed; the rate is that of a large float32 matrix product.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from benchmarks.shapes import SHAPES
from gptq import QuantConfig
from gptq.blockwise import empty_model
from gptq.blockwise.source import open_model
from gptq.errors import UserError
from gptq.models import SPECS
from gptq.solver.damping import DAMP_FACTORS
from gptq.solver.grid import search_factors

PLAIN: dict[str, Any] = {
    "order": "natural",
    "scale_search": "minmax",
    "adaptive_damp": False,
    "error_feedback": 0.0,
    "refine": 0,
}


@dataclass(frozen=True)
class Group:
    """Linear layers that share their input, rows stacked."""

    inputs: int
    outputs: int
    writes: bool
    """Whether they write to the hidden states."""


@dataclass(frozen=True)
class Rates:
    """What one machine does, with as many threads as torch has."""

    operations: float
    """A second, in a large float32 matrix product."""
    bandwidth: float
    """Bytes a second read from memory."""


def groups_of(config: PretrainedConfig) -> list[Group]:
    """The groups of one block."""
    spec = SPECS[config.model_type]
    block = empty_model.build(config, spec, torch.device("cpu")).get_submodule(spec.block(0))
    written = {branch.output for branch in spec.branches}
    groups = []
    for group in (group.layers for group in spec.groups):
        layers = [empty_model.linear(block, name) for name in group]
        outputs = sum(layer.out_features for layer in layers)
        groups.append(Group(layers[0].in_features, outputs, group[0] in written))
    return groups


def operations(
    config: PretrainedConfig, quantization: QuantConfig, nsamples: int, seqlen: int
) -> dict[str, float]:
    """Floating-point operations by stage, all blocks together."""
    tokens = nsamples * seqlen
    streams = 2 if quantization.feeds_back else 1
    groups = groups_of(config)
    # Scores and their sums, each token with half of its window on average.
    attention = 2 * tokens * seqlen * config.hidden_size
    sums: dict[str, float] = {"forward": streams * attention}
    for group in groups:
        for stage, count in _of_group(group, quantization, tokens):
            sums[stage] = sums.get(stage, 0) + count
    return {stage: count * config.num_hidden_layers for stage, count in sums.items()}


def _of_group(group: Group, quantization: QuantConfig, tokens: int) -> Iterator[tuple[str, float]]:
    n, m = group.inputs, group.outputs
    factorization = 2 * n**3 / 3  # Cholesky, and the inverse of a triangle
    yield "forward", 2 * tokens * n * m * (2 if quantization.feeds_back else 1)
    yield "moments", tokens * n**2
    yield "factorization", factorization
    yield "sweep", m * n**2
    yield "losses", 3 * m * n**2
    if quantization.scale_search == "hessian":
        candidates = len(search_factors(quantization.sym)) + (0 if quantization.sym else 2)
        size = n if quantization.group_size == -1 else min(n, quantization.group_size)
        yield "sweep", candidates * m * n * size
    if quantization.refine:
        # In each round the errors' gradient, group by group.
        yield "refinement", 2 * quantization.refine * m * n**2
    if quantization.adapts_damp:
        yield "damping", len(DAMP_FACTORS) * n**3 / 3
    if quantization.feeds_back:
        yield "moments", 2 * tokens * n * (m if group.writes else n)
        # A product with C or H, and two with a triangle.
        yield "feedback", 4 * m * n**2
        yield "factorization", factorization


def measured_rates(size: int = 2048, repeats: int = 5) -> Rates:
    """The best of some repeats, in processor time if one thread computes."""
    clock = thread_time if torch.get_num_threads() == 1 else perf_counter
    left, right = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    large = torch.ones(64 * 2**20)
    product = _best(lambda: torch.mm(left, right, out=out), clock, repeats)
    reading = _best(large.sum, clock, repeats)
    return Rates(2 * size**3 / product, large.nbytes / reading)


def _best(work: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        started = clock()
        work()
        times.append(clock() - started)
    return min(times[1:])


def configuration(model: str) -> PretrainedConfig:
    """Of a shape's name, a folder or a file. Raises UserError."""
    return SHAPES[model]() if model in SHAPES else open_model(Path(model)).config


def table(counts: dict[str, float], rates: Rates, title: str) -> Table:
    made = Table(title=title)
    made.add_column("stage")
    for heading in ("TFLOP", "least seconds"):
        made.add_column(heading, justify="right")
    for stage, count in counts.items():
        made.add_row(stage, f"{count / 1e12:.3f}", f"{count / rates.operations:.1f}")
    total = sum(counts.values())
    made.add_section()
    made.add_row("all", f"{total / 1e12:.3f}", f"{total / rates.operations:.1f}")
    return made


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits",
        description="The least time that quantizing a model can take on this machine.",
    )
    parser.add_argument("model", help=f"a folder, a .gguf file, or one of {', '.join(SHAPES)}")
    parser.add_argument("--plain", action="store_true", help="GPTQ as published, one stream")
    parser.add_argument("--groupsize", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    quantization = QuantConfig(group_size=args.groupsize, **(PLAIN if args.plain else {}))
    try:
        config = configuration(args.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rates = measured_rates()
    counts = operations(config, quantization, args.nsamples, args.seqlen)
    console = Console()
    console.print(
        f"{rates.operations / 1e9:.0f} GFLOP/s, {rates.bandwidth / 1e9:.1f} GB/s read, "
        f"{args.threads} threads"
    )
    title = f"{args.model}, {args.nsamples} x {args.seqlen} tokens"
    console.print(table(counts, rates, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
