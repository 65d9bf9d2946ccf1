"""The release table: real files measured, counted bytes held to real tensors."""

import json

import pytest
import torch
from conftest import bloom_config, llama_config, make_model

import gptq
from benchmarks import release_report, release_table
from benchmarks.common.measures import gpu_bytes, weight_count
from benchmarks.release_report import GIB, Row, cells, markdown
from gptq.config import QuantConfig
from gptq.files.lazy import as_lazy
from gptq.nn import PackedModule
from quant_cuda.cuda import layout


@pytest.mark.parametrize("config", [llama_config(), bloom_config(vocab_size=323)])
@pytest.mark.parametrize("bits", [4, 8])
def test_counted_bytes_are_those_of_the_gpus_layout(config, bits, tmp_path):
    folder = make_model(tmp_path / "m", config)
    quantization = QuantConfig(bits=bits, group_size=64, method="rtn", scale_search="minmax")
    gptq.quantize(folder, None, quantization, save=tmp_path / "m.pt")
    model, _ = gptq.load(folder, tmp_path / "m.pt")
    held = [tensor.half() for tensor in model.parameters()]
    for module in model.modules():
        if isinstance(module, PackedModule):
            made = layout.prepare(module.packed())
            held += [made.words, made.table]
            held += [] if module.bias is None else [module.bias.half()]
    assert gpu_bytes(model) == sum(-(-tensor.nbytes // 512) * 512 for tensor in held)
    full, _ = gptq.load(folder)
    assert weight_count(model) == weight_count(full) == sum(p.numel() for p in full.parameters())


def test_blocks_are_repeated_by_name():
    made = {name: torch.zeros(size) for name, size in (("h.0.a.w", 1), ("h.0.b", 2), ("top", 3))}
    tensors = as_lazy(made)
    found = release_table.repeated(tensors, "h.0.", 3)
    expected = {f"h.{i}.{end}" for i in range(3) for end in ("a.w", "b")} | {"top"}
    assert set(found) == expected
    assert found.shape("h.2.b") == (2,)


def test_a_shape_from_nothing(capsys, monkeypatch):
    """Every byte of a file that is made, measured and removed."""
    monkeypatch.setattr(release_table, "in_fresh_process", lambda function, *args: function(*args))
    assert release_table.main(["--shapes", "bloom-tiny", "--tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(random weights)") == 6  # three rows, as they come and in the table
    assert "Resident memory" in printed
    assert "computed" in printed


def test_sizes_and_sums(tmp_path, llama_dir, text_file, monkeypatch):
    monkeypatch.setattr(release_table, "in_fresh_process", lambda function, *args: function(*args))
    words = [str(llama_dir), "--eval", str(text_file), "--windows", "2", "--seqlen", "32"]
    args = release_table.parse([*words, "--tokens", "3"])
    full, eight, four = release_table.rows(args)
    weights = 2 * 320 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 5 * 64
    assert full.bits_per_weight == pytest.approx(16, rel=0.1)
    assert full.file_bytes == (llama_dir / "model.safetensors").stat().st_size
    assert eight.bits_per_weight == pytest.approx(8 * eight.file_bytes / weights)
    assert four.file_bytes < eight.file_bytes < full.file_bytes
    assert four.computed_memory < eight.computed_memory < full.computed_memory
    assert all(row.perplexity and len(row.seconds_a_token) == 2 for row in (full, eight, four))


def a_row(**changes):
    row = Row("x.pt", 3 * GIB, 4.5, 5 * GIB, False, 2 * GIB, 8, 1.5, (0.1, 0.2, 0.5), None)
    return Row(**{**row.__dict__, **changes})


def test_what_a_row_says():
    row = a_row(random=True, published=(6.9, 8.4))
    assert cells(row) == (
        *("x.pt (random weights)", "3.00", "6.9", "4.50", "2.00 computed", "8.4", "5.00", "1.5"),
        *("5.00 (2.86 to 6.67)", "–"),
    )
    on_gpu = cells(a_row(on_gpu=True, perplexity=9.87654))
    assert on_gpu[4:7] == ("5.00", "–", "–")
    assert on_gpu[-1] == "9.877"
    assert "computed" not in markdown([a_row(on_gpu=True)])


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ([], "nothing to measure"),
        (["--shapes", "gpt"], "--shapes gpt"),
        (["a", "b", "--checkpoints", "c"], "--checkpoints belong to one MODEL"),
        (["/nowhere"], "does not exist"),
    ],
)
def test_bad_input(words, wrong, capsys):
    assert release_table.main(words) == 2
    assert wrong in capsys.readouterr().err


@pytest.mark.extras
def test_what_is_written(tmp_path):
    rows = [a_row(published=(6.9, 8.4)), a_row(name="y.pt")]
    release_report.write(rows, tmp_path / "out")
    again = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    assert [row["file_bytes"] for row in again] == [3 * GIB, 3 * GIB]
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == markdown(rows)
    assert (tmp_path / "out.png").stat().st_size > 5000
