"""The text that a run is tuned on."""

import torch
from torch import Tensor

from gptq import torchrun
from gptq.blockwise.model import BlockwiseModel
from gptq.data.tuning_windows import tuning_windows
from gptq.data.windows import text_fingerprint
from gptq.device import half_dtype, training_dtype
from gptq.errors import UserError
from gptq.job import Job
from gptq.tuning.streams import TuneWindows


def tuned_text(model: BlockwiseModel, job: Job, calibration: Tensor | None) -> TuneWindows | None:
    """What `job.config.tune_tokens` asks for; None if nothing.

    calibration: int64 (nsamples, seqlen), which come first. Raises UserError if there is no text or
        too little, and if processes share the run.
    """
    tokens, dataset = job.config.tune_tokens, job.dataset
    if not tokens:
        return None
    if dataset is None or calibration is None:
        raise UserError("no DATASET to tune on: give c4, wikitext2, ptb or a text file")
    if torchrun.size() > 1:
        raise UserError(
            f"--tune-tokens {tokens} is for one process: start the run without "
            "torchrun, or leave --quality tune out"
        )
    tokenizer = model.source.tokenizer()
    windows = tuning_windows(dataset, tokenizer, calibration, tokens, job.seed)
    stored = half_dtype(model.source.config.dtype)
    return TuneWindows(*windows, training_dtype(model.device), stored)


def identity_of(windows: TuneWindows | None) -> dict[str, object]:
    """What it adds to the identity of a run."""
    if windows is None:
        return {}
    text = torch.cat([windows.training, windows.held_out])
    return {"tuned_on": text_fingerprint(text), "tuned_in": str(windows.compute)}
