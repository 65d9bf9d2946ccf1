"""Small calls of every kernel against float64 or torch, also for compute-sanitizer. A part of
benchmarks/gpu.py.

    python -m benchmarks.gpu check [FAMILY...] [--under "compute-sanitizer --tool memcheck"]

They run in a process of their own. One that crashes it, or takes too long, is named and left out,
and the others go on.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BloomConfig, LlamaConfig, PretrainedConfig, Qwen3Config

import quant_cuda
from benchmarks.common.gpu_facts import is_usable
from benchmarks.common.workers import WORKER as UNNAMED
from benchmarks.common.workers import Events, Limits, supervise
from benchmarks.gpu_models import decoded_each_way, random_weight
from gptq.config import QuantConfig
from gptq.models import SPECS
from gptq.solver.refine import torch_refine
from gptq.solver.sweep import cuda_sweep, static_grids, torch_sweep
from quant_cuda import reference
from quant_cuda.columns import GroupedColumns, SweepColumns
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout, operator
from quant_cuda.cuda import solver as cuda_solver
from quant_cuda.cuda.variants import VARIANTS
from quant_cuda.cuda.variants import variants as all_variants

LIMITS = Limits(start=180, step=30)
WORKER = (sys.executable, "-m", "benchmarks.gpu_check")
# compute-sanitizer makes a kernel up to a hundred times slower.
LIMITS_UNDER = Limits(start=300, step=60)
# Lines of a report that become the reason of a failure, and beginnings of those that say nothing.
REPORTED = 4
COMMON = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY")
# The exit code of a worker whose GPU does not answer any more.
DEAD = 3
# How much more error than the loss of float64's solution, and of modules' tokens, is rounding.
SOLVED = 1.02
DECODED = {torch.float16: 0.02, torch.bfloat16: 0.1}


class Check(NamedTuple):
    """One comparison."""

    name: str
    """What is left out after a failure, wherever else it occurs."""
    where: str
    run: Callable[[], None]
    """Raises AssertionError if it is wrong."""


class Truth(NamedTuple):
    """What a product is compared with."""

    y: Tensor
    """float64 (rows, out)."""
    allowed: float
    """The norm of an error that a kernel may make."""


def truth_of(x: Tensor, exact: Tensor) -> Truth:
    """x: of 16 bits (rows, in). exact: the weight, float64 (in, out)."""
    y = x.double() @ exact
    naive = x @ exact.to(x.dtype)
    return Truth(y, 2 * float((naive.double() - y).norm()) + 5e-4 * float(y.norm()))


def compare(run: Callable[[], Tensor], truth: Truth) -> None:
    """Raises AssertionError for a product (rows, out) that is too far from the truth."""
    made = float((run().double() - truth.y).norm())
    # Not "more than": a sum that is not a number may not be used either.
    assert made <= truth.allowed, f"error {made:.3g}, more than {truth.allowed:.3g}"


def products(engine: str) -> Iterator[Check]:
    """Matmuls by the kernel that an engine chooses: tiles and other layouts, few rows and many."""
    for bits in (2, 3, 4, 8):
        weight = random_weight(bits, 640, 80, "cuda")
        exact = reference.dequantize(weight, torch.float64)
        prepared = quant_cuda.prepare(weight, engine)
        for dtype in (torch.float16, torch.bfloat16):
            for rows in (1, 8, 20, 70, 300, 4200):
                x = torch.randn(rows, 640, device="cuda", dtype=dtype)
                run = partial(quant_cuda.matmul, x, prepared, engine)
                where = f"{str(dtype).removeprefix('torch.')}, {rows} rows"
                check = partial(compare, run, truth_of(x, exact))
                yield Check(f"{engine}'s product of {bits} bits", where, check)


def variants() -> Iterator[Check]:
    """Those that a tuned table may choose, and the kernels that are chosen without one."""
    for bits, inputs, outputs in ((4, 1184, 200), (8, 592, 200)):
        weight = random_weight(bits, inputs, outputs, "cuda")
        exact, prepared = reference.dequantize(weight, torch.float64), layout.prepare(weight)
        for rows in (5, 40, 150):
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
            truth = truth_of(x, exact)
            product = cuda.Product(rows, x.dtype, prepared, cuda.current(x).wgmma)
            for kernel in cuda.KERNELS:
                if kernel.takes(product):
                    run = partial(cuda.matmul, x, prepared, kernel=kernel.name)
                    check = partial(compare, run, truth)
                    yield Check(kernel.name, f"{bits} bits, {rows} rows", check)
        yield from _each_variant(bits, prepared, exact)


def _each_variant(bits: int, weight: layout.KernelWeight, exact: Tensor) -> Iterator[Check]:
    """Every variant that runs on this GPU, with two tiles of rows, of which the second is short.

    exact: the weight, float64 (in, out).
    """
    truths: dict[int, tuple[Tensor, Truth]] = {}
    for variant, kernel in zip(all_variants(), VARIANTS.values(), strict=True):
        rows = 2 * variant.rows - 3
        if rows not in truths:
            x = torch.randn(rows, len(exact), device=exact.device, dtype=torch.float16)
            truths[rows] = x, truth_of(x, exact)
        x, truth = truths[rows]
        product = cuda.Product(rows, x.dtype, weight, cuda.current(x).wgmma)
        if cuda.runs(kernel, product):
            run = partial(cuda.matmul, x, weight, kernel=kernel.name)
            check = partial(compare, run, truth)
            yield Check(kernel.name, f"{bits} bits, {rows} rows", check)


class Layer(NamedTuple):
    """A weight to solve, its columns in groups of neighbours; float32 on the device."""

    w: Tensor
    """(in, out)."""
    H: Tensor
    """(in, in)."""
    runs: list[tuple[int, int]]
    labels: Tensor
    """int64 (in,)."""

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """w and H in float64 on the CPU."""
        return self.w.double().cpu(), self.H.double().cpu()

    def loss(self, q: Tensor, scales: Tensor, zeros: Tensor) -> float:
        """tr(E^T H E), E = w - dequantized q, in float64."""
        w, H = self.columns
        scales, zeros = (t.double().cpu()[self.labels.cpu()] for t in (scales, zeros))
        error = w - (q.double().cpu() - zeros) * scales
        return float((error * (H @ error)).sum())


def random_layer(size: int, device: str, inputs: int = 320, outputs: int = 65) -> Layer:
    """size: columns of a group."""
    x = torch.randn(2 * inputs, inputs, device=device)
    x = x @ (torch.eye(inputs, device=device) + torch.randn_like(x[:inputs]) / inputs**0.5)
    runs = [(start, min(start + size, inputs)) for start in range(0, inputs, size)]
    labels = torch.arange(inputs, device=device) // size
    H = x.T @ x / len(x) + 0.01 * torch.eye(inputs, device=device)
    return Layer(torch.randn(inputs, outputs, device=device), H, runs, labels)


def solver(device: str = "cuda") -> Iterator[Check]:
    """sweep_block with grids that it finds and that are given, and refine_group."""
    for bits in (2, 4, 8):
        for search, given in (("minmax", False), ("hessian", False), ("hessian", True)):
            config = QuantConfig(bits=bits, scale_search=search, sym=bits == 8)
            where = f"{bits} bits, {search}, grids {'given' if given else 'found'}"
            yield Check("sweep_block", where, partial(_check_sweep, config, given, device))
        for size in (40, 128):
            where = f"{bits} bits, groups of {size}"
            yield Check("refine_group", where, partial(_check_refine, bits, size, device))


def _check_sweep(config: QuantConfig, given: bool, device: str) -> None:
    layer = random_layer(64, device)
    w, H = layer.columns
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    inputs = len(w)
    blocks = [(start, min(start + 128, inputs)) for start in range(0, inputs, 128)]
    grids = static_grids(w, H, QuantConfig(bits=config.bits, group_size=64)) if given else None
    exact = SweepColumns(
        w=w.clone(),
        H=H,
        U=U,
        labels=layer.labels.cpu(),
        runs=layer.runs,
        blocks=blocks,
        grids=grids,
    )
    narrow = None if grids is None else tuple(t.float().to(device) for t in grids)
    columns = replace(
        exact,
        w=layer.w.clone(),
        H=layer.H,
        U=U.float().to(device),
        labels=layer.labels,
        grids=narrow,  # type: ignore[arg-type]
    )
    made, expected = cuda_sweep(columns, config), torch_sweep(exact, config)
    _compare_solutions(made[0], expected[0], layer.loss(*made), layer.loss(*expected))


def _check_refine(bits: int, size: int, device: str) -> None:
    layer = random_layer(size, device)
    w, H = layer.columns
    config = QuantConfig(bits=bits, group_size=size, scale_search="minmax")
    scales, zeros = static_grids(w, H, config)
    labels = layer.labels.cpu()
    q = torch.round(w / scales[labels] + zeros[labels]).clamp(0, 2**bits - 1)
    groups = list(range(len(layer.runs)))
    exact = GroupedColumns(
        w=w, H=H, q=q, scales=scales, zeros=zeros, runs=layer.runs, labels=groups
    )
    narrow = replace(
        exact,
        **{
            name: getattr(exact, name).float().to(device)
            for name in ("w", "H", "q", "scales", "zeros")
        },
    )
    made = cuda_solver.refine(narrow, bits=bits, rounds=2)
    expected = torch_refine(exact, bits, 2)
    losses = (layer.loss(*it, zeros) for it in (made, expected))
    _compare_solutions(made[0], expected[0], *losses)


def _compare_solutions(q: Tensor, exact: Tensor, loss: float, exact_loss: float) -> None:
    """Integers of float32's solution, (in, out), and of float64's; a tie may fall differently."""
    same = float((q.double().cpu() == exact).all(0).double().mean())
    assert same > 0.6, f"of {same:.0%} of the outputs the integers are those of float64"
    assert loss <= SOLVED * exact_loss, f"loss {loss:.4g}, in float64 {exact_loss:.4g}"


def decoded_models() -> Iterator[tuple[str, PretrainedConfig, int, torch.dtype]]:
    """Small models for every head size, with and without biases and norms of heads."""
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    half = torch.float16
    for dim in (32, 64, 128, 256):
        config = LlamaConfig(hidden_size=256, head_dim=dim, **sizes)
        yield f"llama, heads of {dim}", config, 4 if dim < 128 else 8, half
    sizes |= {"hidden_size": 256, "head_dim": 64}
    biased = LlamaConfig(attention_bias=True, mlp_bias=True, **sizes)
    yield "llama with biases", biased, 4, half
    yield "llama with biases in bfloat16", biased, 4, torch.bfloat16
    qwen3 = Qwen3Config(**sizes)
    yield "qwen3, norms of heads", qwen3, 4, half
    for count in (2, 8):
        bloom = BloomConfig(vocab_size=320, hidden_size=512, n_layer=2, n_head=count)
        yield f"bloom, heads of {512 // count}", bloom, 4, half


def decode() -> Iterator[Check]:
    """Tokens of small models by the decoding kernels against transformers' modules."""
    for name, config, bits, dtype in decoded_models():
        yield Check(name, f"{bits} bits", partial(_check_decode, config, bits, dtype))


def _check_decode(config: PretrainedConfig, bits: int, dtype: torch.dtype) -> None:
    spec = SPECS[config.model_type]
    modules, *others = decoded_each_way(spec, config, bits, tokens=12, dtype=dtype).values()
    for kernels in others:
        error = float((modules - kernels).double().norm() / modules.double().norm())
        assert error < DECODED[dtype], f"tokens are {error:.3g} from those of modules"
    # The same sums in the same order.
    assert all(torch.equal(others[0], it) for it in others), "overlapping kernels differ"


def families() -> dict[str, Callable[[], Iterable[Check]]]:
    """By name, as the command line takes them: each engine's products, and the rest."""
    engines = {name: partial(products, name) for name in operator.engines()}
    return {**engines, "variants": variants, "solver": solver, "decode": decode}


class Reports:
    """What a sanitizer says of the kernels of this process, in the files of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.new()

    def new(self) -> str:
        """The first lines since the last call, without those that every report has."""
        lines: list[str] = []
        for path in sorted(self._folder.iterdir()) if self._folder else ():
            text = path.read_bytes()
            lines += text[self._read.get(path, 0) :].decode(errors="replace").splitlines()
            self._read[path] = len(text)
        said = (line.removeprefix("=========").strip() for line in lines)
        return "; ".join([it for it in said if it and not it.startswith(COMMON)][:REPORTED])


def work(events: Events, checks: Iterable[Check], logs: Path | None = None) -> None:
    """Run the checks that were not run yet. Ends the process if the GPU does not answer.

    logs: a folder where a sanitizer writes; a check fails of which it writes.
    """
    reports = Reports(logs)
    for check in checks:
        item = f"{check.name}, {check.where}"
        if item in events.finished or events.leaves_out(check.name):
            continue
        events.begin(check.name, check.where)
        try:
            check.run()
            torch.cuda.synchronize()
            said = reports.new()
            assert not said, said
        # Whatever a check raises, the others have to run.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            # Of an illegal access the tool says where, and torch only that there was one.
            if said := reports.new():
                reason += f"; {said}"
            usable = is_usable()
            events.fail(check.name, f"{check.where}: {reason}", crashed=not usable)
            if not usable:
                sys.exit(DEAD)
            continue
        events.finish(item)
    events.end()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu check")
    made.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(families()))
    made.add_argument("--under", default="", help="a command that the checks are run by")
    made.add_argument("--logs", type=Path, help="a folder that this command writes reports to")
    made.add_argument("--events", type=Path, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str]) -> int:
    """Run checks in a process of their own; 1 if one failed."""
    asked = parser().parse_args(arguments)
    known = families()
    unknown = set(asked.families) - set(known)
    if unknown:
        parser().error(f"there is no {', '.join(sorted(unknown))}; name some of {', '.join(known)}")
    wanted = asked.families or list(known)
    if asked.events is not None:
        checks = (check for name in wanted for check in known[name]())
        work(Events(asked.events), checks, asked.logs)
        return 0
    reports = Reports(asked.logs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        logs = ["--logs", str(asked.logs)] if asked.logs else []
        worker = [*WORKER, *wanted, *logs, "--events", str(path)]
        limits = LIMITS_UNDER if asked.under else LIMITS
        failed = supervise([*shlex.split(asked.under), *worker], path, limits)
        passed = len(Events(path).finished)
    if UNNAMED in failed:
        # What a tool found out at its end names no check.
        print(f"{asked.under}: {reports.new() or 'no report'}")
    for name, reason in failed.items():
        print(f"FAILED: {name}: {reason}")
    print(f"{passed} checks passed, {len(failed)} failed: {', '.join(wanted)}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
