"""Instruction and chat records of every form that releases have, as conversations and back."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from gptq.cli.printing import without_surrogates
from gptq.data.local_files import READERS, Order, local_path, read_json
from gptq.errors import UserError

# {"role": "system", "user" or "assistant", "content": ...} for each turn: a system message or none,
# then questions and answers in turn. The last is an answer, and none is empty.
Conversation: TypeAlias = list[dict[str, str]]

FIELDS = "instruction/input/output, instruction/output, input/target, conversations or messages"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_NAMES = {"system": "system message", "user": "question", "assistant": "answer"}
# BELLE's dialogues have all turns in the instruction, up to where the assistant continues.
_TURN = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant)[ \t]*[:：]")
_OPEN = re.compile(r"(?:^|\n)[ \t]*Assistant[ \t]*[:：]\s*$")


def read(path: str | Path) -> list[Conversation]:
    """The conversations of a JSON list, of JSON lines or of a Parquet file.

    Raises UserError, which names the line, for a file that cannot be read, for a record that
    `parse` refuses, and for a file without records.
    """
    conversations = []
    for place, record in values(path):
        try:
            conversation = parse(record)
            for turn in conversation:
                if turn["content"] != without_surrogates(turn["content"]):
                    raise ValueError(f"has half a character in its {_NAMES[turn['role']]}")
            conversations.append(conversation)
        except ValueError as error:
            raise UserError(f"{path}, {place}: {error}; correct or remove it") from error
    if not conversations:
        raise UserError(f"{path}: has no records; pass a file with some")
    return conversations


def values(path: str | Path, order: Order = range) -> Iterator[tuple[str, Any]]:
    """The parsed values of a file, each with its place in it. `order` is as in gptq's READERS.

    Raises UserError for a file that cannot be read.
    """
    file = local_path(path)
    try:
        yield from READERS.get(file.suffix.lower(), read_json)(file, order)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8; convert it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def parse(record: Any) -> Conversation:
    """The conversation in a record of one of FIELDS. Raises ValueError with what is wrong.

    An input follows its instruction in a line of its own. White space around turns is removed.
    """
    if not isinstance(record, dict):
        raise ValueError(f"is of type {type(record).__name__}, not an object with fields")
    match {field: value for field, value in record.items() if value is not None}:
        case {"messages": list(turns)} | {"conversations": list(turns)}:
            conversation = [_message(turn) for turn in turns]
        case {"instruction": str(question), "output": str(answer), **others}:
            given = others.get("input", "")
            if not isinstance(given, str):
                raise ValueError("its input is not a string")
            parts = (question.strip(), given.strip())
            conversation = _turns("\n".join(filter(None, parts)), answer)
        case {"input": str(question), "target": str(answer)}:
            conversation = _turns(question, answer)
        case filled:
            raise ValueError(f"has the fields {', '.join(filled) or 'none'}, but needs {FIELDS}")
    _check(conversation)
    return conversation


def _message(turn: Any) -> dict[str, str]:
    match turn:
        case {"role": str(role), "content": str(text)} | {"from": str(role), "value": str(text)}:
            return {"role": _ROLES.get(role, role), "content": text.strip()}
    raise ValueError("has a message without a role and a text")


def _turns(question: str, answer: str) -> Conversation:
    """A question, or the turns of a dialogue that ends in "Assistant:", and the answer to it."""
    final = {"role": "assistant", "content": answer.strip()}
    if not (_OPEN.search(question) and "Human" in question):
        return [{"role": "user", "content": question.strip()}, final]
    system, *parts = _TURN.split(question)
    roles = [_ROLES.get(name.lower(), name.lower()) for name in parts[::2]]
    turns = [
        {"role": role, "content": text.strip()}
        for role, text in zip(["system", *roles], [system, *parts[1::2]], strict=True)
    ]
    return [*(turns if system.strip() else turns[1:])[:-1], final]


def _check(conversation: Conversation) -> None:
    roles = [turn["role"] for turn in conversation]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError("its turns are not a question and its answer, in turn to the end")
    for turn in conversation:
        if not turn["content"]:
            raise ValueError(f"has an empty {_NAMES[turn['role']]}")


def _question(conversation: Conversation) -> str:
    """All but the last answer as one text, which `_turns` takes apart again."""
    if len(conversation) == 2:
        return conversation[0]["content"]
    prefixes = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
    lines = [prefixes[turn["role"]] + turn["content"] for turn in conversation[:-1]]
    return "\n".join([*lines, "Assistant:"])


def _instruction(conversation: Conversation) -> dict[str, Any]:
    answer = conversation[-1]["content"]
    return {"instruction": _question(conversation), "input": "", "output": answer}


def _merged(conversation: Conversation) -> dict[str, Any]:
    return {"input": _question(conversation), "target": conversation[-1]["content"]}


def _conversations(conversation: Conversation) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    turns = [
        {"from": names.get(turn["role"], turn["role"]), "value": turn["content"]}
        for turn in conversation
    ]
    return {"conversations": turns}


# How a conversation is written. `parse` reads each again.
FORMS: dict[str, Callable[[Conversation], dict[str, Any]]] = {
    "instruction": _instruction,
    "merged": _merged,
    "conversations": _conversations,
    "messages": lambda conversation: {"messages": conversation},
}
