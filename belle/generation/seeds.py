"""Seed tasks: the examples that a prompt shows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gptq.errors import UserError, first_line

LANGUAGES = ("zh", "en")
FIELDS = "a seed has instruction, a string, and instances, a list of input and output, strings"


@dataclass(frozen=True)
class Task:
    instruction: str
    input: str
    """Empty if the instruction needs none."""
    output: str


@dataclass(frozen=True)
class Seed:
    """A task with one or more inputs, and the outputs to them."""

    kind: str
    """One of prompts.KINDS, or empty: BELLE's seeds have none."""
    instances: tuple[Task, ...]

    @property
    def instruction(self) -> str:
        return self.instances[0].instruction


def built_in(language: str) -> Path:
    """Four seeds of each kind, written for this package."""
    return Path(__file__).with_name(f"seeds_{language}.jsonl")


def read_seeds(path: Path) -> list[Seed]:
    """Seeds as BELLE has them: JSON lines of instruction and instances, and perhaps a kind.

    Raises UserError that names the line if one is not so.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); give seed tasks") from error
    seeds = [_seed(text, f"{path}:{i}") for i, text in enumerate(lines, 1) if text.strip()]
    if not seeds:
        raise UserError(f"{path}: is empty; give a seed task a line")
    return seeds


def digest(seeds: Sequence[Seed]) -> str:
    """A short hash of all that prompts are made of."""
    text = json.dumps([asdict(seed) for seed in seeds])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _seed(line: str, where: str) -> Seed:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({first_line(error)}); {FIELDS}") from error
    match record:
        case {"instruction": str(instruction), "instances": [_, *_] as instances}:
            if instruction.strip():
                tasks = tuple(_task(instruction.strip(), it, where) for it in instances)
                return Seed(str(record.get("kind") or ""), tasks)
    raise UserError(f"{where}: lacks a field; {FIELDS}")


def _task(instruction: str, instance: object, where: str) -> Task:
    match instance:
        case {"input": str(given), "output": str(output)} if output.strip():
            return Task(instruction, given.strip(), output.strip())
    raise UserError(f"{where}: an instance lacks input or output; {FIELDS}")
