"""The text of a calibration record, by the fields that instruction and chat data sets have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN_FIELDS = (
    "text (a string), messages or conversations (a list of role/content or from/value), "
    "instruction/input/output or input/target (strings)"
)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_SPEAKERS = {"system": "", "user": "Human: ", "assistant": "Assistant: "}


def record_text(record: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a record known by its fields, "" if what it should hold is null.

    where: the record's place, for messages. Raises UserError for a record that is not of
    KNOWN_FIELDS, a message that is not one, and a chat template that refuses the messages.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: is of type {type(record).__name__}, not an object with fields")
    filled = {field: value for field, value in record.items() if value is not None}
    match filled:
        case {"text": str(text)}:
            return text
        case {"messages": list(messages)} | {"conversations": list(messages)}:
            return _chat([_turn(message, where) for message in messages], where, tokenizer)
        case {"instruction": str(asked), "output": str(answer), **others}:
            asked += str(others.get("input", ""))
            return _dialogue([("user", asked), ("assistant", answer)], where)
        case {"input": str(asked), "target": str(answer)}:
            return _dialogue([("user", asked), ("assistant", answer)], where)
    nulls = record.keys() - filled.keys()
    if nulls & {"text", "messages", "conversations", "output", "target"}:
        return ""
    found = ", ".join(f"{field} ({type(value).__name__})" for field, value in filled.items())
    raise UserError(f"{where}: has the fields {found or 'none'}, but needs {KNOWN_FIELDS}")


def _turn(message: Any, where: str) -> tuple[str, str]:
    """(role, content) of a chat message in OpenAI's or ShareGPT's naming."""
    match message:
        case {"role": str(role), "content": str(content)} | {
            "from": str(role),
            "value": str(content),
        }:
            return _ROLES.get(role, role), content
    raise UserError(f"{where}: a message is not an object with role and content, both strings")


def _chat(turns: list[tuple[str, str]], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not turns or not tokenizer.chat_template:
        return _dialogue(turns, where)
    import jinja2

    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        # Some templates write today's date unless given one; calibration must not depend on it.
        text = tokenizer.apply_chat_template(messages, tokenize=False, date_string="1 Jan 2025")
    except jinja2.TemplateError as error:
        raise UserError(
            f"{where}: the tokenizer's chat template refuses the messages ({error}); mend them"
        ) from error
    return str(text)


def _dialogue(turns: list[tuple[str, str]], where: str) -> str:
    """BELLE's prompt form: `Human: …`, an empty line, `Assistant: …`."""
    for role, _ in turns:
        if role not in _SPEAKERS:
            raise UserError(f"{where}: unknown role {role}; rename it to user or assistant")
    return "\n\n".join(_SPEAKERS[role] + content for role, content in turns)
