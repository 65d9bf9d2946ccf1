"""A model behind an OpenAI-compatible endpoint, asked how good an answer is."""

import json
import os
import re
import urllib.request
from dataclasses import dataclass

from gptq.errors import UserError

SECONDS = 120
# What makes an answer good, by BELLE's classes.
CRITERIA = {
    "extract": "It must hold every item asked for that is in the text, and none that is not.",
    "classification": "It must name the right class; reasons are welcome but count for nothing.",
    "closed qa": "It must be supported by the text given and answer what was asked.",
    "summarization": "It must keep the main points, be shorter than the text and invent nothing.",
    "translation": "It must keep the meaning and read as a native speaker would write it.",
    "rewrite": "It must follow the instruction for rewriting and keep what is to be kept.",
    "brainstorming": "Its ideas must fit the request, differ from one another and be of use.",
    "math": "Its final result must be right; a wrong result is worth at most 0.2.",
    "code": "The program must do what was asked; judge what it does, not how it looks.",
    "cot": "Its result must be right and each step must follow from those before it.",
    "open qa": "It must be true and answer what was asked.",
    "generation": "It must do what was asked in form, length and topic, and read well.",
}
OTHER = "It must do what was asked, truly and completely."
PROMPT = """You grade one answer to one task of the kind "{kind}".
What counts: {criterion}
The reference is one good answer; others can be as good.

Task:
{question}

Reference:
{reference}

Answer to grade:
{written}

Reply with one JSON object and nothing else: {{"score": a number from 0 (worthless) to 1 (as good \
as the reference)}}"""


def prompt(kind: str, question: str, reference: str, written: str) -> str:
    """What the judge is asked."""
    name = kind.strip().lower().replace("_", " ")
    return PROMPT.format(
        kind=name,
        criterion=CRITERIA.get(name, OTHER),
        question=question,
        reference=reference,
        written=written,
    )


def read_score(reply: str) -> float:
    """The number in a judge's reply. Raises UserError if there is none from 0 to 1."""
    match = re.search(r'"score"\s*:\s*(-?[\d.]+)', reply)
    try:
        score = float(match[1]) if match else -1.0
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise UserError(
            f"the judge gave no score from 0 to 1 but {reply[:80]!r}; try another model"
        )
    return score


@dataclass(frozen=True)
class Judge:
    url: str
    """Of the API, up to and with `/v1`."""
    model: str

    def score(self, kind: str, question: str, reference: str, written: str) -> float:
        """From 0 to 1. Raises UserError if the endpoint does not answer."""
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": prompt(kind, question, reference, written)}],
        }
        key = os.environ.get("OPENAI_API_KEY", "none")
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                reply = json.load(answer)["choices"][0]["message"]["content"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.url}: the judge did not answer ({error})") from error
        return read_score(str(reply))
