"""Other programs in environments of their own, which benchmarks/peers/setup.sh makes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from helpers.old_tools import PROBE

FOLDER = Path(os.environ.get("PEERS", ROOT / ".cache" / "peers"))


def exchange(program: str, where: Path, dtype: str = "float32", **task) -> dict[str, str | None]:
    """What the program could not do with a folder, by folder; None if it did all.

    where: a folder for what it leaves behind. task: `make`, `read` of benchmarks/peers/exchange.py.
    """
    python = FOLDER / program / "bin" / "python"
    if not python.exists():
        pytest.skip(f"bash benchmarks/peers/setup.sh {program} makes its environment")
    done = subprocess.run(
        [python, str(ROOT / "benchmarks" / "peers" / f"exchange_{program}.py")],
        input=json.dumps({"ids": PROBE.tolist(), "dtype": dtype, **task}),
        cwd=where,
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["errors"]


def logits(program: str, folder: Path) -> torch.Tensor:
    """Those of the program that read the folder, for PROBE, up to a constant of each token."""
    return load_file(f"{folder}.{program}.safetensors")["logits"]


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference of log-probabilities, over their spread."""
    a, b = (x.float().log_softmax(-1) for x in (logits, expected))
    return float((a - b).pow(2).mean().sqrt() / b.std())
