"""What the embedding and the head cost the model, if they are packed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from gptq.allocation.losses import LOGIT_TOKENS, divergence, relative_errors
from gptq.blockwise.activations import Activations, embed
from gptq.blockwise.logits import output_layers
from gptq.blockwise.model import BlockwiseModel
from gptq.config import QuantConfig, Width, with_width
from gptq.pipeline.head import head_hessian, head_solver
from gptq.pipeline.team import ALONE, Team
from gptq.solver.layer import round_to_nearest

# Rows of the head that are solved at a time.
HEAD_ROWS = 4096


def embed_rounded(
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


def ends_losses(
    model: BlockwiseModel,
    activations: Activations,
    streams: tuple[Activations, Activations],
    config: QuantConfig,
    widths: Sequence[Width],
    team: Team = ALONE,
) -> dict[Width, float]:
    """What the embedding and the head cost the model in each width, in nats a token.

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
        errors = relative_errors(weight, hessian.H, config, widths, widths[0])
    own = [total / tokens * error for error in errors]
    # One process decides: the others' sums may differ in their last bits.
    return dict(zip(widths, team.everyones(own)[0], strict=True))
