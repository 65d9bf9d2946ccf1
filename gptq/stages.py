"""One forward of a block that stops before each group of linear layers.

Each group can be solved on what it receives and changed before the forward goes on, so that a
block is run once however many groups it has.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq import skeleton
from gptq.models import Branch, ModelSpec


@dataclass(frozen=True)
class Inputs:
    """What a group of linear layers is about to receive."""

    x: Tensor
    """(batch, seq, in)."""
    residual: Tensor | None
    """(batch, seq, out): the hidden states that the group's output is added to, where it is."""


Stages = Generator[Inputs, None, Tensor]


def stages(
    block: nn.Module, spec: ModelSpec, hidden: Tensor, arguments: Mapping[str, Any]
) -> Stages:
    """Run `block` on hidden states (batch, seq, hidden), a group of linear layers at a time.

    arguments: the block's others: masks, rotary or ALiBi terms.
    Yields what each of `spec.groups` receives, and returns the block's output.
    Between stages it holds the hidden states and what it has yielded, nothing else.
    """
    after_norm = getattr(block, "apply_residual_connection_post_layernorm", False)
    for branch in spec.branches:
        x = _no_grad(block.get_submodule(branch.norm), hidden)
        if after_norm:
            hidden = x
        yield Inputs(x, None)
        x = _before_output(block, branch, x, arguments)
        yield Inputs(x, hidden)
        hidden = hidden + _no_grad(block.get_submodule(branch.output), x)
    return hidden


def advance(runs: Iterable[Stages]) -> Iterator[Inputs]:
    """What the next group receives in each run, one at a time."""
    return (next(run) for run in runs)


def finish(runs: Iterable[Stages]) -> list[Tensor]:
    """Outputs of runs that have no group left."""
    return [_finish(run) for run in runs]


def _finish(run: Stages) -> Tensor:
    while True:
        try:
            next(run)
        except StopIteration as stop:
            return stop.value


def _before_output(
    block: nn.Module, branch: Branch, x: Tensor, arguments: Mapping[str, Any]
) -> Tensor:
    """What the branch's output layer receives: the module's result with that layer left out."""
    args = (x, x.new_zeros(())) if branch.adds_residual else (x,)
    with _left_out(block, branch.output):
        module = block.get_submodule(branch.module)
        result = _no_grad(module, *args, **(arguments if branch.takes_arguments else {}))
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
def _no_grad(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Not around the generator: between stages its caller's own setting must hold.
    return module(*args, **kwargs)


@contextmanager
def _left_out(block: nn.Module, name: str) -> Iterator[None]:
    layer = block.get_submodule(name)
    skeleton.replace(block, name, nn.Identity())
    try:
        yield
    finally:
        skeleton.replace(block, name, layer)
