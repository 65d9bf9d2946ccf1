"""Tensors read from files one at a time: .safetensors, and what torch.save writes.

Nothing is unpickled beyond what torch's weights-only reader allows, and a file is known by its
first bytes, not by its name's ending.
"""

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gptq.errors import UserError

Read = Callable[[], torch.Tensor]
Shape = tuple[int, ...]

SAFETENSORS_DTYPES = {
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

# A mapped torch file is let go after this many bytes have been copied out of it: its pages count
# as the process's own for as long as it is mapped, and mapping it again costs tenths of a second.
_MAPPED_BYTES = 1 << 28


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors by name; each is read from disk when it is asked for, and is the caller's own copy.

    `metadata` is what the files say about themselves: a safetensors header's strings, or the
    `_metadata` that torch.save keeps with a state dict.
    """

    def __init__(
        self,
        reads: Mapping[str, Read],
        metadata: Mapping[str, Any] | None = None,
        shapes: Mapping[str, Shape] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ):
        self._reads = dict(reads)
        self._shapes = dict(shapes or {})
        self._dtypes = dict(dtypes or {})
        self.metadata: dict[str, Any] = dict(metadata or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reads[name]()

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, which is not read where its file's header tells."""
        return self._shapes[name] if name in self._shapes else tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, which is not read where its file's header tells."""
        return self._dtypes[name] if name in self._dtypes else self[name].dtype

    def expect(self, prefix: str) -> None:
        """Ask the system to read ahead what has names with this prefix, into its own memory.

        Only what `read_span` reads; where the system cannot, nothing happens.
        """
        for name, read in self._reads.items():
            if name.startswith(prefix) and isinstance(read, partial) and read.func is read_span:
                _read_ahead(*read.args)

    def changed(self, changes: Mapping[str, Read | None]) -> "LazyTensors":
        """The same with some tensors read in another way, or left out where that is None."""
        reads = {**self._reads, **changes}
        kept = {name: read for name, read in reads.items() if read is not None}
        return LazyTensors(
            kept,
            self.metadata,
            {name: shape for name, shape in self._shapes.items() if name not in changes},
            {name: dtype for name, dtype in self._dtypes.items() if name not in changes},
        )

    def renamed(self, rename: Callable[[str], str | None]) -> "LazyTensors":
        """The same tensors by other names; a name that becomes None is left out."""
        reads: dict[str, Read] = {}
        shapes: dict[str, Shape] = {}
        dtypes: dict[str, torch.dtype] = {}
        for old, read in self._reads.items():
            new = rename(old)
            if new is None:
                continue
            if new in reads:
                raise UserError(f"two tensors become '{new}' once old names are brought up to date")
            reads[new] = read
            if old in self._shapes:
                shapes[new] = self._shapes[old]
            if old in self._dtypes:
                dtypes[new] = self._dtypes[old]
        return LazyTensors(reads, self.metadata, shapes, dtypes)


def open_tensors(paths: Sequence[Path]) -> LazyTensors:
    """The tensors of one or several files, of which only the headers are read now.

    Raises UserError for a file that is missing, empty, cut short, of an unknown kind or with code
    in it, and for a name that two files share.
    """
    reads: dict[str, Read] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, torch.dtype] = {}
    origin: dict[str, Path] = {}
    metadata: dict[str, Any] = {}
    for path in paths:
        opened = _open(Path(path))
        for name in opened:
            if name in origin:
                raise UserError(
                    f"tensor '{name}' is in both {origin[name]} and {path}: give the files of one "
                    "model only"
                )
            origin[name] = path
        reads.update(opened._reads)
        shapes.update(opened._shapes)
        dtypes.update(opened._dtypes)
        metadata.update(opened.metadata)
    return LazyTensors(reads, metadata, shapes, dtypes)


def read_span(path: Path, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A new contiguous tensor of the little-endian bytes of `path` from byte `start` on."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    target = tensor.reshape(-1).view(torch.uint8).numpy()
    with open_binary(path) as file:
        file.seek(start)
        if file.readinto(target) != target.nbytes:  # type: ignore[attr-defined]
            raise UserError(f"{path} became shorter while it was read: is it still being written?")
    return tensor


def _read_ahead(path: Path, start: int, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if hasattr(os, "posix_fadvise"):
        with open_binary(path) as file:
            size = prod(shape) * dtype.itemsize
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def open_binary(path: Path):
    """`path` opened for reading; UserError, saying why, where that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def cause(error: BaseException) -> str:
    """The first line of an exception's text, short enough to stand inside another message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _open(path: Path) -> LazyTensors:
    with open_binary(path) as file:
        head = file.read(32)
    if not head:
        raise UserError(f"{path} is empty: copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull'")
    # Eight bytes of length and a JSON object come first, since the length can begin with any byte.
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if head.startswith(b"PK"):
        return _open_torch(path, mapped=True)
    if head[:1] == b"\x80":
        return _open_torch(path, mapped=False)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise UserError(
        f"{path} is neither a safetensors nor a PyTorch file: it may be damaged, or encrypted as "
        "BELLE's published LLaMA files are, which BELLE's own tool must decrypt first"
    )


# safetensors ---------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> LazyTensors:
    # The library checks the header against the file's length; the bytes are then read without
    # its mapping, which would count every page of a tensor twice.
    try:
        with safe_open(path, framework="pt") as checked:
            metadata = checked.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is cut short or is not a safetensors file ({cause(error)}): "
            "copy or download it again"
        ) from error
    with open_binary(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    reads: dict[str, Read] = {}
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"{path}: tensor '{name}' is of type {entry['dtype']}, which is unknown"
            )
        start = 8 + length + entry["data_offsets"][0]
        reads[name] = partial(read_span, path, start, dtype, entry["shape"])
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    dtypes = {name: SAFETENSORS_DTYPES[entry["dtype"]] for name, entry in header.items()}
    return LazyTensors(reads, metadata, shapes, dtypes)


# torch.save ----------------------------------------------------------------------------------


class _TorchFile:
    """The state dict in one file of torch.save.

    The zip format is mapped and let go every `_MAPPED_BYTES`. The format before torch 1.6 cannot
    be read in part, so its tensors stay in memory.
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


def _open_torch(path: Path, mapped: bool) -> LazyTensors:
    if mapped:
        _check_zip(path)
    file = _TorchFile(path, mapped)
    state = file.load()
    reads: dict[str, Read] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if not isinstance(name, str):
            raise UserError(f"{path}: tensor {name!r} has no name that is text: not a state dict")
        _check_tensor(path, name, tensor)
        reads[name] = partial(file.read, name)
    shapes = {name: tuple(state[name].shape) for name in reads}
    dtypes = {name: state[name].dtype for name in reads}
    return LazyTensors(reads, dict(getattr(state, "_metadata", {})), shapes, dtypes)


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # The standard library lets several kinds of exception out of a damaged directory.
    except Exception as error:
        raise UserError(
            f"{path} is cut short or damaged ({cause(error)}): copy or download it again"
        ) from error
    # torch.save never compresses; reading what does could fill the memory from a small file.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is a compressed archive, not a PyTorch file: unpack it first")


def check_sums(path: Path) -> None:
    """Read a torch file through and compare its parts with their check sums.

    Raises UserError for one that differs. Other files have no check sums, nor have torch files
    that were written with them turned off: then none fits.
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
            # As above: what a damaged part raises has no common base.
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
    # What bytes of unknown origin make the reader raise is not documented and has no common base.
    except Exception as error:
        raise UserError(
            f"{path} is cut short, damaged or not a PyTorch file ({cause(error)}): "
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
