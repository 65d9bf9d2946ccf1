"""Tensors written to safetensors files one at a time, so that none but one is in memory."""

import json
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gptq.files.opening import SAFETENSORS_DTYPES, LazyTensors

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """The same tensors as a LazyTensors; those that are one yet share their memory."""
    if isinstance(tensors, LazyTensors):
        return tensors
    return LazyTensors(
        {name: partial(tensors.__getitem__, name) for name in tensors},
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
    )


def nbytes(tensors: LazyTensors, name: str) -> int:
    return prod(tensors.shape(name)) * tensors.dtype(name).itemsize


def shards(tensors: LazyTensors, names: list[str], limit: int) -> Iterator[list[str]]:
    """Names in runs of at most `limit` bytes; one larger tensor is a run of its own."""
    run: list[str] = []
    used = 0
    for name in names:
        size = nbytes(tensors, name)
        if run and used + size > limit:
            yield run
            run, used = [], 0
        run.append(name)
        used += size
    if run:
        yield run


def write_tensors(
    path: Path, tensors: LazyTensors, names: list[str], metadata: Mapping[str, str]
) -> None:
    """One safetensors file of the named tensors, each read when its turn has come.

    Wider types come first, as the format's own library has it, so that all are aligned.
    """
    ordered = sorted(names, key=lambda name: (-tensors.dtype(name).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        start, end = end, end + nbytes(tensors, name)
        header[name] = {
            "dtype": _NAMES[tensors.dtype(name)],
            "shape": list(tensors.shape(name)),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            data = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            file.write(data.numpy())  # type: ignore[arg-type]
