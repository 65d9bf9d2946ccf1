"""Quantize a model block by block: capture, accumulate, solve, pack, propagate."""

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.blockwise import empty_model
from gptq.blockwise.activations import Shelf
from gptq.blockwise.source import ModelSource
from gptq.blockwise.steps import advance, advance_past, finish
from gptq.config import QuantConfig, check_packable
from gptq.errors import UserError
from gptq.files.opening import LazyTensors
from gptq.models import ModelSpec
from gptq.nn import QuantLinear
from gptq.pipeline.journal import Journal
from gptq.pipeline.team import ALONE, Team
from gptq.solver.hessian import Moments, moments
from gptq.solver.layer import choose_damp, feed_back
from gptq.solver.solve import Solution, round_to_nearest, solve
from quant_cuda.reference import dequantize

# Share of the calibration tokens that only choose the damping; they count in the solve as well.
HELD_OUT = 0.25


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer."""

    block: int
    name: str
    loss: float
    """Output error on the calibration inputs, as a share of the output's energy."""
    rtn_loss: float
    """The same for plain rounding on the same grid."""
    kept_rtn: int
    """Rows that keep plain rounding."""
    rows: int
    damp: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """What a quantization did."""

    config: QuantConfig
    layers: tuple[LayerReport, ...]
    written: tuple[Path, ...]
    """Files and folders, in the order they were asked for."""
    seconds: float
    """Wall time of the run."""
    peak_memory: int
    """Bytes; on a CPU resident memory of the process, on a GPU its allocator's."""
    stages: tuple[tuple[str, float], ...] = ()
    """Seconds of what came before and after the layers, by name."""


def quantize_blocks(
    source: ModelSource,
    windows: Tensor | None,
    config: QuantConfig,
    journal: Journal,
    device: torch.device,
    dtype: torch.dtype,
    shelf: Shelf | None = None,
    team: Team = ALONE,
) -> Iterator[LayerReport]:
    """Solve every linear layer of every block and write each finished block to the journal.

    windows: int64 (nsamples, seqlen), the calibration tokens; method "rtn" can do without, and
        its losses are then those of the weights.
    shelf: where activations are put between two uses, by default in memory.
    team: the processes that share the run; each calls this, and only the first writes.
    One block's weights are in memory at a time. Blocks that the journal holds already are only
    run. Yields a report a layer.
    Raises UserError for a layer whose weights or inputs are not finite or cannot be packed.
    """
    spec = source.spec
    model = empty_model.build(source.config, spec, device)
    check_layers(model, spec, config.bits)
    empty_model.check_complete(model, spec, source.tensors)
    batches = [] if windows is None else team.share(empty_model.batches(windows, device))
    stream = empty_model.embed(model, spec, source.tensors, batches, device, dtype, shelf)
    # The full-precision model's activations, beside those of the model quantized so far.
    full = stream.copy("full") if config.feeds_back else None
    run = _Run(spec, config, team, stream, full)
    for index in range(empty_model.block_count(model, spec)):
        block = empty_model.fill(model, spec, spec.block(index), source.tensors, device, dtype)
        if isinstance(source.tensors, LazyTensors):
            source.tensors.expect(f"{spec.block(index + 1)}.")
        weights = digest(block)
        if journal.has(index):
            tensors, record = journal.read(index, weights)
            yield from (LayerReport(**layer) for layer in record)
            _replay(block, index, run, tensors)
        else:
            _check_weights(block, spec.block(index))
            reports: list[LayerReport] = []
            packed: dict[str, Tensor] = {}
            for report in _solve_block(block, index, run, packed):
                reports.append(report)
                yield report
            if team.leads:
                journal.write(index, packed, [asdict(report) for report in reports], weights)
        empty_model.drop(block)


@dataclass(frozen=True)
class _Run:
    """What goes from block to block."""

    spec: ModelSpec
    config: QuantConfig
    team: Team
    stream: empty_model.Stream
    """Of the model quantized so far."""
    full: empty_model.Stream | None
    """Of the full-precision model, where errors are fed back."""


def check_layers(model: PreTrainedModel, spec: ModelSpec, bits: int) -> None:
    """Raise UserError unless every layer that is to be quantized can be packed."""
    for linear in spec.linears:
        layer = empty_model.linear(model, f"{spec.block(0)}.{linear}")
        check_packable(linear, layer.in_features, layer.out_features, bits)


def put_quantized(
    linear: nn.Linear, tensors: Mapping[str, Tensor], name: str, config: QuantConfig
) -> None:
    """Give a dense layer the numbers that its packed tensors stand for."""
    packed = QuantLinear(
        linear.in_features, linear.out_features, config.bits, config.group_size, device="meta"
    )
    weight = linear.weight
    state = {key: tensors[f"{name}.{key}"].to(weight.device) for key in packed.state_dict()}
    packed.load_state_dict(state, assign=True)
    weight.copy_(dequantize(packed.packed(), weight.dtype).T)


def fingerprint(source: ModelSource) -> str:
    """A short hash that tells models apart: configuration, embeddings, the first and last block.

    The journal holds a hash of each of the other blocks, see `digest`.
    """
    found = hashlib.sha256(source.config.to_json_string().encode())
    last = source.config.num_hidden_layers - 1
    parts = (*source.spec.embed, *(source.spec.block(index) for index in {0, last}))
    prefixes = tuple(f"{part}." for part in parts)
    for name in sorted(source.tensors):
        if name.startswith(prefixes):
            found.update(name.encode())
            found.update(source.tensors[name].contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def digest(block: nn.Module) -> str:
    """A short hash of a block's weights: of the sums of their bits, row by row."""
    found = hashlib.sha256()
    for name, weight in block.named_parameters():
        words = weight.detach().view(torch.int32 if weight.itemsize == 4 else torch.int16)
        found.update(name.encode())
        found.update(words.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def identity(source: ModelSource, config: QuantConfig, **others: object) -> dict[str, object]:
    """Everything that decides the result of a run, as the journal remembers it."""
    known = {**config.to_dict(), "model": fingerprint(source), **others}
    return json.loads(json.dumps(known, default=str))


def _replay(block: nn.Module, index: int, run: _Run, tensors: Mapping[str, Tensor]) -> None:
    """Take both streams through a block that was solved before.

    By the same steps as when it was solved: the block's own forward adds a bias inside the product,
    which rounds otherwise, and a resumed run has to give the same bits.
    """
    numbers = range(len(run.spec.groups))
    if run.full is not None:
        for number in numbers:
            for _ in advance_past(run.full, block, run.spec, number):
                pass
    for name in run.spec.linears:
        layer = empty_model.linear(block, name)
        put_quantized(layer, tensors, f"{run.spec.block(index)}.{name}", run.config)
    if not run.config.true_sequential:
        run.stream.through(block)
        return
    for number in numbers:
        for _ in advance(run.stream, block, run.spec, number):
            pass
    finish(run.stream, block, run.spec)


def _solve_block(
    block: nn.Module, index: int, run: _Run, packed: dict[str, Tensor]
) -> Iterator[LayerReport]:
    """Quantize a block's linear layers and take both streams through it.

    packed: filled with the layers' packed tensors, by their names in the model.
    """
    spec, config, stream, full = run.spec, run.config, run.stream, run.full
    # The full model's block shares its weights; a layer that is solved gets a new one in `block`.
    twin = copy.deepcopy(block, {id(weight): weight for weight in block.parameters()})
    ahead = stream if config.true_sequential else stream.copy("ahead")
    held_out = HELD_OUT if config.adapts_damp else 0.0

    def of_group(number: int) -> Moments | None:
        beside = None if full is None else advance_past(full, twin, spec, number)
        here = advance(ahead, block, spec, number)
        seen = moments(here, beside, held_out, config.residual_feedback)
        return run.team.mean(seen, sum(stream.hidden.sizes()))

    # Where layers are not solved in turn, all inputs are those of the unquantized block.
    every = range(len(spec.groups))
    known = None if config.true_sequential else iter([of_group(number) for number in every])
    for number in every:
        started = time.perf_counter()
        seen = of_group(number) if known is None else next(known)
        if known is None and number:
            _forget((block, twin), spec.groups[number - 1])
        for report in _quantize_group(block, index, number, seen, run, packed):
            yield replace(report, seconds=time.perf_counter() - started)
            started = time.perf_counter()
    if config.true_sequential:
        finish(stream, block, spec)
    else:
        stream.through(block)


def _forget(blocks: Iterable[nn.Module], group: Iterable[str]) -> None:
    """Free the weights of layers that both streams have passed."""
    for block in blocks:
        for name in group:
            empty_model.drop(block.get_submodule(name))


def _quantize_group(
    block: nn.Module,
    index: int,
    number: int,
    seen: Moments | None,
    run: _Run,
    packed: dict[str, Tensor],
) -> Iterator[LayerReport]:
    """Solve layers that share their input, rows stacked: one factorization for all of them."""
    group, prefix = run.spec.groups[number], run.spec.block(index)
    layers = [empty_model.linear(block, name) for name in group]
    weight = layers[0].weight if len(layers) == 1 else torch.cat([it.weight for it in layers])
    solution = _solve(f"{prefix}.{group[0]}", weight, seen, run.config, run.team)
    first = 0
    for name, layer in zip(group, layers, strict=True):
        rows = solution.rows(first, first + layer.out_features)
        first += layer.out_features
        state = _put(layer, rows, run.config)
        packed |= {f"{prefix}.{name}.{key}": tensor for key, tensor in state.items()}
        yield _report(index, name, rows)


def _put(layer: nn.Linear, solution: Solution, config: QuantConfig) -> dict[str, Tensor]:
    """Give a layer its quantized weight, a new tensor: what later layers see is the stored words.

    Returns the packed tensors, on the CPU.
    """
    bias = layer.bias if layer.bias is None else layer.bias.to(torch.float16)
    packed = QuantLinear.from_solution(solution, config.bits, config.group_size, bias)
    weight = dequantize(packed.packed(), layer.weight.dtype).T.contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return {key: tensor.cpu().contiguous() for key, tensor in packed.state_dict().items()}


def _solve(
    name: str, weight: Tensor, seen: Moments | None, config: QuantConfig, team: Team
) -> Solution:
    if seen is None:
        return round_to_nearest(weight, None, config)
    H = seen.H
    if not bool(torch.isfinite(H).all()):
        raise UserError(
            f"{name}: its inputs hold NaN or infinity; the model is damaged, or --dtype float32 "
            "is needed"
        )
    if seen.held is not None:
        config = replace(config, percdamp=choose_damp(H, seen.held, config))
        seen.held = None  # as large as H, and not needed again
    return team.by_rows(lambda rows: _solve_rows(weight, rows, seen, config), len(weight))


def _solve_rows(weight: Tensor, rows: slice, seen: Moments, config: QuantConfig) -> Solution:
    """Some rows of a stacked weight; none depends on another."""
    weight = weight[rows]
    if config.feeds_back:
        its = seen if seen.R is None else replace(seen, R=seen.R[rows])
        missing = its.missing(weight)
        if missing is not None:
            weight = feed_back(weight, seen.H, missing, config.error_feedback, config.percdamp)
        del missing
    return solve(weight, seen.H, config)


def _report(block: int, name: str, solution: Solution) -> LayerReport:
    energy = max(float(solution.energy.sum(dtype=torch.float64)), torch.finfo(torch.float64).tiny)
    return LayerReport(
        block=block,
        name=name,
        loss=float(solution.loss.sum(dtype=torch.float64)) / energy,
        rtn_loss=float(solution.rtn_loss.sum(dtype=torch.float64)) / energy,
        kept_rtn=int(solution.kept_rtn.sum()),
        rows=len(solution.loss),
        damp=solution.damp,
        seconds=0.0,
    )


def _check_weights(block: nn.Module, prefix: str) -> None:
    for name, parameter in block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{prefix}.{name}: holds NaN or infinity; the model is damaged, fetch it again"
            )
