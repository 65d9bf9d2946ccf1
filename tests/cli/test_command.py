"""How every command line ends: one line for an error, and its exit code."""

import argparse
import json
from pathlib import Path

import jinja2
import pytest
import torch

import gptq
from gptq import convert, serve
from gptq.cli.command import EXIT_BAD_INPUT, EXIT_BUG, EXIT_INTERRUPTED, Parser, report_error
from gptq.cli.run import main
from gptq.errors import SettingError, UserError


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (UserError("x.pt: is cut short\ncopy it again"), 2, "error: x.pt: is cut short copy it\n"),
        (UserError("no x"), 2, "error: no x\n"),
        (SettingError("group_size", 0, "is not possible"), 2, "error: --groupsize 0 is not \n"),
        (SettingError("sweeps", 0, "is not possible"), 2, "error: sweeps 0 is not possible\n"),
        (SettingError("sym", True, "disagrees"), 2, "error: --sym disagrees\n"),
        (SettingError("true_sequential", False, "x"), 2, "error: --no-true-sequential x\n"),
        (SettingError("method", "rtn", "disagrees"), 2, "error: --nearest disagrees\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (KeyboardInterrupt("2 blocks are kept"), 130, "\ninterrupted: 2 blocks are kept\n"),
    ],
)
def test_one_line_and_a_code(stop, code, line, capsys, monkeypatch):
    assert report_error(stop) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line.rstrip())
    assert err.lstrip("\n").count("\n") == 1
    # Of several processes the first on each machine prints.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert report_error(stop) == code
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert report_error(stop) == code
    assert capsys.readouterr() == (out, err)


def test_codes():
    assert (EXIT_BUG, EXIT_BAD_INPUT, EXIT_INTERRUPTED) == (1, 2, 130)


def raised(work, *arguments, **options):
    """The exception that a call ends with."""
    try:
        work(*arguments, **options)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def failing_template():
    jinja2.Template("{{ x.y.z }}").render()


def deep_json():
    json.loads("[" * 200_000)


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (lambda: Path("none\x1b[2J").stat(), r"none\x1b[2J: No such file or directory"),
        (lambda: Path("/proc").mkdir(), "/proc: File exists"),
        (lambda: Path("x" * 300).stat(), "x: File name too long"),
        (lambda: b"\xff".decode(), "text cannot be encoded or decoded ('utf-8' codec can't decode"),
        (lambda: "a\udcff".encode(), r"('a\udcff' as utf-8: surrogates not allowed)"),
        (deep_json, "a file, template or text is nested too deeply (maximum recursion"),
        (lambda: torch.full((1,), 0).fill_(2**70), "a number is too large"),
        (lambda: 1.5**10**6, "a number is too large"),
        (lambda: json.loads("{oops"), "a file is not JSON (Expecting property name"),
        (failing_template, "the chat template fails ('x' is undefined)"),
        (lambda: bytearray(2**62), "there is not enough memory"),
        (lambda: torch.empty(2**58), "there is not enough memory ([enforce fail"),
    ],
)
def test_what_a_user_can_cause_is_one_line(work, line, capsys):
    assert report_error(raised(work)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_each_process_prints_what_it_alone_runs_into(capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert report_error(OSError(28, "No space left on device", "x")) == 2
    assert capsys.readouterr() == ("", "error: x: No space left on device\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_bug_keeps_its_traceback(rank, capsys, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["llama.py", "my model", "--eval"])

    def broken():
        raise KeyError("layer\x1b[2J")

    for error in (raised(broken), raised(lambda: {}["x"]), raised(int, "x"), raised(len, 3)):
        assert report_error(error) == 1
        out, err = capsys.readouterr()
        assert out == ""
        first, second, *trace = err.splitlines()
        assert first.startswith(f"unexpected {type(error).__name__}: please report it")
        assert f"`gptq --version` ({gptq.__version__})" in first
        assert "llama.py 'my model' --eval" in first
        assert second == "Traceback (most recent call last):"
        assert trace[-1].startswith(f"{type(error).__name__}: ")
        assert "error: " not in first
        assert "\x1b" not in err


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (lambda: main(None, []), "gptq.cli.run._run"),
        (lambda: convert.main(["a", "b"]), "gptq.convert.convert"),
        (lambda: serve.main([]), "gptq.serve._serve"),
    ],
)
@pytest.mark.parametrize(
    ("error", "code"), [(PermissionError(13, "denied", "m"), 2), (AssertionError("never"), 1)]
)
def test_every_command_tells_bugs_from_mistakes(command, work, error, code, capsys, monkeypatch):
    def stop(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("gptq.cli.run.parser", lambda _spec: Parser(prog="x"))
    monkeypatch.setattr(work, stop)
    assert command() == code
    err = capsys.readouterr().err
    assert (err == "error: m: denied\n") == (code == 2)
    assert ("Traceback" in err) == (code == 1)


def test_a_parser_raises_and_takes_no_abbreviations():
    parser = Parser(prog="some command")
    parser.add_argument("--number", type=int)
    assert parser.parse_args(["--number", "3"]) == argparse.Namespace(number=3)
    for argv in (["--number", "three"], ["--num", "3"], ["more"]):
        with pytest.raises(UserError, match=r"see some command --help$"):
            parser.parse_args(argv)


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (lambda argv: main(None, argv), ["--wbits", "4"], "required: MODEL; see python -m gptq"),
        (convert.main, ["x.pt"], "required: OUT; see python -m gptq.convert --help"),
        (serve.main, ["no-such-folder"], "no-such-folder: is no model's folder"),
    ],
)
def test_every_command_reports_bad_input_alike(command, argv, message, capsys):
    assert command(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (lambda: main(None, []), "gptq.cli.run._run"),
        (lambda: convert.main(["a", "b"]), "gptq.convert.convert"),
        (lambda: serve.main([]), "gptq.serve._serve"),
    ],
)
def test_every_command_can_be_interrupted(command, work, capsys, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gptq.cli.run.parser", lambda _spec: Parser(prog="x"))
    monkeypatch.setattr(work, stop)
    assert command() == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
