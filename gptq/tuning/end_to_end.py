"""Training scales and norms of the whole model by its output distribution, a block at a time.

The loss is the Kullback-Leibler divergence of the quantized model's next-token distribution from
the full model's. End-to-end training of scales is EfficientQAT's (Chen et al. 2024, arXiv
2407.11062, section 3.3).
A forward keeps what each block is given; the backward runs block after block once more, from the
last to the first. So one block and its gradients are in memory, however deep the model is.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptq.blockwise.logits import output_layers
from gptq.blockwise.model import Block, BlockwiseModel
from gptq.tuning.parameters import Parameters
from gptq.tuning.streams import Streams, autocast, shuffled
from gptq.tuning.trainable import trainable_block

EPOCHS = 2
RATE = 2.5e-3
"""Of Adam at the beginning, for a divergence of 1 before the training: a share of each scale, or of
the mean size of a norm's weights. It grows with the root of the divergence, as the distance to the
minimum of a quadratic does, and falls with a cosine to 0."""
BETAS = (0.9, 0.95)
CHECK = 8
"""Steps between two looks at the held-out windows."""
PATIENCE = 2
"""Looks in a row, each with a higher loss than the one before it, after which training ends. A loss
above that of the beginning is no reason: the first steps, at the full rate, may raise it."""
LOGIT_TOKENS = 128
"""Tokens whose logits are in memory at once; more take as long for each."""


@dataclass(frozen=True)
class State:
    """How far a training is, at a look at the held-out windows. A run can go on from it."""

    step: int
    steps: int
    loss: float
    """Mean divergence of the held-out windows, nats a token."""
    least: float
    first: float
    """The loss before the training."""
    rises: int
    """Looks in a row, each with a higher loss than the one before it."""
    optimizer: Mapping[str, Tensor] = field(repr=False)
    """As `Parameters.state`."""
    best: Mapping[str, Tensor] = field(repr=False)
    """Scales and norms as a file holds them, from the look with the least loss."""

    @property
    def done(self) -> bool:
        return self.step >= self.steps or self.rises >= PATIENCE


def tune_model(
    model: BlockwiseModel,
    packed: Mapping[str, Tensor],
    streams: Streams,
    state: State | None = None,
) -> Iterator[State]:
    """Train the scales of all layers and the norms, from `state` on if there is one.

    packed: the quantized layers' tensors, by their names in the model; read when asked for.
    Yields the state at every look at the held-out windows, the first before any step.
    """
    parameters = Parameters(model, packed, streams.stored, BETAS)
    with output_layers(model):
        model.module.get_submodule(model.spec.norm).float()
        # Autocast would convert its weight for every product.
        model.module.get_submodule(model.spec.head).to(streams.compute)
        passes = _Passes(model, packed, streams, parameters)
        if state is None:
            loss = passes.held_out_loss()
            steps = EPOCHS * len(streams.training)
            kept = {"optimizer": parameters.state(), "best": parameters.as_stored()}
            state = State(0, steps, loss, least=loss, first=loss, rises=0, **kept)
            yield state
        else:
            parameters.restore(state.optimizer, state.step)
        while not state.done:
            stop = min(state.step + CHECK, state.steps)
            for step in range(state.step, stop):
                epoch, place = divmod(step, len(streams.training))
                passes.gradients(list(shuffled(streams.training, epoch))[place])
                parameters.step(RATE * math.sqrt(state.first) * _cosine(step, state.steps))
            state = _look(state, stop, passes.held_out_loss(), parameters)
            yield state


def _look(before: State, step: int, loss: float, parameters: Parameters) -> State:
    better = loss < before.least
    return State(
        step=step,
        steps=before.steps,
        loss=loss,
        least=min(loss, before.least),
        first=before.first,
        rises=0 if loss <= before.loss else before.rises + 1,
        optimizer=parameters.state(),
        best=parameters.as_stored() if better else before.best,
    )


def _cosine(step: int, steps: int) -> float:
    """The share of the rate at a step of `steps`: from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class _Passes:
    """Forwards and backwards through the quantized model, one block in memory at a time."""

    model: BlockwiseModel
    """Its last norm and head are loaded."""
    packed: Mapping[str, Tensor]
    streams: Streams
    parameters: Parameters

    def gradients(self, number: int) -> None:
        """Take the gradients of the mean divergence of one batch."""
        borders = self.streams.start.empty_like("tuned-borders")
        (hidden,) = self.streams.start.get(number)
        hidden = hidden.float()
        blocks = range(self.model.block_count)
        for index in blocks:
            borders.put(index, (hidden,))
            with torch.no_grad():
                hidden = self._through(index, self.parameters.leaves(self._name(index)), hidden)
        gradient = self._gradient_of_output(hidden, number)
        for index in reversed(blocks):
            hidden = borders.get(index)[0].requires_grad_()
            leaves = self.parameters.leaves(self._name(index))
            self._through(index, leaves, hidden).backward(gradient)
            self.parameters.take_gradients(self._name(index), leaves)
            assert hidden.grad is not None
            gradient = hidden.grad

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean divergence of the model that a file would hold, nats a token."""
        numbers = self.streams.held_out
        states = self.streams.start.empty_like("tuned-held-out")
        for place, number in enumerate(numbers):
            states.put(place, (self.streams.start.get(number)[0].float(),))
        for index in range(self.model.block_count):
            values = self.parameters.rounded(self._name(index))
            module = self._module(index)
            for place, (hidden,) in enumerate(states):
                states.put(place, (self._run(module, index, values, hidden),))
        norm = self.parameters.rounded(self.model.spec.norm)
        total, tokens = 0.0, 0
        for number, (hidden,) in zip(numbers, states, strict=True):
            total += sum(float(part) for part in self._divergences(hidden, number, norm))
            tokens += hidden[..., 0].numel()
        return total / tokens

    def _gradient_of_output(self, hidden: Tensor, number: int) -> Tensor:
        """With respect to the last block's output (batch, seq, hidden); the norm's is taken."""
        hidden, norm = hidden.requires_grad_(), self.parameters.leaves(self.model.spec.norm)
        for part in self._divergences(hidden, number, norm):
            (part / hidden[..., 0].numel()).backward()
        self.parameters.take_gradients(self.model.spec.norm, norm)
        assert hidden.grad is not None
        return hidden.grad

    def _divergences(
        self, hidden: Tensor, number: int, norm: Mapping[str, Tensor]
    ) -> Iterator[Tensor]:
        """The divergence of one batch, summed over LOGIT_TOKENS tokens at a time.

        hidden: the last block's output (batch, seq, hidden). norm: values of its parameters.
        """
        own = {f"{self.model.spec.norm}.{name}": it for name, it in norm.items()}
        (targets,) = self.streams.full.hidden.get(number)
        pairs = zip(
            hidden.flatten(0, 1).split(LOGIT_TOKENS),
            targets.float().flatten(0, 1).split(LOGIT_TOKENS),
            strict=True,
        )
        for states, target in pairs:
            with torch.no_grad():
                wanted = self._log_probabilities(target, {})
            found = self._log_probabilities(states, own)
            yield nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)

    def _log_probabilities(self, states: Tensor, norm: dict[str, Tensor]) -> Tensor:
        """float32 (tokens, vocabulary) of states (tokens, hidden)."""
        inputs = {"inputs_embeds": states[None]}
        with autocast(states.device, self.streams.compute):
            output = functional_call(self.model.module, norm, (), inputs, tie_weights=False)
        return output.logits[0].float().log_softmax(-1)

    def _name(self, index: int) -> str:
        return self.model.spec.block(index)

    def _module(self, index: int) -> nn.Module:
        name = self._name(index)
        block = Block(index, name, self.model.module.get_submodule(name), self.model.spec)
        return trainable_block(block, self.packed, self.model.device)

    def _through(self, index: int, values: dict[str, Tensor], hidden: Tensor) -> Tensor:
        return self._run(self._module(index), index, values, hidden)

    def _run(
        self, module: nn.Module, index: int, values: dict[str, Tensor], hidden: Tensor
    ) -> Tensor:
        """A block's output, float32 (batch, seq, hidden)."""
        arguments = self.streams.full.arguments[len(hidden)][index]
        with autocast(hidden.device, self.streams.compute):
            output = functional_call(module, values, (hidden,), dict(arguments))
        return (output[0] if isinstance(output, tuple) else output).float()
