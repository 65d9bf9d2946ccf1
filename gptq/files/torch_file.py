"""Files of torch.save, read one tensor at a time.

The format is a zip archive, not compressed, of a pickle that names each tensor's storage, and of
the storages themselves. Before torch 1.6 it was several pickles, and the storages after them.

Reading calls neither torch.load nor pickle, see `pickle_values`. A file says how long its storages
are and how tensors lie in them; all of it is compared with the file before any memory is asked for.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from gptq.errors import UserError, first_line
from gptq.files.lazy import Entries, Entry, LazyTensors, Read, Shape
from gptq.files.pickle_values import MAX_BYTES, Call, Name, UnknownName, read_pickle
from gptq.files.spans import check_shape, open_binary, read_span
from gptq.files.torch_writing import HEADER, STORAGES

_DTYPES = {f"torch.{name}": dtype for dtype, name in STORAGES.items()} | {
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    # Of types younger than storage classes; the tensor names its own.
    "torch.storage.UntypedStorage": torch.uint8,
}
_REBUILD = "torch._utils._rebuild_"
_TENSORS = {f"{_REBUILD}tensor", f"{_REBUILD}tensor_v2", f"{_REBUILD}tensor_v3"}
_PARAMETERS = {f"{_REBUILD}parameter", f"{_REBUILD}parameter_with_state"}
# What training programs keep beside the tensors, and torch.load takes for data as well.
_VALUES = {
    *("collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set"),
    *("builtins.bytearray", "_codecs.encode"),
    *("torch.serialization._get_layout", "torch.storage.UntypedStorage"),
}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Record(NamedTuple):
    """The bytes of a storage in the file."""

    start: int
    nbytes: int


class _Claim(NamedTuple):
    """A storage as the pickle describes it, in the words of torch.save."""

    dtype: torch.dtype | None
    """None: a storage of integers that torch itself quantized."""
    key: str
    numel: int
    view: tuple[str, int, int] | None = None
    """Of a storage that is a part of another: its own key, first element, number of elements."""


def open_torch(path: Path, zipped: bool) -> LazyTensors:
    """The tensors of a state dict, which may be in a dict under "state_dict" or "model".

    zipped: whether the file is a zip archive. Raises UserError for a file that is damaged,
    compressed or without tensors, and for one with code in it.
    """
    try:
        with open_binary(path) as file:
            loaded, records = _read_zip(path, file) if zipped else _read_stream(file)
        state = _state_dict(path, loaded)
        entries: Entries = {
            name: _entry(path, records, name, value)
            for name, value in state.items()
            if _is_tensor(value)
        }
    except UserError:
        raise
    except UnknownName as error:
        raise UserError(
            f"{path} holds code ({error}) besides tensors and is not loaded: convert it to "
            "safetensors with the tool that made it"
        ) from error
    # A damaged archive or pickle can end in any exception of the standard library.
    except Exception as error:
        raise UserError(
            f"{path} is cut short, damaged or not a PyTorch file ({first_line(error)}): "
            "copy or download it again"
        ) from error
    metadata = getattr(state, "_metadata", None)
    return LazyTensors(entries, metadata if isinstance(metadata, dict) else {})


def _is_known(name: str) -> bool:
    # torch.FloatStorage, torch.float8_e4m3fn, torch.Size, torch.device
    return name in _VALUES or name.startswith(_REBUILD) or name.rpartition(".")[0] == "torch"


def _is_tensor(value: object) -> bool:
    return isinstance(value, Call) and value.function.text.startswith(_REBUILD)


def _claim(identity: Any) -> _Claim:
    """What a pickle says of a storage. Raises an exception of any kind if it makes no sense."""
    kind, storage, key, _, numel, *view = identity
    if kind != "storage" or not isinstance(key, str) or not _are_sizes(numel):
        raise ValueError("a storage that is none")
    part = tuple(view[0]) if view and view[0] else None
    return _Claim(_DTYPES.get(storage.text), key, numel, part)


def _state_dict(path: Path, loaded: Any) -> dict[Any, Any]:
    candidates = [loaded]
    if isinstance(loaded, dict):
        candidates += [loaded.get("state_dict"), loaded.get("model")]
    for candidate in candidates:
        if isinstance(candidate, dict) and any(map(_is_tensor, candidate.values())):
            return candidate
    raise UserError(f"{path} holds no tensors by name: give a file that holds a model's state dict")


# The zip format ------------------------------------------------------------------------------


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, dict[str, _Record]]:
    """The value of a file's pickle, and its storages by their keys."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    # torch.save never compresses; reading what does could fill the memory from a small file.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is a compressed archive, not a PyTorch file: unpack it first")
    records: dict[str, _Record] = {}
    for entry in entries:
        # The archive's own name comes first.
        name = entry.filename.partition("/")[2]
        if name in records:
            raise ValueError(f"two parts {entry.filename}")
        records[name] = _record(file, entry)
    byteorder = records.get("byteorder", _Record(0, 0))
    if _bytes_of(file, byteorder, limit=8) == b"big":
        raise ValueError("its values are big-endian")
    if "data.pkl" not in records:
        raise ValueError("an archive without data.pkl")
    pickled = io.BytesIO(_bytes_of(file, records["data.pkl"], limit=MAX_BYTES))
    storages = {
        name.removeprefix("data/"): record
        for name, record in records.items()
        if name.startswith("data/")
    }
    return read_pickle(pickled, _is_known, _claim), storages


def _record(file: BinaryIO, entry: zipfile.ZipInfo) -> _Record:
    """Where the bytes of a part are; the lengths before them are in the part's own header."""
    file.seek(entry.header_offset + HEADER - 4)
    name, extra = struct.unpack("<HH", file.read(4))
    record = _Record(entry.header_offset + HEADER + name + extra, entry.file_size)
    if record.start + record.nbytes > file.seek(0, io.SEEK_END):
        raise ValueError(f"part {entry.filename} lies past its end")
    return record


def _bytes_of(file: BinaryIO, record: _Record, limit: int) -> bytes:
    if record.nbytes > limit:
        raise ValueError(f"a part of {record.nbytes} bytes where {limit} are enough")
    file.seek(record.start)
    return file.read(record.nbytes)


# The format before torch 1.6 -----------------------------------------------------------------


def _read_stream(file: BinaryIO) -> tuple[Any, dict[str, _Record]]:
    """The same of a file that is pickles and then storages: count as int64, and the values."""

    pickles = io.BytesIO(file.read(MAX_BYTES))

    def read(persistent: Callable[[Any], Any] = _claim) -> Any:
        return read_pickle(pickles, _is_known, persistent)

    sizes: dict[str, int] = {}

    def remember(identity: Any) -> _Claim:
        claim = _claim(identity)
        sizes[claim.key] = 1 if claim.dtype is None else claim.dtype.itemsize
        return claim

    if read() != _MAGIC or read() != _PROTOCOL:
        raise ValueError("its first numbers are not those of torch.save")
    if not read().get("little_endian", True):
        raise ValueError("its values are big-endian")
    loaded, keys = read(remember), read()
    start, end = pickles.tell(), file.seek(0, io.SEEK_END)
    records: dict[str, _Record] = {}
    for key in keys:
        file.seek(start)
        (numel,) = struct.unpack("<q", file.read(8))
        records[key] = _Record(start + 8, numel * sizes[key])
        start = sum(records[key])
        if numel < 0 or start > end:
            raise ValueError(f"storage {key} lies past its end")
    return loaded, records


# A tensor ------------------------------------------------------------------------------------


def _entry(path: Path, records: Mapping[str, _Record], name: Any, value: Call) -> Entry:
    """A tensor that the pickle describes. Raises UserError if the file does not hold it."""
    if not isinstance(name, str):
        raise UserError(f"{path}: tensor {name!r} has no name that is text: not a state dict")
    while value.function.text in _PARAMETERS and _is_tensor(value.args[0]):
        value = value.args[0]
    claim = value.args[0]
    if value.function.text not in _TENSORS or claim.dtype is None:
        raise UserError(f"{path}: tensor '{name}' is sparse or quantized by torch; save it dense")
    _, offset, shape, strides, _, _, *more = value.args
    dtype = _named_dtype(more.pop(0)) if value.function.text.endswith("_v3") else claim.dtype
    if any(more):
        raise UserError(f"{path}: tensor '{name}' is conjugated or negated; save it resolved")
    if not _are_sizes(offset, *shape, *strides):
        raise ValueError(f"the sizes of tensor '{name}'")
    check_shape(path, name, shape)
    record = _of_view(records[claim.key], claim.dtype.itemsize, claim)
    held = record.nbytes // dtype.itemsize
    steps = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # Strides of zero would let a few bytes on disk become any number of them in memory.
    if prod(shape) > held or (prod(shape) and offset + steps >= held):
        raise UserError(
            f"{path}: tensor '{name}' claims more values than the file holds: copy or download it "
            "again"
        )
    start = record.start + offset * dtype.itemsize
    if prod(shape) == 0 or strides == _contiguous(shape):
        return Entry(partial(read_span, path, start, dtype, shape), shape, dtype)
    apart = partial(read_span, path, start, dtype, (steps + 1,))
    return Entry(partial(_together, apart, shape, strides), shape, dtype)


def _named_dtype(name: Name) -> torch.dtype:
    dtype = getattr(torch, name.text.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of type {name.text}")
    return dtype


def _are_sizes(*numbers: object) -> bool:
    """Whether all are whole numbers that a size or a place in a file can be."""
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _of_view(record: _Record, itemsize: int, claim: _Claim) -> _Record:
    """What a claim says is its storage; a part of `record` if it is a view of it."""
    start, numel = (0, claim.numel) if claim.view is None else claim.view[1:]
    if not _are_sizes(start, numel) or (start + numel) * itemsize > record.nbytes:
        raise ValueError("a storage claims more values than the file holds")
    return _Record(record.start + start * itemsize, numel * itemsize)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[place + 1 :]) for place in range(len(shape)))


def _together(read: Read, shape: Shape, strides: Shape) -> torch.Tensor:
    """A new contiguous tensor of values that lie with these strides in what is read."""
    return read().as_strided(shape, strides).clone(memory_format=torch.contiguous_format)


# Check sums ----------------------------------------------------------------------------------


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
