"""Windows to train a quantized model on, and others to judge it by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptq.data.windows import calibration_windows, run_numbers
from gptq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 8
"""Windows to train on for each that is held out."""
OVERLAP = 0.25
"""Share of a window that another text may have too; records of one template share that."""


def tuning_windows(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Tensor,
    tokens: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Windows to train on and held-out windows, int64 (n, seqlen) and (m, seqlen).

    calibration: int64 (nsamples, seqlen), as `calibration_windows` draws them with this seed; they
        come first.
    tokens: to train on, rounded up to whole windows; fewer if the text has no more.
    A held-out window is new text, apart from all that is trained on, and if possible from the
    calibration windows. Raises UserError if the text is too short for both.
    """
    seqlen = calibration.shape[1]
    count = -(-tokens // seqlen)
    held = max(1, count // HELD_OUT)
    others = calibration_windows(dataset, tokenizer, 4 * held, seqlen, seed + 1)
    new = ~_overlaps(others, calibration)
    # Those that overlap least with what was calibrated on, otherwise as drawn.
    held_out = others[torch.argsort(new.int(), descending=True, stable=True)][:held]
    drawn = calibration_windows(dataset, tokenizer, len(calibration) + 2 * count, seqlen, seed)
    drawn = torch.cat([calibration, drawn[len(calibration) :]])
    training = drawn[~_overlaps(drawn, held_out)][:count]
    if not len(training):
        raise UserError(
            f"{dataset}: the text is too short to train on a part of it and judge by another; give "
            "more text, or a smaller --seqlen"
        )
    return training, held_out


def _overlaps(windows: Tensor, others: Tensor) -> Tensor:
    """bool (n,): of windows (n, seqlen) those of which others, (m, seqlen), have a part."""
    shared = torch.isin(run_numbers(windows), run_numbers(others))
    return shared.float().mean(1) > OVERLAP
