"""The tables of quality in the docs and the READMEs, and the file that they are made of."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import quality_report
from benchmarks.common import page
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import RESULTS, UNKNOWN, Result, read_results

ROW = Result("smollm2", "W4 g128 asym", "default", {"wiki": 0.0876, "c4": 0.07}, 4.214, 98.7, 1)


def test_the_pages_are_what_the_results_make_of_them():
    pages = quality_report.pages(read_results(RESULTS), read_results(quality_report.SIZES))
    assert {path.name for path in pages} == {"algorithm.md", "README.md", "README.zh.md"}
    for path, parts in pages.items():
        assert page.updated(path, parts) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [RESULTS, quality_report.SIZES])
def test_every_row_says_what_made_it(path):
    rows = read_results(path)
    assert not [row.key for row in rows if UNKNOWN in (row.version, row.machine)]
    assert len({row.machine for row in rows}) == 1


def test_rows_are_in_the_order_of_settings_and_methods():
    rows = [
        replace(ROW, setting="W3 g128 asym"),
        replace(ROW, method="tune", version="0.2.0"),
        ROW,
    ]
    lines = quality_report.quality_table(rows).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| W4 g128 asym", "default"],
        ["| ", "tune"],
        ["| W3 g128 asym", "default"],
    ]
    assert lines[2].endswith("| 0.0876 | 0.0700 | 4.21 | 99 | not recorded |")


@pytest.mark.parametrize("front", [quality_report.ENGLISH, quality_report.CHINESE])
def test_a_readme_names_versions_of_other_toolkits(front):
    rows = [replace(ROW, method=name, version="peer 1.2.3") for name in front.methods]
    lines = quality_report.front_table(rows, "W4 g128 asym", front).splitlines()
    assert "128" in lines[0]
    assert "4.21" in lines[0]
    assert len(lines) == 2 + len(front.methods)
    for name, line in zip(front.methods, lines[2:], strict=True):
        assert ("1.2.3" in line) == (METHODS[name].toolkit != "gptq")


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(quality_report, "write", lambda *args: written.append(args))
    path = tmp_path / "rows.jsonl"
    for text, expected in (
        (None, "is not there"),
        ("no json", "Expecting value"),
        ('{"model": "smollm2"}', "missing"),
        (json.dumps(asdict(ROW)), "has no rows of llama-tiny"),
        (
            "\n".join(
                json.dumps(asdict(replace(ROW, model=name))) for name in quality_report.MODELS
            ),
            "has no row W4 g128 asym, GPTQModel, its best",
        ),
    ):
        if text is not None:
            path.write_text(text)
        assert quality_report.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: ")
        assert expected in error
        assert error.count("\n") == 1
    assert not written


def test_rows_at_other_sizes_are_missing(tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(quality_report, "write", lambda *args: written.append(args))
    monkeypatch.setattr(quality_report, "SIZES", tmp_path / "sizes.jsonl")
    assert quality_report.main([]) == 2
    assert "sizes.jsonl" in capsys.readouterr().err
    assert not written
