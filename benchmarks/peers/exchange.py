"""What the exchange scripts share: quantize and read models, as a task on standard input says.

A task is JSON:
    make    [{"source": folder, "target": folder, "tokens": windows of token ids, ...settings}]
    read    [folder, ...]
    ids     windows of token ids, all of one length
    new     how many tokens to continue each window with, greedily; 0 if absent
    dtype   what the reader computes in, "float32" or "bfloat16", if it has a choice

Each script runs in an environment of its program's own, without this package. Beside every folder
that was read it writes FOLDER.PROGRAM.safetensors: `logits`, float32 (windows, tokens,
vocabulary), and `new`, int64 (windows, new). The last line that it prints is JSON: `versions`, and
`errors` by folder, the last line of each.
"""

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

Windows = list[list[int]]


class Model(NamedTuple):
    """A loaded model."""

    logits: Callable[[Windows], np.ndarray]
    """Logits up to a constant of each token, (windows, tokens, vocabulary)."""
    continued: Callable[[Windows, int], Windows]
    """So many of the most likely next tokens of each window."""


def exchange(
    program: str,
    packages: tuple[str, ...],
    load: Callable[[str, str], Model],
    make: Callable[..., None] | None = None,
) -> None:
    """Do the task on standard input.

    program: ending of the written files. packages: whose versions are told.
    load: takes a folder and a dtype. make: takes what a row of the task's `make` holds.
    """
    task = json.load(sys.stdin)
    errors = {}
    for row in task.get("make", []):
        assert make is not None, f"{program} writes no models"
        errors[row["target"]] = _error(partial(make, **row))
    for folder in task.get("read", []):
        errors[folder] = _error(partial(_read, program, load, folder, task))
    versions = {package: version(package) for package in packages}
    print("\n" + json.dumps({"versions": versions, "errors": errors}), flush=True)


def _read(program: str, load: Callable[[str, str], Model], folder: str, task: dict) -> None:
    model = load(folder, task.get("dtype", "float32"))
    tensors = {"logits": np.ascontiguousarray(model.logits(task["ids"]), np.float32)}
    if task.get("new"):
        tensors["new"] = np.array(model.continued(task["ids"], task["new"]), np.int64)
    save_file(tensors, f"{folder}.{program}.safetensors")


def _error(action: Callable[[], None]) -> str | None:
    """None, or what the action raised; its trace goes to standard error."""
    try:
        action()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".strip()
    return None
