"""The compiled CPU code where something is missing: memory, threads, its own sources."""

import ctypes
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers.products import activations, packed

import quant_cuda
from quant_cuda import backends, sources
from quant_cuda.cpu import library

# torch's threads are there before the fork, and the compiled code is loaded in the child first.
SCRIPT = """
import os, resource, signal, sys
import torch
sys.path.insert(0, "tests")
import quant_cuda
from helpers.products import activations, packed
from quant_cuda.columns import SweepColumns
from quant_cuda.cpu import library, solver

torch.set_num_threads(2)
torch.randn(200_000).exp_().sum()
weight, x = packed(4, 512, 512)[0], activations(4, 512)
child = os.fork()
if not child:
    signal.alarm(20)  # ends a child that hangs
    y = quant_cuda.matmul(x, quant_cuda.prepare(weight))
    os._exit(0 if y.isfinite().all() else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

n = 1500
eye, labels, runs = torch.eye(n), torch.zeros(n, dtype=torch.int64), [(0, n)]
columns = SweepColumns(torch.randn(n, 64), eye, eye, labels, runs, [(0, n)], None)
library.library()
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), -1))
try:
    solver.sweep(columns, factors=(1.0,), bits=4, sym=False)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
if os.getuid() == 0:
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    os.setuid(65534)
q, _, _ = solver.sweep(columns, factors=(), bits=4, sym=False)
print("swept", q.shape[0])
"""


def test_forks_and_limits():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "child 0",
        "the compiled CPU code ran out of memory",
        "swept 1500",
    ]


def test_a_library_of_other_sources(monkeypatch):
    def look_again():
        for cached in (library._load, library.compiled, library.instruction_sets, library.best):
            cached.cache_clear()
        backends.forget()

    weight, _ = packed(4)
    x = activations(2, 96)
    y = quant_cuda.matmul(x, weight)
    try:
        with monkeypatch.context() as changed:
            changed.setattr(sources, "digest", lambda part: "another")
            look_again()
            with pytest.warns(UserWarning, match=r"built from other sources.*pip install \."):
                assert quant_cuda.available() == ("torch",)
            torch.testing.assert_close(quant_cuda.matmul(x, weight), y, atol=1e-3, rtol=0)
            with pytest.raises(ValueError, match="other sources"):
                library.required()
    finally:
        look_again()
    assert quant_cuda.available()[0] == library.instruction_sets()[0]


def test_a_library_of_an_old_version_has_no_digest():
    assert sources.is_stale(ctypes.CDLL(None), "cpu")
    assert not sources.is_stale(library.required(), "cpu")


def test_the_digest_is_of_all_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", tmp_path)
    assert sources.digest("cpu") is None
    (tmp_path / "cpu").mkdir()
    seen = {sources.digest("cpu")}
    for name in ("cpu/a.cpp", "cpu/a.h", "layout.h"):
        (tmp_path / name).write_text("1")
        seen.add(sources.digest("cpu"))
    (tmp_path / "cpu" / "notes.txt").write_text("1")
    assert len(seen) == 4
    assert sources.digest("cpu") in seen


@pytest.mark.parametrize("backend", library.instruction_sets())
def test_results_round_to_float16_as_torch_does(backend):
    """The bias alone: normal, subnormal, ties, overflow, NaN."""
    bits = torch.arange(0, 0x7C01, 31, dtype=torch.int16)
    halves = bits.view(torch.float16).float()
    ties = (halves[:-1] + (bits[:-1] + 1).view(torch.float16).float()) / 2
    bias = torch.cat([halves, -ties, torch.tensor([65519.9, 65520.0, -1e9, float("nan"), 1e-9])])
    weight, _ = packed(4, 32, len(bias))
    y = quant_cuda.matmul(torch.zeros(1, 32).half(), quant_cuda.prepare(weight), backend, bias=bias)
    torch.testing.assert_close(y[0], bias.half(), rtol=0, atol=0, equal_nan=True)
