"""What a GPU's results have to name: the GPU, its driver, versions, and the commit."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("triton", "transformers")


def facts(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The GPU of this machine and what runs on it; None for what cannot be told.

    packages: further distributions whose versions are named.
    """
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "gpu": torch.cuda.get_device_properties(0).name,
        "driver": _output(query),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": _nvcc(),
        **{name: version(name) for name in (*PACKAGES, *packages)},
        "commit": commit(),
    }


def commit() -> str | None:
    """COMMIT of the environment, for a tree that was copied without .git; else git's."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return os.environ.get("COMMIT") or _output(described)


def version(distribution: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_usable() -> bool:
    """Whether the GPU still answers: after an illegal access every call of this process fails."""
    try:
        return bool((torch.ones(2, device="cuda") + 1).sum().item() == 4)
    except RuntimeError:
        return False


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
