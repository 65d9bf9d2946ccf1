"""Scores by kind of task of one or several models, or of a model and its quantized files.

python -m belle.compare TEST.json MODEL... [--checkpoints FILE...] [--out PATH]
python -m belle.compare TEST.json MODEL... --judge URL --judge-model NAME [--published]
"""

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gptq
from belle.compare import published
from belle.compare.answers import answer, log_likelihood
from belle.compare.chart import draw
from belle.compare.judge import VOTES, Judge
from belle.compare.measures import compare
from belle.compare.questions import Question, first_of_each, read_questions
from belle.compare.results import Means, Scored, markdown, means
from belle.endpoint import Endpoint
from belle.journal import Journal, open_journal
from gptq.cli.command import Parser, report_error
from gptq.cli.printing import prepare_streams, printable
from gptq.cli.progress import progress_bar
from gptq.errors import UserError
from gptq.files.atomic import check_apart, check_writable, whole_file

JOURNAL = ".jsonl"
ENDINGS = (".json", ".md", ".png")
PARTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*config.json", "token*")
"""What a model's folder has that answers depend on."""


@dataclass(frozen=True)
class Subject:
    """A model to compare."""

    name: str
    model: str
    checkpoint: Path | None

    @property
    def key(self) -> str:
        """What tells it from others in the journal: where its files are, and which they are."""
        files: set[Path] = set()
        for path in (Path(self.model), self.checkpoint):
            if path is not None and path.exists():
                folder = {file for pattern in PARTS for file in path.glob(pattern)}
                files |= folder if path.is_dir() else {path}
        states = [(file.name, file.stat()) for file in sorted(files)]
        found = repr([(name, state.st_size, state.st_mtime_ns) for name, state in states])
        digest = hashlib.sha256(found.encode()).hexdigest()[:16]
        return f"{self.name} {self.checkpoint or self.model} {digest}"


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python -m belle.compare",
        description="Compare models by kind of task. The same command goes on after a stop.",
    )
    add = command.add_argument
    add("questions", type=Path, metavar="TEST.json", help="question, class, std_answer")
    add("models", nargs="+", metavar="MODEL", help="of one or several sizes, or scales of data")
    add("--checkpoints", nargs="+", type=Path, default=[], metavar="FILE", help="of one MODEL")
    add("--names", metavar="A,B,...", help="of the models and checkpoints, in their order")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="0 for likelihoods alone")
    add("--limit", type=int, metavar="N", help="the first N questions of each kind")
    add("--judge", metavar="URL", help="an OpenAI-compatible endpoint, such as .../v1")
    add("--judge-model", metavar="NAME", help="its name there; the key is OPENAI_API_KEY's")
    add("--votes", type=int, default=VOTES, metavar="N", help=f"of the judge (default: {VOTES})")
    add("--concurrency", type=int, default=8, metavar="N", help="answers judged at a time")
    add("--published", action="store_true", help="BELLE's published scores beside the judge's")
    add(
        "--out",
        type=Path,
        default=Path("comparison"),
        help="folder and beginning of .jsonl, .json, .md and .png to write (default: comparison)",
    )
    return command


def subjects(arguments: argparse.Namespace) -> list[Subject]:
    """What is compared. Raises UserError if names do not fit."""
    if arguments.checkpoints and len(arguments.models) != 1:
        raise UserError("--checkpoints belong to one MODEL; give one")
    parts = [(model, None) for model in arguments.models]
    parts += [(arguments.models[0], file) for file in arguments.checkpoints]
    names = [Path(model).name if file is None else file.name for model, file in parts]
    if arguments.names is not None:
        names = arguments.names.split(",")
    if len(names) != len(parts) or len(set(names)) != len(names):
        raise UserError(
            f"{len(parts)} models are called {', '.join(names)}; give each its own with --names"
        )
    return [Subject(name, *part) for name, part in zip(names, parts, strict=True)]


def answered(
    subject: Subject, questions: Sequence[Question], new_tokens: int, done: Mapping[int, dict]
) -> Iterator[tuple[int, Scored]]:
    """Each question's number and scores, one after another, but for those that are done."""
    if len(done) == len(questions):
        return
    model, tokenizer = gptq.load(subject.model, subject.checkpoint)
    for number, asked in enumerate(questions):
        if number in done:
            continue
        scored = Scored(subject.name, asked.kind, "")
        if asked.answer:
            scored.values["log-likelihood"] = log_likelihood(model, tokenizer, asked)
        if new_tokens:
            scored.written = answer(model, tokenizer, asked, new_tokens)
            if asked.answer:
                scored.values |= compare(scored.written, asked.answer)
        yield number, scored


def collect(
    compared: Sequence[Subject], questions: Sequence[Question], new_tokens: int, journal: Journal
) -> dict[tuple[str, int], Scored]:
    """All scores but the judge's, by the model's name and the question's number."""
    known: dict[str, dict[int, dict]] = {}
    for line in journal.lines:
        if "scored" in line:
            known.setdefault(line["model"], {})[line["number"]] = line["scored"]
    result: dict[tuple[str, int], Scored] = {}
    for subject in compared:
        done = known.get(subject.key, {})
        result |= {(subject.name, number): Scored(**it) for number, it in done.items()}
        with progress_bar(f"answering {subject.name}", "question", len(done)) as show:
            for number, scored in answered(subject, questions, new_tokens, done):
                line = {"model": subject.key, "number": number, "scored": asdict(scored)}
                journal.append(line)
                result[subject.name, number] = scored
                show(len([name for name, _ in result if name == subject.name]), len(questions))
    return result


async def judge_all(
    judge: Judge,
    questions: Sequence[Question],
    scored: Mapping[tuple[str, int], Scored],
    journal: Journal,
) -> int:
    """Add the judge's score to each answer; returns how many have none.

    A vote belongs to a question and an answer: a model that writes the same is not judged anew.
    """
    places = list(scored)
    keys = [_vote_key(judge, questions[number], scored[name, number]) for name, number in places]
    votes = {line["judged"]: line["votes"] for line in journal.lines if "judged" in line}
    waiting = {key: place for key, place in zip(keys, places, strict=True) if key not in votes}
    order = list(waiting.items())
    asked = (
        (index, questions[place[1]], scored[place].written)
        for index, (_, place) in enumerate(order)
    )
    with progress_bar("judging", "answer", len(set(keys)) - len(order)) as show:
        async for index, given in judge.scores(asked):
            votes[order[index][0]] = given
            # One without votes is asked for again when the same command goes on.
            if given:
                journal.append({"judged": order[index][0], "votes": given})
            show(len(votes), len(set(keys)))
    for key, place in zip(keys, places, strict=True):
        if votes[key]:
            scored[place].values["judge"] = sum(votes[key]) / len(votes[key])
    return sum(not votes[key] for key in keys)


def _vote_key(judge: Judge, asked: Question, scored: Scored) -> str:
    parts = [judge.endpoint.model, judge.votes, asdict(asked), scored.written]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def write(path: Path, averages: Means, beside: Mapping[str, Mapping[str, float]]) -> None:
    """`path` with ENDINGS."""
    numbers = {
        measure: {
            model: {kind: asdict(mean) for kind, mean in by_kind.items()}
            for model, by_kind in by_model.items()
        }
        for measure, by_model in averages.items()
    }
    for ending, content in (
        (".json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"),
        (".md", markdown(averages)),
    ):
        with whole_file(Path(f"{path}{ending}")) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    draw(averages, Path(f"{path}.png"), beside)


def _compare(arguments: argparse.Namespace) -> None:
    if bool(arguments.judge) != bool(arguments.judge_model):
        raise UserError("--judge and --judge-model go together; give both")
    if arguments.judge and not arguments.max_new_tokens:
        raise UserError("a judge needs answers; give --max-new-tokens 1 or more")
    for flag, least in (("max_new_tokens", 0), ("limit", 1), ("votes", 1), ("concurrency", 1)):
        given = getattr(arguments, flag)
        if given is not None and given < least:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {given}: give {least} or more")
    judge = None
    if arguments.judge:
        endpoint = Endpoint(arguments.judge, arguments.judge_model)
        judge = Judge(endpoint, arguments.votes, arguments.concurrency)
    compared = subjects(arguments)
    questions = first_of_each(read_questions(arguments.questions), arguments.limit)
    if judge is None and not any(it.answer for it in questions):
        raise UserError(
            f"{arguments.questions}: has no std_answer to compare with; add some, or give --judge"
        )
    outputs = [Path(f"{arguments.out}{ending}") for ending in (JOURNAL, *ENDINGS)]
    check_apart(outputs, [arguments.questions, *arguments.checkpoints], folder=None)
    for path in outputs[1:]:
        check_writable(path)
    # Answers of other questions, or of another length, are of another comparison.
    asked = json.dumps([asdict(it) for it in questions], ensure_ascii=False)
    identity = {
        "questions": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "max_new_tokens": arguments.max_new_tokens,
    }
    with open_journal(outputs[0], identity) as journal:
        try:
            scored = collect(compared, questions, arguments.max_new_tokens, journal)
            unjudged = 0
            if judge is not None:
                unjudged = asyncio.run(judge_all(judge, questions, scored, journal))
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("the same command goes on") from stop
    averages = means(scored.values())
    if not averages:
        raise UserError("the judge scored no answer; look at what it replies, and run this again")
    print(markdown(averages))
    if unjudged:
        print(f"{unjudged} answers have no score of the judge; the same command asks again")
    write(arguments.out, averages, published.scores() if arguments.published else {})
    print(printable(f"written: {arguments.out}{{.jsonl,{','.join(ENDINGS)}}}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    prepare_streams()
    try:
        _compare(parser().parse_args(argv))
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
