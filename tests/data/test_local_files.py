"""Local files: their text recovered byte by byte, a sample of large ones, damaged ones."""

import json
from pathlib import Path

import datasets
import pytest
from helpers.texts import (
    EOS,
    assert_one_line,
    byte_tokenizer,
    json_lines,
    random_text,
    text_of,
    write,
)
from transformers import PreTrainedTokenizerFast

from gptq.data import local_files
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.errors import UserError


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_home_and_byte_order_mark(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "text.txt", "\ufeffOne\r\ntwo")
    assert text_of("~/text.txt", tokenizer) == "One\ntwo"


@pytest.mark.parametrize(("eos", "between"), [(EOS, EOS), (None, "\n\n")])
def test_records_are_joined_in_any_file(tmp_path, eos, between):
    tokenizer = byte_tokenizer(eos)
    records = [{"text": "One."}, {"text": " "}, {"text": None}, {"text": "二"}, {"text": "3\n"}]
    expected = f"One.{between}二{between}3\n"
    lines = "\ufeff\r\n" + json_lines(*records).replace("\n", "\r\n") + "  \n"
    assert text_of(write(tmp_path / "a.jsonl", lines), tokenizer) == expected
    assert text_of(write(tmp_path / "a.JSON", lines), tokenizer) == expected
    listed = "\ufeff\n " + json.dumps(records, indent=1)
    assert text_of(write(tmp_path / "b.json", listed), tokenizer) == expected
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "c.parquet")
    assert text_of(tmp_path / "c.parquet", tokenizer) == expected


# Large files -------------------------------------------------------------------------------------


def records_of(directory: Path, kind: str, count: int) -> Path:
    """`count` records of 10 characters, each with its number."""
    records = [{"text": f"record{i:04}"} for i in range(count)]
    path = directory / f"many.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path, batch_size=5)
    elif kind == "json":
        write(path, json.dumps(records))
    else:
        write(path, json_lines(*records))
    return path


class RecordingTokenizer:
    """A tokenizer that keeps the last text it tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.eos_token, self.chat_template = tokenizer.eos_token, tokenizer.chat_template

    def __call__(self, text: str, **options):
        self.text = text
        return self.tokenizer(text, **options)

    @property
    def numbers(self) -> list[int]:
        return [int(record.removeprefix("record")) for record in self.text.split(EOS)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_large_file_of_records_is_sampled(monkeypatch, tmp_path, tokenizer, kind):
    monkeypatch.setattr(local_files, "MIN_CHARACTERS", 1000)
    path = records_of(tmp_path, kind, count=2000)
    drawn = []
    for seed in (0, 0, 1):
        recording = RecordingTokenizer(tokenizer)
        calibration_windows(path, recording, nsamples=2, seqlen=20, seed=seed)
        drawn.append(recording.numbers)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(drawn[0]) == 100  # 1000 characters of records
    assert min(drawn[0]) < 500
    assert max(drawn[0]) > 1500


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_more_text_is_read_for_more_tokens(monkeypatch, tmp_path, tokenizer, kind):
    monkeypatch.setattr(local_files, "MIN_CHARACTERS", 1000)
    path = records_of(tmp_path, kind, count=2000)
    recording = RecordingTokenizer(tokenizer)
    calibration_windows(path, recording, nsamples=10, seqlen=50, seed=0)
    assert len(recording.numbers) == 400  # 8 characters for each of 500 tokens
    evaluation_windows(path, recording, seqlen=50, limit=10)
    assert recording.numbers == list(range(400))
    evaluation_windows(path, recording, seqlen=50)
    assert recording.numbers == list(range(2000))


def test_a_large_text_is_read_from_its_start(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(local_files, "MIN_CHARACTERS", 1000)
    text = "汉" * 300 + random_text(5000)
    path = write(tmp_path / "large.txt", text)
    recording = RecordingTokenizer(tokenizer)
    calibration_windows(path, recording, nsamples=2, seqlen=20, seed=0)
    assert recording.text == text[:1000]
    evaluation_windows(path, recording, seqlen=20, limit=1)
    assert recording.text == text[:1000]
    evaluation_windows(path, recording, seqlen=20)
    assert recording.text == text


# Damaged files -----------------------------------------------------------------------------------

BAD_FILES = [
    ("a.txt", b"", "has no text"),
    ("a.txt", b" \n \n", "has no text"),
    ("a.jsonl", b"", "has no text"),
    ("a.json", b"[]", "has no text"),
    ("a.jsonl", b'{"text": ""}\n', "has no text"),
    ("a.txt", "汉字".encode("gb18030"), "is not UTF-8"),
    ("a.jsonl", '{"text": "汉字"}'.encode("utf-16"), "is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3: is not JSON"),
    ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2: is not JSON"),
    ("a.json", b'{\n"text": "a"}', "line 1: is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n"b"\n', "line 2: is of type str, not an object"),
    ("a.json", b'[{"text": "a"}, 3]', "record 2: is of type int, not an object"),
    ("a.jsonl", b'{"text": 5, "id": "a"}', r"text \(int\), id \(str\), but needs text"),
    ("a.jsonl", b'{"prompt": "a", "answer": "b"}', r"prompt \(str\), answer.*instruction/input"),
    ("a.jsonl", b"{}", "has the fields none, but needs"),
    ("a.jsonl", b'{"messages": "hi"}', r"messages \(str\), but needs .*list of role/content"),
    ("a.jsonl", b'{"messages": ["hi"]}', "line 1: a message is not an object"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}', "content, both strings"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}', "content, both strings"),
    ("a.jsonl", b'{"messages": [{"role": "tool", "content": "3"}]}', "unknown role tool"),
    ("a.parquet", b"PAR1 and no more", "is not an intact Parquet file"),
    ("a.parquet", b"", "is not an intact Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(tmp_path, tokenizer, name, content, message):
    path = write(tmp_path / name, content)
    for windows in (
        lambda: calibration_windows(path, tokenizer, 1, 1, seed=0),
        lambda: evaluation_windows(path, tokenizer, 1),
    ):
        with pytest.raises(UserError, match=message) as error:
            windows()
        assert_one_line(error)
        assert str(path) in str(error.value)


def test_a_bad_parquet_record_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"question": ["a"]}).to_parquet(path)
    with pytest.raises(UserError, match=r"row 1 of row group 1: has the fields question \(str\)"):
        evaluation_windows(path, tokenizer, 1)


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
@pytest.mark.parametrize("form", ['{{"text": {}}}\n', "[{}]"])
def test_json_that_python_cannot_hold(tmp_path, form, value):
    path = tmp_path / "m.json"
    path.write_text(form.format(value))
    with pytest.raises(UserError, match=r"m\.json, line 1: cannot be read as JSON"):
        local_files.read_text(path, byte_tokenizer(), None)
