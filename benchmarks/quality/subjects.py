"""Models, what they are calibrated on, and the texts that they are judged by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.common.assets import model_path, text_path
from benchmarks.common.permuted import permuted_copy
from benchmarks.train_tiny import tiny_model
from gptq import api
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.device import pick_device, pick_dtype
from gptq.errors import UserError
from gptq.files.atomic import whole_file

MODELS = ("smollm2", "llama-tiny", "bloom-tiny", "llama-small", "bloom-small")
EVALUATION_WINDOWS = 20
# The protocol of published rows: calibration on 128 windows of c4, perplexity on all of wikitext2's
# test part and 256 windows of c4's validation part, of 2048 tokens each.
STANDARD_CALIBRATION = "c4"
STANDARD_TEXTS = ("wikitext2", "c4")
STANDARD_NSAMPLES = 128
SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model, its calibration text and its evaluation texts."""

    name: str
    folder: Path
    calibration: str | Path
    """A file, or the name of a data set."""
    heldout: Mapping[str, str | Path]
    nsamples: int
    seqlen: int
    windows: int | None = EVALUATION_WINDOWS
    """Of each evaluation text; None: all that it has."""
    dtype: str | None = "float32"
    """Of activations; None: float32 on a CPU, 16 bits on a GPU, as published rows have."""


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


def standard_subject(model: str) -> Subject:
    """Any model by the protocol of published rows. model: a folder, a .gguf file, or a hub name.

    Raises UserError for a model that is not there, or is quantized already.
    """
    source = api.open_model(model)
    if source.quantized:
        raise UserError(f"{model}: is quantized already; give the full model")
    return Subject(
        source.name,
        source.folder / (source.gguf or ""),
        STANDARD_CALIBRATION,
        {name: name for name in STANDARD_TEXTS},
        nsamples=STANDARD_NSAMPLES,
        seqlen=api.window_length(source, None),
        windows=None,
        dtype=None,
    )


def windows_of(subject: Subject) -> tuple[Tensor, dict[str, Tensor]]:
    """Calibration windows, and evaluation windows: int64 (n, seqlen) each."""
    tokenizer = api.open_model(subject.folder).tokenizer()
    calibration = calibration_windows(
        subject.calibration, tokenizer, subject.nsamples, subject.seqlen, SEED
    )
    evaluation = {
        name: evaluation_windows(path, tokenizer, subject.seqlen, subject.windows)
        for name, path in subject.heldout.items()
    }
    return calibration, evaluation


def dtype_of(subject: Subject, device: str | None) -> str:
    """The name of the dtype in which activations run on a device."""
    stored = api.open_model(subject.folder, weights=False).config.dtype
    return str(pick_dtype(subject.dtype, pick_device(device), stored)).removeprefix("torch.")


def log_perplexities(
    folder: Path,
    checkpoint: Path | None,
    evaluation: dict[str, Tensor],
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, float]:
    """ln perplexity by text of the full model, or of a checkpoint made from it."""

    def loss(windows: Tensor) -> float:
        opened = api.open_weights(folder, checkpoint, device=device, dtype=dtype)
        return math.log(api.perplexity(opened, windows))

    return {name: loss(windows) for name, windows in evaluation.items()}
