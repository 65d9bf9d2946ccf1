"""The comparison with llama.cpp, without llama.cpp: a stand-in says what its runner would."""

import itertools
import json
import math
import sys

import pytest
import torch

from benchmarks import llama_cpp
from benchmarks.llama_cpp import main, read_bytes
from benchmarks.llama_cpp_report import PEER, Run, best, results
from gptq.errors import UserError
from quant_cuda.cpu import library


def run(method: str, head: int, prefill: float, start: float, whole: float) -> Run:
    return Run(method, head, 1000, 800, prefill, start, whole)


def test_best_takes_the_least_of_each_time_by_head_and_method():
    runs = [
        run(PEER, 16, 4, 1, 3),
        run("ours, float", 16, 3, 1, 2),
        run(PEER, 8, 9, 9, 9),
        run(PEER, 16, 5, 0.5, 2.5),
    ]
    assert best(runs) == [run(PEER, 16, 4, 0.5, 2.5), runs[1], runs[2]]


def test_rates_and_ratios_are_to_the_same_head():
    runs = [
        run(PEER, 16, 2, 1, 3),
        run("ours, int8", 16, 4, 1, 2),
        run(PEER, 8, 1, 1, 2),
        run("ours, int8", 8, 1, 1, 3),
    ]
    rows = results(runs, prompt=8, tokens=4)
    assert [row["decode"] for row in rows] == [2, 4, 4, 2]
    assert [row["prefill"] for row in rows] == [4, 2, 8, 8]
    assert [row["gigabytes"] for row in rows] == [800 * rate / 1e9 for rate in (2, 4, 4, 2)]
    assert [row["decode_ratio"] for row in rows] == [1, 2, 1, 0.5]
    assert [row["prefill_ratio"] for row in rows] == [1, 0.5, 1, 1]


def test_no_time_is_no_rate():
    with pytest.raises(UserError, match="--tokens 1: too few"):
        run(PEER, 16, 1, 1, 1).decode_rate(1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "bloom-tiny"], "--shape bloom-tiny: choose of llama-7b, llama-13b"),
        (["--blocks", "0"], "--blocks 0: give 1 or more"),
        (["--prompt", "2049"], "--prompt 2049: llama-tiny takes 2048 at most"),
        (["--tokens", "2041"], "--tokens 2041: llama-tiny takes 2040 at most"),
        (["--python", "no-such-python"], "--python no-such-python: cannot be run"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys, tmp_path):
    places = ["--cache", str(tmp_path), "--output", str(tmp_path / "o.json")]
    given = ["--python", sys.executable, "--shape", "llama-tiny", "--threads", "1", *places]
    before = torch.get_num_threads()
    try:
        assert main([*given, *words]) == 2
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {said}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('a\\nb')", f"{PEER} failed: b"),
        ("import sys; sys.exit(3)", f"{PEER} failed: exit code 3"),
        ("print('hello')", "is no Python"),
    ],
)
def test_a_peer_that_fails_is_one_line(code, said, tmp_path, monkeypatch):
    script = tmp_path / "peer.py"
    script.write_text(code)
    monkeypatch.setattr(llama_cpp, "SCRIPT", script)
    with pytest.raises(UserError, match=said) as caught:
        llama_cpp.in_peer(sys.executable, 1, "write")
    assert "\n" not in str(caught.value)


def test_table_and_file(tmp_path, monkeypatch, capsys):
    asked = []

    def stand_in(python: str, threads: int, *words: str) -> dict:
        asked.append(words[0])
        if words[0] == "write":
            file = {"path": "f", "file_bytes": 7_000_000, "read_bytes": 6_000_000}
            return {"files": {"16": file, "8": file}, "version": "1.2", "system": "CPU"}
        return {"prefill_seconds": 0.5, "start_seconds": 0.25, "whole_seconds": 0.5}

    monkeypatch.setattr(llama_cpp, "in_peer", stand_in)
    # Each interval is longer than the one before; so few tokens take too little time to measure.
    monkeypatch.setattr(llama_cpp, "perf_counter", map(math.exp2, itertools.count(-9)).__next__)
    output = tmp_path / "r" / "o.json"
    words = ["--python", "/some/python", "--shape", "llama-tiny", "--blocks", "3"]
    words += ["--threads", "1", "--prompt", "16", "--tokens", "4", "--repeats", "2"]
    before = torch.get_num_threads()
    try:
        assert main([*words, "--cache", str(tmp_path), "--output", str(output)]) == 0
    finally:
        torch.set_num_threads(before)
    assert asked == ["write", *["time"] * 4]
    printed = capsys.readouterr().out
    assert "ours, int8" in printed
    assert "16.00" in printed
    record = json.loads(output.read_text())
    methods = [PEER, "ours, float", "ours, int8"]
    assert [run["method"] for run in record["runs"]] == methods * 4
    assert [row["head"] for row in record["results"]] == [16] * 3 + [8] * 3
    assert record["results"][0]["decode"] == 16
    assert record["results"][0]["prefill"] == 32
    assert record["threads"] == 1
    assert "/some" not in json.dumps(record)


def test_packed_files_have_every_block(tmp_path):
    folder = llama_cpp.our_folder(tmp_path / "ours", "llama-tiny", 3)
    model, _ = llama_cpp.gptq.load(folder, folder / "head-16.safetensors", device="cpu")
    assert len(model.model.layers) == 3
    # The head in the file's 16 bits where compiled code takes it so; the norms as float32.
    dense = (2 if library.compiled() else 4) * 32000 * 64 + 4 * 7 * 64
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 96)
    assert weights / 2 < read_bytes(model) - dense < weights
