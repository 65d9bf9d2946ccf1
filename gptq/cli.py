"""The command lines `llama.py` and `bloom.py`: arguments to one QuantConfig and a few calls."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gptq.config import ORDERS, SCALE_SEARCHES, QuantConfig
from gptq.errors import UserError
from gptq.models import ModelSpec

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# Flags whose value may be left out: the next word is theirs only if it ends like this.
OPTIONAL_VALUES = {"--save": ".pt", "--save_safetensors": ".safetensors"}
DEFAULT_NAME = ""


def main(spec: ModelSpec, argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser(spec).parse_args(join_optional_values(words))
    try:
        _run(spec, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted: finished blocks are kept; add --resume to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def join_optional_values(words: Sequence[str]) -> list[str]:
    """Tie `--save x.pt` into one word, and give a bare `--save` an empty value.

    argparse would otherwise let `--save MODEL c4` swallow MODEL.
    """
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        ending = OPTIONAL_VALUES.get(word)
        if ending is not None:
            taken = rest and rest[0].endswith(ending) and not rest[0].startswith("-")
            word = f"{word}={rest.pop(0) if taken else DEFAULT_NAME}"
        joined.append(word)
    return joined


def parser(spec: ModelSpec) -> argparse.ArgumentParser:
    """The flags of GPTQ-for-LLaMa under their names, and a few more."""
    command = argparse.ArgumentParser(
        description=f"Quantize a {spec.model_type} model with GPTQ, or run one.",
        epilog="Text files, .jsonl and .parquet files can stand for DATASET.",
        allow_abbrev=False,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="local folder, hub name or .gguf file")
    add(
        "dataset",
        metavar="DATASET",
        nargs="?",
        help="c4, wikitext2, ptb, c4-new, ptb-new, or a local file of text, jsonl or parquet",
    )
    _add_quantization(command.add_argument_group("quantization"))
    _add_files(command.add_argument_group("files"))
    _add_actions(command.add_argument_group("what to do with the model"))
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    machine.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of activations (default: float32 on a CPU, the model's 16-bit type on a GPU)",
    )
    return command


def _add_quantization(group) -> None:
    add = group.add_argument
    add("--wbits", type=int, choices=(2, 3, 4, 8, 16), help="bits a weight; 16 is the full model")
    add("--groupsize", type=int, help="inputs that share a scale; -1 for all (default: 128)")
    add("--sym", action="store_true", default=None, help="symmetric grids; every reader takes them")
    add("--nearest", action="store_true", help="round to nearest only; needs no DATASET")
    add("--nsamples", type=int, default=128, help="calibration windows (default: 128)")
    add("--seqlen", type=int, help="tokens in a window (default: 2048, or the model's limit)")
    add("--seed", type=int, default=0, help="of the choice of windows (default: 0)")
    add("--percdamp", type=float, help="damping, a share of H's mean diagonal (default: 0.01)")
    add("--order", choices=ORDERS, help="in what order columns are solved (default: gar)")
    add("--act-order", action="store_true", help="the same as --order act")
    add("--static-groups", action="store_true", default=None, help="find all grids before solving")
    add(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        help="solve a block's layers in turn, each on what the ones before it produce (default)",
    )
    add("--scale-search", choices=SCALE_SEARCHES, help="how scales are found (default: hessian)")


def _add_files(group) -> None:
    add = group.add_argument
    add("--save", metavar="PATH.pt", help="write a .pt state dict; PATH may be left out")
    add("--save_safetensors", metavar="PATH.safetensors", help="the same as safetensors")
    add("--save-dir", metavar="DIR", help="write a Hugging Face folder")
    add("--resume", action="store_true", help="continue a quantization that was stopped")
    add("--load", metavar="PATH", help="a quantized .pt, .safetensors or folder made from MODEL")


def _add_actions(group) -> None:
    add = group.add_argument
    add("--eval", action="store_true", help="print perplexity on DATASET")
    add("--new-eval", action="store_true", help="evaluate c4 and ptb as c4-new and ptb-new")
    add("--eval-data", metavar="DATASET", action="append", help="evaluate on this instead")
    add("--eval-windows", type=int, metavar="N", help="evaluate on the first N windows only")
    add("--text", metavar="PROMPT", help="write on from PROMPT")
    add("--chat", action="store_true", help="answer lines from standard input")
    add("--max-new-tokens", type=int, default=128, help="of --text and --chat (default: 128)")
    add("--benchmark", type=int, metavar="N", help="time N tokens of DATASET, one by one")
    add("--check", action="store_true", help="with --benchmark: perplexity of those tokens too")


def quant_config(arguments: argparse.Namespace) -> QuantConfig:
    """The settings that the flags ask for, defaults for what they leave open."""
    if arguments.act_order and arguments.order not in (None, "act"):
        raise UserError(f"--act-order and --order {arguments.order} disagree; give one of them")
    search = arguments.scale_search or ("minmax" if arguments.nearest else None)
    asked = {
        "bits": arguments.wbits,
        "group_size": arguments.groupsize,
        "sym": arguments.sym,
        "order": "act" if arguments.act_order else arguments.order,
        "static_groups": arguments.static_groups,
        "true_sequential": arguments.true_sequential,
        "percdamp": arguments.percdamp,
        "scale_search": search,
        "method": "rtn" if arguments.nearest else None,
    }
    return QuantConfig(**{key: value for key, value in asked.items() if value is not None})


def default_name(model: str, config: QuantConfig, suffix: str) -> Path:
    """`belle-llama-7b-2m-4bit-128g.pt` for BELLE-LLAMA-7B-2M, in the current folder."""
    stem = Path(model).name.removesuffix(".gguf").lower()
    group = f"-{config.group_size}g" if config.group_size != -1 else ""
    return Path(f"{stem}-{config.bits}bit{group}{suffix}")


def _run(spec: ModelSpec, arguments: argparse.Namespace) -> None:
    actions = arguments.eval or arguments.eval_data or arguments.chat
    actions = actions or arguments.text is not None or arguments.benchmark is not None
    quantizing = arguments.load is None and arguments.wbits not in (None, 16)
    if not quantizing and not actions:
        raise UserError(
            "nothing to do: give --wbits to quantize, or --eval, --text, --chat or --benchmark"
        )
    _check_flags(arguments, quantizing)
    # The heavy imports wait until the command line makes sense.
    from gptq.source import open_model

    found = open_model(arguments.model).spec
    if found.model_type != spec.model_type:
        raise UserError(
            f"{arguments.model}: is a {found.model_type} model; use {found.model_type}.py"
        )
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = arguments.load
        if quantizing:
            checkpoint = _quantize(arguments, Path(scratch))
        if actions:
            _act(arguments, checkpoint)


def _check_flags(arguments: argparse.Namespace, quantizing: bool) -> None:
    saving = [
        flag
        for flag in ("save", "save_safetensors", "save_dir")
        if getattr(arguments, flag) is not None
    ]
    if saving and not quantizing:
        raise UserError(f"--{saving[0]} needs --wbits 2, 3, 4 or 8, and no --load")
    if arguments.load is not None and arguments.wbits == 16:
        raise UserError("--wbits 16 is the full model; leave out --load, or --wbits")
    if arguments.check and arguments.benchmark is None:
        raise UserError("--check needs --benchmark N")
    for flag in ("benchmark", "max_new_tokens", "eval_windows", "nsamples", "seqlen"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: give a number above 0")


def _quantize(arguments: argparse.Namespace, scratch: Path) -> Path:
    from gptq.api import quantize
    from gptq.report import layer_table, totals_table

    config = quant_config(arguments)
    paths: dict[str, Path | None] = {
        "save": _output(arguments.save, arguments.model, config, ".pt"),
        "save_safetensors": _output(
            arguments.save_safetensors, arguments.model, config, ".safetensors"
        ),
        "save_dir": None if arguments.save_dir is None else Path(arguments.save_dir),
    }
    if not any(paths.values()):
        paths["save"] = scratch / default_name(arguments.model, config, ".pt")
    with _progress("quantizing") as show:
        done = 0

        def step(layer, total: int) -> None:
            nonlocal done
            done += 1
            show(done, total, f"block {layer.block} {layer.name}")

        report = quantize(
            arguments.model,
            arguments.dataset,
            config,
            **paths,
            nsamples=arguments.nsamples,
            seqlen=arguments.seqlen,
            seed=arguments.seed,
            device=arguments.device,
            dtype=arguments.dtype,
            resume=arguments.resume,
            progress=step,
        )
    console = Console()
    console.print(layer_table(report))
    console.print(totals_table(report))
    return report.written[0]


def _output(given: str | None, model: str, config: QuantConfig, suffix: str) -> Path | None:
    if given is None:
        return None
    return default_name(model, config, suffix) if given == DEFAULT_NAME else Path(given)


def _act(arguments: argparse.Namespace, checkpoint: str | Path | None) -> None:
    from gptq import api

    opened = api.open_weights(
        arguments.model,
        checkpoint,
        bits=arguments.wbits if arguments.wbits != 16 else None,
        group_size=arguments.groupsize,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    if arguments.eval or arguments.eval_data:
        _evaluate(arguments, opened)
    if arguments.text is None and not arguments.chat and arguments.benchmark is None:
        return
    tokenizer = opened.source.tokenizer()
    model = api.load_weights(opened)
    if arguments.benchmark is not None:
        _benchmark(arguments, opened, model, tokenizer)
    if arguments.text is not None:
        _text(arguments, model, tokenizer)
    if arguments.chat:
        _chat(arguments, model, tokenizer)


def _evaluate(arguments: argparse.Namespace, opened) -> None:
    from gptq.api import perplexity, window_length
    from gptq.calibration import evaluation_windows

    seqlen = window_length(opened.source, arguments.seqlen)
    tokenizer = opened.source.tokenizer()
    for dataset in arguments.eval_data or [_dataset(arguments, "--eval")]:
        if arguments.new_eval and dataset in ("c4", "ptb"):
            dataset = f"{dataset}-new"
        windows = evaluation_windows(dataset, tokenizer, seqlen, arguments.eval_windows)
        with _progress(f"evaluating {Path(dataset).name}") as show:
            value = perplexity(opened, windows, lambda done, total: show(done, total, ""))
        print(f"perplexity {Path(dataset).name} {value:.4f} ({len(windows)} x {seqlen} tokens)")


def _benchmark(arguments: argparse.Namespace, opened, model, tokenizer) -> None:
    from gptq.calibration import evaluation_windows
    from gptq.generate import benchmark
    from gptq.report import MIB

    dataset = _dataset(arguments, "--benchmark")
    tokens = evaluation_windows(dataset, tokenizer, arguments.benchmark, 1)[0]
    with _progress("benchmark") as show:
        result = benchmark(
            model, tokens, arguments.check, lambda done, total: show(done, total, "")
        )
    memory = "GPU memory" if opened.device.type == "cuda" else "resident memory"
    print(f"median {result.median * 1e3:.2f} ms a token, {result.tokens_per_second:.2f} tokens/s")
    print(f"peak {memory} {result.peak_memory / MIB:.0f} MiB")
    if result.perplexity is not None:
        print(f"perplexity of these {result.tokens} tokens {result.perplexity:.4f}")


def _text(arguments: argparse.Namespace, model, tokenizer) -> None:
    from gptq.generate import text

    print(arguments.text + text(model, tokenizer, arguments.text, arguments.max_new_tokens))


def _chat(arguments: argparse.Namespace, model, tokenizer) -> None:
    from transformers import TextStreamer

    from gptq.generate import chat

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for _ in chat(model, tokenizer, _lines(), arguments.max_new_tokens, streamer):
        pass


def _lines() -> Iterator[str]:
    """Lines typed or piped in, until the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _dataset(arguments: argparse.Namespace, flag: str) -> str:
    if arguments.dataset is None:
        raise UserError(f"{flag} needs DATASET: c4, wikitext2, ptb or a text file")
    return arguments.dataset


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {what}".strip())

        yield show
