"""A block's forward in steps, one before each group of linear layers.

Each group can be solved on the input that it receives and changed before the forward goes on.
A block is then run once, however many groups it has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gptq.blockwise.activation_cache import Batch
from gptq.blockwise.activations import Activations, Arguments, run_block
from gptq.blockwise.empty_model import replace
from gptq.blockwise.model import Block
from gptq.errors import UserError
from gptq.models import Branch
from gptq.solver.hessian import Inputs

# How far the steps may be from the block's own forward, as a share of a token's hidden state:
# far above rounding, far below the effect of a part that is left out.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


@torch.no_grad()
def step(block: Block, number: int, batch: Batch, arguments: Arguments) -> Batch:
    """Take a batch on to the input of group `number`.

    batch: what this returned for the group before; for the first group, and after
        `advance_past` a group that writes to the hidden states, these alone, (batch, seq, hidden).
    Returns the group's input and the hidden states beside it. For the number after the last
    group it returns the block's output alone.
    """
    groups = block.spec.groups
    group = groups[number] if number < len(groups) else None
    if group is not None and group.writes_residual:
        x, hidden = batch
        return _output_layer_input(block, group.branch, x, arguments), hidden
    hidden = batch[-1]
    if len(batch) == 2:
        hidden = hidden + _branch_output(block, groups[number - 1].branch, batch[0])
    if group is None:
        return (hidden,)
    norm = group.branch.norm
    x = hidden if norm is None else block.module.get_submodule(norm)(hidden)
    # BLOOM can be configured to add a branch to the normed hidden states.
    after_norm = getattr(block.module, "apply_residual_connection_post_layernorm", False)
    return x, (x if after_norm else hidden)


def advance(activations: Activations, block: Block, number: int) -> Iterator[Inputs]:
    """Take activations to the input of group `number`; yields it, a batch at a time.

    No group receives what comes after the last one: use `finish`.
    """
    group = block.spec.groups[number]
    # The error of the hidden states can be made up for only by what is added to them as it is.
    with_residual = group.writes_residual and group.branch.is_plain
    for index, batch, arguments in activations.batches(block):
        x, hidden = step(block, number, batch, arguments)
        activations.hidden.put(index, (x, hidden))
        yield Inputs(x, hidden if with_residual else None)


def advance_past(activations: Activations, block: Block, number: int) -> Iterator[Inputs]:
    """As `advance`, for a block that nothing changes.

    A group whose output is added to the hidden states as it is, is passed, so that its output is
    known too. Take such activations on with this function and `finish_past` alone.
    """
    group = block.spec.groups[number]
    if not (group.writes_residual and group.branch.is_plain):
        yield from advance(activations, block, number)
        return
    layer = block.linear(group.branch.output)
    for index, batch, arguments in activations.batches(block):
        x, hidden = step(block, number, batch, arguments)
        product, output = _outputs(layer, x, hidden)
        activations.hidden.put(index, (output,))
        yield Inputs(x, hidden, product)


def finish(activations: Activations, block: Block) -> None:
    """Take activations from the last group to the block's end."""
    number = len(block.spec.groups)
    for index, batch, arguments in activations.batches(block):
        activations.hidden.put(index, step(block, number, batch, arguments))


def finish_past(activations: Activations, block: Block) -> None:
    """Take activations that `advance_past` took past the last group to the block's end."""
    if not block.spec.groups[-1].branch.is_plain:
        finish(activations, block)


def check_steps(block: Block, activations: Activations) -> None:
    """Raise UserError unless the steps give what the block's own forward gives.

    activations: before the block; the first batch is run both ways. A block with a norm, a scale
    or a branch that its spec does not name would otherwise be quantized on a wrong input.
    """
    for _, (hidden,), arguments in activations.batches(block):
        expected = run_block(block.module, hidden, arguments)
        batch: Batch = (hidden,)
        for number in range(len(block.spec.groups) + 1):
            batch = step(block, number, batch, arguments)
        difference = (batch[0] - expected).float().norm(dim=-1)
        error = float((difference / expected.float().norm(dim=-1).clamp(min=1e-30)).mean())
        # Values that are not finite have an error of their own, which names the layer.
        if error > TOLERANCE.get(hidden.dtype, 0.05):
            raise UserError(
                f"{block.name}: the description of '{block.spec.model_type}' models does not fit "
                f"this block (its own forward differs by {error:.0%}); quantizing it would give a "
                "wrong model"
            )
        return


def _branch_output(block: Block, branch: Branch, x: Tensor) -> Tensor:
    """What a branch adds to the hidden states. x: the input of its output layer."""
    output = block.linear(branch.output)(x)
    if branch.post_norm is not None:
        output = block.module.get_submodule(branch.post_norm)(output)
    return output if branch.scale is None else output * getattr(block.module, branch.scale)


@torch.no_grad()
def _outputs(layer: nn.Linear, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's product with x, and the hidden states that its output is added to."""
    product = nn.functional.linear(x, layer.weight)
    return product, hidden + (product if layer.bias is None else product + layer.bias)


def _output_layer_input(block: Block, branch: Branch, x: Tensor, arguments: Arguments) -> Tensor:
    """The input of the branch's output layer: the module's result with that layer left out."""
    args = (x, x.new_zeros(())) if branch.adds_residual else (x,)
    with _left_out(block.module, branch.output):
        module = block.module.get_submodule(branch.module)
        result = module(*args, **(arguments if branch.takes_arguments else {}))
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def _left_out(block: nn.Module, name: str) -> Iterator[None]:
    """While open, the layer `name` returns its input."""
    layer = block.get_submodule(name)
    replace(block, name, nn.Identity())
    try:
        yield
    finally:
        replace(block, name, layer)
