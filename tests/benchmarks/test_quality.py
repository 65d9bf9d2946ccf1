"""The quality benchmark on a tiny model: results are added once, shown, and drawn."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
from conftest import llama_config, make_model
from rich.console import Console

import gptq
from benchmarks.common.measures import machine, version
from benchmarks.quality import __main__ as quality
from benchmarks.quality import making
from benchmarks.quality.results import RESULTS, Result, read_results, table
from benchmarks.quality.subjects import Subject


@pytest.fixture
def tiny(monkeypatch, tmp_path, text_file):
    folder = make_model(tmp_path / "m", llama_config())

    def subject(name, _cache):
        heldout = {"words": text_file}
        return Subject(name, folder, text_file, heldout, nsamples=4, seqlen=32)

    monkeypatch.setattr(quality, "subject", subject)
    return tmp_path / "results" / "quality.jsonl"


def test_a_result_is_made_once(tiny, capsys):
    words = ["--models", "llama-tiny", "--settings", "W4 g32 asym", "--results", str(tiny)]
    assert quality.main([*words, "--methods", "rounding"]) == 0
    assert quality.main([*words, "--methods", "rounding", "default"]) == 0
    rows = [json.loads(line) for line in tiny.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["rounding", "default"]
    for row in rows:
        # 4 bits, and in a group of 32 a scale of 16 bits and a zero of 4; g_idx beside them.
        assert 4 + 20 / 32 <= row["bits_per_weight"] < 5.2
        assert row["cpu_seconds"] > 0
    shown = capsys.readouterr().out
    assert f"{rows[1]['gaps']['words']:.4f}" in shown


def test_peers_need_their_environment(capsys):
    with pytest.raises(SystemExit) as stop:
        quality.main(["--methods", "AutoRound, 50 steps"])
    assert stop.value.code == 2
    assert "needs --autoround PYTHON" in capsys.readouterr().err


def test_a_chart_without_matplotlib_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quality.main(["--chart", str(tmp_path / "gap.png")]) == 2
    assert capsys.readouterr().err == (
        "error: --chart needs matplotlib: pip install '.[report]' first\n"
    )


def test_a_peer_that_fails_is_named(tiny, capsys):
    words = ["--models", "llama-tiny", "--settings", "W4 g32 asym", "--results", str(tiny)]
    peer = ["--methods", "GPTQModel, its defaults", "--gptqmodel", "/bin/false"]
    assert quality.main([*words, *peer]) == 2
    assert "GPTQModel, its defaults failed" in capsys.readouterr().err


def test_a_result_is_made_again_when_asked(tiny, monkeypatch, capsys):
    words = ["--models", "llama-tiny", "--settings", "W4 g32 asym", "--methods", "rounding"]
    words += ["--results", str(tiny)]
    monkeypatch.setattr(making, "version", lambda: "0.1+older")
    assert quality.main(words) == 0
    monkeypatch.setattr(making, "version", lambda: "0.2+newer")
    assert quality.main(words) == 0
    rows = read_results(tiny)
    assert [row.version for row in rows] == ["0.1+older"]
    assert quality.main([*words, "--fresh"]) == 0
    assert len(tiny.read_text().splitlines()) == 2
    (row,) = read_results(tiny)
    assert (row.version, row.machine) == ("0.2+newer", machine())
    capsys.readouterr()


ROW = Result("m", "W4 g64 asym", "default", {"wiki": 0.5}, 4.36, 7.0, 1, "0.2+abc", "a CPU")


def shown(rows, model) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(rows, model))
    return capture.get()


def test_a_table_has_one_model_and_says_what_made_each_row():
    other = replace(ROW, method="rounding", version="0.1+def", machine="another CPU", threads=2)
    text = shown([ROW, other, replace(ROW, model="elsewhere", gaps={"wiki": 0.25})], "m")
    lines = {line.split("│")[2].strip(): line for line in text.splitlines() if "W4 g64" in line}
    assert lines.keys() == {"default", "rounding"}
    assert "0.2+abc" in lines["default"]
    assert "a CPU" in lines["default"]
    assert "0.1+def" in lines["rounding"]
    assert "another CPU" in lines["rounding"]
    assert "0.25" not in text
    assert "both run in float32" in text


def test_results_from_before_versions_were_kept(tmp_path):
    path, old = tmp_path / "r.jsonl", dict(vars(ROW))
    for name in ("version", "machine"):
        del old[name]
    path.write_text(json.dumps(old) + "\n")
    (row,) = read_results(path)
    assert row.version == row.machine == "not recorded"
    assert "not recorded" in shown([row], "m")


def test_the_results_in_the_repository_can_be_read():
    rows = read_results(RESULTS)
    assert len({row.key for row in rows}) == len(rows) > 0


def test_which_code_a_method_is():
    assert making.toolkit_version("default", {}) == version()
    assert version().startswith(gptq.__version__)
    # There is no such package in this environment.
    pythons = {"gptqmodel": sys.executable}
    found = making.toolkit_version("GPTQModel, its defaults", pythons)
    assert found == "gptqmodel not recorded"


def test_a_machine_without_a_name(tmp_path):
    path = tmp_path / "cpuinfo"
    assert machine(path).startswith("unknown processor, ")
    path.write_text("processor\t: 0\nmodel name\t: Fast 9000 \nmodel name\t: Slow\n")
    assert machine(path).startswith("Fast 9000, ")
