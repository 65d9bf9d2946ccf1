"""One quantization from its checks to its files."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gptq import torchrun
from gptq.allocation.sensitivity import probe_bytes
from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.activations import Activations, batches
from gptq.blockwise.empty_model import linear
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.rotation import rotated
from gptq.blockwise.source import ModelSource, max_positions
from gptq.checkpoints.assembly import from_blocks
from gptq.checkpoints.canonical import Canonical
from gptq.checkpoints.embeddings import pack_embeddings
from gptq.checkpoints.formats import check_layers, default_format, write
from gptq.checkpoints.preflight import check_before_run, check_gguf, planned_layers
from gptq.checkpoints.settings import from_config
from gptq.checkpoints.writing import FOLDER, is_ours
from gptq.config import EMBEDDING_GROUPS, Width
from gptq.data.windows import calibration_windows, distinct_tokens, text_fingerprint
from gptq.device import available_memory, parse_size, peak_memory
from gptq.errors import UserError
from gptq.fitting import Choice, choice_of, fitting_widths
from gptq.job import Job
from gptq.pipeline.blocks import quantize_blocks
from gptq.pipeline.head import head_hessian, head_solver
from gptq.pipeline.identity import agreed, identity
from gptq.pipeline.journal import Journal, shared_journal
from gptq.pipeline.memory import FIXED, Needs, fits, needs
from gptq.pipeline.report import LayerReport, Report
from gptq.pipeline.team import Team
from gptq.pipeline.team import team as open_team
from gptq.pipeline.training import Show, train_model
from gptq.pipeline.training_memory import check_training_fits, with_training
from gptq.pipeline.widths import check_layers as check_widths
from gptq.pipeline.widths import complete_widths
from gptq.solver.hessian import Hessian
from gptq.tuned_text import identity_of, tuned_text
from gptq.tuning.streams import TuneWindows, open_streams

DEFAULT_SEQLEN = 2048
TOKENS_PER_INPUT = 2
"""Different calibration tokens for each input of the widest layer, of which fewer are too few."""


def run(
    model: BlockwiseModel,
    job: Job,
    progress: Callable[[LayerReport, int], None] | None = None,
    measuring: Callable[[int, int], None] | None = None,
    training: Show | None = None,
) -> Report:
    """`api.quantize` for a model that is open.

    measuring: called with (percent done, 100) while the widths are chosen.
    training: called at each look at the held-out windows.
    """
    started = perf_counter()
    if job.config.rotate:
        model = rotated(model)
    config, choice = job.config, _checked_choice(model, job)
    windows = _windows(model.source, job)
    noticed = _calibration_warnings(model, job, windows)
    for text in noticed if torchrun.rank() == 0 else ():
        warnings.warn(text, stacklevel=3)
    stages = [("reading the calibration text", perf_counter() - started)]
    tuned_on = tuned_text(model, job, windows)
    calibration = _fingerprints(windows, tuned_on)
    needed, in_memory = _needs(model, job, windows, choice, tuned_on)
    own_identity = identity(model, config, job.widths, **calibration, **_asked(choice))
    layers: list[LayerReport] = []
    head: list[Hessian] = []
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(open_team(model.device))
        declared = agreed(team.everyones(own_identity))
        journal = stack.enter_context(
            shared_journal(team, job.outputs.paths, declared, job.resume, is_ours)
        )
        cache = None if in_memory else _activation_cache(needed, model.device, journal, team)
        shared = _Shared(journal, cache, team)
        if choice is not None and windows is not None:
            begun = perf_counter()
            job = _with_chosen_widths(model, windows, job, choice, shared, measuring)
            stages.append(("choosing widths", perf_counter() - begun))
        job = replace(job, widths=complete_widths(model, config, job.widths))
        for layer in _solved_layers(model, windows, job, shared, head):
            layers.append(layer)
            if progress is not None:
                progress(layer, len(model.spec.linears) * model.block_count)
        if tuned_on is not None:
            begun = perf_counter()
            train_model(model, journal, open_streams(model, tuned_on, cache), training)
            stages.append(("training scales and norms", perf_counter() - begun))
        # The others may still be reading what the first would write on, and remove.
        team.wait()
        writing_started = perf_counter()
        if team.leads:
            _write(model, job, journal, calibration, head)
            journal.remove()
    stages.append(("writing", perf_counter() - writing_started))
    seconds, peak = perf_counter() - started, peak_memory(model.device)
    bits = job.config.embedding_bits
    ends = Width(bits, EMBEDDING_GROUPS[bits]) if choice and choice.ends else None
    more: dict[str, Any] = {"stages": tuple(stages), "warnings": noticed, "embedding": ends}
    return Report(job.config, tuple(layers), job.outputs.paths, seconds, peak, **more)


@dataclass(frozen=True)
class _Shared:
    """What all stages of a run use."""

    journal: Journal
    cache: ActivationCache | None
    """For activations; None: they stay in memory."""
    team: Team


def _checked_choice(model: BlockwiseModel, job: Job) -> Choice | None:
    """What there is to choose from, if the job has a target.

    Raises UserError for what would fail only later: outputs that cannot be written, or cannot hold
    the layers, and a target that cannot be met.
    """
    config, source = job.config, model.source
    model_path = source.folder if source.gguf is None else source.folder / source.gguf
    job.outputs.check_apart(model_path, job.dataset)
    if job.target is not None and job.dataset is None:
        raise UserError("choosing widths needs DATASET to calibrate on: c4, or a text file")
    if config.embedding_bits == 4 and not model.spec.packs_embedding and job.outputs.gguf is None:
        raise UserError(
            "--embedding-bits 4: the model scales its embedding, which so stays at 16 bits; leave "
            "the flag out"
        )
    choice = (
        None if job.target is None else choice_of(model, config, job.target, job.possible_outputs)
    )
    widths = job.widths if choice is None else choice.smallest
    widths = complete_widths(model, config, widths)
    check_widths(model, widths)
    ends = {width.bits for width in choice.ends} if choice is not None else set()
    check_before_run(model, ends | _embedding_bits(job), job.outputs.save_dir is not None)
    if job.outputs.save_dir is not None and job.outputs.format is not None:
        layers_to_be = planned_layers(model, config, job.folder_bits, widths)
        check_layers(job.outputs.format, layers_to_be, model_path)
    if job.outputs.gguf is not None:
        check_gguf(model, config, widths)
    return choice


def _needs(
    model: BlockwiseModel,
    job: Job,
    windows: Tensor | None,
    choice: Choice | None,
    tuned_on: TuneWindows | None,
) -> tuple[Needs, bool]:
    """What the run takes of memory, and whether activations can stay in it."""
    limit = None if job.max_memory is None else parse_size(job.max_memory)
    widths = job.widths if choice is None else choice.smallest
    needed = needs(model, job.config, _own_tokens(windows, model.device), widths)
    if choice is not None:
        more = probe_bytes(model, ends=len(choice.ends) > 0)
        needed = replace(needed, activations=needed.activations + more)
    needed = with_training(needed, model, job.config, tuned_on, widths)
    memory = available_memory(model.device) if limit is None else limit
    check_training_fits(needed, memory, job.max_memory)
    return needed, fits(needed, memory, job.max_memory)


def _fingerprints(windows: Tensor | None, tuned_on: TuneWindows | None) -> dict[str, object]:
    """What tells the texts of a run from others."""
    calibration = {} if windows is None else {"calibration": text_fingerprint(windows)}
    return {**calibration, **identity_of(tuned_on)}


def _asked(choice: Choice | None) -> dict[str, object]:
    """What decides the widths of a run that chooses them."""
    if choice is None:
        return {}
    ends = {"ends": [astuple(width) for width in choice.ends]} if choice.ends else {}
    return {"budget": choice.budget, "choice": [astuple(it) for it in choice.sizes], **ends}


def _with_chosen_widths(
    model: BlockwiseModel,
    windows: Tensor,
    job: Job,
    choice: Choice,
    shared: _Shared,
    measuring: Callable[[int, int], None] | None,
) -> Job:
    """The job with the widths in its journal, or those chosen now and written there, and with the
    bits of the embedding and the head."""
    journal, team = shared.journal, shared.team
    kept = team.from_leader(journal.widths)
    if kept is None:
        found = fitting_widths(
            model, windows, job.config, choice, cache=shared.cache, team=team, progress=measuring
        )
        kept = {name: [width.bits, width.group_size] for name, width in found.items()}
        if team.leads:
            journal.keep_widths(kept)
    widths = {name: Width(*width) for name, width in kept.items()}
    ends = widths.pop(model.spec.embed[0], None)
    job = replace(job, widths=widths)
    return job if ends is None else job.with_embedding_bits(ends.bits)


def _solved_layers(
    model: BlockwiseModel,
    windows: Tensor | None,
    job: Job,
    shared: _Shared,
    head: list[Hessian],
) -> Iterator[LayerReport]:
    """Solve all blocks. `head` gets the statistics of the head's inputs if it is to be solved."""
    settings: dict[str, Any] = {"cache": shared.cache, "team": shared.team, "widths": job.widths}
    if _solves_head(model, job):
        settings["at_end"] = partial(_keep_head, model, job, shared.team, head)
    return quantize_blocks(model, windows, job.config, shared.journal, **settings)


def _embedding_bits(job: Job) -> set[int]:
    """Bits of the embedding and the head in each of the outputs."""
    outputs, bits = job.outputs, job.config.embedding_bits
    files = {bits} if outputs.save or outputs.save_safetensors else set()
    return files | ({job.folder_bits} if outputs.save_dir else set())


def _solves_head(model: BlockwiseModel, job: Job) -> bool:
    """Whether any output has a head of so few bits that rounding it would show."""
    packed = model.spec.packs_embedding and job.config.method == "gptq"
    return packed and any(bits < 8 for bits in _embedding_bits(job))


def _keep_head(
    model: BlockwiseModel, job: Job, team: Team, kept: list[Hessian], activations: Activations
) -> None:
    """Keep the statistics of the head's inputs, from the activations after the last block."""
    hessian = head_hessian(model, activations, job.config, team)
    kept.extend([] if hessian is None else [hessian])


def _write(
    model: BlockwiseModel,
    job: Job,
    journal: Journal,
    calibration: dict[str, object],
    head: Sequence[Hessian],
) -> None:
    """Write every output from the journal's blocks.

    calibration: fingerprints of the texts. head: statistics of the head's inputs, if it is solved.
    """
    config, outputs = job.config, job.outputs
    named = {} if job.dataset is None else {"dataset": _utf8_name(job.dataset)}
    settings = from_config(config, {**calibration, **named}, job.widths)

    def with_ends(bits: int) -> Canonical:
        solves = bits < 8 and len(head) > 0
        solve = head_solver(head[0], config, bits) if solves else None
        return pack_embeddings(plain, bits, solve)

    plain = from_blocks(model.source, model.module, journal.tensors(), settings, job.widths)
    if outputs.save_dir is not None:
        packed = with_ends(job.folder_bits)
        name = outputs.format or default_format(map(packed.facts, packed.layers), FOLDER)
        write(packed, outputs.save_dir, name, container=FOLDER)
    if outputs.gguf is not None:
        # 8 bits are rounded as the file's own type, which is symmetric.
        packed = with_ends(config.embedding_bits) if config.embedding_bits < 8 else plain
        write(packed, outputs.gguf, "gguf", container=".gguf")
    files = {".pt": outputs.pt, ".safetensors": outputs.save_safetensors}
    if any(files.values()):
        packed = with_ends(config.embedding_bits)
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
