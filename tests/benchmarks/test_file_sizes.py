"""Files of one size, on a small model, their table and their chart."""

import json
import shutil
import sys
from dataclasses import asdict

import pytest
from conftest import llama_config, make_model

from benchmarks import file_sizes, llama_cpp_files
from benchmarks.file_sizes_report import (
    BETWEEN,
    CHOSEN,
    SIZES,
    THEIRS,
    UNIFORM,
    Row,
    chart,
    read,
    table,
)
from benchmarks.quality.results import RESULTS, read_results
from benchmarks.quality.subjects import Subject

GAPS = {"wiki": 0.1002, "c4": 0.0719}


def row(setting, how, **more):
    values = {"size": 85_904_155, "gaps": GAPS, "embedding_bits": 8, "layers": {"4 bit g128": 210}}
    about = {"cpu_seconds": 149.6, "version": "0.2.0", "machine": "some"}
    return Row(setting, how, **{**values, **about, **more})


@pytest.fixture
def small(text_file, tmp_path, monkeypatch):
    """A small model in place of SmolLM2. Returns the file of results."""
    # Large enough that names and shapes take little of the file.
    folder = make_model(tmp_path / "m", llama_config(vocab_size=4000, hidden_size=192))
    texts = {"wiki": text_file, "c4": text_file}
    model = Subject("m", folder, text_file, texts, nsamples=8, seqlen=32, windows=2)
    monkeypatch.setattr(file_sizes, "subject", lambda name, cache: model)
    # A page of the repository is not for results of a small model.
    monkeypatch.setattr(file_sizes, "PAGE", tmp_path / "none.md")
    return tmp_path / "rows.jsonl"


def test_two_files_of_a_setting(small, capsys):
    assert file_sizes.main(["--settings", "W4 g128", "--results", str(small)]) == 0
    uniform, chosen = read(small)
    assert (uniform.how, chosen.how) == (UNIFORM, CHOSEN)
    assert (uniform.embedding_bits, uniform.layers) == (8, {"4 bit g128": 14})
    assert sum(chosen.layers.values()) == 14
    assert 0 < chosen.size <= uniform.size
    assert list(chosen.gaps) == ["wiki", "c4"]
    assert "W4 g128, chosen for its bytes" in capsys.readouterr().out


def test_a_file_between_two(small, capsys):
    words = ["--settings", BETWEEN, "--results", str(small)]
    assert file_sizes.main(words) == 2
    assert "has the bytes of W4 g128; measure that first" in capsys.readouterr().err
    sizes = {"W4 g128": 1_300_000, "W3 g128": 1_200_000}
    rows = [asdict(row(setting, UNIFORM, size=size)) for setting, size in sizes.items()]
    small.write_text("".join(f"{json.dumps(it)}\n" for it in rows))
    assert file_sizes.main(words) == 0
    (*_, chosen) = read(small)
    assert (chosen.setting, chosen.how) == (BETWEEN, CHOSEN)
    # What is set aside for names and shapes is much of so small a file.
    assert 1_150_000 < chosen.size <= 1_250_000


def test_files_of_llama_cpp(small, monkeypatch, capsys):
    """A stand-in that rounds nothing: it only says what it took."""
    assert file_sizes.main(["--settings", "Q3_K_M", "--results", str(small)]) == 2
    assert "Q3_K_M is llama.cpp's; give --llamacpp PYTHON" in capsys.readouterr().err
    asked = []

    def stand_in(_python, _threads, task, full, out, *words, **_):
        asked.append((task, *words[:2], len(words)))
        shutil.copy(full, out)
        return {"types": {"Q3_K": 14}, "embedding_bits": 6, "version": "0.3"}

    monkeypatch.setattr(llama_cpp_files, "in_peer", stand_in)
    words = ["--settings", "Q3_K_M", "--llamacpp", sys.executable, "--results", str(small)]
    assert file_sizes.main(words) == 0
    assert asked == [("quantize", "q3_k_m", "default", 2), ("quantize", "q3_k_m", "default", 3)]
    *theirs, chosen = read(small)
    assert [it.how for it in theirs] == list(THEIRS)
    for it in theirs:
        assert it.gaps == pytest.approx({"wiki": 0, "c4": 0}, abs=1e-5)
        assert (it.embedding_bits, it.layers) == (6, {"Q3_K": 14})
        assert it.version == "llama-cpp-python 0.3"
    # The full model leaves room for 8 bits everywhere.
    assert chosen.how == CHOSEN
    assert chosen.embedding_bits == 8


def test_the_table_has_a_line_between_two_files():
    files = [("W4 g128", UNIFORM), ("W4 g128", CHOSEN), ("W3 g128", UNIFORM), (BETWEEN, CHOSEN)]
    rows = [row(*file) for file in files]
    rows[2] = row("W3 g128", UNIFORM, size=72_500_000, gaps={"wiki": 0.3, "c4": 0.2})
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) + 1
    assert lines[2] == "| W4 g128 | uniform | 85.9 | 0.100 | 0.072 | 8 | 210 of 4 bit g128 | 150 |"
    assert lines[4] == f"| {BETWEEN} | uniform, on the line | 79.2 | 0.200 | 0.136 | 8 |  |  |"
    assert lines[5].startswith(f"| {BETWEEN} | {CHOSEN} | 85.9 |")
    assert lines[6].startswith("| W3 g128 | uniform | 72.5 |")


def test_of_two_rows_for_a_file_the_later_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row("W3 g128", CHOSEN), row("W4 g128", UNIFORM), row("W3 g128", CHOSEN, size=1)]
    path.write_text("".join(f"{json.dumps(asdict(it))}\n" for it in rows))
    assert read(path) == [rows[2], rows[1]]


def test_the_page_has_the_rows_of_the_file():
    page = file_sizes.PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {file_sizes.PART} -->\n", f"\n<!-- end of {file_sizes.PART} -->"
    assert page.partition(begin)[2].partition(end)[0] == table(read(SIZES))
    assert len({it.machine for it in read(SIZES)}) == 1


def test_the_chart_has_every_file(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    rows, quality = read(SIZES), read_results(RESULTS)
    rows.append(row("W4 g128", UNIFORM, gaps={"wiki": -0.1, "c4": 0.0}))
    close, drawn = pyplot.close, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        chart(rows, quality, tmp_path / "sizes.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    close(drawn[0])
    assert list(lines["ours, uniform bits"].get_xdata()) == pytest.approx([60.8, 72.5, 85.9], 1e-2)
    assert len(lines["ours, --size"].get_xdata()) == sum(it.how == CHOSEN for it in rows)
    # 4.21 bits a weight of its layers, 16 of the embedding.
    assert max(lines["GPTQModel, embedding of 16 bits"].get_xdata()) == pytest.approx(112.6, 1e-2)
    assert (tmp_path / "sizes.png").stat().st_size > 0


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        file_sizes.main(["--settings", "W5"])
    assert stop.value.code == 2
    assert "W5" in capsys.readouterr().err


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(asdict(row("W4 g128", UNIFORM))) + "\n")
    assert read(path) == [row("W4 g128", UNIFORM)]
