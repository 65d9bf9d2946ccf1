"""Quantize a model block by block: capture, accumulate, solve, pack, propagate."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq import skeleton
from gptq.adapt import choose_damp, feed_back
from gptq.config import QuantConfig, check_packable
from gptq.errors import UserError
from gptq.files import Journal
from gptq.models import ModelSpec
from gptq.moments import Moments, moments
from gptq.qlinear import QuantLinear
from gptq.solver import Solution, round_to_nearest, solve
from gptq.source import ModelSource
from gptq.stages import advance, finish, stages
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
) -> Iterator[LayerReport]:
    """Solve every linear layer of every block and write each finished block to the journal.

    windows: int64 (nsamples, seqlen), the calibration tokens; method "rtn" can do without, and
        its losses are then those of the weights.
    One block's weights are in memory at a time. Blocks that the journal holds already are only
    run. Yields a report a layer.
    Raises UserError for a layer whose weights or inputs are not finite or cannot be packed.
    """
    spec = source.spec
    model = skeleton.build(source.config, spec, device)
    check_layers(model, spec, config.bits)
    stream = skeleton.Stream([], {})
    if windows is not None:
        stream = skeleton.embed(model, spec, source.tensors, windows, device, dtype)
    # The full-precision model's activations, beside those of the model quantized so far.
    full = skeleton.Stream(list(stream.hidden), stream.arguments)
    for index in range(skeleton.block_count(model, spec)):
        name = spec.block(index)
        block = skeleton.fill(model, spec, name, source.tensors, device, dtype)
        twin = copy.deepcopy(block) if config.feeds_back else None
        if journal.has(index):
            tensors, record = journal.read(index)
            for linear in spec.linears:
                put_quantized(skeleton.linear(block, linear), tensors, f"{name}.{linear}", config)
            yield from (LayerReport(**layer) for layer in record)
            stream.through(block)
            if twin is not None:
                full.through(twin)
        else:
            _check_weights(block, name)
            reports: list[LayerReport] = []
            solutions: dict[str, Solution] = {}
            for report in _solve_block(block, twin, index, spec, stream, full, config, solutions):
                reports.append(report)
                yield report
            tensors = {
                f"{name}.{linear}.{key}": tensor.cpu().contiguous()
                for linear, solution in solutions.items()
                for key, tensor in _pack(skeleton.linear(block, linear), solution, config)
                .state_dict()
                .items()
            }
            journal.write(index, tensors, [asdict(report) for report in reports])
        skeleton.drop(block)


def check_layers(model: PreTrainedModel, spec: ModelSpec, bits: int) -> None:
    """Raise UserError unless every layer that is to be quantized can be packed."""
    for linear in spec.linears:
        layer = skeleton.linear(model, f"{spec.block(0)}.{linear}")
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
    """A short hash that tells models apart: the configuration and the first and last block."""
    digest = hashlib.sha256(source.config.to_json_string().encode())
    last = source.config.num_hidden_layers - 1
    prefixes = tuple(source.spec.block(index) + "." for index in {0, last})
    for name in sorted(source.tensors):
        if name.startswith(prefixes):
            digest.update(name.encode())
            digest.update(source.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(source: ModelSource, config: QuantConfig, **others: object) -> dict[str, object]:
    """Everything that decides the result of a run, as the journal remembers it."""
    known = {**config.to_dict(), "model": fingerprint(source), **others}
    return json.loads(json.dumps(known, default=str))


def _solve_block(
    block: nn.Module,
    twin: nn.Module | None,
    index: int,
    spec: ModelSpec,
    stream: skeleton.Stream,
    full: skeleton.Stream,
    config: QuantConfig,
    solutions: dict[str, Solution],
) -> Iterator[LayerReport]:
    """Quantize a block's linear layers in place and take both streams through it.

    twin: the block as it was, for the full-precision stream; None where nothing is fed back.
    solutions: filled with the layers' solutions, by their names in the block.
    """
    runs = [stages(block, spec, *item) for item in stream]
    beside = [] if twin is None else [stages(twin, spec, *item) for item in full]

    held_out = HELD_OUT if config.adapts_damp else 0.0

    def of_next_group() -> Moments | None:
        return moments(advance(runs), advance(beside) if beside else None, held_out)

    prefix = spec.block(index)
    # Where layers are not solved in turn, all inputs are those of the unquantized block.
    known = None if config.true_sequential else iter([of_next_group() for _ in spec.groups])
    for group in spec.groups:
        its = known.__next__ if known else of_next_group
        yield from _quantize_group(block, prefix, index, group, its, config, solutions)
    if beside:
        full.hidden = finish(beside)
    if config.true_sequential:
        stream.hidden = finish(runs)
    else:
        stream.through(block)


def _quantize_group(
    block: nn.Module,
    prefix: str,
    index: int,
    group: tuple[str, ...],
    of_inputs: Callable[[], Moments | None],
    config: QuantConfig,
    solutions: dict[str, Solution],
) -> Iterator[LayerReport]:
    """Solve layers that share their input, rows stacked: one factorization for all of them."""
    started = time.perf_counter()
    layers = [skeleton.linear(block, name) for name in group]
    weight = torch.cat([layer.weight for layer in layers])
    solution = _solve(f"{prefix}.{group[0]}", weight, of_inputs(), config)
    first = 0
    for name, layer in zip(group, layers, strict=True):
        solutions[name] = solution.rows(first, first + layer.out_features)
        first += layer.out_features
        _put(layer, solutions[name], config)
        yield _report(index, name, solutions[name], time.perf_counter() - started)
        started = time.perf_counter()


def _put(layer: nn.Linear, solution: Solution, config: QuantConfig) -> None:
    """Give a layer its quantized weight: what later layers see is the stored words."""
    layer.weight.copy_(dequantize(_pack(layer, solution, config).packed(), layer.weight.dtype).T)


def _solve(name: str, weight: Tensor, seen: Moments | None, config: QuantConfig) -> Solution:
    if seen is None:
        return round_to_nearest(weight, None, config)
    H = seen.H
    if not bool(torch.isfinite(H).all()):
        raise UserError(
            f"{name}: its inputs hold NaN or infinity; the model is damaged, or --dtype float32 "
            "is needed"
        )
    if seen.held is not None:
        percdamp = choose_damp(H - seen.held, seen.held, config)
        config = replace(config, percdamp=percdamp)
    if seen.C is not None and config.error_feedback > 0:
        missing = weight.float() @ seen.C
        if seen.R is not None and config.residual_feedback:
            missing += seen.R
        weight = feed_back(weight, H, missing, config.error_feedback, config.percdamp)
    return solve(weight, H, config)


def _pack(layer: nn.Linear, solution: Solution, config: QuantConfig) -> QuantLinear:
    bias = layer.bias if layer.bias is None else layer.bias.to(torch.float16)
    return QuantLinear.from_solution(solution, config.bits, config.group_size, bias)


def _report(block: int, name: str, solution: Solution, seconds: float) -> LayerReport:
    energy = max(float(solution.energy.sum(dtype=torch.float64)), torch.finfo(torch.float64).tiny)
    return LayerReport(
        block=block,
        name=name,
        loss=float(solution.loss.sum(dtype=torch.float64)) / energy,
        rtn_loss=float(solution.rtn_loss.sum(dtype=torch.float64)) / energy,
        kept_rtn=int(solution.kept_rtn.sum()),
        rows=len(solution.loss),
        damp=solution.damp,
        seconds=seconds,
    )


def _check_weights(block: nn.Module, prefix: str) -> None:
    for name, parameter in block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{prefix}.{name}: holds NaN or infinity; the model is damaged, fetch it again"
            )
