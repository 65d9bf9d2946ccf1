"""The parts of benchmarks/gpu.py that need no GPU, and what it says without one."""

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, bloom_config, llama_config
from rich.console import Console

from benchmarks import gpu, gpu_models, gpu_peers
from benchmarks.common import gpu_results
from gptq.blockwise import empty_model
from gptq.inference import compiled_decode, decoding
from gptq.inference.cuda_graph import stepper
from gptq.models.bloom import BLOOM
from gptq.models.llama import LLAMA
from gptq.nn import QuantLinear
from gptq.tuning.streams import TuneWindows
from quant_cuda.cpu import library

NO_GPU = "error: torch finds no GPU here; run this where there is one"


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("spec", "config"), [(LLAMA, llama_config()), (BLOOM, bloom_config())])
def test_a_random_model_runs(spec, config, bits):
    model = gpu_models.random_model(spec, config, bits, "cpu", torch.float32)
    quantized = [m for m in model.modules() if isinstance(m, QuantLinear)]
    layers = config.num_hidden_layers * len(spec.linears)
    assert len(quantized) == (layers if bits < 16 else 0)
    assert not [name for name, p in model.named_parameters() if p.is_meta]
    biases = [layer.bias for layer in quantized if layer.bias is not None]
    assert bool(biases) == (spec is BLOOM and bits < 16)
    assert all(bias.dtype == torch.float32 and bias.any() for bias in biases)
    step = stepper(model, 4)
    assert all(torch.isfinite(step(torch.full((1, 1), 7))).all() for _ in range(4))


def test_answers_are_timed(monkeypatch):
    monkeypatch.setattr(gpu_models, "DECODED", 20)
    model = gpu_models.random_model(LLAMA, llama_config(), 4, "cpu", torch.float32)
    compiled_decode.install(model)
    decode = Mock(wraps=decoding.decode)
    monkeypatch.setattr(decoding, "decode", decode)
    rates = gpu_models.answers(model)
    assert list(rates) == ["generate", "answer"]
    assert all(rate > 0 for rate in rates.values())
    assert decode.call_count == (2 if library.compiled() else 0)


def test_what_has_no_loop_of_its_own_is_timed_once(monkeypatch):
    """A float16 model: the second figure would be the first again."""
    monkeypatch.setattr(gpu_models, "DECODED", 4)
    monkeypatch.setattr(decoding, "arguments", lambda _: {})
    model = gpu_models.random_model(LLAMA, llama_config(), 16, "cpu", torch.float32)
    assert list(gpu_models.answers(model)) == ["generate"]


def test_memory_is_read_before_the_answers(monkeypatch):
    """generate's own cache would be counted otherwise."""
    taken = [5]
    monkeypatch.setattr(gpu_models, "random_model", lambda *_: None)
    monkeypatch.setattr(gpu_models.compiled_decode, "install", lambda _: None)
    monkeypatch.setattr(gpu_models, "can_overlap", lambda: False)
    monkeypatch.setattr(gpu_models, "stepper", lambda *_: None)
    monkeypatch.setattr(gpu_models, "_rate", lambda _: 100.0)
    monkeypatch.setattr(gpu_models, "answers", lambda _: taken.append(9) or {"generate": 1.0})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: taken[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 - taken[-1], 100))
    row = gpu_models._decode(LLAMA, llama_config(), 4)
    assert (row["memory"], row["used"], row["generate"]) == (5, 5, 1.0)


def test_the_shapes_are_those_of_seven_billion():
    sizes = []
    for spec, config in gpu_models.SEVEN_BILLION:
        with torch.device("meta"):
            model = empty_model.build(config, spec, torch.device("meta"))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes == [6_885_494_784, 7_069_016_064]


@pytest.mark.parametrize(("spec", "config"), [(LLAMA, llama_config()), (BLOOM, bloom_config())])
def test_a_whole_random_model_is_quantized(spec, config):
    windows = torch.randint(config.vocab_size, (2, 16))
    row = gpu_models.quantize_model(spec, config, windows, torch.device("cpu"), torch.float32)
    assert row["layers"] == config.num_hidden_layers * len(spec.linears)
    assert row["tokens"] == 32
    stages = ("forward", "moments", "sweep", "refinement", "pack", "all else")
    assert 0 < sum(row[stage] for stage in stages) < row["seconds"]


def test_a_whole_random_model_is_tuned():
    config = llama_config()
    windows = torch.randint(config.vocab_size, (5, 16))
    tuned = TuneWindows(windows[:3], windows[3:], torch.float32, torch.float16)
    arguments = (LLAMA, config, windows[:2], torch.device("cpu"), torch.float32, "fast")
    row = gpu_models.quantize_model(*arguments, tuned=tuned)
    assert row["steps"] == 2
    assert row["training"] > 0


def test_every_released_model_has_its_row():
    """Memory in use as measured, in GiB, beside the published; none where it did not fit."""
    decoded = [
        {"model": model, "bits": bits, "memory": bits << 30, "used": (bits + 1) << 30}
        for model, widths in gpu_models.WIDTHS.items()
        for bits in widths
    ]
    decoded[3] = {"model": "bloom", "bits": 32, "memory": None, "used": None}
    rows = {row["model"]: row for row in gpu_models.released(decoded)}
    assert len(rows) == 8
    assert rows["bloom7b-2m"]["in use, GiB"] is None
    assert rows["llama7b-2m-4bit-128g.pt"]["in use, GiB"] == 5
    assert rows["llama7b-2m-4bit-128g.pt"]["published, G"] == 5.6


def test_tables_name_every_column():
    known = {"copy": 3e12, "matrix": 7e14}
    row = {"bits": 4, "inputs": 64, "outputs": 32, "rows": 1, "gemv": 3e-5, "dense": 4e-5}
    row |= {"bytes": 3e7, "flop": 1e8}
    row |= {"chosen": "bulk-16x128-stages4-splits2", "bulk-16x128-stages4-splits2": 2e-5}
    made = gpu.table("kernels", [row], known)
    cells = {str(c.header): next(iter(c.cells)) for c in made.columns}
    assert cells["shape"] == "64 x 32"
    assert cells["gemv us"] == "30.0"
    assert cells["chosen"] == "bulk-16x128-stages4-splits2 20.0 us"
    assert cells["copy rate"] == "50%"
    assert cells["triton us"] == ""
    other = gpu.table("decode", [{"model": "llama", "tokens_per_second": 123.456}], known)
    assert [next(iter(c.cells)) for c in other.columns] == ["llama", "123.5"]


@pytest.fixture
def written(monkeypatch, tmp_path):
    """The results that a machine with a GPU has written; called, it reads them."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="A 1"))
    monkeypatch.setattr(gpu, "limits", lambda: {"copy": 1e12, "matrix": 1e14})
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    return lambda: gpu_results.read(tmp_path / "a-1.json")


def test_a_part_that_fails_leaves_what_was_measured(written, monkeypatch):
    """Its own rows before, and the parts after it."""

    def failing():
        yield {"model": "llama", "bits": 4}
        raise RuntimeError("no more")

    monkeypatch.setattr(gpu, "PARTS", {"decode": failing, "solving": lambda: [{"seconds": 1.5}]})
    console = Console(record=True)
    assert not gpu.measure(console, ["decode", "solving"])
    assert "FAILED: decode" in console.export_text()
    (decode,), (solving,) = map(written().get, ("decode", "solving"))
    assert (decode["rows"], decode["finished"]) == ([{"model": "llama", "bits": 4}], False)
    assert (solving["rows"], solving["finished"]) == ([{"seconds": 1.5}], True)
    assert gpu.measure(console, ["solving"])
    assert written()["decode"] == [decode]


def test_each_part_keeps_its_own_facts(written, monkeypatch):
    rows = iter([{"model": "llama", "bits": bits, "memory": 1} for bits in (8, 4)])
    monkeypatch.setattr(gpu, "PARTS", {"decode": lambda: [next(rows)], "solving": lambda: [{}]})
    monkeypatch.setenv("COMMIT", "first")
    assert gpu.measure(Console(record=True), ["decode", "solving"])
    monkeypatch.setenv("COMMIT", "second")
    assert gpu.measure(Console(record=True), ["decode"])
    commits = {name: [run["about"]["commit"] for run in runs] for name, runs in written().items()}
    assert commits == {"decode": ["second"], "solving": ["first"]}
    about = written()["decode"][0]["about"]
    assert {"gpu", "driver", "python", "torch", "cuda", "triton", "transformers"} <= set(about)
    assert about["limits"] == {"copy": 1e12, "matrix": 1e14}


@pytest.fixture
def fake_peers(monkeypatch):
    """One whose products are right, one whose are not, and one that does not compile."""

    def made(factor, bits, inputs, outputs):
        weight = torch.randn(outputs, inputs).half()
        return lambda x: factor * x @ weight.T, weight

    def missing(*_):
        raise ImportError("no compiler\nfor this")

    peers = {"right": partial(made, 1), "wrong": partial(made, 1.5), "missing": missing}
    monkeypatch.setattr(gpu_peers, "PEERS", peers)


def test_peers_are_checked_before_they_are_timed(fake_peers, capsys):
    names, calls = ["wrong", "missing", "right"], []

    def time(layers):
        calls.append([layer().shape for layer in layers])
        return 1e-6

    cases = [gpu_peers.Case(bits, (256, 64), (1, 3)) for bits in (4, 8)]
    rows = list(gpu_peers.peers(names, cases, 1 << 15, time, device="cpu"))
    assert [(r["peer"], r["bits"], r["rows"]) for r in rows] == [
        ("right", bits, n) for bits in (4, 8) for n in (1, 3)
    ]
    assert calls == [[(n, 64)] * count for count in (4, 4) for n in (1, 3)]
    said = capsys.readouterr().out
    assert (
        "wrong, 4 bit, 256 x 64, is not timed: ValueError: its products are 0.5 from those" in said
    )
    assert "missing, 8 bit, 256 x 64, is not timed: ImportError: no compiler\n" in said


def test_a_peer_measured_again_replaces_its_rows(written, monkeypatch):
    def measured(peer, seconds, count=1):
        rows = [{"peer": peer, "bits": 4, "rows": 1, "seconds": seconds}]
        monkeypatch.setattr(gpu, "peers", lambda *_: iter(rows * count))
        gpu.add_peers(Console(record=True), [peer])
        return rows

    monkeypatch.setattr(gpu, "CASES", [gpu_peers.Case(4, (64, 32), (1,))])
    measured("humming", 1e-6)
    kept = measured("gemlite", 2e-6)
    again = measured("humming", 3e-6)
    runs = written()["peers"]
    assert [run["rows"] for run in runs] == [again, kept]
    assert [set(run["about"]) & {"humming-kernels", "gemlite"} for run in runs] == [
        {"humming-kernels"},
        {"gemlite"},
    ]
    assert measured("humming", 0, count=0) == [
        {"peer": "humming", "bits": 4, "rows": 1, "seconds": 0}
    ]
    assert written()["peers"] == runs, "one that could not be timed leaves the older times"


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU here")
    for part in ("check", "tune", "measure", "peers"):
        assert gpu.main([part]) == 2
        assert capsys.readouterr().err == f"{NO_GPU}\n"
    done = subprocess.run(
        ["benchmarks/gpu.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, f"{NO_GPU}\n", "")
