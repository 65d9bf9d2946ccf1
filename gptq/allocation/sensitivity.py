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
from itertools import accumulate

import torch
from torch import Tensor, nn

from gptq.allocation.ends import embed_rounded, ends_losses
from gptq.allocation.losses import (
    LOGIT_TOKENS,
    SAMPLES,
    relative_errors,
    sample_tokens,
    sampled_divergence,
)
from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.activations import Activations, batches, embed, run_block
from gptq.blockwise.logits import head_of_tokens, output_layers
from gptq.blockwise.model import Block, BlockwiseModel, free
from gptq.blockwise.steps import advance, advance_past, finish
from gptq.config import QuantConfig, Width, with_width
from gptq.pipeline.blocks import HELD_OUT
from gptq.pipeline.team import ALONE, Team
from gptq.solver.compensation import compensate
from gptq.solver.damping import choose_damping
from gptq.solver.hessian import Hessian, accumulate_hessian
from gptq.solver.layer import solve_layer

# Tokens on which the divergence is measured, at most, and as a share of the calibration tokens.
PROBE_TOKENS, PROBE_SHARE = 2048, 1 / 16
# Calibration tokens that the Hessians of this measurement are made of, at most.
HESSIAN_TOKENS = 2**15
# Forwards of those tokens through a block that take as long as all that is done for its groups.
PASSES = 8


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
    progress: called with (percent done, 100) after each block, and after the ends.
    One block's weights are in memory at a time, and for every group of the blocks so far the hidden
    states of PROBE_TOKENS tokens.
    """
    calibration, probed = _split(windows)
    activations = embed(model, batches(calibration, model.device), cache)
    tokens = batches(probed, model.device)
    probe = embed(model, tokens, activations.hidden.empty_like("probe"))
    changed = Activations(probe.hidden.empty_like("changed"), probe.arguments)
    packed = embed_rounded(model, tokens, probe, config, ends[:1])
    percents = _percents(model, calibration, probed, bool(ends))
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
                errors.append(relative_errors(weight, hessian.H, config, widths, reference))
                quantized = _solve(weight, hessian, config, reference)
                other = _with_group(block, number, quantized, activations, config)
                _branch_off(probe, changed, other)
            names.append(tuple(f"{block.name}.{name}" for name in group.layers))
        finish(activations, block)
        for stream in (probe, *packed):
            stream.through(block)
        free(block.module)
        if progress is not None:
            progress(percents[index], 100)
    both = zip(_divergences(model, probe, changed), errors, strict=True)
    found = _gathered(names, [[loss * error for error in own] for loss, own in both], widths, team)
    for stream in packed:
        last = ends_losses(model, activations, (probe, stream), config, ends, team)
        found.append(Sensitivity((model.spec.embed[0],), last))
        if progress is not None:
            progress(100, 100)
    return found


def _gathered(
    names: Sequence[tuple[str, ...]],
    own: Sequence[Sequence[float]],
    widths: Sequence[Width],
    team: Team,
) -> list[Sensitivity]:
    """The sensitivity of every group, from the losses by width of those that this process has."""
    shares = team.everyones(own)
    found = []
    for place, layers in enumerate(names):
        losses = shares[place % team.size][place // team.size]
        found.append(Sensitivity(layers, dict(zip(widths, losses, strict=True))))
    return found


def probe_bytes(model: BlockwiseModel, ends: bool = False) -> int:
    """Bytes that `measure` holds at its end: hidden states, and two more heads if it measures the
    ends."""
    hidden, heads = model.source.config.hidden_size, 0
    if ends:
        heads = 2 * model.source.config.vocab_size * hidden
    streams = 1 + ends + len(model.spec.groups) * model.block_count
    return (streams * PROBE_TOKENS * hidden + heads) * model.dtype.itemsize


def _percents(model: BlockwiseModel, calibration: Tensor, probed: Tensor, ends: bool) -> list[int]:
    """The part of the work that is done after each block, in percent. ends: whether more follows.

    Each block has more changed streams than the one before it.
    """
    streams = len(model.spec.groups) * probed.numel()
    work = [PASSES * calibration.numel() + index * streams for index in range(model.block_count)]
    done = list(accumulate(work))
    return [100 * it // (done[-1] + ends * work[0]) for it in done]


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


def _divergences(model: BlockwiseModel, probe: Activations, changed: Activations) -> list[float]:
    """KL divergence in nats a token of each changed stream from the full model's, by the last
    block's outputs."""
    count = len(probe.hidden)
    totals = torch.zeros(len(changed.hidden) // count, dtype=torch.float64)
    tokens = 0
    with output_layers(model) as logits:
        head = model.module.get_submodule(model.spec.head)
        for index, (hidden,) in enumerate(probe.hidden):
            tokens += hidden.shape[0] * hidden.shape[1]
            for start in range(0, hidden.shape[1], LOGIT_TOKENS):
                part = slice(start, start + LOGIT_TOKENS)
                next_tokens = sample_tokens(logits(hidden[:, part]).softmax(-1), SAMPLES)
                with head_of_tokens(head, next_tokens):
                    full = logits(hidden[:, part])
                    for stream in range(len(totals)):
                        (other,) = changed.hidden.get(stream * count + index)
                        totals[stream] += sampled_divergence(full, logits(other[:, part]))
    return (totals / tokens).tolist()
