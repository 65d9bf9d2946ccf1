"""BELLE's form: prompt, chat template and records agree with each other and with literals."""

import pytest
from helpers.texts import byte_tokenizer

from gptq.data.chat import BELLE_TEMPLATE, belle_prompt, belle_text, chat_prompt
from gptq.data.records import record_text

TURNS = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "{x} and\nmore"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Bye"},
]
PROMPT = (
    "Human: 你好\n\nAssistant: Hello.\n\n"
    "Human: {x} and\nmore\n\nAssistant: Yes.\n\n"
    "Human: Bye\n\nAssistant:"
)


@pytest.fixture
def plain():
    """A tokenizer without a chat template, as BELLE's are."""
    tokenizer = byte_tokenizer()
    assert tokenizer.chat_template is None
    return tokenizer


@pytest.fixture
def templated():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BELLE_TEMPLATE
    return tokenizer


def templated_text(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_belle_prompt(plain):
    assert chat_prompt(plain, TURNS[:1]) == "Human: 你好\n\nAssistant:"
    assert chat_prompt(plain, TURNS) == belle_prompt(TURNS) == PROMPT


@pytest.mark.parametrize("count", range(1, 6))
def test_prompt_template_and_records_agree(count, plain, templated):
    """On a conversation of `count` turns: the user's is the last of an odd number."""
    turns = TURNS[:count]
    record = record_text({"messages": turns}, "line 1", plain)
    assert record == belle_text(turns)
    written = templated_text(templated, turns)
    assert record_text({"messages": turns}, "line 1", templated) == written
    if count % 2:
        assert record + "\n\nAssistant:" == written
        assert chat_prompt(plain, turns) == chat_prompt(templated, turns) == written
        assert written == templated_text(templated, turns, add_generation_prompt=True)
    else:
        assert record == written
    assert PROMPT.startswith(written)


def test_an_instruction_is_a_conversation_of_two_turns(plain, templated):
    question, answer = TURNS[2:4]
    expected = "Human: {x} and\nmore\n\nAssistant: Yes."
    for record in (
        {"instruction": question["content"], "output": answer["content"]},
        {"input": question["content"], "target": answer["content"]},
        {"messages": [question, answer]},
    ):
        assert record_text(record, "line 1", plain) == expected
        assert record_text(record, "line 1", templated) == expected


def test_the_template_as_files_have_it():
    """chat_template.jinja of a folder does not change with the code that writes it."""
    assert BELLE_TEMPLATE == (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        "{{ 'Human: ' + message['content'] + '\n\nAssistant:' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] }}"
        "{% elif message['role'] == 'system' %}"
        "{% if not loop.first %}{{ '\n\n' }}{% endif %}{{ message['content'] }}"
        "{% endif %}{% endfor %}"
    )


def test_a_system_message_comes_before_the_first_turn(plain, templated):
    system = {"role": "system", "content": "Be kind."}
    expected = f"Be kind.\n\n{PROMPT}"
    assert belle_prompt([system, *TURNS]) == expected
    assert templated_text(templated, [system, *TURNS]) == expected
    assert chat_prompt(plain, [system, *TURNS]) == chat_prompt(templated, [system, *TURNS])
    tool = {"role": "tool", "content": "42"}
    assert belle_prompt([*TURNS, tool]) == PROMPT == templated_text(templated, [*TURNS, tool])
    record = record_text({"messages": [system, *TURNS[:2]]}, "line 1", plain)
    assert record == "Be kind.\n\nHuman: 你好\n\nAssistant: Hello."
