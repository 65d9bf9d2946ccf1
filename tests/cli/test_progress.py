"""Progress: a bar on a terminal; elsewhere lines that are there as soon as they are true."""

import re
import sys

import pytest
from helpers.logs import TIMES, without_progress

from gptq.cli import progress
from gptq.cli.progress import progress_bar, quantization_progress
from gptq.cli.run import main
from gptq.pipeline.journal import Journal
from gptq.pipeline.report import LayerReport

QUANTIZE = ["--wbits", "4", "--groupsize", "32", "--nsamples", "4", "--seqlen", "32"]


def layer(block, seconds, loss=0.5):
    return LayerReport(block, "mlp", 4, 128, loss, loss, 0, 8, 0.01, seconds)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets, in place of the time."""
    now = [100.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
    return now


def test_a_log_gets_each_block_as_it_is_finished(
    llama_dir, text_file, tmp_path, monkeypatch, capsys
):
    log, seen = tmp_path / "log", []
    write = Journal.write

    def watched(journal, index, *rest):
        seen.append((index, log.read_text()))
        write(journal, index, *rest)

    monkeypatch.setattr(Journal, "write", watched)
    argv = [str(llama_dir), str(text_file), *QUANTIZE, "--save", str(tmp_path / "x.pt"), "--eval"]
    # Buffered, as a file is: what is read from it was flushed.
    with log.open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(None, argv) == 0
    assert [index for index, _ in seen] == [0, 1]
    for index, text in seen:
        assert text.count("\n") == index + 1
        line = rf"quantizing: block {index + 1} of 2, mean loss \d\.\d{{3}}e-\d\d, {TIMES}\n"
        assert re.search(line + r"\Z", text)
    text = log.read_text()
    assert re.findall(r"^evaluating words\.txt: block (\d) of 2, ", text, re.M) == ["1", "2"]
    assert without_progress(text) == ""
    assert "quantizing" not in capsys.readouterr().out


def test_time_left_of_a_quantization(clock, capsys):
    with quantization_progress(2) as show:
        # A block of an earlier run: read in a second, solved in a minute.
        clock[0] += 1
        show(layer(0, 20.0, loss=0.1), 8)
        assert capsys.readouterr().err == ""
        show(layer(0, 40.0, loss=0.3), 8)
        line = "quantizing: block 1 of 4, mean loss 2.000e-01, 0:00:01 so far, about 0:03:00 left"
        assert capsys.readouterr() == ("", line + "\n")
        clock[0] += 3600
        show(layer(1, 1.0), 8)
        show(layer(1, 1.0), 8)
        line = "quantizing: block 2 of 4, mean loss 5.000e-01, 1:00:01 so far, about 1:01:00 left"
        assert capsys.readouterr() == ("", line + "\n")


def test_a_line_for_every_tenth_of_the_blocks(clock, capsys):
    with progress_bar("evaluating x", "block") as show:
        for done in range(1, 33):
            clock[0] += 2
            show(done, 32)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluating x: block 4 of 32, 0:00:08 so far, about 0:00:56 left"
    assert lines[-1] == "evaluating x: block 32 of 32, 0:01:04 so far, about 0:00:00 left"
    assert len(lines) == 10


def test_lines_of_a_job_that_goes_on_in_uneven_steps(clock, capsys):
    """The time left follows from the steps since its start."""
    with progress_bar("generating", "task", first=10) as show:
        for done in (10, 14, 14, 29, 32, 32):
            clock[0] += 3
            show(done, 40, f"{done} tokens")
    assert capsys.readouterr().err.splitlines() == [
        "generating: task 14 of 40 (14 tokens), 0:00:06 so far, about 0:00:39 left",
        "generating: task 29 of 40 (29 tokens), 0:00:12 so far, about 0:00:07 left",
        "generating: task 32 of 40 (32 tokens), 0:00:15 so far, about 0:00:05 left",
    ]


def test_a_log_that_nobody_reads_any_more_ends_nothing(monkeypatch):
    class Closed:
        encoding = "utf-8"

        def write(self, _text):
            raise BrokenPipeError

        flush = isatty = lambda self: False

    for stream in (Closed(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("working") as show:
            show(1, 2)


def test_the_bar_on_a_terminal_shows_steps_and_goes_away(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar("working") as show:
        show(1, 3, "block 0 [mlp]")
        show(2, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/3" in err
    # The last thing written erases the line.
    assert err.endswith("\x1b[2K")


def test_the_bar_on_a_terminal_shows_layers(capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    with quantization_progress(1) as show:
        show(layer(0, 1.0), 3)
        show(layer(1, 1.0), 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/3" in err
    assert "mean loss" not in err
    assert err.endswith("\x1b[2K")
