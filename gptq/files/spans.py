"""Runs of bytes in a file, read as tensors."""

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from gptq.errors import UserError


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading. Raises UserError with the system's reason if that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


# No layer has a tenth of them; torch takes a thousand, and a message would name each.
_MOST_DIMENSIONS = 64


def check_shape(path: Path, name: str, shape: Sequence[int]) -> None:
    """Raise UserError for a shape that no tensor can have, though its size in bytes is right.

    A size of 0 hides any other number beside it.
    """
    if len(shape) > _MOST_DIMENSIONS or any(size >= 1 << 63 for size in shape):
        raise UserError(
            f"{path}: tensor '{name}' has an impossible shape: copy or download it again"
        )


def read_span(path: Path, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A new contiguous tensor of the little-endian values that begin at byte `start`.

    Raises UserError if the file ends before the tensor does.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype)
    target = tensor.reshape(-1).view(torch.uint8).numpy()
    with open_binary(path) as file:
        file.seek(start)
        if file.readinto(target) != target.nbytes:  # type: ignore[attr-defined]
            raise UserError(f"{path} became shorter while it was read: is it still being written?")
    return tensor


def prefetch_span(path: Path, start: int, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Ask the system to read the same bytes into its page cache; without effect if it cannot."""
    if hasattr(os, "posix_fadvise"):
        with open_binary(path) as file:
            size = prod(shape) * dtype.itemsize
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
