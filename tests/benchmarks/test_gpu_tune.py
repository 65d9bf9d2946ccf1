"""Choosing the fastest kernel, and the table of it: with clocks of our own instead of a GPU's."""

import itertools
import json
import sys

import pytest
import torch
from conftest import ROOT
from helpers.products import packed

from benchmarks import gpu_tune
from benchmarks.common.workers import Events
from quant_cuda.cuda import kernels, layout, tuned
from quant_cuda.cuda.variants import SPLITS, TILES, VARIANTS

HALF = torch.float16
ABOUT = {"gpu": "Some GPU 1", "driver": "1.2", "commit": "abc"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    tuned.table_for.cache_clear()
    yield tmp_path / "tuned"
    tuned.table_for.cache_clear()


def clock(*seconds: float):
    """A timer that goes through these, again and again."""
    return itertools.cycle(seconds).__next__


def test_kernels_are_timed_in_turn_and_the_slow_ones_once():
    calls = []

    def timer(name, seconds):
        def run():
            calls.append(name)
            return seconds

        return run

    timers = {"a": timer("a", 3.0), "b": timer("b", 1.0), "c": timer("c", 1.2), "d": timer("d", 2)}
    assert list(gpu_tune.fastest(timers, repeats=2).items()) == [("b", 1.0), ("c", 1.2), ("a", 3.0)]
    assert calls == ["a", "b", "c", "d", "a", "b", "c", "a", "b", "c"]


def test_a_median_decides_not_one_lucky_time():
    timers = {"a": clock(2.0), "lucky": clock(1.9, 2.3, 2.3, 0.1, 2.3)}
    assert next(iter(gpu_tune.fastest(timers, repeats=5))) == "a"


def timed(untuned="gemv", **seconds):
    sizes = {"bits": 4, "inputs": 64, "outputs": 32, "rows": 8}
    in_order = dict(sorted(seconds.items(), key=lambda item: item[1]))
    return {**sizes, "untuned": untuned, "seconds": in_order}


def test_what_is_hardly_faster_replaces_nothing():
    row = gpu_tune.entry(timed(gemv=1.01e-5, other=1e-5), {})
    assert (row["kernel"], row["microseconds"]) == ("gemv", 10.1)
    row = gpu_tune.entry(timed(gemv=1.1e-5, other=1e-5), {})
    assert (row["kernel"], row["untuned_microseconds"]) == ("other", 11)


def test_what_fails_later_loses_its_rows():
    it = timed(gemv=3e-5, second=2e-5, bad=1e-5)
    assert gpu_tune.entry(it, {})["kernel"] == "bad"
    assert gpu_tune.entry(it, {"bad": "error"})["kernel"] == "second"
    row = gpu_tune.entry(it, {"bad": "error", "gemv": "error"})
    assert (row["kernel"], row["untuned_microseconds"]) == ("second", None)
    assert gpu_tune.entry(timed(bad=1e-5), {"bad": "error"}) is None
    assert gpu_tune.entry(timed(), {}) is None


@pytest.fixture
def products(monkeypatch):
    """cuda.matmul by name on the CPU: one is right, one is not, one has no such kernel."""

    def matmul(x, weight, kernel):
        if kernel == "refused":
            raise RuntimeError("bulk failed: no such kernel\nmore")
        return (x @ weight) * (1.02 if kernel == "wrong" else 1)

    monkeypatch.setattr(gpu_tune.cuda, "matmul", matmul)
    monkeypatch.setattr(gpu_tune, "_replays", lambda run, weights, _: lambda: run(weights[0]).sum())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    weight = torch.randn(96, 24, dtype=torch.float64)
    return torch.randn(3, 96).half(), weight, [weight.half()]


def timers_of(events, products):
    names = ["wrong", "refused", "right"]
    return dict(gpu_tune._timers(events, "3 rows", names, products))


def test_only_what_is_right_is_timed(products, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tune, "is_usable", lambda: True)
    events = Events(tmp_path / "events.jsonl")
    timers = timers_of(events, products)
    assert list(timers) == ["right"]
    assert list(events.failed) == ["wrong", "refused"]
    assert "3 rows: error" in events.failed["wrong"]
    assert events.failed["refused"] == "3 rows: bulk failed: no such kernel"
    said = capsys.readouterr().out
    assert "3 rows: right\n" in said
    timers["right"]()
    assert capsys.readouterr().out == "", "a line for each of all timings hides the others"
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    # The last word before a timing that may hang.
    assert json.loads(lines[-1]) == {"begun": "right", "where": "3 rows"}
    assert len(lines) == 6


def test_a_gpu_that_does_not_answer_ends_the_worker(products, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tune, "is_usable", lambda: False)
    events = Events(tmp_path / "events.jsonl")
    with pytest.raises(SystemExit):
        timers_of(events, products)
    assert list(events.failed) == ["wrong"]
    # Started again it leaves that out.
    with pytest.raises(SystemExit):
        timers_of(Events(tmp_path / "events.jsonl"), products)
    assert list(timers_of(Events(tmp_path / "events.jsonl"), products)) == ["right"]


WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.common.workers import Events
events = Events(Path(sys.argv[-1]))
for rows in (8, 16):
    item = f"4 bits, 128 x 64, {{rows}} rows"
    if item in events.finished:
        continue
    seconds = {{}}
    for name, taken in {{"gemm": 1e-5, "gemv": 3e-5, "dense": 4e-5}}.items():
        if name in events.failed:
            continue
        events.begin(name, item)
        if name == "gemm" and rows == 16:
            os.abort()
        seconds[name] = taken
    sizes = {{"bits": 4, "inputs": 128, "outputs": 64, "rows": rows}}
    events.finish(item, **sizes, untuned="dense", seconds=seconds)
events.end()
"""


def test_a_kernel_that_crashes_is_named_and_not_in_the_table(folder, tmp_path, monkeypatch, capfd):
    """Also not in the row that it had won before; every row is there."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(ROOT)))
    monkeypatch.setattr(gpu_tune, "WORKER", (sys.executable, str(worker)))
    monkeypatch.setattr(gpu_tune, "facts", lambda: ABOUT)
    argv = ["--bits", "4", "--shapes", "128x64", "--rows", "8", "16"]
    assert gpu_tune.main(argv) == 1
    said = capfd.readouterr().out
    assert "FAILED: gemm: 4 bits, 128 x 64, 16 rows: ended by SIGABRT\n" in said
    assert f"2 of 2 rows of the table written to {folder}" in said
    table = json.loads((folder / "some-gpu-1.json").read_text())
    assert [(row["rows"], row["kernel"]) for row in table["entries"]] == [(8, "gemv"), (16, "gemv")]
    assert table["commit"] == "abc"


def test_every_kernel_that_fits_is_tried():
    weight = layout.prepare(packed(4, 1280, 64, 128)[0])
    tried = gpu_tune.names(20, weight, False)
    assert tried[0] == "gemv"
    assert {"gemm", "dense"} < set(tried)
    assert {name.rpartition("-")[0] for name in tried if name in VARIANTS} >= {
        "gemm-32x128-stages3",
        "gemm-16x128-stages3",
    }
    assert not [name for name in tried if name.startswith("gemm-64")]
    assert not [name for name in tried if "wgmma" in name]
    short = layout.prepare(packed(4, 192, 64, 64)[0])
    splits = {name.rpartition("splits")[2] for name in gpu_tune.names(20, short, True)}
    assert splits & {"1", "2", "3"} == {"1", "2"}, "it has two blocks of inputs"


def test_where_bulk_takes_a_product_other_variants_are_left_out():
    weight = layout.prepare(packed(4, 1280, 64, 128)[0])
    tried = gpu_tune.names(20, weight, True)
    assert {"gemv", "gemm", "wgmma", "dense"} < set(tried)
    variants = [name for name in tried if name in VARIANTS]
    assert {name.split("-")[0] for name in variants} == {"bulk", "bulk_pairs"}
    splits = {int(name.rpartition("splits")[2]) for name in variants}
    assert splits == set(gpu_tune.SPLITS)
    assert gpu_tune.names(5000, weight, True) == ["dense"]


def test_shapes_go_before_bits(monkeypatch, tmp_path):
    """A run that is cut off has whole shapes, as models have them, not one width of all."""
    done = []
    monkeypatch.setattr(gpu_tune, "work", lambda _, bits, shape, rows: done.append((bits, shape)))
    assert gpu_tune.main(["--events", str(tmp_path / "events")]) == 0
    square, wide = (8192, 8192), (4096, 11008)
    assert done[:4] == [(4, square), (8, square), (4, wide), (8, wide)]
    assert len(done) == 8


def test_names_say_all_of_a_variant():
    pairs = [tile for tile in TILES if tile[0] == "bulk_pairs"]
    assert len(VARIANTS) == len(TILES) * len(SPLITS) - len(pairs) * sum(s > 4 for s in SPLITS)


def test_the_table_is_read_where_kernels_are_chosen(folder):
    variant = "gemm-32x128-stages3-splits2"
    rows = [
        {"bits": 4, "inputs": 96, "outputs": 24, "rows": 32, "kernel": variant},
        {"bits": 4, "inputs": 96, "outputs": 24, "rows": 64, "kernel": "dense"},
        {"bits": 4, "inputs": 9600, "outputs": 240, "rows": 64, "kernel": "gemm"},
        # A variant for the smallest x alone, which does not take all that the row stands for.
        {"bits": 8, "inputs": 96, "outputs": 24, "rows": 512, "kernel": "gemv"},
    ]
    path = gpu_tune.write([row | {"microseconds": 1.5} for row in rows], ABOUT)
    assert path == folder / "some-gpu-1.json"
    assert json.loads(path.read_text())["driver"] == "1.2"
    table = tuned.table_for("Some GPU 1")
    weight = layout.prepare(packed(4, 192, 24, 32)[0])

    def chosen(rows, weight=weight, dtype=HALF):
        return kernels.kernel_for(rows, dtype, weight, True, table).name

    assert [chosen(rows) for rows in (20, 32, 33, 64)] == [variant, variant, "dense", "dense"]
    # More rows than were measured, float32, and other layouts are chosen by the rule.
    assert chosen(65) == "wgmma"
    assert chosen(32, dtype=torch.float32) == "dense"
    assert chosen(32, layout.plain(packed(4)[0])) == "plain_multiply"
    assert chosen(20, layout.prepare(packed(4, 4800, 200, 32)[0])) == "gemm"
    assert chosen(100, layout.prepare(packed(8)[0])) == "wgmma"
    # A weight of one block of inputs has nothing to split.
    assert chosen(20, layout.prepare(packed(4)[0])) == "gemv"


@pytest.mark.parametrize("text", ["", "{}", '{"entries": [{"bits": 4}]}', '{"entries": 3}'])
def test_a_table_that_cannot_be_read_is_not_used(folder, text):
    folder.mkdir()
    (folder / "some-gpu-1.json").write_text(text)
    with pytest.warns(UserWarning, match=r"some-gpu-1.json cannot be read .* write it again"):
        assert tuned.table_for("Some GPU 1") is None


def test_a_gpu_without_a_table(folder):
    assert tuned.table_for("Some GPU 1") is None


def test_tables_of_this_repository_name_kernels_that_exist():
    assert kernels.named("gemm-32x128-stages3-splits2").launcher == "gemm"
    with pytest.raises(ValueError, match="there is no kernel 'gone'"):
        kernels.named("gone")
    for path in tuned.FOLDER.glob("*.json"):
        for row in tuned.read(path).entries:
            kernels.named(row.kernel)


def test_bad_shapes_are_refused(capsys):
    for text in ("8192", "100x64", "128x0", "ax128"):
        with pytest.raises(SystemExit):
            gpu_tune.parser().parse_args(["--shapes", text])
        assert text in capsys.readouterr().err
    assert gpu_tune.parser().parse_args(["--shapes", "128x64"]).shapes == [(128, 64)]
