"""The two calls most people need: quantize a model into a file, and load it again."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gptq.allocation.target import EMBEDDING_CHOICES, Target
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import ModelSource, open_model
from gptq.config import BITS, DEFAULTS, FULL_MODEL, QuantConfig, Widths
from gptq.device import calibration_dtype, parse_size, pick_device
from gptq.errors import UserError
from gptq.inference import perplexity as evaluation
from gptq.inference.loading import Opened, load_weights, open_weights
from gptq.job import DEFAULT_NSAMPLES, Job, Outputs
from gptq.pipeline.report import LayerReport, Report
from gptq.quantization import run, window_length

__all__ = [
    "DEFAULT_NSAMPLES",
    "Job",
    "Opened",
    "Outputs",
    "load",
    "load_weights",
    "open_full",
    "open_model",
    "open_weights",
    "perplexity",
    "quantize",
    "run",
    "window_length",
]


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
    max_memory: str | int | None = None,
    widths: Widths | None = None,
    size: str | int | None = None,
    average_bits: float | None = None,
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
    max_memory: of each process, in bytes or as "6GiB"; activations go to disk, next to the output,
        if they would exceed it, a GPU's first to the machine's memory. By default what is free.
    widths: bits and group size of layers that do not have those of `config`, by their full names;
        layers that share their input must have one width.
    size, average_bits: instead, each layer gets the bits and group size with which the model is
        closest to the full one, so that each file (of a folder, its weight files) has at most
        `size`, in bytes or as "3.5GiB", or the layers so many bits a weight, with scales and zero
        points. For a size a packed embedding and head get 4 or 8 bits, or `config`'s if not 8.
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
        max_memory=None if max_memory is None else str(max_memory),
        widths=widths,
        target=_target(size, average_bits, widths, config),
    )
    return run(open_full(model, device, dtype), job, progress)


def _target(
    size: str | int | None, bits: float | None, widths: Widths | None, config: QuantConfig | None
) -> Target | None:
    given = [it for it in (size, bits, widths) if it is not None]
    if len(given) > 1:
        raise UserError("size, average_bits and widths exclude each other; give one of them")
    if size is None and bits is None:
        return None
    if size is None:
        if not (isinstance(bits, int | float) and BITS[0] < bits <= FULL_MODEL):
            raise UserError(f"average_bits {bits!r}: give more than {BITS[0]}, up to {FULL_MODEL}")
        return Target(bits=bits)
    is_default = config is None or config.embedding_bits == DEFAULTS["embedding_bits"]
    return Target(
        parse_size(str(size), "size"), embedding_bits=EMBEDDING_CHOICES if is_default else ()
    )


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
