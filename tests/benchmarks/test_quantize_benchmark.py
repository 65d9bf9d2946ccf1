"""The limits of quantizing against counts by hand, and the stopwatch that is held beside them."""

import dataclasses
import json

import pytest
import torch
from conftest import llama_config

from benchmarks import quantize
from benchmarks.common.stopwatch import STAGES, Stopwatch
from benchmarks.limits import PLAIN, Group, groups_of, main, operations
from benchmarks.quality.subjects import Subject
from benchmarks.quantize import run_ours
from gptq import QuantConfig


def test_groups_of_a_block():
    config = llama_config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2
    )
    assert groups_of(config) == [
        Group(64, 128, False),
        Group(64, 64, True),
        Group(64, 192, False),
        Group(96, 64, True),
    ]


def test_operations_of_plain_gptq():
    config = llama_config(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
    )
    counts = operations(config, QuantConfig(group_size=32, **PLAIN), nsamples=2, seqlen=10)
    weights = 64 * (128 + 64 + 192) + 96 * 64
    assert counts["forward"] == 3 * (2 * 20 * weights + 4 * 20 * 5 * 64)
    assert counts["moments"] == 3 * 20 * (3 * 64**2 + 96**2)
    assert counts["factorization"] == pytest.approx(3 * 2 / 3 * (3 * 64**3 + 96**3))
    assert counts["sweep"] == 3 * (64**2 * (128 + 64 + 192) + 96**2 * 64)
    assert not {"damping", "feedback", "refinement"} & set(counts)


def test_every_step_of_the_default_counts():
    config = llama_config()
    counts = operations(config, QuantConfig(group_size=32), nsamples=2, seqlen=10)
    plain = operations(config, QuantConfig(group_size=32, **PLAIN), nsamples=2, seqlen=10)
    assert {"damping", "feedback", "refinement"} <= set(counts)
    assert counts["forward"] == 2 * plain["forward"]
    assert all(counts[stage] >= plain[stage] for stage in plain)


def test_a_model_that_is_not_there(capsys, tmp_path):
    assert main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_inner_time_is_the_inner_functions():
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    watch = Stopwatch(lambda: now[0])
    inner = watch.timed("inner", lambda: spend(2))

    def both():
        spend(1)
        inner()
        inner()
        spend(3)

    watch.timed("outer", both)()
    assert watch.seconds == {"inner": 4, "outer": 4}


@pytest.fixture
def tiny(llama_dir, text_file):
    return Subject("tiny", llama_dir, text_file, {}, nsamples=6, seqlen=32)


def test_stages_of_a_run(tiny, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run, path = run_ours(tiny, "default", tmp_path)
    finally:
        torch.set_num_threads(before)
    assert path.exists()
    assert set(STAGES.values()) == set(run.stages)
    assert min(run.stages.values()) >= 0
    assert sum(run.stages.values()) <= run.cpu_seconds


def test_tables_and_file(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantize, "subject", lambda _name, _cache: tiny)
    short = dataclasses.replace(quantize.Rates(1e9, 1e9))
    monkeypatch.setattr(quantize, "measured_rates", lambda: short)
    monkeypatch.setitem(quantize.GRID, "group_size", 32)
    output = tmp_path / "r" / "q.json"
    words = ["--settings", "plain", "--model", str(tiny.folder), "--output", str(output)]
    assert quantize.main(words) == 0
    record = json.loads(output.read_text())
    assert [run["method"] for run in record["runs"]] == ["plain"]
    assert "forward" in record["runs"][0]["stages"]
    assert "share of the limit" in capsys.readouterr().out
