"""The text of a calibration record, by the fields that instruction and chat data sets have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq.data.chat import ROLES, TEMPLATE, Message, belle_text
from gptq.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN_FIELDS = (
    "text (a string), messages or conversations (a list of role/content or from/value), "
    "instruction/input/output or input/target (strings)"
)
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def record_text(record: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a record, "" if the field that should hold it is null.

    record: a parsed JSON value or Parquet row with the fields of KNOWN_FIELDS.
    where: the record's place in its file, for error messages.
    tokenizer: its chat template, if it has one, writes lists of messages.
    Raises UserError for a record with other fields, a message without role and content, an unknown
    role, and a chat template that refuses the messages.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: is of type {type(record).__name__}, not an object with fields")
    filled = {field: value for field, value in record.items() if value is not None}
    match filled:
        case {"text": str(text)}:
            return text
        case {"messages": list(messages)} | {"conversations": list(messages)}:
            return _chat_text([_message(message, where) for message in messages], where, tokenizer)
        case {"instruction": str(question), "output": str(answer), **others}:
            return _question_text(question + str(others.get("input", "")), answer)
        case {"input": str(question), "target": str(answer)}:
            return _question_text(question, answer)
    nulls = record.keys() - filled.keys()
    if nulls & {"text", "messages", "conversations", "output", "target"}:
        return ""
    fields = ", ".join(f"{field} ({type(value).__name__})" for field, value in filled.items())
    raise UserError(f"{where}: has the fields {fields or 'none'}, but needs {KNOWN_FIELDS}")


def _message(message: Any, where: str) -> Message:
    """A chat message in OpenAI's naming (role, content), from that or ShareGPT's (from, value)."""
    match message:
        case {"role": str(role), "content": str(content)} | {
            "from": str(role),
            "value": str(content),
        }:
            return {"role": _ROLE_ALIASES.get(role, role), "content": content}
    raise UserError(f"{where}: a message is not an object with role and content, both strings")


def _question_text(question: str, answer: str) -> str:
    """One question and its answer in BELLE's form, whatever the tokenizer's chat template."""
    return belle_text(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )


def _chat_text(messages: list[Message], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if messages and tokenizer.chat_template:
        return _templated_text(messages, where, tokenizer)
    for message in messages:
        if (role := message["role"]) not in ROLES:
            raise UserError(f"{where}: unknown role {role}; rename it to user or assistant")
    return belle_text(messages)


def _templated_text(messages: list[Message], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    turns = [dict(message) for message in messages]
    try:
        # Some templates write today's date unless given one; calibration must not depend on it.
        text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="1 Jan 2025")
    # A template is a program: it raises jinja2's errors and Python's.
    except Exception as error:
        raise UserError(
            f"{where}: {TEMPLATE} refuses the messages ({first_line(error)}); correct them"
        ) from error
    return str(text)
