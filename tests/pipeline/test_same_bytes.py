"""A quantization writes the same bytes in every run on one device, also if it was stopped."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from gptq.cli import run as cli
from gptq.models import SPECS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Of every kernel of the solver: a search of grids and given ones, refinement, another sweep.
SETTINGS = {"default": (), "given": ("--act-order", "--static-groups", "--refine", "2")}
STOPPED = """
import sys
from helpers.shared_runs import stopped
sys.exit(stopped(sys.argv[2:], int(sys.argv[1])))
"""


def words(folder, text, path, device, *more):
    sizes = ("--wbits", "4", "--groupsize", "32", "--nsamples", "4", "--seqlen", "32")
    return [str(folder), str(text), *sizes, "--device", device, "--save", str(path), *more]


def quantized(kind, folder, text, path, device, *more):
    """The bytes of the file that a run writes."""
    assert cli.main(SPECS[kind], words(folder, text, path, device, *more)) == 0
    return path.read_bytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_two_runs(kind, settings, device, text_file, tmp_path, request):
    folder = request.getfixturevalue(f"{kind}_dir")
    make = [kind, folder, text_file]
    more = (device, *SETTINGS[settings])
    first, second = (quantized(*make, tmp_path / f"{i}.pt", *more) for i in range(2))
    assert first == second
    other = quantized(*make, tmp_path / "other.pt", *more, "--seed", "5")
    assert first != other, "other windows make another file: the comparison can fail"


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_was_stopped(device, llama_dir, text_file, tmp_path):
    whole = quantized("llama", llama_dir, text_file, tmp_path / "whole.pt", device)
    path = tmp_path / "stopped.pt"
    argv = words(llama_dir, text_file, path, device, "--resume")
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(int(signal.SIGKILL)), *argv],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    journal = tmp_path / "stopped.pt.journal"
    assert [it.name for it in sorted(journal.glob("block-*"))] != []
    assert not path.exists()
    assert quantized("llama", llama_dir, text_file, path, device, "--resume") == whole
    assert not journal.exists()
