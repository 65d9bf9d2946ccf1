"""A block's forward in steps, one before each group of linear layers.

Each group can be solved on what it receives and changed before the forward goes on, so that a
block is run once however many groups it has.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptq.blockwise import empty_model
from gptq.blockwise.activations import Batch
from gptq.models import Branch, ModelSpec
from gptq.solver.hessian import Inputs


@torch.no_grad()
def step(
    block: nn.Module, spec: ModelSpec, number: int, batch: Batch, arguments: Mapping[str, Any]
) -> Batch:
    """Take a batch on to where the group of linear layers `number` reads it.

    batch: what this returned for the group before, or the hidden states (batch, seq, hidden)
        alone, for number 0 and where that group's output is in them. arguments: the block's
        others: masks, rotary or ALiBi terms.
    Returns what the group receives and the hidden states beside it; after the last group, for
    number len(spec.groups), the block's output alone.
    """
    if number % 2:
        x, hidden = batch
        return _before_output(block, spec.branches[number // 2], x, arguments), hidden
    hidden = batch[-1]
    if len(batch) == 2:
        hidden = hidden + _output(block, spec, number - 1)(batch[0])
    if number == len(spec.groups):
        return (hidden,)
    x = block.get_submodule(spec.branches[number // 2].norm)(hidden)
    after_norm = getattr(block, "apply_residual_connection_post_layernorm", False)
    return x, (x if after_norm else hidden)


def advance(
    stream: empty_model.Stream, block: nn.Module, spec: ModelSpec, number: int
) -> Iterator[Inputs]:
    """Take a stream to where group `number` reads it; yields what it receives, a batch at a time.

    After the last group nothing is yielded for there is none to receive it: use `finish`.
    """
    for index, arguments in enumerate(stream.each_arguments()):
        x, hidden = step(block, spec, number, stream.hidden.get(index), arguments)
        stream.hidden.put(index, (x, hidden))
        yield Inputs(x, hidden if number % 2 else None)


def advance_past(
    stream: empty_model.Stream, block: nn.Module, spec: ModelSpec, number: int
) -> Iterator[Inputs]:
    """As `advance`, for a block that nothing changes: past a layer that writes to the hidden
    states, so that what it gives is known too. Take such a stream on with this alone."""
    if number % 2 == 0:
        yield from advance(stream, block, spec, number)
        return
    layer = cast(nn.Linear, _output(block, spec, number))
    for index, arguments in enumerate(stream.each_arguments()):
        x, hidden = step(block, spec, number, stream.hidden.get(index), arguments)
        product, output = _outputs(layer, x, hidden)
        stream.hidden.put(index, (output,))
        yield Inputs(x, hidden, product)


def finish(stream: empty_model.Stream, block: nn.Module, spec: ModelSpec) -> None:
    """Take a stream from the last group to the block's end."""
    for index, arguments in enumerate(stream.each_arguments()):
        batch = step(block, spec, len(spec.groups), stream.hidden.get(index), arguments)
        stream.hidden.put(index, batch)


@torch.no_grad()
def _outputs(layer: nn.Linear, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's product with x, and the hidden states that its output is added to."""
    product = nn.functional.linear(x, layer.weight)
    return product, hidden + (product if layer.bias is None else product + layer.bias)


def _output(block: nn.Module, spec: ModelSpec, number: int) -> nn.Module:
    """The layer of group `number`, an odd one, which writes to the hidden states."""
    return block.get_submodule(spec.branches[number // 2].output)


def _before_output(
    block: nn.Module, branch: Branch, x: Tensor, arguments: Mapping[str, Any]
) -> Tensor:
    """What the branch's output layer receives: the module's result with that layer left out."""
    args = (x, x.new_zeros(())) if branch.adds_residual else (x,)
    with _left_out(block, branch.output):
        module = block.get_submodule(branch.module)
        result = module(*args, **(arguments if branch.takes_arguments else {}))
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def _left_out(block: nn.Module, name: str) -> Iterator[None]:
    layer = block.get_submodule(name)
    empty_model.replace(block, name, nn.Identity())
    try:
        yield
    finally:
        empty_model.replace(block, name, layer)
