"""The two calls most people need: quantize a model into a file, and load it again."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gptq.blockwise import empty_model
from gptq.blockwise.activations import Shelf
from gptq.blockwise.source import ModelSource, open_model
from gptq.checkpoints import writing as export
from gptq.checkpoints.layouts import FORMATS
from gptq.checkpoints.reading import Checkpoint, attach
from gptq.config import QuantConfig
from gptq.data.windows import calibration_windows, text_fingerprint
from gptq.device import (
    available_memory,
    calibration_dtype,
    parse_size,
    peak_memory,
    pick_device,
    pick_dtype,
)
from gptq.errors import UserError
from gptq.files.atomic import check_writable
from gptq.inference import cpu_decode
from gptq.inference import perplexity as evaluate
from gptq.nn import HalfHead, QuantLinear, TiedHead
from gptq.pipeline import team as distributed
from gptq.pipeline.blocks import LayerReport, Report, identity, quantize_blocks
from gptq.pipeline.journal import Journal, open_journal
from gptq.pipeline.memory import FIXED, Needs, fits, needs
from quant_cuda.cpu import library

DEFAULT_NSAMPLES = 128
DEFAULT_SEQLEN = 2048


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
    progress: Callable[[LayerReport, int], None] | None = None,
) -> Report:
    """Quantize a model and write it.

    model: a local folder, a hub name, or a `.gguf` file.
    dataset: what to calibrate on: c4, wikitext2, ptb, or a file of text, jsonl or parquet;
        method "rtn" can do without.
    save, save_safetensors, save_dir: a `.pt`, a `.safetensors`, a Hugging Face folder; at least
        one. Each appears complete or not at all.
    format: of the folder, "gptq" or "gptq_v2"; by default "gptq" where symmetric, else "gptq_v2".
    quantize_embeddings: also in the folder, which then no other program reads; files always have
        the embedding and the head in `config.embedding_bits`.
    nsamples, seqlen: windows of calibration text, and tokens in each (by default 2048, or what
        the model can take).
    resume: continue a run of the same arguments that was stopped.
    max_memory: such as "6GiB"; activations go to disk, beside the output, where they would exceed
        it. By default what is free. On a GPU it is the GPU's memory that counts, and they go to the
        machine's where they fit.
    progress: called after each layer with its report and the number of layers in all.
    Raises gptq.errors.UserError for anything in the arguments that cannot work.
    """
    started = perf_counter()
    config = config or QuantConfig()
    outputs = [Path(path) for path in (save, save_safetensors, save_dir) if path is not None]
    _check_outputs(outputs, save_dir is not None, format)
    limit = None if max_memory is None else parse_size(max_memory)
    source = open_model(model)
    if source.quantized:
        raise UserError(f"{model}: is quantized already; give the full model")
    where = pick_device(device)
    kind = calibration_dtype(dtype, where, source.config.dtype)
    reading = perf_counter()
    windows = _windows(source, dataset, config, nsamples, seqlen, seed)
    stages = [("reading the calibration text", perf_counter() - reading)]
    calibration = {} if windows is None else {"calibration": text_fingerprint(windows)}
    meta = {**calibration, **({} if dataset is None else {"dataset": Path(dataset).name})}
    needed = needs(source, config, 0 if windows is None else windows.numel(), kind)
    in_memory = fits(needed, available_memory(where) if limit is None else limit, max_memory)
    total = len(source.spec.linears) * source.config.num_hidden_layers
    layers = []
    run = identity(source, config, dtype=kind, **calibration)
    with distributed.team(where) as team, _shared_journal(team, outputs, run, resume) as journal:
        shelf = None if in_memory else _shelf(needed, where, journal, team)
        blocks = quantize_blocks(source, windows, config, journal, where, kind, shelf, team)
        for layer in blocks:
            layers.append(layer)
            if progress is not None:
                progress(layer, total)
        # The others may still be reading what the first would write on, and remove.
        team.wait()
        writing = perf_counter()
        if team.leads:
            tensors = export.assemble(source, journal)
            if save_dir is not None:
                inside = config if quantize_embeddings else replace(config, embedding_bits=16)
                some = export.with_embeddings(source, tensors, inside)
                export.write_folder(Path(save_dir), source, some, inside, meta, format)
            if save is not None or save_safetensors is not None:
                tensors = export.with_embeddings(source, tensors, config)
                said = export.settings(config, meta)
            if save is not None:
                tied = empty_model.tied(source.config, source.spec, tensors)
                export.write_pt(Path(save), tensors, said, tied)
            if save_safetensors is not None:
                export.write_safetensors(Path(save_safetensors), tensors, said)
            journal.remove()
    now = perf_counter()
    stages.append(("writing", now - writing))
    peak = peak_memory(where)
    return Report(config, tuple(layers), tuple(outputs), now - started, peak, tuple(stages))


def _shelf(needed: Needs, device: torch.device, journal: Journal, team: distributed.Team) -> Shelf:
    """For activations that do not stay where they are computed."""
    room = available_memory(torch.device("cpu")) / team.size
    if device.type == "cuda" and needed.activations + FIXED < room:
        return Shelf(host=True)
    return Shelf(journal.scratch / str(team.rank) / "quantized")


def _check_outputs(outputs: list[Path], folder_last: bool, format: str | None) -> None:
    if not outputs:
        raise UserError("nothing to write: give save=, save_safetensors= or save_dir=")
    if format not in (None, *FORMATS):
        raise UserError(f"format {format!r} is not known; choose one of {', '.join(FORMATS)}")
    for path in outputs:
        check_writable(path, folder=folder_last and path is outputs[-1])


@contextmanager
def _shared_journal(
    team: distributed.Team, outputs: list[Path], run: dict[str, object], resume: bool
) -> Iterator[Journal]:
    """The journal that the first of several processes has opened, for all of them."""
    with ExitStack() as held:

        def begin() -> str:
            return str(held.enter_context(open_journal(outputs, run, resume)).folder.resolve())

        yield Journal(Path(team.from_leader(begin)))


@dataclass(frozen=True)
class Opened:
    """A full or quantized model whose weights are still on disk."""

    source: ModelSource
    model: PreTrainedModel
    """Without weights; packed layers are in place."""
    checkpoint: Checkpoint | None
    device: torch.device
    dtype: torch.dtype

    @property
    def tensors(self):
        return self.source.tensors if self.checkpoint is None else self.checkpoint.tensors


def open_weights(
    model: str | Path,
    checkpoint: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Opened:
    """Everything but the weights: for `load_weights`, or to be run block by block.

    A `model` folder that is itself quantized needs no `checkpoint`.
    """
    source = open_model(model, weights=False)
    path = Path(checkpoint) if checkpoint is not None else None
    if path is None and source.quantized:
        path = source.folder
    if path is None:
        source = open_model(model)
        # A folder need not say that its weights are packed.
        if any(name.endswith(".qweight") for name in source.tensors):
            path = source.folder
    where = pick_device(device)
    kind = pick_dtype(dtype, where, source.config.dtype)
    bare = empty_model.build(source.config, source.spec, where)
    attached = None
    if path is not None:
        attached = attach(bare, source.spec, path, bits, group_size)
    return Opened(source, bare, attached, where, kind)


def load_weights(opened: Opened, int8_activations: bool = False) -> PreTrainedModel:
    """Fill every part of an opened model; it is then an ordinary transformers model.

    Packed layers are put in the order that kernels read, one part after another, and what was read
    from disk is let go: never more than the file's bytes and one part are held.
    """
    model, spec = opened.model, opened.source.spec
    for name in empty_model.parts(model, spec):
        head, embedding = (model.get_submodule(path) for path in (spec.head, spec.embed[0]))
        if name == spec.head and isinstance(head, TiedHead):
            head.int8_activations = int8_activations
            head.embedding.prepare()
        elif name == spec.head and model.config.tie_word_embeddings:
            head.weight = embedding.weight
        elif name == spec.head and (halves := _stored_in_halves(opened)) is not None:
            head.weight = nn.Parameter(halves, requires_grad=False)
            head.__class__ = HalfHead
        else:
            part = empty_model.fill(model, spec, name, opened.tensors, opened.device, opened.dtype)
            for layer in part.modules():
                if isinstance(layer, QuantLinear):
                    layer.int8_activations = int8_activations
                    layer.prepare()
    cpu_decode.install(model)
    if (opened.source.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(opened.source.folder)
    return model


def _stored_in_halves(opened: Opened) -> Tensor | None:
    """The weight of a head that is not tied, as a quantized model's file has it, where that is
    16-bit floats and a CPU is to multiply it by float32; else None."""
    if opened.checkpoint is None or opened.dtype != torch.float32 or opened.device.type != "cpu":
        return None
    head, spec = opened.model.get_output_embeddings(), opened.source.spec
    if type(head) is not nn.Linear or not library.compiled():
        return None
    weight = empty_model.stored(
        opened.model, spec, f"{spec.head}.weight", opened.tensors, head.weight
    )
    return weight.contiguous() if weight.dtype in (torch.float16, torch.bfloat16) else None


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
    checkpoint: a `.pt`, `.safetensors` or folder made from it; None for the full model, or where
        `model` is a quantized folder.
    bits, group_size: only for files that do not say them.
    int8_activations: packed layers round what they are given to 8 bits, with a scale for each
        group of inputs: faster on most CPUs, a little less exact.
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
    return evaluate.perplexity(
        opened.model,
        opened.source.spec,
        opened.tensors,
        windows,
        opened.device,
        opened.dtype,
        progress,
    )


def _windows(
    source: ModelSource,
    dataset: str | Path | None,
    config: QuantConfig,
    nsamples: int,
    seqlen: int | None,
    seed: int,
) -> Tensor | None:
    if dataset is None:
        if config.method == "rtn":
            return None
        raise UserError("no DATASET to calibrate on: give c4, wikitext2, ptb or a text file")
    return calibration_windows(
        dataset, source.tokenizer(), nsamples, window_length(source, seqlen), seed
    )


def window_length(source: ModelSource, seqlen: int | None) -> int:
    """Tokens in a window: as asked, else 2048 or the model's own limit where that is lower."""
    limit = getattr(source.config, "max_position_embeddings", None)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and seqlen > limit:
        raise UserError(f"--seqlen {seqlen} exceeds the {limit} positions of {source.name}")
    return seqlen
