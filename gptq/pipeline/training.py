"""Training the whole model after its blocks are solved: what the journal keeps of it."""

from collections.abc import Callable

from torch import Tensor

from gptq.blockwise.model import BlockwiseModel
from gptq.pipeline.journal import BEST, Journal
from gptq.tuning.end_to_end import State, tune_model
from gptq.tuning.streams import Streams

Show = Callable[[int, int, float], None]
"""Given the steps done, the steps in all and the held-out loss, in nats a token."""
_FIELDS = ("step", "steps", "loss", "least", "first", "rises")
_PARTS = ("optimizer", BEST)


def train_model(
    model: BlockwiseModel,
    journal: Journal,
    streams: Streams,
    show: Show | None = None,
) -> None:
    """Train scales and norms end to end, or go on with what the journal holds.

    The journal has the best scales and norms afterwards.
    """
    for state in tune_model(model, journal.solved(), streams, _read(journal)):
        _write(journal, state)
        if show is not None:
            show(state.step, state.steps, state.loss)


def _write(journal: Journal, state: State) -> None:
    tensors = {
        f"{part}.{name}": it.contiguous()
        for part in _PARTS
        for name, it in getattr(state, part).items()
    }
    journal.write_training(tensors, {name: getattr(state, name) for name in _FIELDS})


def _read(journal: Journal) -> State | None:
    stored = journal.read_training()
    if stored is None:
        return None
    tensors, record = stored

    def part(name: str) -> dict[str, Tensor]:
        first = f"{name}."
        return {key[len(first) :]: it for key, it in tensors.items() if key.startswith(first)}

    return State(**record, optimizer=part("optimizer"), best=part(BEST))
