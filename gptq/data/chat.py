"""A conversation as text: by a tokenizer's chat template, or in BELLE's prompt form.

BELLE's models were trained on `Human: ...`, an empty line, `Assistant: ...`; their tokenizers come
without a chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from gptq.data.bounded import bounded
from gptq.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "the tokenizer's chat template"
"""In messages."""
# With the keys "role" and "content", as chat templates take it.
Message: TypeAlias = Mapping[str, str]

_USER, _ASSISTANT, _BETWEEN = "Human: ", "Assistant:", "\n\n"
_PREFIXES = {"system": "", "user": _USER, "assistant": f"{_ASSISTANT} "}
ROLES = tuple(_PREFIXES)

# -------------------------------------------------------------------------------------------------
# BELLE's form as a chat template, for programs that ask the tokenizer for one. One difference to
# `belle_text` is on purpose: "Assistant:" closes a user's turn in any case, since some programs do
# not ask for a generation prompt. A system message is text of its own before the first turn.
# -------------------------------------------------------------------------------------------------
BELLE_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ '" + _BETWEEN + "' }}{% endif %}"
    "{{ '" + _USER + "' + message['content'] + '" + _BETWEEN + _ASSISTANT + "' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] }}"
    "{% elif message['role'] == 'system' %}"
    "{% if not loop.first %}{{ '" + _BETWEEN + "' }}{% endif %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)


def belle_text(messages: Sequence[Message]) -> str:
    """A conversation in BELLE's form. Raises KeyError for a role that is not in ROLES."""
    return _BETWEEN.join(_PREFIXES[message["role"]] + message["content"] for message in messages)


def belle_prompt(messages: Sequence[Message]) -> str:
    """A conversation in BELLE's form, up to where the assistant continues.

    Messages of other roles than ROLES are left out, as BELLE_TEMPLATE does.
    """
    turns = [message for message in messages if message["role"] in ROLES]
    return belle_text(turns) + _BETWEEN + _ASSISTANT


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of a conversation up to where the assistant continues, by the tokenizer's chat
    template or, without one, in BELLE's form. Raises UserError if the template fails or takes more
    time or memory than `bounded` gives it."""
    if tokenizer.chat_template is None:
        return belle_prompt(messages)
    return bounded(lambda: [_templated_prompt(tokenizer, messages)], TEMPLATE)[0]


def _templated_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    turns = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # A template is a program: it raises jinja2's errors and Python's.
    except Exception as error:
        raise UserError(
            f"{TEMPLATE} refuses the conversation ({first_line(error)}); correct it"
        ) from error
    return str(text)
