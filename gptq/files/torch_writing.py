"""Files as torch.save writes them, written one tensor at a time.

torch.save wants all tensors in memory. The format is a zip archive, not compressed, of a pickle
that names each tensor's storage, and of the storages themselves.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_tensor_v2  # the function that every such file names

from gptq.files.lazy import LazyTensors

# Names of torch's storage classes, which tell a tensor's dtype in a file.
STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
PROTOCOL = 2
# Where storages begin, so that a mapped file's values are aligned.
ALIGNMENT = 64
# Bytes of a zip part's header before its name, and of what is added for parts beyond 2 GB.
HEADER, _LARGE_HEADER = 30, 20
# The field of a header that torch, too, fills up with Zs.
_FIELD, _FIELD_ID = struct.Struct("<HH"), 0x4246


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class _Stored:
    """A contiguous tensor, pickled as torch pickles one."""

    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", getattr(torch, STORAGES[obj.dtype]), obj.key, "cpu", obj.count
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Stored):
            strides = torch.empty(obj.shape, device="meta").stride()
            args: tuple = (obj.storage, 0, obj.shape, strides, False, OrderedDict())
            return _rebuild_tensor_v2, args
        return NotImplemented


def write_state_dict(
    path: Path, tensors: LazyTensors, tied: Mapping[str, str], metadata: Mapping[str, Any]
) -> None:
    """Write what `torch.save(state_dict)` writes; each tensor is read when it is written.

    tied: more names, written after `tensors`, each with the tensor whose storage it shares.
    metadata: the state dict's `_metadata`.
    """
    state: OrderedDict[str, _Stored] = OrderedDict()
    for number, name in enumerate(tensors):
        dtype, shape = tensors.dtype(name), tuple(tensors.shape(name))
        count = tensors.nbytes(name) // dtype.itemsize
        state[name] = _Stored(_Storage(str(number), dtype, count), shape)
    for name, other in tied.items():
        state[name] = state[other]
    state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    pickled = io.BytesIO()
    _Pickler(pickled, PROTOCOL).dump(state)
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _write(archive, file, "data.pkl", pickled.getbuffer())
        _write(archive, file, "byteorder", b"little")
        for name in tensors:
            _write(archive, file, f"data/{state[name].storage.key}", _bytes(tensors[name]))
        _write(archive, file, "version", b"3\n")


def _write(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: Any) -> None:
    with archive.open(_entry(name, len(data), file.tell()), "w") as part:
        part.write(data)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _entry(name: str, size: int, place: int) -> zipfile.ZipInfo:
    """The directory's entry of a part whose header begins at byte `place` of the file."""
    # The date is the same in every file, so that equal runs write equal files.
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = size
    # zipfile asks this question in the same way.
    large = _LARGE_HEADER if size * 1.05 > zipfile.ZIP64_LIMIT else 0
    header = HEADER + len(entry.filename) + _FIELD.size + large
    fill = -(place + header) % ALIGNMENT
    entry.extra = _FIELD.pack(_FIELD_ID, fill) + b"Z" * fill
    return entry
