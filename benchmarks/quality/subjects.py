"""Models, what they are calibrated on, and the texts that they are judged by."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.common.assets import model_path, text_path
from benchmarks.common.permuted import permuted_copy
from benchmarks.train_tiny import tiny_model
from gptq import api
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.files.atomic import whole_file

MODELS = ("smollm2", "llama-tiny", "bloom-tiny", "llama-small", "bloom-small")
EVALUATION_WINDOWS = 20
SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model, its calibration text and its evaluation texts."""

    name: str
    folder: Path
    calibration: Path
    heldout: dict[str, Path]
    nsamples: int
    seqlen: int


def subject(name: str, cache: Path) -> Subject:
    """One of this benchmark's models, made in `cache` if it is not there."""
    if name == "smollm2":
        text = text_path("c4", cache).read_text(encoding="utf-8")
        halves = cache / "c4-calibration.txt", cache / "c4-heldout.txt"
        cut = len(text) // 2
        for path, half in zip(halves, (text[:cut], text[cut:]), strict=True):
            with whole_file(path) as unfinished:
                unfinished.write_text(half, encoding="utf-8")
        folder = permuted_copy(model_path(cache), cache / "smollm2-permuted")
        heldout = {"wiki": text_path("wiki", cache), "c4": halves[1]}
        return Subject(name, folder, halves[0], heldout, nsamples=16, seqlen=512)
    arch, _, size = name.partition("-")
    folder = tiny_model(arch, cache, size=size)
    heldout = {"held out": folder / "heldout.txt"}
    return Subject(name, folder, folder / "train.txt", heldout, nsamples=32, seqlen=256)


def windows_of(subject: Subject) -> tuple[Tensor, dict[str, Tensor]]:
    """Calibration windows, and evaluation windows: int64 (n, seqlen) each."""
    tokenizer = api.open_model(subject.folder).tokenizer()
    calibration = calibration_windows(
        subject.calibration, tokenizer, subject.nsamples, subject.seqlen, SEED
    )
    evaluation = {
        name: evaluation_windows(path, tokenizer, subject.seqlen, EVALUATION_WINDOWS)
        for name, path in subject.heldout.items()
    }
    return calibration, evaluation


def log_perplexities(
    folder: Path, checkpoint: Path | None, evaluation: dict[str, Tensor]
) -> dict[str, float]:
    """ln perplexity by text of the full model, or of a checkpoint made from it."""
    return {
        name: math.log(api.perplexity(api.open_weights(folder, checkpoint), windows))
        for name, windows in evaluation.items()
    }
