"""A teacher by rule behind the OpenAI protocol: short tasks of six kinds, with computed answers.

It recognises prompts as belle.generation and belle.compare send them. Its replies depend on the
prompt alone, and have the faults that a model's replies have. As a judge it gives 1 to an answer
that is exactly the reference, and 0 to any other.
"""

import contextlib
import json
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from belle.generation.prompts import KINDS, TASKS

MODEL = "rule"
# One task in so many has a fault, and one reply in so many is cut.
FAULTY, CUT = 5, 10

NAMES, CITIES, ADJECTIVES = map(
    str.split,
    (
        "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Kate Leo Mary Nick Olga Paul",
        "Oslo Rome Paris London Berlin Madrid Vienna Dublin Tokyo Cairo Boston Sydney",
        "red blue green black white old new small big heavy clean cheap",
    ),
)
_CLASSES = {
    "animal": "dog cat horse cow sheep goose rabbit bear lion mouse",
    "food": "bread apple cheese soup rice cake onion carrot potato honey",
    "tool": "hammer saw drill knife brush shovel ladder needle pencil rope",
}
CLASSES = {kind: words.split() for kind, words in _CLASSES.items()}
THINGS = [word for words in CLASSES.values() for word in words]
CODE = {
    "the sum": "sum",
    "the largest value": "max",
    "the smallest value": "min",
    "the length": "len",
    "a sorted copy": "sorted",
}


class Task(NamedTuple):
    kind: str
    question: str
    answer: str


def _extract(draw: random.Random) -> tuple[str, str]:
    city = draw.choice(CITIES)
    thing = f"{draw.choice(ADJECTIVES)} {draw.choice(THINGS)}"
    return f"Which city is in it: {draw.choice(NAMES)} took the {thing} to {city}.", city


def _classification(draw: random.Random) -> tuple[str, str]:
    kind = draw.choice(list(CLASSES))
    thing = f"{draw.choice(ADJECTIVES)} {draw.choice(CLASSES[kind])}"
    return f"Animal, food or tool: the {thing} that {draw.choice(NAMES)} has?", kind


def _closed_qa(draw: random.Random) -> tuple[str, str]:
    names, things = draw.sample(NAMES, 2), draw.sample(THINGS, 2)
    text = ". ".join(f"{name} has the {thing}" for name, thing in zip(names, things, strict=True))
    asked = draw.randrange(2)
    return f"{text}. What does {names[asked]} have?", f"the {things[asked]}"


def _rewrite(draw: random.Random) -> tuple[str, str]:
    things = [f"the {draw.choice(ADJECTIVES)} {thing}" for thing in draw.sample(THINGS, 2)]
    return f"Swap the two: {' and '.join(things)}", " and ".join(things[::-1])


def _math(draw: random.Random) -> tuple[str, str]:
    first, second = draw.randint(10, 40), draw.randint(2, 9)
    plus = draw.random() < 0.5
    done = "gets" if plus else "loses"
    question = f"{draw.choice(NAMES)} in {draw.choice(CITIES)} had {first} coins and {done} "
    return f"{question}{second}. How many now?", str(first + second if plus else first - second)


def _code(draw: random.Random) -> tuple[str, str]:
    wanted = draw.choice(list(CODE))
    name = f"{draw.choice(ADJECTIVES)}_{draw.choice(THINGS)}"
    return f"Write Python for {wanted} of the list {name}", f"{CODE[wanted]}({name})"


RULES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "extract": _extract,
    "classification": _classification,
    "closed qa": _closed_qa,
    "rewrite": _rewrite,
    "math": _math,
    "code": _code,
}


def task(kind: str, draw: random.Random) -> Task:
    return Task(kind, *RULES[kind](draw))


def evaluation(each: int) -> list[Task]:
    """So many different questions of each kind, always the same."""
    asked: dict[str, Task] = {}
    for kind in RULES:
        draw, count = random.Random(f"evaluation {kind}"), len(asked) + each
        while len(asked) < count:
            drawn = task(kind, draw)
            asked[drawn.question] = drawn
    return list(asked.values())


# Faults --------------------------------------------------------------------------------------


def _spoil(tasks: list[Task], questions: Sequence[Task], draw: random.Random) -> None:
    """Give the last task of a reply a fault: the first four are for the filters of generation, the
    others for those of a release."""
    last = tasks[-1]
    spoiled = [
        tasks[0] if len(tasks) > 1 else last._replace(answer=""),
        last._replace(answer=""),
        last._replace(answer="As an AI language model, I have no opinion about it."),
        last._replace(question="Swap"),
        last._replace(answer="I am just an AI assistant, so I do not know."),
        last._replace(answer="I'm sorry, but I cannot answer that question."),
        last._replace(answer=f"{last.answer}, " * 100),
        draw.choice(questions),
    ]
    tasks[-1] = draw.choice(spoiled)


# Replies -------------------------------------------------------------------------------------


def teach(prompt: str, questions: Sequence[Task]) -> tuple[str, str]:
    """A reply to belle.generation's prompt for tasks, and its finish_reason.

    questions: of the evaluation, which get into the tasks now and then.
    """
    draw = random.Random(prompt)
    number = int(re.findall(r"^###\n(\d+)\. Instruction:", prompt, re.MULTILINE)[-1])
    # The line of the demands that names kinds; it may name some that have no rule here.
    named = prompt.partition("evenly over these kinds:")[2].partition("\n")[0]
    kinds = [kind for kind in RULES if KINDS[kind]["en"] in named] or list(RULES)
    tasks: list[Task] = []
    for place in range(TASKS):
        tasks.append(task(kinds[place % len(kinds)], draw))
        if draw.randrange(FAULTY) == 0:
            _spoil(tasks, questions, draw)
    text = "\n###\n".join(
        f"{i}. Instruction: {it.question}\n{i}. Input: none\n{i}. Output: {it.answer}"
        for i, it in enumerate(tasks, start=number)
    ).removeprefix(f"{number}. Instruction:")
    if draw.randrange(CUT) == 0:
        return text[: -len(tasks[-1].answer) // 2 or None], "length"
    return text, "stop"


def judge(prompt: str) -> str:
    """A reply to belle.compare's prompt for a score."""
    reference = prompt.partition("\nReference:\n")[2].partition("\n\nTask:\n")[0]
    written = prompt.partition("\nAnswer to grade:\n")[2].rpartition("\n\nReply with one JSON")[0]
    return json.dumps({"score": int(written.strip() == reference.strip())})


@contextlib.contextmanager
def serving(questions: Sequence[Task]) -> Iterator[str]:
    """The teacher as an endpoint while the context lasts; gives its address, up to /v1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # One packet for an answer, which nothing delays.

        def do_GET(self) -> None:
            self._send({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][-1]["content"]
            grades = "Answer to grade:" in prompt
            text, reason = (judge(prompt), "stop") if grades else teach(prompt, questions)
            message = {"role": "assistant", "content": text}
            # About four characters a token.
            usage = {"total_tokens": (len(prompt) + len(text)) // 4}
            choice = {"index": 0, "message": message, "finish_reason": reason}
            self._send({"object": "chat.completion", "choices": [choice], "usage": usage})

        def _send(self, fields: dict[str, Any]) -> None:
            body = json.dumps({"id": "x", "created": 0, "model": MODEL, **fields}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
