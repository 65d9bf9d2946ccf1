"""A .gguf file as Hugging Face tensors and configuration.

The header is walked here, with every length held against the file's own, because the gguf
package's reader loops for as long as a damaged header tells it to and makes an object of every
word of the vocabulary. What the numbers of a tensor mean is left to that package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from transformers import BloomConfig, LlamaConfig, PretrainedConfig

from gptq.errors import UserError
from gptq.files.opening import LazyTensors, Read, open_binary, read_span
from gptq.models import BLOOM, LLAMA, SPECS

Value = bool | int | float | str

_PLAIN_DTYPES = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
}

# Of a block, with "blk.{i}." before it in the file and `blocks`.{i}. in the model; and the rest.
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOOM_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_BLOCK = {"llama": _LLAMA_BLOCK, "bloom": _BLOOM_BLOCK}
_OUTSIDE = {
    spec.model_type: {
        **dict(zip(("token_embd", "token_embd_norm"), spec.embed, strict=False)),
        "output_norm": spec.norm,
        "output": spec.head,
    }
    for spec in (LLAMA, BLOOM)
}


@dataclass(frozen=True)
class _Entry:
    type: GgmlType
    shape: tuple[int, ...]
    """Outermost first, as torch has it; the file has it the other way round."""
    start: int
    """First byte in the file."""


@dataclass(frozen=True)
class _Header:
    path: Path
    metadata: dict[str, Value]
    """The scalar values; arrays, which are the tokenizer's, are left out."""
    tensors: dict[str, _Entry]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def number(self, key: str, default: float | None = None) -> float:
        """A value of this architecture, for instance `block_count` for `llama.block_count`."""
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        if isinstance(value, str | bool) or value is None or not math.isfinite(value) or value < 0:
            raise UserError(f"{self.path} gives no usable number for '{key}': convert it again")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """The same for a whole number of at least 1."""
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise UserError(
                f"{self.path} gives {value} for '{self.architecture}.{key}': convert it again"
            )
        return int(value)

    @property
    def heads(self) -> int:
        return self.count("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self.count("attention.head_count_kv", self.heads)


def open_gguf(path: Path) -> LazyTensors:
    """The model's tensors by their Hugging Face names, in Hugging Face's order of rows.

    float32, float16 and bfloat16 stay what they are; quantized types become float32. There is no
    `lm_head.weight` where the file ties it to the embedding. Raises UserError for what is no
    complete GGUF file of a LLaMA or BLOOM model.
    """
    header = _read_header(path)
    reads = {}
    for name, entry in header.tensors.items():
        if name.endswith(".attn_rot_embd.weight"):
            continue  # what the model computes for itself, in files of 2023
        read: Read
        if entry.type in _PLAIN_DTYPES:
            read = partial(read_span, path, entry.start, _PLAIN_DTYPES[entry.type], entry.shape)
        else:
            read = partial(_dequantize, path, entry)
        reorder = _reordering(header, name, entry)
        reads[_hf_name(header, name)] = partial(_then, read, reorder) if reorder else read
    return LazyTensors(reads, header.metadata)


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration that Hugging Face's class needs to run the model; errors as `open_gguf`."""
    header = _read_header(path)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} has no 'token_embd.weight': it holds no whole model")
    tokens = {
        f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    common: dict[str, Any] = {
        "architectures": [SPECS[header.architecture].architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": header.count("embedding_length"),
        "num_hidden_layers": header.count("block_count"),
        "num_attention_heads": header.heads,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{name: number for name, number in tokens.items() if isinstance(number, int)},
    }
    if header.architecture == "bloom":
        return BloomConfig(
            layer_norm_epsilon=header.number("attention.layer_norm_epsilon"),
            **common,
        )
    head_dim = header.count("attention.key_length", common["hidden_size"] // header.heads)
    if header.count("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path} rotates a part of each head only, which LLaMA models do not do")
    return LlamaConfig(
        intermediate_size=header.count("feed_forward_length"),
        num_key_value_heads=header.kv_heads,
        head_dim=head_dim,
        max_position_embeddings=header.count("context_length"),
        rms_norm_eps=header.number("attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": header.number("rope.freq_base", 10000.0),
        },
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
        **common,
    )


# From llama.cpp's conventions to Hugging Face's ---------------------------------------------


def _hf_name(header: _Header, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    index, part, kind = match.groups() if match else (None, "", "")
    table = _OUTSIDE if index is None else _BLOCK
    module = table[header.architecture].get(part)
    if module is None:
        raise UserError(
            f"{header.path} holds a tensor '{name}', which no plain {header.architecture} model "
            "has: this variant is not supported"
        )
    spec = SPECS[header.architecture]
    return f"{module}.{kind}" if index is None else f"{spec.block(int(index))}.{module}.{kind}"


def _reordering(
    header: _Header, name: str, entry: _Entry
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    part = name.split(".")[-2]
    rows = entry.shape[0]
    if header.architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = header.heads if part == "attn_q" else header.kv_heads
        if rows % (2 * heads) == 0:
            return partial(unpermute_rotary, heads=heads)
    elif header.architecture == "bloom" and part == "attn_qkv":
        heads = header.heads
        if rows % (3 * heads) == 0:
            return partial(interleave_qkv, heads=heads)
    else:
        return None
    raise UserError(f"{header.path}: '{name}' has {rows} rows, which do not divide into its heads")


def unpermute_rotary(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, [heads * head_dim, ...], for the rotary form of
    Hugging Face, which turns row i with row i + head_dim / 2; llama.cpp turns 2i with 2i + 1.
    """
    pairs = tensor.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def interleave_qkv(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries, keys and values, [3 * heads * head_dim, ...], to BLOOM's q, k, v by head."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(tensor.shape)


def _then(read: Read, reorder: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return reorder(read())


def _dequantize(path: Path, entry: _Entry) -> torch.Tensor:
    block, size = gguf.GGML_QUANT_SIZES[entry.type]
    row = entry.shape[-1] // block * size
    packed = read_span(path, entry.start, torch.uint8, (*entry.shape[:-1], row))
    return torch.from_numpy(gguf.dequantize(packed.numpy(), entry.type))


# The header ----------------------------------------------------------------------------------

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Far above any real file's; a damaged count must not keep us busy or fill the memory.
_MAX_COUNT = 1 << 24
_MAX_TEXT = 1 << 26


class _Cursor:
    """Reads a file from its start on and never past its end."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
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

    def scalar(self, code: str) -> Value:
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
        """A metadata value with its type before it; None for an array, which is skipped."""
        kind = self.scalar("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[int(kind)])
        if kind != _ARRAY:
            raise self.damaged(f"a value of type {kind}")
        element, length = self.scalar("I"), self.count()
        if element in _SCALARS:
            self.take(length * struct.calcsize(_SCALARS[int(element)]))
        elif element == _STRING:
            for _ in range(length):
                self.take(self.count(limit=_MAX_TEXT))
        else:
            raise self.damaged(f"an array of type {element}")
        return None


def _read_header(path: Path) -> _Header:
    with open_binary(path) as file:
        cursor = _Cursor(path, file)
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
        entries: dict[str, _Entry] = {}
        for _ in range(tensor_count):
            name, entry = cursor.text(), _read_entry(cursor)
            if name in entries:
                raise cursor.damaged(f"tensor '{name}' twice")
            entries[name] = entry
        header = _Header(path, metadata, _placed(cursor, metadata, entries))
    _check_supported(header)
    return header


def _read_entry(cursor: _Cursor) -> _Entry:
    dims = cursor.count("I", limit=4)
    shape = tuple(cursor.count(limit=1 << 40) for _ in range(dims))[::-1]
    kind = int(cursor.scalar("I"))
    if kind not in set(GgmlType):
        raise UserError(
            f"{cursor.path} holds tensors of type {kind}, which the gguf package does not know: "
            "update that package"
        )
    return _Entry(GgmlType(kind), shape, int(cursor.scalar("Q")))


def _placed(
    cursor: _Cursor, metadata: dict[str, Value], entries: dict[str, _Entry]
) -> dict[str, _Entry]:
    """The entries with their starts counted from the file's beginning, all inside the file."""
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.damaged(f"an alignment of {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    placed = {}
    for name, entry in entries.items():
        block, size = gguf.GGML_QUANT_SIZES[entry.type]
        if 0 in entry.shape or not entry.shape or entry.shape[-1] % block:
            raise cursor.damaged(f"tensor '{name}' of shape {entry.shape}")
        start = base + entry.start
        if start + math.prod(entry.shape) // block * size > cursor.size:
            raise UserError(
                f"{cursor.path} is cut short: tensor '{name}' lies past its end; "
                "copy or download it again"
            )
        placed[name] = _Entry(entry.type, entry.shape, start)
    return placed


def _check_supported(header: _Header) -> None:
    path, arch = header.path, header.architecture
    if arch not in SPECS:
        raise UserError(f"{path} is a '{arch}' model; {' and '.join(SPECS)} are supported")
    parts = header.metadata.get("split.count", 1)
    if parts != 1:
        raise UserError(f"{path} is one of {parts} parts: join them with llama-gguf-split --merge")
    scaling = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        scaling = "llama3"
    if scaling != "none":
        raise UserError(
            f"{path} scales its rotary positions ('{scaling}', rope scaling), which cannot be "
            "taken from GGUF files: pass the Hugging Face folder of this model"
        )
    for kind in {entry.type for entry in header.tensors.values()} - _PLAIN_DTYPES.keys():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{path} holds tensors of type {kind.name}, which the gguf package cannot read: "
                "quantize from a file of another type"
            ) from error
