"""Terminals of other encodings, and names with characters that terminals obey."""

import io
import logging
import sys
import warnings

import pytest

from gptq.cli.printing import harmless, prepare_streams, printable, without_surrogates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("模型 \U0001f600 é.pt", "模型 \U0001f600 é.pt"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\rb\nc\x00\x7f\x9b", r"a\rb\nc\x00\x7f\x9b"),
        ("tp.\u202esrotasnet\u2069\u2028", r"tp.\u202esrotasnet\u2069\u2028"),
    ],
)
def test_control_characters_are_escaped(text, expected):
    assert printable(text) == expected


def test_surrogates_are_replaced():
    assert without_surrogates("a\udcffb\ud83d 数") == "a\ufffdb\ufffd 数"


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding, monkeypatch):
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))
    prepare_streams()
    for stream in (sys.stdout, sys.stderr):
        print("\udcff \U0001f600 数 é", file=stream)
    sys.stderr.flush()
    # Standard output needs no flush after a line.
    for stream in raw.values():
        text = stream.getvalue().decode(encoding)
        assert text.startswith("\\udcff ")
        assert text.endswith("\n")
    assert ("\U0001f600" in text) == (encoding == "utf-8")


def test_input_of_other_bytes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"\xff a\nb\xfe\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    prepare_streams()
    assert input() == "\ufffd a"
    prepare_streams()
    assert input() == "b\ufffd"


def test_streams_that_are_no_files_stay(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    prepare_streams()
    print("x")
    assert sys.stdout.getvalue() == "x\n"


@pytest.fixture
def prepared(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    prepare_streams()
    yield
    logging.setLogRecordFactory(factory)


def test_messages_of_libraries_command_nothing(prepared, caplog):
    """They quote configurations and names that were downloaded."""
    logging.getLogger("transformers.x").warning("no %s\n\tsecond \u202eline", "\x1b]0;title\x07")
    assert caplog.messages == ["no \\x1b]0;title\\x07\n\tsecond \u202eline"]
    line = warnings.formatwarning("a\x1b[2J\nb", UserWarning, "module.py", 3)
    assert line == "warning: a\\x1b[2J\\nb\n"


def test_generated_text_keeps_its_lines():
    assert harmless("one\n\ttwo \u200e\u05d0\x1b[31m\r\x9b") == (
        "one\n\ttwo \u200e\u05d0\\x1b[31m\\r\\x9b"
    )
