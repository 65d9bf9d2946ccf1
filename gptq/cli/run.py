"""The command lines `llama.py` and `bloom.py`: arguments to one QuantConfig and a few calls."""

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
    check_agreement,
    check_flags,
    default_name,
    given_settings,
    join_optional_values,
    parser,
    quant_config,
    spelled,
)
from gptq.config import QuantConfig
from gptq.errors import UserError
from gptq.models import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from gptq.api import Opened
    from gptq.blockwise.source import ModelSource
    from gptq.pipeline.report import LayerReport, Report

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
DEFAULT_NEW_TOKENS = 128


def main(spec: ModelSpec, argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        # parse_args would not let a flag stand between MODEL and DATASET.
        _run(spec, parser(spec).parse_intermixed_args(join_optional_values(words)))
    except UserError as error:
        if torchrun.rank() == 0:
            print("error:", *str(error).splitlines(), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as stop:
        if torchrun.rank() == 0:
            print("\n" + ": ".join(("interrupted", *map(str, stop.args))), file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _run(spec: ModelSpec, arguments: argparse.Namespace) -> None:
    evaluating = arguments.eval or arguments.eval_data is not None
    running = arguments.text is not None or arguments.chat or arguments.benchmark is not None
    quantizing = arguments.load is None and arguments.wbits not in (None, 16)
    check_flags(arguments, quantizing)
    if not (quantizing or evaluating or running):
        raise UserError(
            "nothing to do: give --wbits to quantize, or --eval, --text, --chat or --benchmark"
        )
    config = quant_config(arguments) if quantizing else None
    if torchrun.rank() > 0:
        # Only quantizing is shared out, and only the first process prints and writes.
        evaluating = running = False
        if config is None:
            return
    # The heavy imports wait until the command line makes sense.
    from gptq.blockwise.source import open_model

    source = open_model(arguments.model, weights=quantizing)
    kind = source.spec.model_type
    if kind != spec.model_type:
        raise UserError(f"{arguments.model}: is a {kind} model; use {kind}.py")
    opened = None if config else _open(arguments, arguments.load)
    # What comes after hours of work is read before them, so that it cannot fail after them.
    material = _material(arguments, source) if evaluating or running else None
    with tempfile.TemporaryDirectory() as scratch:
        report = None
        if config:
            report = _quantize(arguments, config, source.name, Path(scratch))
            opened = _open(arguments, report.written[0]) if material else None
        found = _evaluate(opened, material) if opened and material else {}
        if report and arguments.report is not None and torchrun.rank() == 0:
            from gptq.cli.html_report import write_page

            print(write_page(Path(arguments.report), source.name, spec, report, found))
        if opened and material and running:
            _use(arguments, opened, material)


@dataclass(frozen=True)
class _Material:
    """What the model is to be run on."""

    tokenizer: PreTrainedTokenizerBase
    windows: dict[str, Tensor]
    """For perplexity, by data set: int64 (n, seqlen)."""
    timed: Tensor | None
    """For the benchmark: int64 (tokens,)."""


def _material(arguments: argparse.Namespace, source: ModelSource) -> _Material:
    from gptq.api import window_length
    from gptq.data.windows import evaluation_windows

    tokenizer = source.tokenizer()
    names = arguments.eval_data or ([arguments.dataset] if arguments.eval else [])
    if arguments.new_eval:
        names = [f"{name}-new" if name in ("c4", "ptb") else name for name in names]
    seqlen = window_length(source, arguments.seqlen)
    windows = {
        name: evaluation_windows(name, tokenizer, seqlen, arguments.eval_windows) for name in names
    }
    timed, count = None, arguments.benchmark
    if count is not None:
        limit = getattr(source.config, "max_position_embeddings", None)
        if limit is not None and count > limit:
            raise UserError(f"--benchmark {count} exceeds the {limit} positions of {source.name}")
        timed = evaluation_windows(arguments.dataset, tokenizer, count, 1)[0]
    return _Material(tokenizer, windows, timed)


def _quantize(
    arguments: argparse.Namespace, config: QuantConfig, name: str, scratch: Path
) -> Report:
    """Quantize and show what came of it."""
    from rich.console import Console

    from gptq.api import DEFAULT_NSAMPLES, quantize
    from gptq.checkpoints.compatibility import facts, lines
    from gptq.cli.console import layer_table, progress_bar, totals_table
    from gptq.cli.html_report import PAGE
    from gptq.files.atomic import check_writable
    from gptq.pipeline.journal import finished_blocks

    paths = {
        "save": _output(arguments.save, name, config, ".pt"),
        "save_safetensors": _output(arguments.save_safetensors, name, config, ".safetensors"),
        "save_dir": None if arguments.save_dir is None else Path(arguments.save_dir),
    }
    if arguments.report is not None:
        check_writable(Path(arguments.report) / PAGE)
    kept = any(paths.values())
    if not kept:
        paths["save"] = scratch / default_name(name, config, ".pt")
    done = 0
    follows = torchrun.rank() > 0
    with contextlib.ExitStack() as held:
        show = None if follows else held.enter_context(progress_bar("quantizing"))

        def step(layer: LayerReport, total: int) -> None:
            nonlocal done
            done += 1
            if show is not None:
                show(done, total, f"block {layer.block} {layer.name}")

        try:
            report = quantize(
                arguments.model,
                arguments.dataset,
                config,
                **paths,
                format=arguments.format,
                quantize_embeddings=arguments.quantize_embeddings,
                nsamples=arguments.nsamples or DEFAULT_NSAMPLES,
                seqlen=arguments.seqlen,
                seed=arguments.seed or 0,
                device=arguments.device,
                dtype=arguments.dtype,
                resume=arguments.resume,
                max_memory=arguments.max_memory,
                progress=step,
            )
        except (KeyboardInterrupt, UserError) as error:
            blocks = finished_blocks(next(filter(None, paths.values()))) if kept else 0
            if not (blocks and done):
                raise
            hint = f"{blocks} finished blocks are kept; add --resume to the same command to go on"
            if isinstance(error, UserError):
                raise UserError(f"{error}; {hint}") from error
            raise KeyboardInterrupt(hint) from None
    if follows:
        return report
    console = Console()
    console.print(layer_table(report))
    console.print(totals_table(report))
    if paths["save_dir"] is not None:
        print("\n".join(lines(facts(paths["save_dir"]))))
    return report


def _output(given: str | None, name: str, config: QuantConfig, suffix: str) -> Path | None:
    if given is None:
        return None
    return default_name(name, config, suffix) if given == DEFAULT_NAME else Path(given)


def _open(arguments: argparse.Namespace, checkpoint: str | Path | None) -> Opened:
    """The full or quantized model, its weights still on disk."""
    from gptq.api import open_weights

    opened = open_weights(
        arguments.model,
        checkpoint,
        bits=arguments.wbits,
        group_size=arguments.groupsize,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    given = given_settings(arguments)
    if opened.checkpoint is not None:
        check_agreement(given, opened.checkpoint.settings, opened.checkpoint.path)
        return opened
    for field, value in given.items():
        if field != "bits":
            raise UserError(
                f"{spelled(field, value)} is for a quantized model: it needs --wbits 2, 3, 4 or "
                "8, or --load"
            )
    return opened


def _evaluate(opened: Opened, material: _Material) -> dict[str, float]:
    """Print perplexities and return them by data set."""
    from gptq.api import perplexity
    from gptq.cli.console import progress_bar

    found = {}
    for dataset, windows in material.windows.items():
        name = Path(dataset).name
        with progress_bar(f"evaluating {name}") as show:
            value = perplexity(opened, windows, show)
        count, seqlen = windows.shape
        print(f"perplexity {name} {value:.4f} ({count} x {seqlen} tokens)")
        found[name] = value
    return found


def _use(arguments: argparse.Namespace, opened: Opened, material: _Material) -> None:
    """What needs the whole model in memory."""
    from transformers import TextStreamer

    from gptq.api import load_weights
    from gptq.inference.generate import chat, text

    model, tokenizer = load_weights(opened), material.tokenizer
    new_tokens = arguments.max_new_tokens or DEFAULT_NEW_TOKENS
    if material.timed is not None:
        _benchmark(model, material.timed, arguments.check)
    if arguments.text is not None:
        print(arguments.text + text(model, tokenizer, arguments.text, new_tokens))
    if arguments.chat:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        for _ in chat(model, tokenizer, _lines(), new_tokens, streamer):
            pass


def _benchmark(model, tokens: Tensor, check: bool) -> None:
    from gptq.cli.console import MIB, progress_bar
    from gptq.inference.generate import benchmark

    with progress_bar("benchmark") as show:
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
            yield line
