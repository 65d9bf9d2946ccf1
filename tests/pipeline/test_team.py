"""One run in two processes against the same run in one."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
from conftest import ROOT
from helpers.forked import team
from helpers.shared_runs import stopped, words

import gptq
import gptq.api
from gptq import QuantConfig
from gptq.blockwise import activations
from gptq.cli import run as cli
from gptq.config import Width
from gptq.data.windows import evaluation_windows
from gptq.models import LLAMA
from gptq.pipeline import team as distributed
from gptq.pipeline.team import ALONE, Team

# Of few bits a random model's perplexity hangs on every integer, and some are ties.
CONFIG = QuantConfig(bits=8, group_size=32, adaptive_damp=False)
RUN = {"nsamples": 7, "seqlen": 32, "device": "cpu"}


def quantize(folder, text, path, config=CONFIG, widths=None):
    report = gptq.quantize(folder, text, config, save=path, widths=widths, **RUN)
    losses = [asdict(layer) for layer in report.layers]
    path.with_suffix(".json").write_text(json.dumps(losses))
    return 0


@pytest.mark.parametrize(
    ("fixture", "tokens", "config", "widths"),
    [
        ("llama_dir", 64, CONFIG, {"model.layers.0.mlp.down_proj": Width(4, -1)}),
        # One batch: the second process has nothing to run, and solves its rows all the same.
        ("bloom_dir", 4096, QuantConfig(bits=4, group_size=32, embedding_bits=4), None),
    ],
)
def test_two_processes_do_what_one_does(
    fixture, tokens, config, widths, request, tmp_path, text_file, monkeypatch
):
    folder = request.getfixturevalue(fixture)
    monkeypatch.setattr(activations, "BATCH_TOKENS", tokens)
    quantize(folder, text_file, tmp_path / "one.pt", config, widths)
    names = ("two.pt", "never.pt")
    calls = [lambda n=n: quantize(folder, text_file, tmp_path / n, config, widths) for n in names]
    children = team(calls, tmp_path)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    assert not (tmp_path / "never.pt").exists()
    one, two, other = (
        json.loads((tmp_path / n).read_text()) for n in ("one.json", "two.json", "never.json")
    )
    assert len(one) == len(two) == len(other)
    for alone, first, second in zip(one, two, other, strict=True):
        assert (alone["name"], alone["rows"]) == (first["name"], first["rows"])
        # Sums in another order make a few integers of narrow layers fall the other way, and all
        # that follows sees it; a loss is a share of the output's energy.
        assert first["loss"] == pytest.approx(alone["loss"], rel=0.05, abs=1e-4)
        assert first["loss"] == second["loss"]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-3)
    mean_one, mean_two = (sum(layer["loss"] for layer in run) / len(run) for run in (one, two))
    assert mean_two == pytest.approx(mean_one, abs=1e-3)
    values = []
    for name in ("one.pt", "two.pt"):
        opened = gptq.api.open_weights(folder, tmp_path / name, device="cpu")
        windows = evaluation_windows(text_file, opened.source.tokenizer(), 32, 4)
        values.append(gptq.api.perplexity(opened, windows))
    # A few integers that fall the other way move it by 0.15 to 0.4%, as other batches do with one
    # process; how many do depends on the processor.
    assert values[1] == pytest.approx(values[0], rel=5e-3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_run_and_the_journal_can_be_resumed(
    number, tmp_path, llama_dir, text_file, monkeypatch
):
    # One that is stopped stays silent; one that is killed closes its connections at once.
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=8))
    argv = words(llama_dir, text_file, tmp_path / "m.pt")
    first, second = team([lambda: cli.main(LLAMA, argv), lambda: stopped(argv, number)], tmp_path)
    assert first.wait() == 2, first.said
    second.kill()
    second.wait()
    assert "error: another process of this run was lost" in first.said
    assert "1 finished blocks are kept; add --resume" in first.said
    assert second.said == ""
    assert not (tmp_path / "m.pt").exists()
    assert cli.main(LLAMA, [*argv, "--resume"]) == 0
    assert (tmp_path / "m.pt").exists()
    assert not (tmp_path / "m.pt.journal").exists()


def test_an_error_is_said_once(tmp_path, llama_dir, text_file):
    journal = tmp_path / "m.pt.journal"
    journal.mkdir()
    (journal / "block-0000.safetensors").touch()
    argv = words(llama_dir, text_file, tmp_path / "m.pt")
    first, second = team([lambda: cli.main(LLAMA, argv)] * 2, tmp_path)
    assert (first.wait(), second.wait()) == (2, 2)
    assert "error: " in first.said
    assert "holds 1 finished blocks" in first.said
    assert second.said == ""


def test_torchruns_signal_is_one_line(tmp_path, llama_dir, text_file):
    """torchrun ends the others with SIGTERM when one process has failed."""
    argv = words(llama_dir, text_file, tmp_path / "m.pt")
    calls = [lambda: stopped(argv, signal.SIGTERM), lambda: cli.main(LLAMA, argv)]
    first, second = team(calls, tmp_path)
    assert (first.wait(), second.wait()) == (2, 2)
    assert "error: another process of this run was lost, or the run was ended" in first.said
    assert "1 finished blocks are kept; add --resume" in first.said


def test_alone_everything_is_its_own():
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.mean(None, 3) is None
    assert ALONE.from_leader(lambda: 5) == 5
    assert ALONE.everyones(5) == [5]
    assert ALONE.tensors_from_leader({"x": torch.ones(2)}).keys() == {"x"}
    assert ALONE.outputs(7) == slice(0, 7)
    solution = object()
    assert ALONE.join(solution, 7) is solution
    assert torch.distributed.is_initialized() is False


def test_each_process_solves_its_outputs():
    assert [Team(rank, 3).outputs(8) for rank in range(3)] == [
        slice(0, 2),
        slice(2, 5),
        slice(5, 8),
    ]
    # All solve the whole layer if it has fewer outputs than there are processes.
    assert [Team(rank, 3).outputs(2) for rank in range(3)] == [slice(0, 2)] * 3


@pytest.mark.slow
def test_torchrun(tmp_path, llama_dir, text_file):
    """The README's line as a user's shell runs it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    argv = words(llama_dir, text_file, tmp_path / "m.pt", "--eval", "--eval-windows", "2")
    done = subprocess.run(
        [*command, str(ROOT / "llama.py"), *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.pt").is_file()
    assert done.stdout.count("mean loss") == 2  # its own line and that of rounding: printed once
    assert done.stdout.count("perplexity") == 1
