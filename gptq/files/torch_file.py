"""Files of torch.save, read and written one tensor at a time.

torch.save wants all tensors in memory. The format is a zip archive, not compressed, of a pickle
that names each tensor's storage, and of the storages themselves.
"""

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_tensor_v2  # the function that every such file names

from gptq.errors import UserError, first_line
from gptq.files.lazy import Entries, Entry, LazyTensors

# A mapped file is unmapped after this many bytes have been copied out of it: its pages count as the
# process's own for as long as it is mapped, and mapping it again costs tenths of a second.
_MAPPED_BYTES = 1 << 28

# Reading -------------------------------------------------------------------------------------


class _TorchFile:
    """The state dict in one file of torch.save.

    The zip format is mapped, and unmapped after every `_MAPPED_BYTES`. The format before torch 1.6
    cannot be read in part, so its tensors stay in memory.
    """

    def __init__(self, path: Path, mapped: bool):
        self.path = path
        self.mapped = mapped
        self.state: dict[str, Any] | None = None
        self.copied = 0

    def load(self) -> dict[str, Any]:
        if self.state is None:
            self.state = _load_state_dict(self.path, self.mapped)
            self.copied = 0
        return self.state

    def read(self, name: str) -> torch.Tensor:
        tensor = self.load()[name].detach().clone(memory_format=torch.contiguous_format)
        self.copied += tensor.nbytes
        if self.mapped and self.copied >= _MAPPED_BYTES:
            self.state = None
        return tensor


def open_torch(path: Path, mapped: bool) -> LazyTensors:
    """The tensors of a state dict, which may be in a dict under "state_dict" or "model".

    mapped: whether the file is a zip archive; it can then be read in part. Raises UserError for a
    file that is damaged, compressed or without tensors, and for one with code in it.
    """
    if mapped:
        _check_zip(path)
    file = _TorchFile(path, mapped)
    state = file.load()
    entries: Entries = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if not isinstance(name, str):
            raise UserError(f"{path}: tensor {name!r} has no name that is text: not a state dict")
        _check_tensor(path, name, tensor)
        entries[name] = Entry(partial(file.read, name), tuple(tensor.shape), tensor.dtype)
    return LazyTensors(entries, dict(getattr(state, "_metadata", {})))


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # The standard library lets several kinds of exception out of a damaged directory.
    except Exception as error:
        raise UserError(
            f"{path} is cut short or damaged ({first_line(error)}): copy or download it again"
        ) from error
    # torch.save never compresses; reading what does could fill the memory from a small file.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is a compressed archive, not a PyTorch file: unpack it first")


def check_sums(path: Path) -> None:
    """Read a torch file through and compare its parts with their check sums.

    Raises UserError if a part differs. Other files have no check sums. Neither have torch files
    written with them turned off: no part fits then, which is not an error.
    """
    if not zipfile.is_zipfile(path):
        return
    right, wrong = 0, None
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as part:
                    while part.read(1 << 20):
                        pass
                right += entry.file_size > 0
            # Exceptions of a damaged part have no common base class, as above.
            except Exception:
                wrong = wrong or entry.filename
    if right and wrong:
        raise UserError(f"{path} is damaged (in its part {wrong}): copy or download it again")


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UserError(f"{path}: tensor '{name}' is sparse or quantized by torch; save it dense")
    # Strides of zero would let a few bytes on disk become any number of them in memory.
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: tensor '{name}' claims more values than the file holds")


def _load_state_dict(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text advises to load the file unsafely, so none of it is shown.
        code = re.search(r"GLOBAL (\S+)", str(error))
        holds = f"code ({code[1]}) besides tensors" if code else "more than tensors, or is damaged,"
        raise UserError(
            f"{path} holds {holds} and is not loaded: convert it to safetensors with the tool that "
            "made it"
        ) from error
    # What the reader raises for damaged bytes is not documented and has no common base class.
    except Exception as error:
        raise UserError(
            f"{path} is cut short, damaged or not a PyTorch file ({first_line(error)}): "
            "copy or download it again"
        ) from error
    candidates = [loaded]
    if isinstance(loaded, dict):
        candidates += [loaded.get("state_dict"), loaded.get("model")]
    for candidate in candidates:
        if isinstance(candidate, dict) and any(
            isinstance(value, torch.Tensor) for value in candidate.values()
        ):
            return candidate
    raise UserError(f"{path} holds no tensors by name: give a file that holds a model's state dict")


# Writing -------------------------------------------------------------------------------------

# Names of torch's storage classes, which tell a tensor's dtype in a file.
_STORAGES = {
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
_HEADER, _LARGE_HEADER = 30, 20
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
            return "storage", getattr(torch, _STORAGES[obj.dtype]), obj.key, "cpu", obj.count
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
    header = _HEADER + len(entry.filename) + _FIELD.size + large
    fill = -(place + header) % ALIGNMENT
    entry.extra = _FIELD.pack(_FIELD_ID, fill) + b"Z" * fill
    return entry
