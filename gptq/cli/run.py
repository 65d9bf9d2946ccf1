"""Quantizing and running models: from the arguments to one QuantConfig and a few calls."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptq import torchrun
from gptq.cli.arguments import (
    DEFAULT_NAME,
    check_flags,
    default_name,
    join_optional_values,
    parser,
)
from gptq.cli.command import input_error, report_error
from gptq.cli.printing import harmless, prepare_streams, printable, without_surrogates
from gptq.cli.settings import (
    WBITS,
    check_agreement,
    quant_config,
    saves_gguf,
    settings_from,
    spelled,
    target_from,
)
from gptq.config import FULL_MODEL, QuantConfig
from gptq.errors import UserError
from gptq.models import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptq.api import Opened
    from gptq.blockwise.model import BlockwiseModel
    from gptq.blockwise.source import ModelSource
    from gptq.pipeline.report import LayerReport, Report

DEFAULT_NEW_TOKENS = 128


def main(spec: ModelSpec | None = None, argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    spec: of the architectures to accept, those that share its script; None: any.
    argv: without the program's name; None: this process's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    try:
        # parse_args would not let a flag stand between MODEL and DATASET.
        _run(spec, parser(spec).parse_intermixed_args(join_optional_values(argv)))
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    return 0


def _run(spec: ModelSpec | None, arguments: argparse.Namespace) -> None:
    evaluating = arguments.eval or arguments.eval_data is not None
    running = arguments.text is not None or arguments.chat or arguments.benchmark is not None
    asked = arguments.wbits not in (None, FULL_MODEL) or arguments.size is not None
    quantizing = arguments.load is None and asked
    check_flags(arguments, quantizing)
    if not (quantizing or evaluating or running):
        raise UserError(
            "nothing to do: give --wbits or --size to quantize, or --eval, --text, --chat or "
            "--benchmark"
        )
    config = quant_config(arguments) if quantizing else None
    if torchrun.rank() > 0:
        # Only quantizing is shared out, and only the first process prints and writes.
        evaluating = running = False
        if config is None:
            return
    if config is not None and saves_gguf(arguments) and arguments.groupsize is None:
        size = config.group_size
        print(f"groups of {size}: a .gguf file has a scale for {size} inputs; see --groupsize")
    # The heavy imports wait until the command line makes sense.
    from gptq.blockwise.source import open_model

    source = open_model(arguments.model, weights=arguments.load is None)
    _check_architecture(arguments.model, source.spec, spec)
    model = _empty_model(arguments, source, config)
    opened = None if config else _open(arguments, model, arguments.load)
    # Tokenizer and texts are read before hours of quantizing, so that they cannot fail after.
    inputs = _read_inputs(arguments, source) if evaluating or running else None
    with tempfile.TemporaryDirectory() as scratch:
        result = None
        if config:
            result = _quantize(arguments, config, model, Path(scratch))
            opened = _open(arguments, model, result.written[0]) if inputs else None
        perplexities = _evaluate(opened, inputs) if opened and inputs else {}
        if result and arguments.report is not None and torchrun.rank() == 0:
            from gptq.cli.html_report import write_page

            folder = Path(arguments.report)
            page = write_page(folder, source.name, source.spec, result, perplexities)
            print(printable(str(page)))
        if opened and inputs and running:
            _use(arguments, opened, inputs)


def _empty_model(
    arguments: argparse.Namespace, source: ModelSource, config: QuantConfig | None
) -> BlockwiseModel:
    """The model without its weights: to quantize and run, or without a config only to run."""
    from gptq.api import open_full
    from gptq.inference.loading import open_blockwise

    if config is not None:
        return open_full(source, arguments.device, arguments.dtype)
    return open_blockwise(source, device=arguments.device)


def _check_architecture(model: str, actual: ModelSpec, accepted: ModelSpec | None) -> None:
    """Raise UserError for a model that another script takes."""
    if accepted is not None and actual.script != accepted.script:
        raise UserError(f"{model}: is a {actual.model_type} model; use {actual.script}.py")


@dataclass(frozen=True)
class _Inputs:
    """What the model is to be run on."""

    tokenizer: PreTrainedTokenizerBase
    windows: dict[str, Tensor]
    """For perplexity, by data set: int64 (n, seqlen)."""
    benchmark: Tensor | None
    """For the benchmark: int64 (tokens,)."""


def _read_inputs(arguments: argparse.Namespace, source: ModelSource) -> _Inputs:
    """Read the tokenizer and every text. Raises UserError for what cannot be read or is short."""
    from gptq.blockwise.source import max_positions
    from gptq.data.windows import evaluation_windows
    from gptq.quantization import window_length

    tokenizer = source.tokenizer()
    names = arguments.eval_data or ([arguments.dataset] if arguments.eval else [])
    if arguments.new_eval:
        names = [f"{name}-new" if name in ("c4", "ptb") else name for name in names]
    seqlen = window_length(source, arguments.seqlen)
    windows = {
        name: evaluation_windows(name, tokenizer, seqlen, arguments.eval_windows) for name in names
    }
    benchmark, count = None, arguments.benchmark
    if count is not None:
        limit = max_positions(source.config)
        if limit is not None and count > limit:
            raise UserError(f"--benchmark {count} exceeds the {limit} positions of {source.name}")
        benchmark = evaluation_windows(arguments.dataset, tokenizer, count, 1)[0]
    return _Inputs(tokenizer, windows, benchmark)


def _quantize(
    arguments: argparse.Namespace, config: QuantConfig, model: BlockwiseModel, scratch: Path
) -> Report:
    """Quantize, and print the tables of the report.

    scratch: where the model is written if the arguments name no output.
    """
    from gptq import api
    from gptq.cli.progress import run_progress, show_training

    paths = _paths(arguments, model.source.name, config)
    journal = next(filter(None, paths.values()), None)
    if journal is None:
        paths["save"] = scratch / "model.pt"
    outputs = api.Outputs(
        **paths,
        format=arguments.format,
        quantize_embeddings=arguments.quantize_embeddings,
        report=None if arguments.report is None else Path(arguments.report),
    )
    job = api.Job(
        config,
        outputs,
        arguments.dataset,
        nsamples=arguments.nsamples or api.DEFAULT_NSAMPLES,
        seqlen=arguments.seqlen,
        seed=arguments.seed or 0,
        resume=arguments.resume,
        max_memory=arguments.max_memory,
        target=target_from(arguments),
    )
    leader = torchrun.rank() == 0
    done = 0
    bars = run_progress(len(model.spec.linears), job.target is not None)
    with bars if leader else contextlib.nullcontext((None, None)) as (measured, show):

        def step(layer: LayerReport, total: int) -> None:
            nonlocal done
            done += 1
            if show is not None:
                show(layer, total)

        try:
            result = api.run(model, job, step, measured, show_training)
        except (KeyboardInterrupt, Exception) as stop:
            hint = _resume_hint(journal) if done and leader else None
            message = input_error(stop)
            if hint is None or (message is None and isinstance(stop, Exception)):
                raise
            if message is not None:
                raise UserError(f"{message}; {hint}") from stop
            raise KeyboardInterrupt(hint) from None
    if leader:
        _print_result(result, (outputs.gguf, outputs.save_dir))
    return result


def _paths(arguments: argparse.Namespace, name: str, config: QuantConfig) -> dict[str, Path | None]:
    """The paths to write, by the fields of `api.Outputs`."""

    def path(argument: str | None, suffix: str) -> Path | None:
        if argument is None:
            return None
        if argument != DEFAULT_NAME:
            return Path(argument)
        return default_name(name, config, suffix, mixed)

    average = arguments.wbits if isinstance(arguments.wbits, float) else None
    mixed = arguments.size if average is None else f"{average:g}bit"

    if arguments.report is not None:
        from gptq.cli.html_report import PAGE
        from gptq.files.atomic import check_writable

        check_writable(Path(arguments.report) / PAGE)
    return {
        "save": path(arguments.save, ".pt"),
        "save_safetensors": path(arguments.save_safetensors, ".safetensors"),
        "save_dir": None if arguments.save_dir is None else Path(arguments.save_dir),
    }


def _resume_hint(journal: Path | None) -> str | None:
    """What to do to continue a run that was stopped; None if none of it is kept.

    journal: the output that the journal lies next to.
    """
    from gptq.pipeline.journal import finished_blocks

    blocks = 0 if journal is None else finished_blocks(journal)
    if not blocks:
        return None
    return f"{blocks} finished blocks are kept; add --resume to the same command to go on"


def _print_result(result: Report, outputs: Sequence[Path | None]) -> None:
    """Print the tables of a run, and which programs read what it wrote."""
    from rich.console import Console

    from gptq.checkpoints.compatibility import output_lines
    from gptq.cli.console import layer_table, totals_table

    console = Console()
    console.print(layer_table(result))
    console.print(totals_table(result))
    for path in filter(None, outputs):
        for line in output_lines(path):
            print(printable(line))


def _open(
    arguments: argparse.Namespace, model: BlockwiseModel, checkpoint: str | Path | None
) -> Opened:
    """The full or quantized model, its weights still on disk. The empty model is used up."""
    from gptq.inference.loading import open_weights

    opened = open_weights(
        model,
        checkpoint,
        bits=None if isinstance(arguments.wbits, float) else arguments.wbits,
        group_size=arguments.groupsize,
        dtype=arguments.dtype,
    )
    settings = settings_from(arguments)
    if opened.checkpoint is not None:
        check_agreement(settings, opened.checkpoint.settings, opened.checkpoint.path)
        return opened
    for field, value in settings.items():
        if field != "bits":
            raise UserError(
                f"{spelled(field, value)} is for a quantized model: it needs {WBITS}, or --load"
            )
    return opened


def _evaluate(opened: Opened, inputs: _Inputs) -> dict[str, float]:
    """Print perplexities and return them by data set."""
    from gptq.api import perplexity
    from gptq.cli.progress import progress_bar

    perplexities = {}
    for dataset, windows in inputs.windows.items():
        name = printable(Path(dataset).name)
        with progress_bar(f"evaluating {name}", "block") as show:
            value = perplexity(opened, windows, show)
        count, seqlen = windows.shape
        print(f"perplexity {name} {value:.4f} ({count} x {seqlen} tokens)")
        perplexities[name] = value
    return perplexities


def _use(arguments: argparse.Namespace, opened: Opened, inputs: _Inputs) -> None:
    """Load the whole model; time it, write on from a prompt, answer lines."""
    from gptq.api import load_weights
    from gptq.inference.generate import text

    model, tokenizer = load_weights(opened), inputs.tokenizer
    new_tokens = arguments.max_new_tokens or DEFAULT_NEW_TOKENS
    if inputs.benchmark is not None:
        _benchmark(model, inputs.benchmark, arguments.check)
    if arguments.text is not None:
        prompt = without_surrogates(arguments.text)
        print(harmless(prompt + text(model, tokenizer, prompt, new_tokens)))
    if arguments.chat:
        _chat(arguments, model, tokenizer, new_tokens)


def _chat(
    arguments: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
) -> None:
    from gptq.inference.answers import Served
    from gptq.inference.dialogue import Sampling, dialogue

    settings = {name: getattr(arguments, name) for name in ("top_k", "repetition_penalty", "seed")}
    sampling = Sampling(arguments.temperature or 0.0, arguments.top_p or 1.0, **settings)

    def show(piece: str) -> None:
        # Words are the tokenizer's, which is a downloaded file's.
        print(harmless(piece), end="", flush=True)

    def notify(sentence: str) -> None:
        print(f"note: {sentence}", file=sys.stderr, flush=True)

    served = Served.of(model, tokenizer)
    for _ in dialogue(served, _lines(), sampling, new_tokens, show, notify):
        print(flush=True)


def _benchmark(model, tokens: Tensor, check: bool) -> None:
    from gptq.cli.console import MIB
    from gptq.cli.progress import progress_bar
    from gptq.inference.generate import benchmark

    with progress_bar("benchmark", "token") as show:
        result = benchmark(model, tokens, check, show)
    memory = "GPU memory" if model.device.type == "cuda" else "resident memory"
    print(f"median {result.median * 1e3:.2f} ms a token, {result.tokens_per_second:.2f} tokens/s")
    print(f"peak {memory} {result.peak_memory / MIB:.0f} MiB")
    if result.perplexity is not None:
        print(f"perplexity of these {result.tokens} tokens {result.perplexity:.4f}")


def _lines() -> Iterator[str]:
    """Lines typed or piped in, until the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield without_surrogates(line)
