"""The two calls most people need: quantize a model into a file, and load it again."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gptq import torchrun
from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.activations import batches
from gptq.blockwise.empty_model import linear
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import ModelSource, max_positions, open_model
from gptq.checkpoints.assembly import from_blocks
from gptq.checkpoints.embeddings import pack_embeddings
from gptq.checkpoints.formats import (
    FORMATS,
    check_layers,
    default_format,
    folder_formats,
    write,
)
from gptq.checkpoints.preflight import check_before_run, check_gguf, planned_layers
from gptq.checkpoints.settings import from_config
from gptq.checkpoints.writing import FOLDER, is_ours
from gptq.config import QuantConfig, Widths
from gptq.data.windows import calibration_windows, distinct_tokens, text_fingerprint
from gptq.device import (
    available_memory,
    calibration_dtype,
    parse_size,
    peak_memory,
    pick_device,
)
from gptq.errors import UserError
from gptq.files.atomic import check_apart, check_writable
from gptq.inference import perplexity as evaluation
from gptq.inference.loading import Opened, load_weights, open_weights
from gptq.pipeline.blocks import quantize_blocks
from gptq.pipeline.identity import agreed, identity
from gptq.pipeline.journal import Journal, shared_journal
from gptq.pipeline.memory import FIXED, Needs, fits, needs
from gptq.pipeline.report import LayerReport, Report
from gptq.pipeline.team import Team
from gptq.pipeline.team import team as open_team
from gptq.pipeline.widths import check_layers as check_widths
from gptq.pipeline.widths import complete_widths

DEFAULT_NSAMPLES = 128
DEFAULT_SEQLEN = 2048
TOKENS_PER_INPUT = 2
"""Different calibration tokens for each input of the widest layer, of which fewer are too few."""


@dataclass(frozen=True)
class Outputs:
    """Where a quantized model is written, and how. Raises UserError if it cannot be."""

    save: Path | None = None
    save_safetensors: Path | None = None
    save_dir: Path | None = None
    format: str | None = None
    quantize_embeddings: bool = False
    report: Path | None = None
    """A folder for a page about the run, which the command line writes afterwards."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("nothing to write: give save=, save_safetensors= or save_dir=")
        if self.format not in (None, *folder_formats()):
            raise UserError(
                f"format {self.format!r} is not known; choose one of {', '.join(folder_formats())}"
            )
        # The other processes of a run write nothing, and may be on machines without these folders.
        for path in self.paths if torchrun.rank() == 0 else ():
            check_writable(path, folder=path is self.save_dir, ours=is_ours)

    @classmethod
    def of(
        cls,
        save: str | Path | None,
        save_safetensors: str | Path | None,
        save_dir: str | Path | None,
        format: str | None = None,
        quantize_embeddings: bool = False,
    ) -> "Outputs":
        """The record of paths that may be strings."""
        pt, safetensors, folder = (
            None if path is None else Path(path) for path in (save, save_safetensors, save_dir)
        )
        return cls(pt, safetensors, folder, format, quantize_embeddings)

    def check_apart(self, model: Path, dataset: str | Path | None) -> None:
        """Raise UserError if an output lies inside another one, or would replace an input."""
        outputs = [*self.paths, *([] if self.report is None else [self.report])]
        inputs = [model, *([] if dataset is None else [Path(dataset)])]
        check_apart(outputs, inputs, self.save_dir)

    @property
    def pt(self) -> Path | None:
        """`save`, unless it is a .gguf file."""
        return None if self.gguf is not None else self.save

    @property
    def gguf(self) -> Path | None:
        """`save`, if it is a .gguf file."""
        return self.save if self.save is not None and self.save.suffix == ".gguf" else None

    @property
    def paths(self) -> tuple[Path, ...]:
        """In the order in which they are reported; the journal lies next to the first."""
        return tuple(filter(None, (self.save, self.save_safetensors, self.save_dir)))


@dataclass(frozen=True)
class Job:
    """One quantization, as `quantize` documents its parts."""

    config: QuantConfig
    outputs: Outputs
    dataset: str | Path | None
    nsamples: int = DEFAULT_NSAMPLES
    seqlen: int | None = None
    seed: int = 0
    resume: bool = False
    max_memory: str | None = None
    widths: Widths | None = None


def quantize(
    model: str | Path,
    dataset: str | Path | None,
    config: QuantConfig | None = None,
    *,
    save: str | Path | None = None,
    save_safetensors: str | Path | None = None,
    save_dir: str | Path | None = None,
    format: str | None = None,
    quantize_embeddings: bool = False,
    nsamples: int = DEFAULT_NSAMPLES,
    seqlen: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    resume: bool = False,
    max_memory: str | None = None,
    widths: Widths | None = None,
    progress: Callable[[LayerReport, int], None] | None = None,
) -> Report:
    """Quantize a model and write it.

    model: a local folder, a hub name, or a `.gguf` file.
    dataset: what to calibrate on: c4, wikitext2, ptb, or a file of text, jsonl or parquet;
        method "rtn" can do without.
    save, save_safetensors, save_dir: a `.pt` or `.gguf`, a `.safetensors`, a Hugging Face folder;
        at least one. Each appears complete or not at all.
    format: of the folder, a key of `checkpoints.formats.FORMATS`; by default as `default_format`
        there says.
    quantize_embeddings: also in the folder, which then fewer programs read; files and format "mlx"
        always have the embedding and the head in `config.embedding_bits`.
    nsamples, seqlen: windows of calibration text, and tokens in each (by default 2048, or what
        the model can take).
    resume: continue a run of the same arguments that was stopped.
    max_memory: of each process, such as "6GiB"; activations go to disk, next to the output, if they
        would exceed it, a GPU's first to the machine's memory. By default what is free on the
        device, or the process's share of it.
    widths: bits and group size of layers that do not have those of `config`, by their full names;
        layers that share their input must have one width.
    progress: called after each layer with its report and the number of layers in all.
    Raises gptq.errors.UserError for anything in the arguments that cannot work.
    """
    job = Job(
        config or QuantConfig(),
        Outputs.of(save, save_safetensors, save_dir, format, quantize_embeddings),
        dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        resume=resume,
        max_memory=max_memory,
        widths=widths,
    )
    return run(open_full(model, device, dtype), job, progress)


def open_full(
    model: str | Path | ModelSource, device: str | None = None, dtype: str | None = None
) -> BlockwiseModel:
    """A model to quantize, its weights still on disk. Raises UserError for a quantized one."""
    source = model if isinstance(model, ModelSource) else open_model(model)
    if source.quantized:
        name = source.folder if isinstance(model, ModelSource) else model
        raise UserError(f"{name}: is quantized already; give the full model")
    where = pick_device(device)
    kind = calibration_dtype(dtype, where, source.config.dtype)
    return BlockwiseModel.from_source(source, where, kind)


def run(
    model: BlockwiseModel, job: Job, progress: Callable[[LayerReport, int], None] | None = None
) -> Report:
    """`quantize` for a model that is open."""
    started = perf_counter()
    config, source = job.config, model.source
    model_path = source.folder if source.gguf is None else source.folder / source.gguf
    job.outputs.check_apart(model_path, job.dataset)
    widths = complete_widths(model, config, job.widths)
    check_widths(model, widths)
    check_before_run(model, _embedding_bits(job), job.outputs.save_dir is not None)
    if job.outputs.save_dir is not None and job.outputs.format is not None:
        layers_to_be = planned_layers(model, config, _folder_bits(job), widths)
        check_layers(job.outputs.format, layers_to_be, model_path)
    if job.outputs.gguf is not None:
        check_gguf(model, config, widths)
    limit = None if job.max_memory is None else parse_size(job.max_memory)
    windows = _windows(source, job)
    noticed = _calibration_warnings(model, job, windows)
    for text in noticed if torchrun.rank() == 0 else ():
        warnings.warn(text, stacklevel=3)
    stages = [("reading the calibration text", perf_counter() - started)]
    calibration = {} if windows is None else {"calibration": text_fingerprint(windows)}
    needed = needs(model, config, _own_tokens(windows, model.device), widths)
    memory = available_memory(model.device) if limit is None else limit
    in_memory = fits(needed, memory, job.max_memory)
    total = len(source.spec.linears) * model.block_count
    layers = []
    own_identity = identity(model, config, widths, **calibration)
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(open_team(model.device))
        declared = agreed(team.everyones(own_identity))
        journal = stack.enter_context(
            shared_journal(team, job.outputs.paths, declared, job.resume, is_ours)
        )
        cache = None if in_memory else _activation_cache(needed, model.device, journal, team)
        for layer in quantize_blocks(model, windows, config, journal, cache, team, widths=widths):
            layers.append(layer)
            if progress is not None:
                progress(layer, total)
        # The others may still be reading what the first would write on, and remove.
        team.wait()
        writing_started = perf_counter()
        if team.leads:
            named = {} if job.dataset is None else {"dataset": _utf8_name(job.dataset)}
            _write(model, replace(job, widths=widths), journal, {**calibration, **named})
            journal.remove()
    now = perf_counter()
    stages.append(("writing", now - writing_started))
    seconds, peak = now - started, peak_memory(model.device)
    paths = job.outputs.paths
    return Report(config, tuple(layers), paths, seconds, peak, tuple(stages), warnings=noticed)


def _embedding_bits(job: Job) -> set[int]:
    """Bits of the embedding and the head in each of the outputs."""
    outputs, bits = job.outputs, job.config.embedding_bits
    files = {bits} if outputs.pt or outputs.save_safetensors else set()
    return files | ({_folder_bits(job)} if outputs.save_dir else set())


def _folder_bits(job: Job) -> int:
    name = job.outputs.format
    packs = job.outputs.quantize_embeddings or (name in FORMATS and FORMATS[name].packs_embeddings)
    return job.config.embedding_bits if packs else 16


def _write(model: BlockwiseModel, job: Job, journal: Journal, meta: dict[str, object]) -> None:
    """Write every output from the journal's blocks."""
    config, outputs = job.config, job.outputs
    settings = from_config(config, meta, job.widths)
    plain = from_blocks(model.source, model.module, journal.tensors(), settings, job.widths)
    if outputs.save_dir is not None:
        packed = pack_embeddings(plain, _folder_bits(job))
        name = outputs.format or default_format(map(packed.facts, packed.layers), FOLDER)
        write(packed, outputs.save_dir, name, container=FOLDER)
    if outputs.gguf is not None:
        write(plain, outputs.gguf, "gguf", container=".gguf")
    files = {".pt": outputs.pt, ".safetensors": outputs.save_safetensors}
    if any(files.values()):
        packed = pack_embeddings(plain, config.embedding_bits)
        for container, path in files.items():
            if path is not None:
                write(packed, path, "gptq", container=container)


def _activation_cache(
    needed: Needs, device: torch.device, journal: Journal, team: Team
) -> ActivationCache:
    """For activations that the device has no memory for."""
    available = available_memory(torch.device("cpu"))
    if device.type == "cuda" and needed.activations + FIXED < available:
        return ActivationCache(host=True)
    return ActivationCache(journal.scratch / str(team.rank) / "quantized")


def load(
    model: str | Path,
    checkpoint: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    int8_activations: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model ready to run, and its tokenizer.

    model: where the configuration and tokenizer are, as for `quantize`.
    checkpoint: a `.pt`, `.safetensors` or folder made from it; None for the full model, or if
        `model` is a quantized folder.
    bits, group_size: only for files that do not say them.
    int8_activations: packed layers round their inputs to 8 bits, with a scale for each group of
        inputs: faster on most CPUs, a little less exact.
    Raises gptq.errors.UserError for files that are damaged, disagree or belong to another model.
    """
    opened = open_weights(
        model, checkpoint, bits=bits, group_size=group_size, device=device, dtype=dtype
    )
    tokenizer = opened.source.tokenizer()
    return load_weights(opened, int8_activations), tokenizer


def perplexity(
    opened: Opened, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> float:
    """Perplexity of an opened model on windows (n, seqlen), one block in memory at a time."""
    return evaluation.perplexity(opened.model, windows, progress)


def _windows(source: ModelSource, job: Job) -> Tensor | None:
    """The calibration tokens, int64 (nsamples, seqlen); None if none are needed."""
    if job.dataset is None:
        if job.config.method == "rtn":
            return None
        raise UserError("no DATASET to calibrate on: give c4, wikitext2, ptb or a text file")
    seqlen = window_length(source, job.seqlen)
    return calibration_windows(job.dataset, source.tokenizer(), job.nsamples, seqlen, job.seed)


def _calibration_warnings(
    model: BlockwiseModel, job: Job, windows: Tensor | None
) -> tuple[str, ...]:
    """What to say if the calibration text is too short or too much the same; empty if it is not.

    A layer of n inputs has n weights an output. On fewer than n different tokens its Hessian is
    singular, and weights can be found that are right on those alone: the losses fall, and the model
    gets worse. A tiny trained LLaMA at 3 bits, 224 inputs at most, was above rounding's loss up to
    400 different tokens, and below it from 850 on. Hence TOKENS_PER_INPUT.
    """
    if windows is None or job.dataset is None or job.config.method == "rtn":
        return ()
    block = model.module.get_submodule(model.spec.block(0))
    widest = max(linear(block, name).in_features for name in model.spec.linears)
    count = distinct_tokens(windows)
    if count >= TOKENS_PER_INPUT * widest:
        return ()
    return (
        f"{_utf8_name(job.dataset)}: {count} different tokens are few for layers of {widest} "
        "inputs, and the model may become worse than by rounding; give more text, or more "
        "--nsamples",
    )


def _own_tokens(windows: Tensor | None, device: torch.device) -> int:
    """How many calibration tokens one process runs at most, the first."""
    if windows is None:
        return 0
    return sum(batch.numel() for batch in batches(windows, device)[:: torchrun.size()])


def _utf8_name(path: str | Path) -> str:
    """A file's name, with U+FFFD for bytes that are not UTF-8."""
    return Path(path).name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def window_length(source: ModelSource, seqlen: int | None) -> int:
    """Tokens in a window: `seqlen`, or by default 2048 or the model's own limit if lower."""
    limit = max_positions(source.config)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and seqlen > limit:
        raise UserError(f"--seqlen {seqlen} exceeds the {limit} positions of {source.name}")
    return seqlen
