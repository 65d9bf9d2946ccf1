"""The text of each kind of record, alone and through a chat template."""

import datasets
import pytest
from helpers.texts import EOS, assert_one_line, byte_tokenizer, json_lines, text_of, write
from transformers import PreTrainedTokenizerFast

from gptq.errors import UserError

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "您好！"},
    {"role": "user", "content": "Bye"},
]
CHAT_TEXT = "Be kind.\n\nHuman: 你好\n\nAssistant: 您好！\n\nHuman: Bye"
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
RECORDS = [
    ({"text": "plain", "input": "i", "target": "t"}, "plain"),
    ({"instruction": "Sum: ", "input": "1+1", "output": "2"}, "Human: Sum: 1+1\n\nAssistant: 2"),
    ({"instruction": "Go", "input": None, "output": "ok"}, "Human: Go\n\nAssistant: ok"),
    ({"instruction": "Go", "output": "ok", "id": 4}, "Human: Go\n\nAssistant: ok"),
    ({"input": "问题", "target": "答案"}, "Human: 问题\n\nAssistant: 答案"),
    ({"messages": CHAT, "id": "a"}, CHAT_TEXT),
    ({"conversations": SHAREGPT}, "Human: Hi\n\nAssistant: Ho"),
    ({"conversations": CHAT}, CHAT_TEXT),
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.mark.parametrize(("record", "text"), RECORDS)
def test_shapes_of_records(tmp_path, tokenizer, record, text):
    assert text_of(write(tmp_path / "one.jsonl", json_lines(record)), tokenizer) == text


def test_parquet_records_of_mixed_shapes(tmp_path, tokenizer):
    mixed = [{"text": "a", "messages": None}, {"text": None, "messages": CHAT[1:3]}]
    datasets.Dataset.from_list(mixed).to_parquet(tmp_path / "m.parquet")
    expected = f"a{EOS}Human: 你好\n\nAssistant: 您好！"
    assert text_of(tmp_path / "m.parquet", tokenizer) == expected


def test_chat_goes_through_the_tokenizers_template(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    )
    records = [{"conversations": SHAREGPT}, {"messages": CHAT[1:2]}, {"text": "t"}, {"text": "u"}]
    path = write(tmp_path / "chat.jsonl", json_lines(*records))
    # The template has closed the records itself: no second end-of-text token.
    expected = "[user]Hi</s>\n[assistant]Ho</s>\n[user]你好</s>\nt</s>u"
    assert text_of(path, tokenizer) == expected


def test_a_dated_chat_template_gives_the_same_text_every_day(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%s') %}{% endif %}"
        "{{ date_string }}: {{ messages[0].content }}"
    )
    path = write(tmp_path / "chat.jsonl", json_lines({"messages": CHAT[:1]}))
    assert text_of(path, tokenizer) == "1 Jan 2025: Be kind."


def test_a_chat_template_that_refuses(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "chat.jsonl", json_lines({"messages": CHAT}))
    with pytest.raises(UserError, match=r"line 1: .*chat template.*roles must alternate") as error:
        text_of(path, tokenizer)
    assert_one_line(error)
