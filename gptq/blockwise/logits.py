"""From the last block's output to the next token's logits, by transformers' own forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from gptq.blockwise.model import BlockwiseModel, free


@contextmanager
def output_layers(model: BlockwiseModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """While open, the last norm and the head are loaded.

    Gives a function of the last block's output (batch, seq, hidden) to logits float32 (batch, seq,
    vocabulary). The model's forward is transformers' own, which does what an architecture does to
    its logits: scaling, capping. Only its base is left out.
    """
    norm, head = (model.load(name) for name in (model.spec.norm, model.spec.head))
    base = model.module.get_submodule(model.spec.base)

    def forward(*_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=norm(inputs_embeds))

    def logits(hidden: Tensor) -> Tensor:
        return model.module(inputs_embeds=hidden).logits.float()

    # An attribute of the instance comes before the method of its class.
    base.forward = forward
    try:
        yield logits
    finally:
        del base.forward
        for part in (norm, head):
            free(part)


@contextmanager
def head_of_tokens(head: nn.Module, tokens: Tensor) -> Iterator[None]:
    """While open, a model's logits are those of `tokens` alone, in their place and float32.

    head: a linear layer to the vocabulary, in use by `output_layers`.
    tokens: int64 (batch, seq, count), those of each position.
    """
    weight = head.get_parameter("weight")[tokens].float()
    bias = None if getattr(head, "bias", None) is None else head.get_parameter("bias")[tokens]

    def forward(states: Tensor) -> Tensor:
        logits = (weight @ states.float()[..., None]).squeeze(-1)
        return logits if bias is None else logits + bias

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
