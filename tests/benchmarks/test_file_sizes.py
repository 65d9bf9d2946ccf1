"""Files of one size, on a small model, and their table."""

import json
from dataclasses import asdict

import pytest
from conftest import llama_config, make_model

from benchmarks import file_sizes
from benchmarks.file_sizes import CHOSEN, UNIFORM, Row, read, table
from benchmarks.quality.subjects import Subject

GAPS = {"wiki": 0.1002, "c4": 0.0719}


def row(setting, how, **more):
    values = {"size": 85_904_155, "gaps": GAPS, "embedding_bits": 8, "layers": {"4 bit g128": 210}}
    about = {"cpu_seconds": 149.6, "version": "0.2.0", "machine": "some"}
    return Row(setting, how, **{**values, **about, **more})


def test_two_files_of_a_setting(text_file, tmp_path, monkeypatch, capsys):
    # Large enough that names and shapes take little of the file.
    folder = make_model(tmp_path / "m", llama_config(vocab_size=4000, hidden_size=192))
    texts = {"wiki": text_file, "c4": text_file}
    model = Subject("m", folder, text_file, texts, nsamples=8, seqlen=32, windows=2)
    monkeypatch.setattr(file_sizes, "subject", lambda name, cache: model)
    # A page of the repository is not for results of a small model.
    monkeypatch.setattr(file_sizes, "PAGE", tmp_path / "none.md")
    results = tmp_path / "rows.jsonl"
    assert file_sizes.main(["--settings", "W4 g128", "--results", str(results)]) == 0
    uniform, chosen = read(results)
    assert (uniform.how, chosen.how) == (UNIFORM, CHOSEN)
    assert (uniform.embedding_bits, uniform.layers) == (8, {"4 bit g128": 14})
    assert sum(chosen.layers.values()) == 14
    assert 0 < chosen.size <= uniform.size
    assert list(chosen.gaps) == ["wiki", "c4"]
    assert "W4 g128, chosen for its bytes" in capsys.readouterr().out


def test_the_table_has_the_latest_rows():
    rows = [row(setting, how) for setting in file_sizes.SETTINGS for how in (UNIFORM, CHOSEN)]
    rows += [row("W3 g128", CHOSEN, embedding_bits=4, layers={"4 bit g64": 2, "3 bit g32": 1})]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2] == "| W4 g128 | uniform | 85.9 | 0.100 | 0.072 | 8 | 210 of 4 bit g128 | 150 |"
    assert len(table(rows[:1]).splitlines()) == 3
    assert "| 4 | 2 of 4 bit g64, 1 of 3 bit g32 |" in lines[5]


def test_the_page_has_the_rows_of_the_file():
    page = file_sizes.PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {file_sizes.PART} -->\n", f"\n<!-- end of {file_sizes.PART} -->"
    assert page.partition(begin)[2].partition(end)[0] == table(read(file_sizes.SIZES))
    assert len({it.machine for it in read(file_sizes.SIZES)}) == 1


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        file_sizes.main(["--settings", "W5"])
    assert stop.value.code == 2
    assert "W5" in capsys.readouterr().err


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(asdict(row("W4 g128", UNIFORM))) + "\n")
    assert read(path) == [row("W4 g128", UNIFORM)]
