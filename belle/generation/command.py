"""`python generate_instruction.py generate_instruction_following_data`: BELLE's command line."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from belle.endpoint import APIS, OPENAI, Endpoint
from belle.generation.output import Output
from belle.generation.prompts import one_line
from belle.generation.run import Run, Settings
from belle.generation.seeds import LANGUAGES, built_in, read_seeds
from belle.generation.similarity import Pool
from belle.generation.state import State
from belle.journal import Record, open_journal
from gptq.cli.command import Parser, report_error
from gptq.cli.printing import prepare_streams, printable
from gptq.cli.progress import progress_bar
from gptq.errors import UserError
from gptq.files.atomic import unwritable

FUNCTION = "generate_instruction_following_data"
OUTPUT, JOURNAL, REFUSED = "Belle.train.json", "Belle.train.journal", "Belle.train.refused.jsonl"
CONCURRENCY = 4
MANY = 2**31 - 1


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python generate_instruction.py",
        description="Generate instruction data with a teacher model behind an OpenAI-compatible "
        f"endpoint. {OUTPUT} may be edited between runs; the same command goes on.",
    )
    add = command.add_argument
    add("function", choices=(FUNCTION,), metavar=FUNCTION, help="what to do")
    whole, share, truth = _number(int, 1, MANY), _number(float, 0, 1), _truth
    for flag, kind, default, text in (
        ("--output_dir", Path, Path(), f"where {OUTPUT} is written"),
        ("--seed_tasks_path", Path, None, "JSON lines of seed tasks (default: ours)"),
        ("--num_instructions_to_generate", whole, 1, "tasks to accept"),
        ("--api", str, "completion", f"one of {', '.join(APIS)}"),
        ("--model_name", str, "text-davinci-003", "the teacher"),
        ("--base_url", str, None, f"the endpoint, up to /v1 (default: $OPENAI_BASE_URL, {OPENAI})"),
        ("--num_prompt_instructions", whole, 3, "examples in a prompt"),
        ("--concurrency", whole, None, f"requests in flight (default: {CONCURRENCY})"),
        ("--request_batch_size", whole, None, "BELLE's name of --concurrency"),
        ("--temperature", _number(float, 0, 2), 1.0, ""),
        ("--top_p", share, 1.0, ""),
        ("--max_tokens", whole, 1024, "of a reply"),
        ("--num_cpus", whole, 16, "threads that compare the tasks of a reply, at most"),
        ("--language", str, "zh", f"of prompts and our seeds, one of {', '.join(LANGUAGES)}"),
        ("--similarity", share, 0.7, "the highest ROUGE-L of two instructions"),
        ("--seed", _number(int, 0, MANY), None, "of prompts; if given, also sent with requests"),
    ):
        shown = "" if default is None else f"(default: {default})"
        add(flag, type=kind, default=default, help=f"{text} {shown}".strip())
    add(
        "--two_stage",
        type=truth,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="ask for instructions first, then for each answer: for small teachers",
    )
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    prepare_streams()
    try:
        _generate(parser().parse_args(argv))
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.language not in LANGUAGES:
        raise UserError(f"--language {arguments.language}: give one of {', '.join(LANGUAGES)}")
    url = arguments.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    endpoint = Endpoint(url, arguments.model_name, arguments.api)
    path = arguments.seed_tasks_path or built_in(arguments.language)
    seeds = read_seeds(path)
    settings = Settings(**{it.name: getattr(arguments, it.name) for it in fields(Settings)})
    if settings.num_prompt_instructions > len(seeds):
        raise UserError(
            f"--num_prompt_instructions {settings.num_prompt_instructions}: {path} has "
            f"{len(seeds)} seeds; give no more"
        )
    concurrency = arguments.concurrency or arguments.request_batch_size or CONCURRENCY
    count, folder = arguments.num_instructions_to_generate, arguments.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    known = [it.instruction for it in seeds]
    if settings.two_stage:
        # Which is how a prompt shows them.
        known += [one_line(task) for it in seeds for task in it.instances if task.input]
    pool = Pool(known, settings.similarity, arguments.num_cpus)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(
            open_journal(folder / JOURNAL, settings.identity(seeds, endpoint))
        )
        output = Output(folder / OUTPUT, journal)
        state = State(pool, stack.enter_context(_refusals(folder / REFUSED)))
        for line in journal.lines:
            state.add(line)
        first = min(len(state.accepted), count)
        try:
            with progress_bar("generating", "task", first) as bar:
                run = Run(
                    endpoint,
                    settings,
                    seeds,
                    journal,
                    state=state,
                    count=count,
                    concurrency=concurrency,
                    show=lambda: bar(min(len(state.accepted), count), count, _summary(state)),
                )
                asyncio.run(run.run())
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("the same command goes on") from stop
        finally:
            output.extend(state.accepted[:count])
            if state.requests:
                Console().print(_table(state, output))


def _summary(state: State) -> str:
    refused = ", ".join(f"{number} {reason}" for reason, number in state.refused.most_common(2))
    return f"{state.tokens} tokens; refused: {refused or 'none'}"


def _table(state: State, output: Output) -> Table:
    """What all runs together came to."""
    table = Table(title="generated", title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("requests", str(state.requests))
    table.add_row("tokens", str(state.tokens))
    for reason, number in state.refused.most_common():
        table.add_row(f"refused: {escape(reason)}", str(number))
    table.add_row("accepted", str(len(state.accepted)))
    table.add_row("written", f"{output.written} to {escape(printable(str(output.path)))}")
    return table


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[Callable[[Record], None]]:
    """Write refused tasks to a file of JSON lines, which begins anew with each run."""
    try:
        file: TextIO = path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise unwritable(path, error) from error

    def write(record: Record) -> None:
        try:
            print(json.dumps(record, ensure_ascii=False), file=file)
        except OSError as error:
            raise unwritable(path, error) from error

    with file:
        yield write


def _number(kind: type, least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text} is no {noun} from {least} to {most}")
        return number

    return parse


def _truth(text: str) -> bool:
    """As a flag of BELLE's command lines: --two_stage, --two_stage=True, --two_stage False."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text} is neither True nor False")
    return known[text.lower()]


if __name__ == "__main__":
    sys.exit(main())
