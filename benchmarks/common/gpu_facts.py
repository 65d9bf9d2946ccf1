"""What a GPU's results have to name: the GPU, its driver, versions, and the commit."""

import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def facts() -> dict[str, Any]:
    """The GPU of this machine and what runs on it; None for what cannot be told."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "gpu": torch.cuda.get_device_properties(0).name,
        "driver": _output(query),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": _nvcc(),
        "commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
    }


def _nvcc() -> str | None:
    text = _output(["nvcc", "--version"])
    found = re.search(r"\bV(\d[\d.]*)", text or "")
    return found[1] if found else None


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
