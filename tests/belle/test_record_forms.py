"""Records of every form are the same conversation, and are written back as they were."""

import json

import pytest

from belle.records import FORMS, parse, read
from gptq.errors import UserError

SINGLE = [{"role": "user", "content": "把数字加一。\n三"}, {"role": "assistant", "content": "四"}]
DIALOGUE = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "今天几号？\n请直说。"},
    {"role": "assistant", "content": "五号"},
]
SYSTEM = [{"role": "system", "content": "Answer briefly."}, *DIALOGUE]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "把数字加一。", "input": "三", "output": "四"},
        {"instruction": "把数字加一。 ", "input": "三\n", "output": " 四", "id": 3},
        {"instruction": "把数字加一。\n三\n", "input": None, "output": "四"},
        {"instruction": "把数字加一。\n三", "output": "四"},
        {"input": "把数字加一。\n三", "target": "四"},
        {"input": "Human: 把数字加一。\n三\n\nAssistant: ", "target": "四"},
        {"messages": SINGLE},
        {
            "conversations": [
                {"from": "human", "value": "把数字加一。\n三"},
                {"from": "gpt", "value": "四"},
            ]
        },
    ],
)
def test_every_form_is_one_conversation(record):
    assert parse(record) == SINGLE


def test_a_dialogue_in_one_instruction_has_its_turns():
    instruction = "Human:你好\nAssistant:你好！\nHuman：今天几号？\n请直说。\nAssistant:\n"
    assert parse({"instruction": instruction, "input": "", "output": "五号"}) == DIALOGUE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conversation", [SINGLE, DIALOGUE, SYSTEM, [SYSTEM[0], *SINGLE]])
def test_a_written_record_is_read_back(form, conversation):
    assert parse(json.loads(json.dumps(FORMS[form](conversation)))) == conversation


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "is of type str"),
        ({"text": "x"}, "has the fields text, but needs"),
        ({"instruction": "x", "output": None}, "has the fields instruction, but needs"),
        ({"instruction": "x", "output": " \n"}, "has an empty answer"),
        ({"instruction": "", "input": "", "output": "x"}, "has an empty question"),
        ({"instruction": "x", "input": 3, "output": "x"}, "its input is not a string"),
        ({"messages": []}, "its turns are not"),
        ({"messages": SINGLE[:1]}, "its turns are not"),
        ({"messages": [*SINGLE, SINGLE[1]]}, "its turns are not"),
        ({"messages": [{"role": "tool", "content": "x"}, *SINGLE]}, "its turns are not"),
        ({"messages": [{"role": "user"}]}, "has a message without"),
        ({"instruction": "Human:a\nHuman:b\nAssistant:", "output": "c"}, "its turns are not"),
    ],
)
def test_a_record_that_is_no_conversation_says_why(record, reason):
    with pytest.raises(ValueError, match=reason):
        parse(record)


def test_lines_lists_and_tables_are_read_alike(tmp_path):
    records = [FORMS["merged"](SINGLE), FORMS["messages"](DIALOGUE)]
    lines, whole = tmp_path / "lines.json", tmp_path / "list.json"
    lines.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    whole.write_text(json.dumps(records), encoding="utf-8")
    assert read(lines) == read(whole) == [SINGLE, DIALOGUE]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = tmp_path / "table.parquet"
    columns = {field: None for record in records for field in record}
    rows = [{**columns, **record} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert read(table) == [SINGLE, DIALOGUE]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"input": "a", "target": "b"}\n{"input": "a"}', "line 2: has the fields input, but"),
        (b'{"input": "a", "target": "b"}\n{"input": "a"', "line 2: is not JSON"),
        (b"[]", "has no records"),
        (b'{"input": "a", "target": "\\ud800"}', "line 1: has half a character in its answer"),
        (b'{"input": "\xff", "target": "b"}', "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, text, reason):
    path = tmp_path / "data.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=reason) as raised:
        read(path)
    assert str(raised.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.json: cannot be read"):
        read(tmp_path / "data.json")
