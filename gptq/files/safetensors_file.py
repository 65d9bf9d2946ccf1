"""Safetensors files, read and written one tensor at a time.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gptq.errors import UserError, first_line
from gptq.files.lazy import Entries, Entry, LazyTensors
from gptq.files.spans import check_shape, open_binary, read_span

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_safetensors(path: Path) -> LazyTensors:
    """The tensors of a file; only its header is read now. Raises UserError for a damaged one."""
    # The library checks the header against the file's length; the bytes are then read without
    # its mapping, which would count every page of a tensor twice.
    try:
        with safe_open(path, framework="pt") as checked:
            metadata = checked.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is cut short or is not a safetensors file ({first_line(error)}): "
            "copy or download it again"
        ) from error
    with open_binary(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries: Entries = {}
    for name, stored in header.items():
        dtype = _DTYPES.get(stored["dtype"])
        if dtype is None:
            raise UserError(
                f"{path}: tensor '{name}' is of type {stored['dtype']}, which is unknown"
            )
        start, shape = 8 + length + stored["data_offsets"][0], tuple(stored["shape"])
        check_shape(path, name, shape)
        entries[name] = Entry(partial(read_span, path, start, dtype, shape), shape, dtype)
    return LazyTensors(entries, metadata)


def shards(tensors: LazyTensors, names: list[str], limit: int) -> Iterator[list[str]]:
    """Names in runs of at most `limit` bytes; a larger tensor is a run of its own."""
    run: list[str] = []
    used = 0
    for name in names:
        size = tensors.nbytes(name)
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
    """Write the named tensors to one file; each is read when it is written.

    Wider types come first, as the format's own library has it, so that all are aligned.
    """
    ordered = sorted(names, key=lambda name: (-tensors.dtype(name).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        start, end = end, end + tensors.nbytes(name)
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors.dtype(name)],
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
