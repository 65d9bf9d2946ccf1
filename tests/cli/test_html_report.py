"""The page of a quantization says what the report and the file say."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import gptq
from gptq.cli.html_report import heat_map, parts, stages, write_page
from gptq.cli.run import main
from gptq.config import QuantConfig
from gptq.files.opening import open_tensors
from gptq.models import SPECS

CONFIG = QuantConfig(group_size=64, method="rtn", scale_search="minmax")


@pytest.fixture(scope="module", params=["llama", "bloom"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    model = request.getfixturevalue(f"{request.param}_dir")
    report = gptq.quantize(model, None, CONFIG, save=folder / "m.pt")
    return SPECS[request.param], report, folder


class Page(HTMLParser):
    """Text by element, and what the page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_every_weight_and_byte_is_in_one_part(made):
    spec, report, folder = made
    tensors = open_tensors([folder / "m.pt"])
    *rows, (_, weights, bits, size) = parts(tensors, spec)
    assert size == sum(tensors[name].nbytes for name in tensors)
    # A tied head is the embedding's own weight.
    config = {"llama": 2 * 2 * 64 * 16 + 2 * 64 * 64 * 2 + 2 * 3 * 64 * 96, "bloom": 2 * 12 * 64**2}
    vocabulary = {"llama": 2 * 320 * 64, "bloom": 320 * 64}
    inner = {part: count for part, count, _, _ in rows}
    assert inner.pop("embedding") + inner.pop("head", 0) == vocabulary[spec.model_type]
    inner.pop("norms and biases")
    counted = sum(layer.rows for layer in report.layers if layer.name.endswith("o_proj"))
    assert counted in (0, 128)
    if spec.model_type == "bloom":
        assert sum(inner.values()) == config["bloom"]
    else:
        assert inner["gate_proj"] == inner["down_proj"] == 2 * 64 * 96
        assert inner["q_proj"] == 2 * 64 * 64
        assert inner["k_proj"] == 2 * 64 * 32
    assert bits == pytest.approx(8 * size / weights)
    for part, count, each, size_of_part in rows:
        assert each == pytest.approx(8 * size_of_part / count), part
    # 4 bits, a scale of 16 and a zero point of 4 for 64 inputs, 32 for each input's group.
    name = "q_proj" if spec.model_type == "llama" else "dense"
    each = {part: each for part, _, each, _ in rows}[name]
    assert each == pytest.approx(4 + 20 / 64 + 32 / 64)


def test_shades_go_by_the_logarithm(made):
    spec, report, _ = made
    layers = tuple(
        replace(layer, loss=10.0 ** -(2 + index % 3)) for index, layer in enumerate(report.layers)
    )
    rows = heat_map(layers, spec)
    assert [block for block, _ in rows] == [0, 1]
    flat = [(layer, shade) for _, row in rows for layer, shade in row]
    assert [layer for layer, _ in flat] == list(layers)
    for layer, shade in flat:
        assert shade == pytest.approx({1e-2: 1, 1e-3: 0.5, 1e-4: 0}[round(layer.loss, 6)])


def test_stages_add_up_to_the_run(made):
    spec, report, _ = made
    rows = stages(report, spec)
    assert sum(seconds for _, seconds, _ in rows) == pytest.approx(report.seconds)
    assert {"reading the calibration text", "writing", "the rest"} < {name for name, _, _ in rows}


def test_the_page(made):
    spec, report, folder = made
    path = write_page(folder / "new", "<My & model>", spec, report, {"wiki.txt": 12.3456})
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not page.fetched
    assert "url(" not in text
    assert "@import" not in text
    text_shown = "".join(page.texts)
    assert "<My & model>" in text_shown
    assert "12.346" in text_shown
    assert text.count("<i style=") == len(report.layers)
    for layer in report.layers:
        assert f"block {layer.block} {layer.name}: {layer.loss:.2e}" in text
    for setting, value in CONFIG.to_dict().items():
        assert re.search(rf"<td>{setting}</td><td>{re.escape(str(value))}</td>", text)


def test_widths_of_several_kinds(made):
    """Each layer says its bits and group, and the heading how many layers have which."""
    spec, report, folder = made
    first, *others = report.layers
    mixed = replace(report, layers=(replace(first, bits=8, group_size=-1), *others))
    text = write_page(folder / "mixed", "m", spec, mixed, {}).read_text(encoding="utf-8")
    shown = " ".join("".join(Page(text).texts).split())
    assert f"4 bit g64 ({len(others)} layers), 8 bit g-1 (1 layers), written to m.pt" in shown
    losses = f"{first.loss:.2e}, rounded {first.rtn_loss:.2e}"
    assert f"block 0 {first.name}: {losses}, 8 bit g-1" in text
    assert len(re.findall(r', 4 bit g64">4</i>', text)) == len(others)
    uniform = write_page(folder / "uniform", "m", spec, report, {}).read_text(encoding="utf-8")
    assert "4 bit in groups of 64, written to" in " ".join("".join(Page(uniform).texts).split())
    assert '">4</i>' not in uniform


def test_the_flag(llama_dir, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(llama_dir), str(text_file), "--wbits", "4", "--nearest", "--seqlen", "32"]
    torch.manual_seed(0)
    argv += ["--report", "page", "--save", "m.pt", "--eval", "--eval-windows", "2"]
    assert main(SPECS["llama"], argv) == 0
    printed = capsys.readouterr().out
    value = re.search(r"perplexity words.txt ([\d.]+)", printed)[1]
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    shown = re.search(r"<b>([\d.]+)</b><span>perplexity, words.txt</span>", page)[1]
    assert float(shown) == pytest.approx(float(value), abs=6e-4)
    (tmp_path / "file").touch()
    assert main(SPECS["llama"], [*argv[:-6], "file", "--save", "n.pt"]) == 2
    assert "file" in capsys.readouterr().err
    assert not (tmp_path / "n.pt").exists()
