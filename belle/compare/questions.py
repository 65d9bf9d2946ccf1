"""The questions of an evaluation, in BELLE's form: question, class and std_answer."""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq.errors import UserError

KINDS = (
    "extract",
    "classification",
    "closed qa",
    "summarization",
    "translation",
    "rewrite",
    "brainstorming",
    "math",
    "code",
    "cot",
    "open qa",
    "generation",
)
"""BELLE's classes of questions (arXiv 2303.14742, section 3)."""
# Other spellings, without spaces and signs.
_SPELLINGS = {
    **{re.sub(r"\W", "", kind): kind for kind in KINDS},
    "extraction": "extract",
    "mathematics": "math",
    "summary": "summarization",
    "summarisation": "summarization",
    "rewriting": "rewrite",
    "brainstorm": "brainstorming",
    "chainofthought": "cot",
    "openquestionanswering": "open qa",
    "closedquestionanswering": "closed qa",
}


@dataclass(frozen=True)
class Question:
    question: str
    kind: str
    """One of KINDS, or the class as the file spells it."""
    answer: str
    """The reference; empty if there is none: BELLE's own file has 369 such of 1,000."""


def kind_of(name: str) -> str:
    """The kind that a class name means, whatever its case, spaces and signs."""
    plain = " ".join(unicodedata.normalize("NFKC", name).split())
    return _SPELLINGS.get(re.sub(r"[\W_]", "", plain.lower()), plain)


def read_questions(path: Path) -> list[Question]:
    """Records of a JSON list or of JSON lines.

    Raises UserError for what is neither, and for a record without a question and a class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a JSON file") from error
    questions = []
    for where, record in _records(path, text):
        fields = record if isinstance(record, dict) else {}
        question, kind = fields.get("question"), fields.get("class")
        answer = fields.get("std_answer") or ""
        if not all(isinstance(it, str) and it.strip() for it in (question, kind)):
            raise UserError(f"{where}: lacks a question or a class that is text; give it one")
        if not isinstance(answer, str):
            raise UserError(f"{where}: std_answer is no text; write it as one, or leave it empty")
        questions.append(Question(str(question), kind_of(str(kind)), answer))
    if not questions:
        raise UserError(f"{path}: holds no questions; give a file that does")
    return questions


def _records(path: Path, text: str) -> list[tuple[str, object]]:
    """Each record, and its place for messages."""
    if text.lstrip().startswith("["):
        try:
            return [(f"{path}: record {n}", it) for n, it in enumerate(json.loads(text), start=1)]
        except ValueError as error:
            raise UserError(f"{path}: is no JSON ({error}); correct it") from error
    records = []
    # Not splitlines(), which also splits at signs that JSON allows within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append((f"{path}:{number}", json.loads(line)))
            except ValueError as error:
                raise UserError(f"{path}:{number}: is no JSON ({error}); correct it") from error
    return records


def first_of_each(questions: Sequence[Question], most: int | None) -> list[Question]:
    """At most so many questions of each kind."""
    counts: dict[str, int] = defaultdict(int)
    kept = []
    for asked in questions:
        counts[asked.kind] += 1
        if most is None or counts[asked.kind] <= most:
            kept.append(asked)
    return kept
