"""Terminals of other encodings, and names with characters that terminals obey."""

import io
import sys

import pytest

from gptq.cli.printing import prepare_streams, printable, without_surrogates


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
