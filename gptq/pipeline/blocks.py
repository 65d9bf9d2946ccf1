"""Quantize a model block by block: run it, gather statistics, solve, pack, go on."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.activations import Activations, batches, embed
from gptq.blockwise.model import Block, BlockwiseModel, free
from gptq.blockwise.steps import advance, advance_past, check_steps, finish, finish_past
from gptq.config import QuantConfig, Widths, config_of_layer
from gptq.errors import UserError
from gptq.nn import QuantLinear
from gptq.pipeline.identity import digest
from gptq.pipeline.journal import Journal
from gptq.pipeline.report import LayerReport
from gptq.pipeline.team import ALONE, Team
from gptq.pipeline.widths import check_layers, complete_widths
from gptq.solver.hessian import Hessian, accumulate_hessian
from gptq.solver.layer import solve_layer
from gptq.solver.solution import Solution
from quant_cuda.reference import dequantize

# Share of the calibration tokens that only choose the damping; they count in the solve as well.
HELD_OUT = 0.25


def quantize_blocks(
    model: BlockwiseModel,
    windows: Tensor | None,
    config: QuantConfig,
    journal: Journal,
    cache: ActivationCache | None = None,
    team: Team = ALONE,
    widths: Widths | None = None,
    at_end: Callable[[Activations], None] | None = None,
) -> Iterator[LayerReport]:
    """Solve every linear layer of every block and write each finished block to the journal.

    windows: int64 (nsamples, seqlen), the calibration tokens; method "rtn" can do without, and
        its losses are then those of the weights.
    cache: for activations between two uses, by default in memory.
    journal: read and written by the first process alone.
    team: the processes that share the run; each calls this.
    widths: of layers that do not have the bits and group size of `config`.
    at_end: given the quantized model's activations after the last block.
    One block's weights are in memory at a time. Blocks that the journal holds already are only
    run. Yields a report a layer.
    Raises UserError for a layer whose weights or inputs are not finite or cannot be packed, and
    for a block that the model's spec does not describe.
    """
    widths = complete_widths(model, config, widths)
    check_layers(model, widths)
    model.check_tensors()
    shared = [] if windows is None else team.share(batches(windows, model.device))
    activations = embed(model, shared, cache)
    # The full-precision model's activations, beside those of the model quantized so far.
    full = activations.copy("full") if config.feeds_back else None
    run = _Run(config, widths, team, activations, full)
    for index in range(model.block_count):
        block = model.load_block(index)
        weights = _agreed_digest(block, team)
        if run.is_new_kind(block):
            check_steps(block, activations)
        finished = _finished_block(journal, index, weights, team)
        if finished is not None:
            tensors, record = finished
            yield from (LayerReport(**layer) for layer in record)
            _replay(block, run, tensors)
        else:
            _check_weights(block)
            reports: list[LayerReport] = []
            packed: dict[str, Tensor] = {}
            for report in _solve_block(block, run, packed):
                reports.append(report)
                yield report
            if team.leads:
                journal.write(index, packed, [asdict(report) for report in reports], weights)
        free(block.module)
    if at_end is not None:
        at_end(activations)


def _agreed_digest(block: Block, team: Team) -> str:
    """A hash of a block's weights, which must be the same on all machines."""
    digests = team.everyones(digest(block.module))
    if len(set(digests)) > 1:
        raise UserError(
            f"{block.name}: its weights differ between the processes; give all the same MODEL"
        )
    return digests[0]


def _finished_block(
    journal: Journal, index: int, weights: str, team: Team
) -> tuple[dict[str, Tensor], list[dict]] | None:
    """`Journal.read` by the first process, for all of them; None if it has not the block."""
    tensors: dict[str, Tensor] = {}

    def read() -> list[dict] | None:
        if not journal.has(index):
            return None
        stored, record = journal.read(index, weights)
        tensors.update(stored)
        return record

    record = team.from_leader(read)
    return None if record is None else (team.tensors_from_leader(tensors), record)


@dataclass(frozen=True)
class _Run:
    """What goes from block to block."""

    config: QuantConfig
    widths: Widths
    team: Team
    activations: Activations
    """Of the model quantized so far."""
    full: Activations | None
    """Of the full-precision model, if errors are fed back."""
    _kinds: set[tuple] = field(default_factory=set)

    def config_of(self, block: Block, name: str) -> QuantConfig:
        """The settings of one layer. name: inside the block."""
        return config_of_layer(self.config, self.widths, f"{block.name}.{name}")

    def is_new_kind(self, block: Block) -> bool:
        """Whether no block of this class has been given these arguments before."""
        for _, _, arguments in self.activations.batches(block):
            kind = (type(block.module), *((name, id(it)) for name, it in arguments.items()))
            if kind in self._kinds:
                return False
            self._kinds.add(kind)
            return True
        return False


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


def _replay(block: Block, run: _Run, tensors: Mapping[str, Tensor]) -> None:
    """Take the activations through a block that was solved before.

    By the same steps as when it was solved: the block's own forward adds a bias inside the product,
    which rounds otherwise, and a resumed run has to give the same bits.
    """
    numbers = range(len(block.spec.groups))
    if run.full is not None:
        for number in numbers:
            for _ in advance_past(run.full, block, number):
                pass
        finish_past(run.full, block)
    for name in block.spec.linears:
        config = run.config_of(block, name)
        put_quantized(block.linear(name), tensors, f"{block.name}.{name}", config)
    if not run.config.true_sequential:
        run.activations.through(block)
        return
    for number in numbers:
        for _ in advance(run.activations, block, number):
            pass
    finish(run.activations, block)


def _solve_block(block: Block, run: _Run, packed: dict[str, Tensor]) -> Iterator[LayerReport]:
    """Quantize a block's linear layers and take the activations through.

    packed: filled with the layers' packed tensors, by their names in the model.
    """
    config, activations = run.config, run.activations
    # The full-precision block shares the weights; a layer that is solved gets a new one in `block`.
    shared = {id(weight): weight for weight in block.module.parameters()}
    full_block = replace(block, module=copy.deepcopy(block.module, shared))
    ahead = activations if config.true_sequential else activations.copy("ahead")
    held_out = HELD_OUT if config.adapts_damp else 0.0

    def hessian_of(number: int) -> Hessian | None:
        full = None if run.full is None else advance_past(run.full, full_block, number)
        inputs = advance(ahead, block, number)
        hessian = accumulate_hessian(inputs, full, held_out, config.residual_feedback)
        return run.team.mean(hessian, sum(activations.hidden.sizes()))

    # If layers are not solved in turn, all inputs are those of the unquantized block.
    numbers = range(len(block.spec.groups))
    all_at_once = None if config.true_sequential else iter([hessian_of(it) for it in numbers])
    for number in numbers:
        started = time.perf_counter()
        hessian = hessian_of(number) if all_at_once is None else next(all_at_once)
        if all_at_once is None and number:
            _free_group((block, full_block), number - 1)
        for report in _solve_group(block, number, hessian, run, packed):
            yield replace(report, seconds=time.perf_counter() - started)
            started = time.perf_counter()
    if run.full is not None:
        finish_past(run.full, full_block)
    if config.true_sequential:
        finish(activations, block)
    else:
        activations.through(block)


def _free_group(blocks: Iterable[Block], number: int) -> None:
    """Free the weights of layers that all activations have passed."""
    for block in blocks:
        for name in block.spec.groups[number].layers:
            free(block.linear(name))


def _solve_group(
    block: Block, number: int, hessian: Hessian | None, run: _Run, packed: dict[str, Tensor]
) -> Iterator[LayerReport]:
    """Solve layers that share their input, outputs stacked: one factorization for all of them."""
    names = block.spec.groups[number].layers
    layers = [block.linear(name) for name in names]
    weight = layers[0].weight if len(layers) == 1 else torch.cat([it.weight for it in layers])
    own, config = run.team.outputs(len(weight)), run.config_of(block, names[0])
    if hessian is not None:
        check_inputs(f"{block.name}.{names[0]}", hessian)
    try:
        if hessian is None:
            solution = solve_layer(weight[own], None, config)
        else:
            # Only the solve holds what is taken here, so that it can free a part.
            solution = solve_layer(weight[own], hessian.take_outputs(own), config)
    except ValueError as error:
        raise UserError(f"{block.name}.{names[0]}: {error}") from error
    solution = run.team.join(solution, len(weight))
    first = 0
    for name, layer in zip(names, layers, strict=True):
        part = solution.outputs(first, first + layer.out_features)
        first += layer.out_features
        state = _replace_weight(layer, part)
        packed |= {f"{block.name}.{name}.{key}": tensor for key, tensor in state.items()}
        yield _report(block.index, name, part)


def _replace_weight(layer: nn.Linear, solution: Solution) -> dict[str, Tensor]:
    """Give a layer its dequantized weight, a new tensor: what later layers see is what is stored.

    Returns the packed tensors, on the CPU.
    """
    bias = layer.bias if layer.bias is None else layer.bias.to(torch.float16)
    packed = QuantLinear.from_solution(solution, bias)
    weight = dequantize(packed.packed(), layer.weight.dtype).T.contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return {key: tensor.cpu().contiguous() for key, tensor in packed.state_dict().items()}


def check_inputs(name: str, hessian: Hessian) -> None:
    """Raise UserError if the inputs of a layer `name` were not finite."""
    if not bool(torch.isfinite(hessian.H).all()):
        raise UserError(
            f"{name}: its inputs hold NaN or infinity; the model is damaged, or --dtype float32 "
            "is needed"
        )


def _report(block: int, name: str, solution: Solution) -> LayerReport:
    energy = max(float(solution.energy.sum(dtype=torch.float64)), torch.finfo(torch.float64).tiny)
    return LayerReport(
        block=block,
        name=name,
        bits=solution.bits,
        group_size=solution.group_size,
        loss=float(solution.loss.sum(dtype=torch.float64)) / energy,
        rtn_loss=float(solution.rtn_loss.sum(dtype=torch.float64)) / energy,
        kept_rtn=int(solution.kept_rtn.sum()),
        rows=len(solution.loss),
        damp=solution.damp,
        seconds=0.0,
        dead=solution.dead,
    )


def _check_weights(block: Block) -> None:
    for name, parameter in block.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{block.name}.{name}: holds NaN or infinity; the model is damaged, fetch it again"
            )
