"""The quality benchmark on a tiny model: results are added once, shown, and drawn."""

import importlib.util
import json

import pytest
from conftest import llama_config, make_model

from benchmarks import quality


@pytest.fixture
def tiny(monkeypatch, tmp_path, text_file):
    folder = make_model(tmp_path / "m", llama_config())

    def subject(name, _cache):
        heldout = {"words": text_file}
        return quality.Subject(name, folder, text_file, heldout, nsamples=4, seqlen=32)

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
