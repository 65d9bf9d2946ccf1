"""Choosing the fastest kernel, and the table of it: with clocks of our own instead of a GPU's."""

import itertools
import json

import pytest
import torch
from helpers.products import activations, packed

from benchmarks import gpu_tune
from quant_cuda import reference
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


def test_what_is_hardly_faster_replaces_nothing():
    row = gpu_tune.entry(4, (64, 32), 8, {"gemv": clock(1.01e-5), "other": clock(1e-5)})
    assert (row["kernel"], row["microseconds"]) == ("gemv", 10.1)
    row = gpu_tune.entry(4, (64, 32), 8, {"gemv": clock(1.1e-5), "other": clock(1e-5)})
    assert (row["kernel"], row["untuned_microseconds"]) == ("other", 11)


def test_a_wrong_product_may_not_be_used():
    weight, _ = packed(4)
    exact, x = reference.dequantize(weight, torch.float64), activations(3, 96, dtype=HALF)
    truth = gpu_tune.truth_of(x, exact)
    y = (x.double() @ exact).half()

    def fails():
        raise RuntimeError("bulk failed: no such kernel")

    assert gpu_tune.reason_against(lambda: y, truth) is None
    assert "more than" in gpu_tune.reason_against(lambda: y * 1.01, truth)
    assert "more than" in gpu_tune.reason_against(lambda: y * float("nan"), truth)
    assert gpu_tune.reason_against(fails, truth) == "bulk failed: no such kernel"


def test_every_kernel_that_fits_is_tried():
    weight = layout.prepare(packed(4, 1280, 64, 128)[0])
    tried = gpu_tune.names(20, weight, True)
    assert tried[0] == "gemv"
    assert {"gemm", "wgmma", "dense"} < set(tried)
    assert {name.rpartition("-")[0] for name in tried if name in VARIANTS} >= {
        "gemm-32x128-stages3",
        "gemm-16x128-stages3",
    }
    assert not [name for name in tried if name.startswith("gemm-64")]
    assert not [name for name in gpu_tune.names(20, weight, False) if "wgmma" in name]
    short = layout.prepare(packed(4, 192, 64, 64)[0])
    splits = {name.rpartition("splits")[2] for name in gpu_tune.names(20, short, True)}
    assert splits & {"1", "2", "3"} == {"1", "2"}, "it has two blocks of inputs"


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
