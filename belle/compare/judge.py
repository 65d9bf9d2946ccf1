"""A model behind an OpenAI-compatible endpoint, asked how good an answer is.

As BELLE does it (arXiv 2303.14742, section 3): a score from 0 to 1, the mean of three; mathematics,
code and chains of thought are right or wrong.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from belle.compare.questions import Question
from belle.endpoint import Connection, Endpoint, Unanswered, connect

VOTES = 3
# Of one vote, if the judge's reply has no score.
ATTEMPTS = 3
# So that votes on one answer can differ.
TEMPERATURE = 0.5
RIGHT_OR_WRONG = ("math", "code", "cot")
# What makes an answer good, by BELLE's classes.
CRITERIA = {
    "extract": "It must hold every item asked for that is in the text, and none that is not.",
    "classification": "It must name the right class; reasons are welcome but count for nothing.",
    "closed qa": "It must be supported by the text given and answer what was asked.",
    "summarization": "It must keep the main points, be shorter than the text and invent nothing.",
    "translation": "It must keep the meaning and read as a native speaker would write it.",
    "rewrite": "It must follow the instruction for rewriting and keep what is to be kept.",
    "brainstorming": "Its ideas must fit the request, differ from one another and be of use.",
    "math": "Its final result must be right: 1 if it is, 0 if not.",
    "code": "The program must do what was asked: 1 if it does, 0 if not, however it looks.",
    "cot": "Its result and each step towards it must be right: 1 if they are, 0 if not.",
    "open qa": "It must be true and answer what was asked.",
    "generation": "It must do what was asked in form, length and topic, and read well.",
}
OTHER = "It must do what was asked, truly and completely."
PROMPT = """You grade one answer to one task of the kind "{kind}".
What counts: {criterion}
{reference}

Task:
{question}

Answer to grade:
{written}

Reply with one JSON object and nothing else: {{"score": a number from 0 (worthless) to 1 (nothing \
better could be asked for)}}"""
REFERENCE = """The reference is one good answer; others can be as good.

Reference:
{}"""
NO_REFERENCE = "There is no reference answer; judge by the task alone."
_SCORE = re.compile(
    r"""(?:score|分数|得分|评分)["'*]*\s*[:：=]["'*\s]*"""  # JSON, or Markdown in bold
    # Neither the beginning of a longer number nor one of another scale, as 8/10.
    r"(-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?!\.?\d|\s*[/%])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Judge:
    endpoint: Endpoint
    votes: int = VOTES
    concurrency: int = 8
    """Answers that are judged at a time."""

    async def scores(
        self, answers: Iterable[tuple[int, Question, str]]
    ) -> AsyncIterator[tuple[int, list[float]]]:
        """The votes on each of (number, question, answer), as they come; fewer, perhaps none, if
        the judge gives no usable reply. Raises UserError if it never will."""
        async with connect(self.endpoint) as connection:
            waiting = list(answers)[::-1]
            running: set[asyncio.Task] = set()
            try:
                while waiting or running:
                    while waiting and len(running) < self.concurrency:
                        work = self._judge(connection, *waiting.pop())
                        running.add(asyncio.create_task(work))
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()

    async def _judge(
        self, connection: Connection, number: int, asked: Question, written: str
    ) -> tuple[int, list[float]]:
        message = {"role": "user", "content": prompt(asked, written)}
        votes = []
        for vote in range(self.votes):
            for attempt in range(ATTEMPTS):
                try:
                    reply = await connection.ask(
                        [message], temperature=TEMPERATURE, seed=vote * ATTEMPTS + attempt
                    )
                    votes.append(read_score(reply.text, asked.kind))
                    break
                except Unanswered:
                    continue
        return number, votes


def prompt(asked: Question, written: str) -> str:
    """What the judge is asked."""
    return PROMPT.format(
        kind=asked.kind,
        criterion=CRITERIA.get(asked.kind, OTHER),
        question=asked.question,
        reference=REFERENCE.format(asked.answer) if asked.answer else NO_REFERENCE,
        written=written,
    )


def read_score(reply: str, kind: str) -> float:
    """The last number that a judge's reply calls a score. Raises Unanswered if none is from 0 to 1.

    One of a kind that is right or wrong is 0 or 1.
    """
    found = _SCORE.findall(reply)
    try:
        score = float(found[-1]) if found else -1.0
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise Unanswered(f"no score from 0 to 1 in {reply[:80]!r}")
    return float(score >= 0.5) if kind in RIGHT_OR_WRONG else score
