"""`python -m belle.release DATA... OUT`: instruction data filtered, and in subsets of any size."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from belle.records import FORMS, parse, values
from belle.release import ALL, REMOVED, REPORT
from belle.release.filters import LANGUAGES, of_role
from gptq.cli.command import Parser, report_error
from gptq.cli.printing import prepare_streams, printable, without_surrogates
from gptq.cli.progress import progress_bar
from gptq.errors import UserError
from gptq.files.atomic import check_writable

if TYPE_CHECKING:
    from belle.release.pipeline import Plan

EXTRA = "releasing data needs {}, which is not here: pip install 'belle-gptq[belle]'"
# Characters of a text.
SAMPLE = 40


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python -m belle.release",
        description="Filter instruction data and write it in subsets, each within the next.",
    )
    add = command.add_argument
    add("data", metavar="DATA", nargs="+", type=Path, help="JSON lines, a JSON list or Parquet")
    add("out", metavar="OUT", type=Path, help="a new folder")
    add(
        "--form",
        choices=tuple(FORMS),
        default="instruction",
        help="of records (default: %(default)s)",
    )
    add("--scales", type=_scales, default=[], metavar="N,N,...", help="sizes of subsets to write")
    add("--evaluation", type=Path, metavar="FILE", help="whose questions must not be in the data")
    add(
        "--language",
        choices=LANGUAGES,
        default="any",
        help="of questions and answers (default: %(default)s)",
    )
    add("--without", type=_names, default=[], metavar="FILTER,...", help="filters to leave out")
    add(
        "--threshold",
        type=_share,
        default=0.8,
        metavar="J",
        help="Jaccard similarity from which records are near duplicates (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the order (default: 0)")
    add(
        "--workers",
        type=_count,
        default=os.cpu_count(),
        metavar="N",
        help="processes, or jobs at a time (default: one a core)",
    )
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="(default: local)")
    add("--partition", help="of Slurm")
    add("--time", default="04:00:00", help="limit of Slurm for a job (default: %(default)s)")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="for files in between, which stay there; needed for slurm and ray, on a shared disk",
    )
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    prepare_streams()
    # Of bars that datatrove shows; read when its packages are imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        return _release(parser().parse_args(argv))
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)


def _release(arguments: argparse.Namespace) -> int:
    try:
        # Takes a second, and needs more packages than the command line does.
        from belle.release import pipeline
    except ModuleNotFoundError as error:
        raise UserError(EXTRA.format(error.name)) from error
    started, out = perf_counter(), arguments.out.resolve()
    _check_executor(arguments)
    if out.is_dir() and (names := sorted(path.name for path in out.iterdir())):
        raise UserError(f"{arguments.out}: has {names[0]} in it; give a new folder")
    check_writable(out, folder=True)
    plan = _plan(arguments)
    cluster = pipeline.Cluster(
        arguments.executor, arguments.workers, arguments.partition, arguments.time
    )
    with (
        pipeline.work_folder(out, arguments.work and arguments.work.resolve()) as work,
        progress_bar("releasing", "task") as show,
    ):
        pipeline.run(plan, cluster, work, show)
    if arguments.executor == "slurm":
        print(printable(f"submitted; the last job, release-publish, writes {arguments.out}"))
        return 0
    _show(arguments.out, perf_counter() - started)
    return 0


def _check_executor(arguments: argparse.Namespace) -> None:
    chosen = f"--executor {arguments.executor}"
    if arguments.executor == "local":
        return
    if arguments.work is None:
        raise UserError(f"{chosen}: add --work, on a disk of all nodes")
    if arguments.executor == "slurm" and arguments.partition is None:
        raise UserError(f"{chosen}: add --partition")
    tool = {"slurm": "sbatch", "ray": "ray"}[arguments.executor]
    if which(tool) is None:
        raise UserError(f"{chosen}: there is no {tool}; run it on a machine that has it")


def _plan(arguments: argparse.Namespace) -> "Plan":
    """What the arguments ask for. Raises UserError for what cannot be."""
    from belle.release.blocks import Source
    from belle.release.filters import filters
    from belle.release.pipeline import Plan

    asked = [] if arguments.evaluation is None else questions(arguments.evaluation)
    chosen = filters(arguments.language, asked)
    for name in arguments.without:
        if name not in chosen:
            raise UserError(f"--without {name}: choose of {', '.join(chosen)}")
        del chosen[name]
    sources = [Source.of(path) for path in arguments.data]
    count = sum(source.parts for source in sources)
    for scale in arguments.scales:
        # The parts of a Parquet file are many records.
        if scale > count and not any(path.suffix == ".parquet" for path in arguments.data):
            raise UserError(f"--scales {scale}: the data has {count} records; ask for fewer")
    options = {
        "data": [source.name for source in sources],
        "evaluation questions": len(asked),
        **{
            name: getattr(arguments, name)
            for name in ("form", "scales", "seed", "language", "threshold")
        },
    }
    return Plan(sources, arguments.out.resolve(), chosen, options, arguments.threshold)


def questions(path: Path) -> list[str]:
    """The questions of an evaluation file: its field `question`, as BELLE's has, or a record's.

    Raises UserError for a file that cannot be read or has a record without a question.
    """
    asked: list[str] = []
    for place, record in values(path):
        match record:
            case {"question": str(question)}:
                asked.append(question)
            case _:
                try:
                    asked.extend(of_role(parse(record), "user"))
                except ValueError as error:
                    raise UserError(f"{path}, {place}: {error}, or question") from error
    if not asked:
        raise UserError(f"{path}: has no questions; pass a file with some")
    return asked


def _show(out: Path, seconds: float) -> None:
    """Print what became of the records. Raises UserError if there is less than was asked for."""
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    console = Console()
    table = Table(title=f"{report['read']} records", title_justify="left")
    table.add_column("filter")
    table.add_column("removed", justify="right")
    table.add_column("one of them", overflow="fold")
    for name, entry in report["filters"].items():
        table.add_row(name, str(entry["removed"]), escape(_sample(entry["first"])))
    table.add_section()
    table.add_row("kept", str(report["kept"]), f"{seconds:.1f} s")
    console.print(table)
    for name in (ALL, *(f"{scale}.jsonl" for scale in report["scales"]), REMOVED, REPORT):
        print(printable(str(out / name)))
    if missing := report["scales not written"]:
        problem = f"has no {missing[0]}.jsonl, because {report['kept']} records are left"
    elif not report["kept"]:
        problem = f"no record is left; {REMOVED} has the reasons"
    else:
        return
    raise UserError(f"{out}: {problem}")


def _sample(entry: dict[str, Any] | None) -> str:
    """The reason and the beginnings of the last question and its answer, in a line."""
    if entry is None:
        return ""
    try:
        *_, question, answer = (turn["content"] for turn in parse(entry["record"]))
        text = f"{_start(question)} → {_start(answer)}"
    except ValueError:
        text = _start(json.dumps(entry["record"], ensure_ascii=False))
    return text if entry["reason"] == entry["filter"] else f"{entry['reason']}: {text}"


def _start(text: str) -> str:
    line = without_surrogates(printable(" ".join(text.split())))
    return line if len(line) <= SAMPLE else f"{line[:SAMPLE]}…"


def _scales(text: str) -> list[int]:
    return sorted({_count(part) for part in text.split(",")})


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _count(text: str) -> int:
    # No more digits than int takes.
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0 and up to 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
