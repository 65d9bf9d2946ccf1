"""What each width of each group of layers costs the model, measured on calibration tokens.

Errors of different layers' outputs cannot be compared: it depends on the layer what the model makes
of them. So one group of layers at a time is quantized in the otherwise full model, and the KL
divergence of the next token's distribution from the full model's is measured. For small errors it
is quadratic in the error of the group's output, and what different groups cost adds up (HIGGS,
Malinovskii et al. 2024, arXiv 2411.17525, section 3). It is measured for one width of each group;
for the others it is taken to be in proportion to the error of the group's output.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.activations import Activations, batches, embed, run_block
from gptq.blockwise.logits import output_layers
from gptq.blockwise.model import Block, BlockwiseModel, free
from gptq.blockwise.steps import advance, advance_past, finish
from gptq.config import QuantConfig, Width, with_width
from gptq.pipeline.blocks import HELD_OUT
from gptq.pipeline.head import head_hessian, head_solver
from gptq.pipeline.team import ALONE, Team
from gptq.solver.compensation import compensate
from gptq.solver.damping import choose_damping
from gptq.solver.hessian import Hessian, accumulate_hessian
from gptq.solver.layer import round_to_nearest, solve_layer

# Tokens on which the divergence is measured, at most, and as a share of the calibration tokens.
PROBE_TOKENS, PROBE_SHARE = 2048, 1 / 16
# Outputs of a group that are rounded to know the error of a width that is not measured.
ROWS = 128
# Calibration tokens that the Hessians of this measurement are made of, at most.
HESSIAN_TOKENS = 2**15
# Tokens of a window whose logits are in memory at once.
LOGIT_TOKENS = 256
# Rows of the head that are solved at a time.
HEAD_ROWS = 4096


@dataclass(frozen=True)
class Sensitivity:
    """What a group of layers costs the model at each width."""

    layers: tuple[str, ...]
    """Full names. The embedding's stands for the head too."""
    losses: Mapping[Width, float]
    """Nats a token."""


@torch.no_grad()
def measure(
    model: BlockwiseModel,
    windows: Tensor,
    config: QuantConfig,
    widths: Sequence[Width],
    reference: Width,
    *,
    ends: Sequence[Width] = (),
    cache: ActivationCache | None = None,
    team: Team = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """The sensitivity of every group of layers, in the order they run.

    windows: int64 (nsamples, seqlen), the calibration tokens.
    reference: the width whose effect is measured.
    ends: widths of the embedding and the head, which come last; their effect is measured at the
        first of them.
    cache: for activations between two uses, by default in memory.
    team: processes that share the groups out; each calls this with all windows.
    progress: called with (blocks done, blocks in all).
    One block's weights are in memory at a time, and for every group of the blocks so far the hidden
    states of PROBE_TOKENS tokens.
    """
    calibration, probed = _split(windows)
    activations = embed(model, batches(calibration, model.device), cache)
    tokens = batches(probed, model.device)
    probe = embed(model, tokens, activations.hidden.empty_like("probe"))
    changed = Activations(probe.hidden.empty_like("changed"), probe.arguments)
    # What all blocks make of the embedding in the first of `ends`.
    packed = _embed_rounded(model, tokens, probe, config, ends[:1])
    names: list[tuple[str, ...]] = []
    errors: list[list[float]] = []
    for index in range(model.block_count):
        block = model.load_block(index)
        changed.through(block)
        for number, group in enumerate(block.spec.groups):
            hessian = accumulate_hessian(advance(activations, block, number), None, HELD_OUT)
            assert hessian is not None
            if len(names) % team.size == team.rank:
                weight = torch.cat([block.linear(name).weight for name in group.layers])
                errors.append(_relative_errors(weight, hessian.H, config, widths, reference))
                quantized = _solve(weight, hessian, config, reference)
                other = _with_group(block, number, quantized, activations, config)
                _branch_off(probe, changed, other)
            names.append(tuple(f"{block.name}.{name}" for name in group.layers))
        finish(activations, block)
        for stream in (probe, *packed):
            stream.through(block)
        free(block.module)
        if progress is not None:
            progress(index + 1, model.block_count)
    divergences = _divergences(model, probe, changed)
    own = [
        [divergence * error for error in group_errors]
        for divergence, group_errors in zip(divergences, errors, strict=True)
    ]
    shares = team.everyones(own)
    losses = [shares[place % team.size][place // team.size] for place in range(len(names))]
    found = [
        Sensitivity(group, dict(zip(widths, group_losses, strict=True)))
        for group, group_losses in zip(names, losses, strict=True)
    ]
    for stream in packed:
        # One process decides: the others' sums may differ in their last bits.
        first = team.everyones(_ends_losses(model, activations, (probe, stream), config, ends))[0]
        found.append(Sensitivity((model.spec.embed[0],), dict(zip(ends, first, strict=True))))
    return found


def probe_bytes(model: BlockwiseModel, ends: bool = False) -> int:
    """Bytes that `measure` holds at its end: hidden states, and two more heads if it measures the
    ends."""
    hidden, heads = model.source.config.hidden_size, 0
    if ends:
        heads = 2 * model.source.config.vocab_size * hidden
    streams = 1 + ends + len(model.spec.groups) * model.block_count
    return (streams * PROBE_TOKENS * hidden + heads) * model.dtype.itemsize


def _split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows for the Hessians, and windows to measure the divergence on: int64 (n, seqlen) each.

    Corrections fit the tokens that they are made from, so that these would not tell their worth.
    A single window is both.
    """
    length = min(windows.shape[1], PROBE_TOKENS)
    tokens = min(PROBE_TOKENS, int(PROBE_SHARE * windows.numel()))
    count = max(1, tokens // length)
    rest = windows[: len(windows) - count] if len(windows) > 1 else windows
    most = max(1, HESSIAN_TOKENS // windows.shape[1])
    return rest[:most], windows[len(windows) - count :, :length]


def _solve(weight: Tensor, hessian: Hessian, config: QuantConfig, width: Width) -> Tensor:
    """weight (out, in) in one width, dequantized. What changes a solution little is left out."""
    quick = replace(config, error_feedback=0.0, sweeps=1, refine=min(config.refine, 1))
    solution = solve_layer(weight, hessian, with_width(quick, width))
    return solution.dequantize(weight.dtype)


def _relative_errors(
    weight: Tensor, H: Tensor, config: QuantConfig, widths: Sequence[Width], reference: Width
) -> list[float]:
    """The output's mean squared error for each width, as a share of that for the reference.

    The share of its bits, at the reference's group size, times the share of its group size. Of
    plain rounding, for which H need not be factored: the solve lowers the errors of all widths by
    nearly the same factor (within 10% of it for 12 groups of SmolLM2, mostly 3%). Of ROWS of the
    outputs, which tell it for all: they share the inputs and the shape.
    """
    count = min(ROWS, len(weight))
    sample = weight[torch.arange(count, device=weight.device) * len(weight) // count]
    losses: dict[Width, float] = {}

    def share(width: Width) -> float:
        for each in (width, reference):
            if each not in losses:
                solution = round_to_nearest(sample, H, with_width(config, each))
                losses[each] = float(solution.loss.sum())
        return losses[width] / max(losses[reference], torch.finfo(torch.float32).tiny)

    return [
        share(Width(width.bits, reference.group_size))
        * share(Width(reference.bits, width.group_size))
        for width in widths
    ]


def _with_group(
    block: Block, number: int, quantized: Tensor, activations: Activations, config: QuantConfig
) -> Block:
    """The block with one group quantized, and with what the run does about that.

    The output layer of the group's branch is corrected for the error of its input, as
    `solver.layer` does it. Without it the sensitivity of q, k and v would be three times too high:
    most of what they lose is an error of v, which the output layer can take back.
    activations: at the group's input.
    """
    group = block.spec.groups[number]
    shared = {id(weight): weight for weight in block.module.parameters()}
    other = replace(block, module=copy.deepcopy(block.module, shared))
    layers = [other.linear(name) for name in group.layers]
    parts = quantized.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    if group.writes_residual or not (config.feeds_back and config.true_sequential):
        return other
    inputs = advance(activations.copy("ahead"), other, number + 1)
    full = advance_past(activations.copy("behind"), block, number + 1)
    hessian = accumulate_hessian(inputs, full, HELD_OUT, config.residual_feedback)
    assert hessian is not None
    assert hessian.held_out is not None
    output, damp = other.linear(group.branch.output), config.percdamp
    if config.adapts_damp:
        damp = choose_damping(hessian.H, hessian.held_out, config)
    error = hessian.target_error(output.weight)
    corrected = compensate(output.weight, hessian.H, error, config.error_feedback, damp)
    output.weight = nn.Parameter(corrected.to(output.weight.dtype), requires_grad=False)
    return other


def _branch_off(probe: Activations, changed: Activations, block: Block) -> None:
    """Add what the block, as it is now, makes of the probe to the streams that were changed."""
    for _, (hidden,), arguments in probe.batches(block):
        output = run_block(block.module, hidden, arguments)
        changed.hidden.put(len(changed.hidden), (output,))


def _embed_rounded(
    model: BlockwiseModel,
    tokens: Sequence[Tensor],
    probe: Activations,
    config: QuantConfig,
    widths: Sequence[Width],
) -> list[Activations]:
    """For each width the tokens' embeddings in that width."""

    def rounded(rows: Tensor, width: Width) -> Tensor:
        return round_to_nearest(rows, None, with_width(config, width)).dequantize(rows.dtype)

    return [
        embed(model, tokens, probe.hidden.empty_like("ends"), partial(rounded, width=width))
        for width in widths
    ]


def _ends_losses(
    model: BlockwiseModel,
    activations: Activations,
    streams: tuple[Activations, Activations],
    config: QuantConfig,
    widths: Sequence[Width],
) -> list[float]:
    """What the embedding and the head cost the model in each width.

    activations: of the calibration tokens, after the last block.
    streams: the probe's after the last block, of the full embedding and of that in the first width.
    """
    hessian = head_hessian(model, activations, config)
    assert hessian is not None
    quick = replace(config, sweeps=1, refine=min(config.refine, 1))
    solve = head_solver(hessian, quick, widths[0].bits)
    total, tokens = 0.0, 0
    with output_layers(model) as logits:
        head = model.module.get_submodule(model.spec.head)
        weight: Tensor = head.weight  # type: ignore[assignment]
        solved = [solve(rows).dequantize(rows.dtype) for rows in weight.split(HEAD_ROWS)]
        quantized = nn.Parameter(torch.cat(solved), requires_grad=False)
        for (hidden,), (other,) in zip(*(it.hidden for it in streams), strict=True):
            tokens += hidden.shape[0] * hidden.shape[1]
            for start in range(0, hidden.shape[1], LOGIT_TOKENS):
                part = slice(start, start + LOGIT_TOKENS)
                head.weight = weight
                full = logits(hidden[:, part]).float().log_softmax(-1)
                head.weight = quantized
                total += divergence(full, logits(other[:, part]))
        head.weight = weight
        errors = _relative_errors(weight, hessian.H, config, widths, widths[0])
    return [total / tokens * error for error in errors]


def _divergences(model: BlockwiseModel, probe: Activations, changed: Activations) -> list[float]:
    """KL divergence in nats a token of each changed stream from the full model's, by the last
    block's outputs."""
    count = len(probe.hidden)
    totals = torch.zeros(len(changed.hidden) // count, dtype=torch.float64)
    tokens = 0
    with output_layers(model) as logits:
        for index, (hidden,) in enumerate(probe.hidden):
            tokens += hidden.shape[0] * hidden.shape[1]
            for start in range(0, hidden.shape[1], LOGIT_TOKENS):
                part = slice(start, start + LOGIT_TOKENS)
                full = logits(hidden[:, part]).float().log_softmax(-1)
                for stream in range(len(totals)):
                    (other,) = changed.hidden.get(stream * count + index)
                    totals[stream] += divergence(full, logits(other[:, part]))
    return (totals / tokens).tolist()


def divergence(full: Tensor, logits: Tensor) -> float:
    """The sum over tokens of the KL divergence from one distribution to another, in nats.

    full: logarithms of probabilities, float32 (..., vocabulary). logits: of the other distribution,
    floating, of the same shape.
    """
    # ---------------------------------------------------------------------------------------------
    # Why not entropy and cross entropy: their difference is small, and the rounding of both large
    # sums is -2e-4 nats for the logits of a real model, as much as what 4 bits cost a layer. Here
    # each term is at least 0; exp(d) - 1 counts what rounding leaves of the sums of probabilities,
    # so that it does not show in first order.
    # ---------------------------------------------------------------------------------------------
    less = logits.float().log_softmax(-1).sub_(full)
    terms = less.expm1().sub_(less).mul_(full.exp())
    return float(terms.sum(dtype=torch.float64))
