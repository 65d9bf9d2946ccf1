"""Tables hold the numbers of a run, at any width."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from gptq.cli.console import layer_table, size_of, totals_table
from gptq.config import QuantConfig
from gptq.models import BLOOM, LLAMA
from gptq.pipeline.report import LayerReport, Report


def a_report(names=("a", "b"), written=()):
    layers = tuple(
        LayerReport(
            block=7,
            name=name,
            bits=4,
            group_size=128,
            loss=0.001 * index,
            rtn_loss=0.004 * index,
            kept_rtn=index,
            rows=11008,
            damp=0.01 if index < 3 else 0.1,
            seconds=100.126 + index,
        )
        for index, name in enumerate(names, 1)
    )
    return Report(QuantConfig(), layers, tuple(written), 3725.04, 1536 * 2**20)


def rendered(table, width=120):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def cells(line):
    return re.split(r"[\s│]+", line.strip(" │"))


def test_a_line_for_each_layer():
    lines = rendered(layer_table(a_report(["self_attn.k_proj", "mlp.up_proj"]))).splitlines()
    numbers = [cells(line) for line in lines if "proj" in line]
    assert numbers == [
        ["7", "self_attn.k_proj", "1.000e-03", "4.000e-03", "1/11008", "0.01", "101.13"],
        ["7", "mlp.up_proj", "2.000e-03", "8.000e-03", "2/11008", "0.01", "102.13"],
    ]


def mixed_report(names=("a", "b", "c")):
    """Layers of 3 bits in groups of 32, but the first, of 8 bits in one group."""
    report = a_report(names)
    layers = [replace(layer, bits=3, group_size=32) for layer in report.layers]
    return replace(report, layers=(replace(layers[0], bits=8, group_size=-1), *layers[1:]))


def test_widths_are_told_if_layers_have_several():
    report = mixed_report()
    lines = rendered(layer_table(report)).splitlines()
    numbers = [cells(line)[:4] for line in lines if "11008" in line]
    assert numbers == [["7", "a", "8", "-1"], ["7", "b", "3", "32"], ["7", "c", "3", "32"]]
    assert any(cells(line)[:4] == ["block", "layer", "bits", "group"] for line in lines)
    rows = dict(re.findall(r"^│ (.+?) +│ (.+?) +│$", rendered(totals_table(report), 300), re.M))
    assert rows["widths"] == "3 bit g32 (2 layers), 8 bit g-1 (1 layer)"


@pytest.mark.parametrize("spec", [LLAMA, BLOOM], ids=lambda spec: spec.model_type)
@pytest.mark.parametrize("make", [a_report, mixed_report])
def test_the_table_fits_80_columns(make, spec):
    text = rendered(layer_table(make(spec.linears)), width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("spec", [LLAMA, BLOOM], ids=lambda spec: spec.model_type)
def test_names_and_numbers_are_whole_in_80_columns(spec):
    text = rendered(layer_table(a_report(spec.linears)), width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [line for line in text.splitlines() if "11008" in line]
    assert [cells(line)[1] for line in lines] == list(spec.linears)
    assert all(len(cells(line)) == 7 for line in lines)


def test_nothing_is_cut_off_in_narrow_terminals():
    name = "self_attention.query_key_value"
    text = rendered(layer_table(a_report([name])), width=60)
    assert "…" not in text
    below = text.rpartition("─")[2].splitlines()
    assert "".join(line[6:19].strip() for line in below) == name
    assert cells(below[-1])[-5:] == ["1.000e-03", "4.000e-03", "1/11008", "0.01", "101.13"]


def test_totals(tmp_path):
    path = tmp_path / "out [bold].pt"
    path.write_bytes(bytes(3 * 2**19))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(bytes(2**20))
    text = rendered(totals_table(a_report("abcd", [path, folder])), width=300)
    rows = dict(re.findall(r"^│ (.+?) +│ (.+?) +│$", text, re.M))
    assert rows == {
        "layers": "4",
        "mean loss": "2.500e-03 of the output",
        "mean loss of rounding": "1.000e-02",
        "rows that keep rounding": "10 of 44032",
        "damp": "0.01 (2 layers), 0.1 (2 layers)",
        "time": "3725.0 s",
        "peak memory": "1536 MiB",
        "written": f"{folder} (2.0 MiB)",
    }
    assert f"{path} (1.5 MiB)" in text


def test_a_long_path_is_folded_not_cut(tmp_path):
    path = tmp_path / ("long" * 30)
    path.touch()
    text = rendered(totals_table(a_report(written=[path])), width=60)
    assert "…" not in text
    assert str(path) in "".join(re.findall(r"│ ([^│]+?) +│$", text, re.M))


def test_sizes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(5))
    (tmp_path / "b").write_bytes(bytes(7))
    assert (size_of(tmp_path / "a"), size_of(tmp_path)) == (5, 12)


def test_warnings_of_a_run_are_in_its_totals():
    report = replace(a_report(), warnings=("few tokens [red]\x1b[2J",))
    assert "few tokens [red]\\x1b[2J" in rendered(totals_table(report))
