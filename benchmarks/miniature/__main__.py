"""BELLE's whole circle in small: generate data, release it, train, quantize, compare, in one page.

    python -m benchmarks.miniature

Each step is a command as docs/belle.md has it. One that has ended is not run again; one that was
stopped goes on.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.common.assets import DEFAULT_CACHE, model_path
from benchmarks.miniature.page import write_page
from benchmarks.miniature.teacher import MODEL, evaluation, serving
from gptq.cli.command import Parser, report_error
from gptq.errors import UserError
from gptq.files.atomic import whole_file

ROOT = Path(__file__).resolve().parents[2]
TIMES = "times.json"
BITS = (8, 4)


@dataclass(frozen=True)
class Settings:
    folder: Path
    model: Path
    tasks: int
    """To generate: more than the largest scale, because filters remove some."""
    scales: tuple[int, ...]
    top_blocks: int
    length: int
    """Tokens of an example at most."""
    each: int
    """Evaluation questions of each kind."""

    def path(self, name: str) -> str:
        return shown(self.folder / name)


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    output: Path


def steps(settings: Settings, url: str) -> list[Step]:
    """The commands of the circle in their order. url: of the teacher, who is the judge too."""
    path, largest = settings.path, max(settings.scales)
    scales, model = ",".join(map(str, settings.scales)), shown(settings.model)
    generate = "generate_instruction.py generate_instruction_following_data --api=chat "
    generate += f"--model_name={MODEL} --base_url={url} --language=en --similarity=0.85 --seed=1 "
    generate += f"--num_instructions_to_generate={settings.tasks} --output_dir={path('data')}"
    release = f"-m belle.release {path('data/Belle.train.json')} {path('release')} --language en "
    release += f"--scales {scales} --evaluation {path('evaluation.json')}"
    data, trained = path(f"release/{largest}.jsonl"), path(f"trained/{largest}")
    train = f"-m belle.finetune {model} {data} {path('trained')} --scales {scales} "
    train += "--schedule constant --epochs 1 --batch 8 --rate 3e-4 --prompt belle --resume "
    train += f"--top-blocks {settings.top_blocks} --length {settings.length}"
    names = {str(scale): path(f"trained/{scale}") for scale in settings.scales}
    names |= {f"{largest} {bits} bit": path(f"packed/{bits}bit") for bits in BITS}
    compare = f"-m belle.compare {path('evaluation.json')} {' '.join(names.values())} "
    compare += f"--names {shlex.quote(','.join(names))} --max-new-tokens 12 "
    compare += f"--judge {url} --judge-model {MODEL} --votes 1 --out {path('comparison')}"
    lines = {"generate": (generate, "data/Belle.train.json"), "release": (release, "release")}
    lines["train"] = (train, f"trained/{largest}")
    for bits in BITS:
        target = f"packed/{bits}bit"
        quantize = f"llama.py {trained} {data} --wbits {bits} --groupsize 64 --nsamples 64 "
        quantize += f"--seqlen 64 --quality fast --save-dir {path(target)} --resume"
        lines[f"quantize to {bits} bit"] = (quantize, target)
    lines["compare"] = (compare, "comparison.json")
    folder = settings.folder
    return [Step(name, shlex.split(line), folder / end) for name, (line, end) in lines.items()]


def run(settings: Settings) -> Path:
    """Run the steps that have not ended yet, and write the page; returns its path.

    Raises UserError for the folder of another run, and SystemExit, with the exit code of a command
    that failed.
    """
    questions = evaluation(settings.each)
    (settings.folder / "packed").mkdir(parents=True, exist_ok=True)
    identity = {name: str(value) for name, value in vars(settings).items()}
    if write_new(settings.folder / "settings.json", identity) != identity:
        raise UserError(
            f"{settings.folder}: is of other arguments; remove it, or give another --folder"
        )
    fields = [
        {"question": it.question, "class": it.kind, "std_answer": it.answer} for it in questions
    ]
    write_new(settings.folder / "evaluation.json", fields)
    times = settings.folder / TIMES
    known = write_new(times, {})
    with serving(questions) as url:
        for step in steps(settings, url):
            # Its port is another one each time.
            line = shlex.join(["python", *step.command]).replace(url, "URL")
            before = known.get(step.name, {"seconds": 0.0, "cpu": 0.0, "ended": False})
            if before["ended"] and step.output.exists():
                continue
            print(f"$ python {shlex.join(step.command)}", flush=True)
            code, seconds, cpu = call(step.command)
            known[step.name] = {
                "command": line,
                "seconds": before["seconds"] + seconds,
                "cpu": before["cpu"] + cpu,
                "ended": code == 0,
            }
            write(times, known)
            if code:
                raise SystemExit(code)
    return write_page(settings.folder, settings.model, settings.scales, known)


def write(path: Path, value: Any) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1))


def write_new(path: Path, value: Any) -> Any:
    """Write a file if it is not there; returns what it has."""
    if not path.exists():
        write(path, value)
    return json.loads(path.read_text())


def call(command: list[str]) -> tuple[int, float, float]:
    """Run a command of Python as a user would; returns its exit code, seconds and CPU seconds."""
    started, before = perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen([sys.executable, *command], cwd=ROOT) as child:
        code = None
        while code is None:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                # The command got it too, and saves what it has.
                continue
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, perf_counter() - started, cpu


def shown(path: Path) -> str:
    """A path as a user in the checkout would write it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python -m benchmarks.miniature",
        description="Run BELLE's whole circle in small, and write a page about it.",
    )
    add = command.add_argument
    add("--folder", type=Path, default=DEFAULT_CACHE / "belle", help="default: .cache/belle")
    add("--model", type=Path, help="default: SmolLM2-135M-Instruct, fetched if it is not there")
    add("--tasks", type=int, default=330, metavar="N", help="to generate (default: 330)")
    add("--scales", default="16,64,256", metavar="N,N", help="default: 16,64,256")
    add("--top-blocks", type=int, default=8, metavar="N", help="to train (default: 8)")
    add("--length", type=int, default=64, metavar="N", help="tokens of an example (default: 64)")
    add("--each", type=int, default=10, metavar="N", help="questions of a kind (default: 10)")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        own = vars(parser().parse_args(argv))
        own["scales"] = tuple(sorted(map(int, own["scales"].split(","))))
        own["folder"], own["model"] = own["folder"].resolve(), own["model"] or model_path()
        page = run(Settings(**own))
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    except SystemExit as stop:
        return int(stop.code or 0)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
