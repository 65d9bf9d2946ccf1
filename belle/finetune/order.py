"""The order in which examples are trained on, fixed before the run so that it can be resumed."""

import random
from collections.abc import Sequence

# Batches whose examples are sorted by length together: enough that a batch has little padding, few
# enough that batches differ between epochs.
_SORTED_TOGETHER = 50


def shuffled(lengths: Sequence[int], batch: int, epochs: int, seed: int) -> list[int]:
    """Indices of examples, each once an epoch, those of a batch of similar lengths.

    Examples are not packed into one row: BLOOM's alibi does not know where an example begins.
    """
    draw, order = random.Random(seed), []
    for _ in range(epochs):
        indices = list(range(len(lengths)))
        draw.shuffle(indices)
        batches = []
        for start in range(0, len(indices), batch * _SORTED_TOGETHER):
            together = indices[start : start + batch * _SORTED_TOGETHER]
            together.sort(key=lambda index: -lengths[index])
            batches += [together[i : i + batch] for i in range(0, len(together), batch)]
        draw.shuffle(batches)
        order += [index for each in batches for index in each]
    return order
