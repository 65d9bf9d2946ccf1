"""GGUF files: the header, and the tensors by the names that they have in the file.

The header is read here and every length in it is checked against the file's, because the gguf
package's reader loops for as long as a damaged header tells it to and makes an object of every
token of the vocabulary. That package dequantizes the tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

from gptq.errors import UserError
from gptq.files.lazy import Entry
from gptq.files.spans import open_binary, read_span

Value = bool | int | float | str | tuple[bool | int | float | str, ...]

_PLAIN_DTYPES = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in a file."""

    type: GgmlType
    shape: tuple[int, ...]
    """Outermost first, as torch has it; the file has it the other way round."""
    start: int
    """First byte in the file."""


@dataclass(frozen=True)
class GgufHeader:
    """What a file says about itself and its tensors."""

    path: Path
    metadata: dict[str, Value]
    """The scalar values, and arrays of a number for each block; those of the tokenizer are left
    out."""
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def number(self, key: str, default: float | None = None) -> float:
        """A value of this architecture, for instance `rope.freq_base` for `llama.rope.freq_base`.

        Raises UserError if it is no finite number of at least 0, or absent without a default.
        """
        value = self.get(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or value < 0
        ):
            raise UserError(
                f"{self.path} gives no usable number for '{self.architecture}.{key}': convert it "
                "again"
            )
        return value

    def get(self, key: str, default: Value | None = None) -> Value | None:
        """A value of this architecture as it is stored; `default` if there is none."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """The same for a whole number of at least 1."""
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise UserError(
                f"{self.path} gives {value} for '{self.architecture}.{key}': convert it again"
            )
        return int(value)


# Tensors -------------------------------------------------------------------------------------


def lazy_tensor(header: GgufHeader, name: str) -> Entry:
    """A tensor to read: float32, float16 and bfloat16 as they are, quantized types as float32."""
    stored = header.tensors[name]
    if stored.type in _PLAIN_DTYPES:
        dtype = _PLAIN_DTYPES[stored.type]
        read = partial(read_span, header.path, stored.start, dtype, stored.shape)
        return Entry(read, stored.shape, dtype)
    return Entry(partial(_dequantize, header.path, stored), stored.shape, torch.float32)


def _dequantize(path: Path, stored: GgufTensor) -> torch.Tensor:
    block, size = gguf.GGML_QUANT_SIZES[stored.type]
    row = stored.shape[-1] // block * size
    packed = read_span(path, stored.start, torch.uint8, (*stored.shape[:-1], row))
    return torch.from_numpy(gguf.dequantize(packed.numpy(), stored.type))


def check_types(header: GgufHeader) -> None:
    """Raise UserError if the gguf package cannot dequantize all tensors."""
    for kind in {tensor.type for tensor in header.tensors.values()} - _PLAIN_DTYPES.keys():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{header.path} holds tensors of type {kind.name}, which the gguf package cannot "
                "read: quantize from a file of another type"
            ) from error


# The header ----------------------------------------------------------------------------------

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Far above any real file's; a damaged count must cost neither time nor memory.
_MAX_COUNT = 1 << 24
_MAX_TEXT = 1 << 26
# Arrays that are longer have no number for each block, but for each token.
_MAX_BLOCKS = 1 << 12


class _Cursor:
    """Reads a file from its start on and never past its end."""

    def __init__(self, path: Path, file: BinaryIO, arrays: bool = False):
        """arrays: keep arrays of texts, and of more numbers than a model has blocks."""
        self.path = path
        self.file = file
        self.arrays = arrays
        self.size = path.stat().st_size
        self.at = 0

    def damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path} is cut short or damaged ({what} at byte {self.at} of {self.size}): "
            "copy or download it again"
        )

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.damaged("the header ends early")
        self.at += count
        return self.file.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, code: str = "Q", limit: int = _MAX_COUNT) -> int:
        value = int(self.scalar(code))
        if value > limit:
            raise self.damaged(f"a count of {value}")
        return value

    def text(self) -> str:
        try:
            return self.take(self.count(limit=_MAX_TEXT)).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("text that is not UTF-8") from error

    def value(self) -> Value | None:
        """A metadata value with its type before it; None for an array that is skipped."""
        kind = self.scalar("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged(f"a value of type {kind}")
        element, length = self.scalar("I"), self.count()
        if element in _SCALARS:
            code = f"<{length}{_SCALARS[element]}"
            taken = self.take(struct.calcsize(code))
            is_kept = self.arrays or length <= _MAX_BLOCKS
            return struct.unpack(code, taken) if is_kept else None
        if element != _STRING:
            raise self.damaged(f"an array of type {element}")
        texts = (self.take(self.count(limit=_MAX_TEXT)) for _ in range(length))
        if self.arrays:
            return tuple(text.decode(errors="replace") for text in texts)
        for _ in texts:
            pass
        return None


def read_header(path: Path, arrays: bool = False) -> GgufHeader:
    """Read a file's header. Raises UserError unless it is a complete one of version 2 or 3.

    arrays: also those of its metadata that have an entry for each token.
    """
    with open_binary(path) as file:
        cursor = _Cursor(path, file, arrays)
        if cursor.size < 4 or cursor.take(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        version = int(cursor.scalar("I"))
        if version not in (2, 3):
            kind = "is big-endian" if version & 0xFFFF == 0 else f"is GGUF version {version}"
            raise UserError(f"{path} {kind}; versions 2 and 3, little-endian, are supported")
        tensor_count, value_count = cursor.count(), cursor.count()
        metadata: dict[str, Value] = {}
        for _ in range(value_count):
            key, value = cursor.text(), cursor.value()
            if key in metadata:
                raise cursor.damaged(f"'{key}' twice")
            if value is not None:
                metadata[key] = value
        tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            name, tensor = cursor.text(), _read_tensor(cursor)
            if name in tensors:
                raise cursor.damaged(f"tensor '{name}' twice")
            tensors[name] = tensor
        return GgufHeader(path, metadata, _located(cursor, metadata, tensors))


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """`start` is still counted from the end of the header."""
    dims = cursor.count("I", limit=4)
    shape = tuple(cursor.count(limit=1 << 40) for _ in range(dims))[::-1]
    kind = int(cursor.scalar("I"))
    if kind not in set(GgmlType):
        raise UserError(
            f"{cursor.path} holds tensors of type {kind}, which the gguf package does not know: "
            "update that package"
        )
    return GgufTensor(GgmlType(kind), shape, int(cursor.scalar("Q")))


def _located(
    cursor: _Cursor, metadata: dict[str, Value], tensors: dict[str, GgufTensor]
) -> dict[str, GgufTensor]:
    """The tensors with `start` counted from the file's beginning; all are inside the file."""
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.damaged(f"an alignment of {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    located = {}
    for name, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[tensor.type]
        if 0 in tensor.shape or not tensor.shape or tensor.shape[-1] % block:
            raise cursor.damaged(f"tensor '{name}' of shape {tensor.shape}")
        start = base + tensor.start
        if start + math.prod(tensor.shape) // block * size > cursor.size:
            raise UserError(
                f"{cursor.path} is cut short: tensor '{name}' lies past its end; "
                "copy or download it again"
            )
        located[name] = replace(tensor, start=start)
    return located
