"""`python -m belle.finetune MODEL DATA OUT`: train a model on instruction and chat records."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle.finetune.recipes import DEFAULT, RECIPES, SCHEDULES, Lora, Recipe
from gptq import torchrun
from gptq.cli.command import Parser, report_error
from gptq.cli.printing import prepare_streams, printable
from gptq.errors import UserError

if TYPE_CHECKING:
    from belle.finetune.run import Job, Result

# Numpy's generators take seeds below it.
SEEDS = 2**32
# Flags that replace a value of the recipe, with their types and help.
_OF_RECIPE: dict[str, tuple[type, str]] = {
    "batch": (int, "examples in a step, over all devices"),
    "rate": (float, "the highest learning rate"),
    "epochs": (int, "how often each example is trained on"),
    "warmup": (float, "share of the steps in which the rate rises"),
    "decay": (float, "weight decay"),
    "length": (int, "tokens of an example at most"),
}
_OF_LORA: dict[str, tuple[type, str]] = {
    "rank": (int, "rank of an adapter"),
    "alpha": (int, "an adapter is scaled by alpha / rank"),
    "dropout": (float, "share of an adapter's inputs that are left out"),
}


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python -m belle.finetune",
        description="Train a model on instruction and chat records, on answers alone. Several "
        "devices: accelerate launch --config_file FILE -m belle.finetune ...",
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="folder, .gguf file or hub name of a model")
    add("data", metavar="DATA", type=Path, help="a .json, .jsonl or .parquet file of records")
    add("out", metavar="OUT", type=Path, help="the folder to write (or file, of --train scales)")
    add("--recipe", choices=tuple(RECIPES), default=DEFAULT, help=f"default: {DEFAULT}")
    for name, (kind, text) in _OF_RECIPE.items():
        add(f"--{name}", type=kind, metavar="N", help=f"{text} (default: the recipe's)")
    add("--schedule", choices=SCHEDULES, help="of the rate (default: the recipe's)")
    _add_trained(command)
    add(
        "--prompt",
        choices=("auto", "belle", "template"),
        default="auto",
        help="auto: the tokenizer's chat template if it marks answers, else Human:/Assistant:",
    )
    add(
        "--too-long", choices=("cut", "drop"), default="cut", help="what is done to longer examples"
    )
    add("--file-order", action="store_true", help="take examples in the file's order")
    add("--scales", type=_counts, default=(), metavar="N,N", help="write OUT/N after N examples")
    add("--device-batch", type=int, metavar="N", help="examples that a device takes at once")
    add("--recompute", action="store_true", help="save memory: compute activations twice")
    add("--save-every", type=int, default=100, metavar="STEPS", help="between two saved states")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on with a run that was stopped")
    return command


def _add_trained(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what is trained (default: all weights, or the recipe's)")
    add = group.add_argument
    add("--lora", action="store_true", help="a LoRA adapter, also of a quantized model")
    for name, (kind, text) in _OF_LORA.items():
        add(f"--{name}", type=kind, metavar="N", help=text)
    add("--all-linear", action="store_true", help="adapters on all layers, not on q and v alone")
    add("--merge", action="store_true", help="write the full model with the adapter added")
    add("--top-blocks", type=int, metavar="N", help="the last N blocks")
    add("--train", choices=("scales",), help="the scales of a quantized model")
    add("--load", metavar="FILE", help="a quantized file or folder made from MODEL")


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        counts = (0,)
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text} is no list of whole numbers from 1 on, as N,N")
    return counts


def _job(arguments: argparse.Namespace) -> "Job":
    from belle.finetune.run import Job
    from belle.finetune.trained import Trained

    whole = ("batch", "epochs", "length", "rank", "alpha", "top_blocks", "device_batch")
    for name in (*whole, "save_every"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= arguments.seed < SEEDS:
        raise UserError(f"--seed {arguments.seed}: must be in 0..{SEEDS - 1}")
    recipe = _recipe(arguments)
    if recipe.lora is not None and not 0 <= recipe.lora.dropout < 1:
        raise UserError(f"--dropout {recipe.lora.dropout}: must be at least 0 and below 1")
    if not (recipe.rate > 0 and 0 <= recipe.warmup < 1 and recipe.decay >= 0):
        raise UserError("--rate must be above 0, --warmup in 0..1, --decay at least 0")
    trained = Trained(recipe.lora, arguments.top_blocks, arguments.train == "scales")
    own = vars(arguments)
    same = ("model", "data", "out", "load", "scales", "file_order", "prompt", "too_long", "merge")
    others = ("device_batch", "recompute", "save_every", "seed", "resume")
    return Job(recipe=recipe, trained=trained, **{name: own[name] for name in (*same, *others)})


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with what the flags replace."""
    own = vars(arguments)
    recipe = RECIPES[arguments.recipe]
    values = {name: own[name] for name in (*_OF_RECIPE, "schedule") if own[name] is not None}
    lora = recipe.lora or (Lora() if arguments.lora else None)
    of_lora: dict[str, Any] = {name: own[name] for name in _OF_LORA if own[name] is not None}
    if arguments.all_linear:
        of_lora["all_linear"] = True
    if lora is None and of_lora:
        raise UserError(f"--{next(iter(of_lora)).replace('_', '-')} is of a LoRA; add --lora")
    chosen = {
        "--lora": lora is not None,
        "--top-blocks": arguments.top_blocks is not None,
        "--train scales": arguments.train is not None,
    }
    if len(together := [flag for flag, is_set in chosen.items() if is_set]) > 1:
        raise UserError(f"{' and '.join(together)}: choose one of them, or another --recipe")
    return replace(recipe, lora=None if lora is None else replace(lora, **of_lora), **values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    prepare_streams()
    try:
        arguments = parser().parse_args(argv)
        job = _job(arguments)
        from transformers.utils import logging

        from belle.finetune.run import run

        # A bar for each saved state would be written over the one of the training.
        logging.disable_progress_bar()
        result = run(job)
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    if torchrun.rank() == 0:
        _print(job, result)
    return 0


def _print(job: "Job", result: "Result") -> None:
    from rich.console import Console
    from rich.table import Table

    encoded, recipe, losses = result.encoded, job.recipe, result.losses
    tenth = max(len(losses) // 10, 1)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    rows = {
        "trained": str(job.trained),
        "records": f"{len(encoded.examples)} used, {encoded.cut} of them cut; "
        f"{encoded.dropped} without an answer in {recipe.length} tokens left out",
        "examples": f"{result.examples} x {recipe.epochs} epochs, {len(losses)} steps",
        "loss": f"{first:.3f} (first tenth of the steps) to {last:.3f} (last)",
        "time": f"{result.seconds:.1f} s",
        "written": ", ".join(printable(str(path)) for path in result.written),
    }
    table = Table(title="fine-tuning", title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
