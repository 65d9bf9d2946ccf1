"""How every command line ends: one line for an error, and its exit code."""

import argparse

import pytest

from gptq import convert, serve
from gptq.cli.command import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Parser, report_error
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
    # Of several processes the first alone prints.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert report_error(stop) == code
    assert capsys.readouterr() == ("", "")


def test_codes():
    assert (EXIT_BAD_INPUT, EXIT_INTERRUPTED) == (2, 130)


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
