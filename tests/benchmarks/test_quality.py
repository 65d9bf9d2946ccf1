"""The quality benchmark on a tiny model: results are added once, shown, and drawn."""

import importlib.util
import json
import math
import random
import shutil
import sys
from dataclasses import replace

import datasets
import pytest
import torch
from conftest import WORDS, llama_config, make_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq
from benchmarks import llama_cpp_files
from benchmarks.common.measures import machine, version
from benchmarks.quality import __main__ as quality
from benchmarks.quality import making, methods, subjects
from benchmarks.quality.results import RESULTS, Result, chart, read_results, table
from benchmarks.quality.subjects import Subject
from gptq import api
from gptq.config import QUALITIES


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


def test_widths_chosen_for_an_average(tiny, monkeypatch, capsys):
    monkeypatch.setitem(methods.SETTINGS, "4.9 bits", methods.Setting({"sym": False}, 4.9))
    words = ["--models", "llama-tiny", "--settings", "W4 g32 asym", "4.9 bits"]
    words += ["--results", str(tiny), "--methods", "rounding", "+ residual feedback"]
    assert quality.main(words) == 0
    rows = {row.key[1:]: row for row in read_results(tiny)}
    assert rows.keys() == {
        ("W4 g32 asym", "rounding"),
        ("W4 g32 asym", "+ residual feedback"),
        ("4.9 bits", "+ residual feedback"),
    }
    assert 4.3 < rows["4.9 bits", "+ residual feedback"].bits_per_weight <= 4.9
    line = "skipped 4.9 bits by rounding: rounding has no text to choose widths on\n"
    assert capsys.readouterr().err.count(line) == 1


@pytest.mark.parametrize(
    ("average", "uniform"), [("4.21 bits asym", "W4 g128 asym"), ("2.33 bits asym", "W2 g64 asym")]
)
def test_the_average_of_equal_size_is_no_larger(average, uniform):
    """Of SmolLM2, whose layers are these."""
    spent = {
        row.setting: row.bits_per_weight for row in read_results(RESULTS) if row.model == "smollm2"
    }
    bits = methods.SETTINGS[average].average_bits
    assert 1e-3 < spent[uniform] - bits < 2e-3


def test_what_no_method_can_make_is_refused(capsys):
    assert quality.main(["--settings", "3.5 bits asym", "--methods", "rounding"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "error: nothing to measure: 3.5 bits asym by rounding: rounding has no text"
    )
    assert err.count("\n") == 1


def test_more_calibration_text_and_tuning(tiny, monkeypatch, capsys):
    """Each is calibrated on as much as its name says, and says how the training goes."""
    asked = []
    run = api.run

    def spy(model, job, **shown):
        asked.append((job.config.tune_tokens, job.nsamples))
        return run(model, job, **shown)

    monkeypatch.setattr(api, "run", spy)
    monkeypatch.setitem(QUALITIES["tune"], "tune_tokens", 64)
    words = ["--models", "llama-tiny", "--settings", "W4 g32 asym", "--results", str(tiny)]
    words += ["--methods", "default", "default, 64 windows", "tune"]
    assert quality.main(words) == 0
    assert asked == [(0, 4), (0, 64), (64, 4)]
    assert "held-out divergence" in capsys.readouterr().err


def test_autoround_on_the_tokens_of_tune(tiny, monkeypatch, tmp_path):
    """A peer that keeps the text it is given."""
    kept = tmp_path / "tokens.json"
    peer = tmp_path / "python"
    peer.write_text(f'#!/bin/sh\ncp "$3" {kept}\nexit 1\n')
    peer.chmod(0o755)
    words = ["--models", "llama-tiny", "--settings", "W4 g32 asym", "--results", str(tiny)]
    windows = {}
    for name in ("AutoRound, 50 steps", "AutoRound, 50 steps, tokens of tune"):
        assert quality.main([*words, "--methods", name, "--autoround", str(peer)]) == 2
        windows[name] = json.loads(kept.read_text())
    few, many = windows.values()
    assert len(few) == 4
    assert len(many) > 4
    assert {len(window) for window in many} == {32}
    # Those that overlap held-out windows are not among them.
    assert sum(window in many for window in few) > 0


def test_llama_cpp_has_settings_of_its_own(capsys):
    assert quality.main(["--settings", "Q4_0"]) == 2
    assert "only llama.cpp has this type" in capsys.readouterr().err
    words = ["--llamacpp", sys.executable, "--methods", "llama.cpp", "--settings", "W4 g64 asym"]
    assert quality.main(words) == 2
    assert "llama.cpp has types: Q4_0, Q4_K_M" in capsys.readouterr().err
    for name, setting in methods.SETTINGS.items():
        rows = [it for it in methods.METHODS if methods.refusal(name, it) is None]
        theirs = [it for it in rows if it.startswith("llama.cpp")]
        assert theirs == (rows if setting.llama_cpp_type else [])


def test_llama_cpp_is_measured_like_the_others(tiny, monkeypatch, capsys):
    """A stand-in that rounds nothing: it only says how many bits it took."""
    asked = []

    def stand_in(_python, _threads, task, full, out, *words, **_):
        asked.append((task, *words[:2], len(words)))
        shutil.copy(full, out)
        return {"bits": 4.5}

    monkeypatch.setattr(llama_cpp_files, "in_peer", stand_in)
    words = ["--models", "llama-tiny", "--settings", "Q4_0", "Q2_K", "--results", str(tiny)]
    assert quality.main([*words, "--llamacpp", sys.executable]) == 0
    assert asked == [
        ("quantize", "q4_0", "f16", 2),
        ("quantize", "q4_0", "f16", 3),
        ("quantize", "q2_k", "f16", 2),
        ("quantize", "q2_k", "f16", 3),
    ]
    for row in read_results(tiny):
        assert row.gaps["words"] == pytest.approx(0, abs=1e-5)
        assert row.bits_per_weight == 4.5
        assert row.version == "llama-cpp-python not recorded"


@pytest.mark.parametrize("toolkit", methods.PACKAGES)
def test_an_environment_that_is_not_there(toolkit, capsys):
    with pytest.raises(SystemExit) as stop:
        quality.main([f"--{toolkit}", "/nowhere/python"])
    assert stop.value.code == 2
    assert f"--{toolkit} /nowhere/python: no such program" in capsys.readouterr().err


def test_the_chart_has_every_method(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    rows = [
        replace(ROW, setting=setting, method=method, bits_per_weight=4 + number)
        for number, setting in enumerate(methods.SETTINGS)
        for method in methods.METHODS
        if methods.refusal(setting, method) is None
    ]
    close, drawn = pyplot.close, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        chart(rows, tmp_path / "gap.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    close(drawn[0])
    assert {name.removesuffix(", widths chosen") for name in lines} == {*methods.METHODS}
    assert len(lines["llama.cpp"].get_xdata()) == 4
    assert len(lines["default"].get_xdata()) == 6
    assert len(lines["default, widths chosen"].get_xdata()) == len(methods.AVERAGES)
    assert [lines[name].get_linestyle() for name in ("llama.cpp", "default")] == ["None", "-"]
    assert (tmp_path / "gap.png").stat().st_size > 0


@pytest.fixture
def hub(monkeypatch):
    """The named data sets, with other words for each split."""
    asked = []

    def load_dataset(path, name=None, data_files=None, split=None, revision=None):
        asked.append((path, split))
        rng = random.Random(split)
        documents = [" ".join(rng.choices(WORDS.split(), k=80)) for _ in range(40)]
        return datasets.Dataset.from_dict({"text": documents})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_any_model_by_the_protocol_of_published_rows(hub, tmp_path, monkeypatch, capsys):
    folder = make_model(tmp_path / "some-model", llama_config(max_position_embeddings=40))
    it = subjects.standard_subject(str(folder))
    assert (it.nsamples, it.seqlen, it.windows, it.dtype) == (128, 40, None, None)
    monkeypatch.setattr(subjects, "STANDARD_NSAMPLES", 4)
    results = tmp_path / "r.jsonl"
    words = ["--models", str(folder), "--settings", "W4 g32 asym", "--methods", "rounding"]
    assert quality.main([*words, "--results", str(results), "--device", "cpu"]) == 0
    wikitext, c4 = "Salesforce/wikitext", "allenai/c4"
    assert [*dict.fromkeys(hub)] == [(c4, "train"), (wikitext, "test"), (c4, "validation")]
    (row,) = read_results(results)
    assert row.key == ("some-model", "W4 g32 asym", "rounding")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(datasets.load_dataset(wikitext, split="test")["text"])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // 40 * 40].view(-1, 40)
    with torch.no_grad():
        full = float(model(input_ids=windows, labels=windows).loss)
    assert row.full_perplexities["wikitext2"] == pytest.approx(math.exp(full), rel=1e-4)
    for name, gap in row.gaps.items():
        ratio = row.perplexities[name] / row.full_perplexities[name]
        assert math.log(ratio) == pytest.approx(gap, abs=1e-9)
    assert f"wikitext2 {math.exp(full):.2f}" in capsys.readouterr().out


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert quality.main(["--models", str(tmp_path / "none"), "--methods", "rounding"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}/none does not exist")
    assert err.count("\n") == 1


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
