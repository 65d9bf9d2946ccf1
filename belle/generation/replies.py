"""Tasks in the text of a reply, whose form teachers vary, and why some are refused."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from belle.generation.seeds import Task
from belle.text import tokens

FEWEST, MOST = 3, 150
"""Tokens of an instruction."""
SHOWN = 200
"""Characters of a reply that has no task in it."""

_FIELDS = {"指令": "instruction", "输入": "input", "输出": "output"}
_FIELDS |= {name: name for name in _FIELDS.values()}
# Here no two repeats that take the same characters touch, as a teacher may repeat one endlessly.
# A label begins a line, after marks of a heading or list and a number, perhaps in bold type, and
# ends with either colon or with the line.
_LABEL = re.compile(
    rf"^[ \t#>*•-]*(?:[(（]?\d+\s*[.．、)）:：]?[ \t*]*)?({'|'.join(_FIELDS)})s?"
    r"[ \t]*\d*\**[ \t]*(?:[:：]\**|$)",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBER = re.compile(r"^[ \t]*(?:\**[(（]?\d+\s*[.．、)）](?:\*\*(?=\s))?[ \t]*)+", re.MULTILINE)
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_BULLET = re.compile(r"^\s*[-*•][ \t]+")
# What ends a task: ### alone or before a number, and as last lines rules and announcements.
_END = re.compile(r"^[ \t]*#{3,}[ \t]*(?:\d+[.．、]?)?[ \t]*$", re.MULTILINE)
_LAST = re.compile(
    r"[ \t#]*(?:-{3,}|\*{3,}|\*{0,2}(?:任务|task)[ \t]*\d+[.:：*]*)?[ \t]*", re.IGNORECASE
)
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_AROUND = " \t\n.。<>()（）[]“”\"'-"
_NO_INPUT = re.compile(
    r"(?:无|没有|不需要|无需|空)(?:输入)?|none|no[- ]?input.*|n/?a|null|empty"
    r"|not (?:needed|required|applicable)|",
    re.IGNORECASE,
)
_SELF = re.compile(
    r"(?<![a-z])(?:chat)?gpt|openai"
    r"|\b(?:as|i am|i'm) an? (?:ai|artificial intelligence|chatbot|(?:large )?language model)\b"
    r"|(?:作为|我是)(?:一个|一款|一名)?(?:ai|人工智能|(?:大型)?语言模型)",
    re.IGNORECASE,
)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


@dataclass(frozen=True)
class Refusal:
    reason: str
    """A few words, which are counted."""
    task: Task
    """As far as it was read."""


def read_tasks(text: str, cut: bool, language: str) -> list[Task | Refusal]:
    """The tasks of a reply to `prompts.tasks_prompt`, in its order.

    The reply may go on where the prompt ends, begin with a label of its own, or with a remark.
    cut: whether the text stops before its end; its last task is then refused.
    """
    text = _THOUGHTS.sub("", text)
    first = _LABEL.search(text)
    if first is None:
        return [Refusal("no task in the reply", Task(text.strip()[:SHOWN], "", ""))]
    if _FIELDS[first[1].lower()] != "instruction":
        text = f"指令: {text}"
    return _judge(_tasks(text), cut, lambda task: _problem(task, language))


def read_instructions(text: str, cut: bool, language: str) -> list[Task | Refusal]:
    """The instructions of a reply to `prompts.instructions_prompt`, as tasks without output."""
    head, *items = _NUMBER.split(_THOUGHTS.sub("", text))
    if not items:
        items = head.splitlines()
    elif not head.rstrip().endswith((":", "：")):
        # No remark: it goes on after the number at the prompt's end.
        items.insert(0, head)
    found = [" ".join(_BOLD.sub(r"\1", _BULLET.sub("", item)).split()) for item in items]
    tasks = [Task(item, "", "") for item in found if item]
    if not tasks:
        return [Refusal("no task in the reply", Task(text.strip()[:SHOWN], "", ""))]
    return _judge(tasks, cut, lambda task: _instruction_problem(task.instruction, language))


def read_answer(instruction: str, text: str, cut: bool, language: str) -> Task | Refusal:
    """The task that a reply to `prompts.answer_prompt` completes."""
    task = Task(instruction, "", _THOUGHTS.sub("", text).strip())
    return _judge([task], cut, lambda task: _problem(task, language))[0]


def _problem(task: Task, language: str) -> str | None:
    """Why a task is of no use; None if it is of use."""
    if (why := _instruction_problem(task.instruction, language)) is not None:
        return why
    if not task.output:
        return "no output"
    if _SELF.search(task.instruction) or _SELF.search(task.output):
        return "self-mention"
    return None


def _instruction_problem(instruction: str, language: str) -> str | None:
    if not instruction:
        return "no instruction"
    words = tokens(instruction)
    if not FEWEST <= len(words) <= MOST:
        return "length of the instruction"
    han = sum(_HAN.match(word) is not None for word in words)
    if not han if language == "zh" else 2 * han > len(words):
        return "instruction in another language"
    return None


def _judge(tasks: list[Task], cut: bool, why: Callable[[Task], str | None]) -> list[Task | Refusal]:
    reasons = [why(task) for task in tasks]
    if cut:
        reasons[-1] = "cut by length"
    return [
        task if reason is None else Refusal(reason, task)
        for task, reason in zip(tasks, reasons, strict=True)
    ]


def _tasks(text: str) -> list[Task]:
    """Split a text at its labels. What looks like a label in an output, such as the input and
    output of an example in a task about code, is part of it: only an instruction ends it."""
    order = ("instruction", "input", "output")
    tasks: list[dict[str, str]] = []
    current, start = "", 0
    for match in _LABEL.finditer(text):
        name = _FIELDS[match[1].lower()]
        if tasks and name != "instruction" and order.index(name) <= order.index(current):
            continue
        if tasks:
            tasks[-1][current] = text[start : match.start()]
        if name == "instruction":
            tasks.append(dict.fromkeys(order, ""))
        current, start = name, match.end()
    tasks[-1][current] = text[start:]
    return [_task(**fields) for fields in tasks]


def _task(instruction: str, input: str, output: str) -> Task:
    given = _clean(input)
    return Task(
        _clean(instruction),
        "" if _NO_INPUT.fullmatch(given.strip(_AROUND)) else given,
        _clean(output),
    )


def _clean(text: str) -> str:
    lines = _END.split(text, maxsplit=1)[0].strip().split("\n")
    while lines and _LAST.fullmatch(lines[-1]):
        lines.pop()
    return "\n".join(lines).strip()
