"""The output head, quantized for what its inputs are, as any other linear layer.

Its error is the larger part of what a packed embedding and head cost, and is the part that a solve
can lower. Errors of the hidden states are not fed back: a head that is the embedding as well would
carry what makes up for them into every token's embedding.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from gptq.blockwise.activations import Activations
from gptq.blockwise.model import BlockwiseModel, free
from gptq.config import EMBEDDING_GROUPS, QuantConfig
from gptq.pipeline.blocks import HELD_OUT, check_inputs
from gptq.pipeline.team import ALONE, Team
from gptq.solver.damping import choose_damping
from gptq.solver.hessian import Hessian, Inputs, accumulate_hessian
from gptq.solver.layer import solve_layer
from gptq.solver.solution import Solution


def head_hessian(
    model: BlockwiseModel, activations: Activations, config: QuantConfig, team: Team = ALONE
) -> Hessian | None:
    """Statistics of the head's inputs over the tokens of all processes; None of no tokens.

    activations: after the last block. A training of the model after that hardly changes which
    directions its hidden states have. Raises UserError if they are not finite.
    """
    norm = model.load(model.spec.norm)
    inputs = (Inputs(norm(hidden), None) for (hidden,) in activations.hidden)
    own = accumulate_hessian(inputs, None, HELD_OUT if config.adapts_damp else 0.0)
    free(norm)
    hessian = team.mean(own, sum(activations.hidden.sizes()))
    if hessian is not None:
        check_inputs(model.spec.head, hessian)
    return hessian


def head_solver(hessian: Hessian, config: QuantConfig, bits: int) -> Callable[[Tensor], Solution]:
    """A function that quantizes rows of the head, floating (n, in), by the settings of a run.

    hessian: from `head_hessian`. Groups are runs of EMBEDDING_GROUPS inputs in their own order.
    """
    order = "gar" if config.order == "act" else config.order
    size = EMBEDDING_GROUPS[bits]
    own = replace(config, bits=bits, group_size=size, order=order, error_feedback=0.0)
    if own.adapts_damp and hessian.held_out is not None:
        damp = choose_damping(hessian.H, hessian.held_out, own)
        own = replace(own, percdamp=damp, adaptive_damp=False)

    def solve(rows: Tensor) -> Solution:
        return solve_layer(rows.to(hessian.H.device), Hessian(hessian.H), own)

    return solve
