"""A .gguf file as Hugging Face tensors, and the same the other way round.

Names and orders of rows are data of the architecture: `ModelSpec.gguf`. Configurations are in
`gguf_config`.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from gptq.blockwise.gguf_rope import ROPE_TENSORS
from gptq.errors import UserError
from gptq.files.gguf_file import GgufHeader, check_types, lazy_tensor, read_header
from gptq.files.lazy import Entries, Entry, LazyTensors, Read
from gptq.models import SPECS, GgufNames, ModelSpec, RowOrder


def open_gguf(path: Path, spec: ModelSpec | None = None) -> LazyTensors:
    """The model's tensors by their Hugging Face names, in Hugging Face's order of rows.

    float32, float16 and bfloat16 stay what they are; quantized types become float32. There is no
    `lm_head.weight` if the file ties it to the embedding. Raises UserError unless this is a
    complete GGUF file of an architecture in SPECS.
    spec: of several architectures that files name alike, the one to read it as.
    """
    opened = open_names(path, spec)
    entries: Entries = {}
    for full, name in opened.tensors.items():
        entry, rows = lazy_tensor(opened.header, name), opened.rows(name)
        if rows is not None:
            entry = entry._replace(read=partial(_in_order, entry.read, rows))
        if opened.names.norm_offset and is_norm(name):
            read = partial(_without, entry.read, opened.names.norm_offset)
            entry = entry._replace(read=read, dtype=torch.float32)
        entries[full] = entry
    entries |= _from_arrays(opened.header, opened.spec, opened.names)
    return LazyTensors(entries, opened.header.metadata)


class GgufModel(NamedTuple):
    """A file of an architecture in SPECS; nothing but its header has been read."""

    header: GgufHeader
    spec: ModelSpec
    names: GgufNames
    tensors: dict[str, str]
    """Hugging Face's name of each tensor -> its name in the file, in the file's order."""

    def rows(self, name: str) -> Tensor | None:
        """Which row of the file's tensor `name` each row of Hugging Face's is, int64 (rows,); None
        if the order is the same. Raises UserError if the rows do not divide into heads."""
        order = self.names.row_order.get(name.split(".")[-2])
        if order is None:
            return None
        heads = kv_heads(self.header) if order == RowOrder.ROTARY_KV else query_heads(self.header)
        rows = self.header.tensors[name].shape[0]
        restore, parts = _RESTORING[order]
        if rows % (parts * heads):
            raise UserError(
                f"{self.header.path}: '{name}' has {rows} rows, which do not divide into its heads"
            )
        return restore(torch.arange(rows), heads)


def open_names(path: Path, spec: ModelSpec | None = None) -> GgufModel:
    """Open a file; arguments and errors as `open_gguf`."""
    header, spec, names = open_header(path, spec)
    tensors = {}
    for name in header.tensors:
        # What the model computes for itself: in files of 2023, and with scaled positions.
        if not name.endswith(".attn_rot_embd.weight") and name not in ROPE_TENSORS:
            tensors[_hf_name(header, spec, names, name)] = name
    return GgufModel(header, spec, names, tensors)


def query_heads(header: GgufHeader) -> int:
    return header.count("attention.head_count")


def kv_heads(header: GgufHeader) -> int:
    return header.count("attention.head_count_kv", query_heads(header))


# Which files are supported -------------------------------------------------------------------


def open_header(
    path: Path, spec: ModelSpec | None = None
) -> tuple[GgufHeader, ModelSpec, GgufNames]:
    """The header, and how its architecture is described; arguments and errors as `open_gguf`."""
    header = read_header(path)
    _check_variant(header)
    found = _described(header, [spec] if spec is not None else list(SPECS.values()))
    check_types(header)
    return header, *found


def _described(header: GgufHeader, specs: list[ModelSpec]) -> tuple[ModelSpec, GgufNames]:
    known = [(spec, spec.gguf) for spec in specs if spec.gguf is not None]
    named = [it for it in known if it[1].architecture == header.architecture]
    marked = [it for it in named if it[1].marker and header.get(it[1].marker)]
    # Of several that files name alike, the first: LLaMA, Mistral and Helium.
    for it in marked or named:
        if marked or it[1].marker is None:
            return it
    supported = dict.fromkeys(names.architecture for _, names in known)
    raise UserError(
        f"{header.path} is a '{header.architecture}' model; {', '.join(supported)} are supported"
    )


def _check_variant(header: GgufHeader) -> None:
    parts = header.metadata.get("split.count", 1)
    if parts != 1:
        raise UserError(
            f"{header.path} is one of {parts} parts: join them with llama-gguf-split --merge"
        )


# From llama.cpp's conventions to Hugging Face's ---------------------------------------------


def _hf_name(header: GgufHeader, spec: ModelSpec, names: GgufNames, name: str) -> str:
    """Hugging Face's name of a tensor."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    index, part, kind = match.groups() if match else (None, "", "")
    module = _outside(spec).get(part) if index is None else names.block.get(part)
    if module is None:
        raise UserError(
            f"{header.path} holds a tensor '{name}', which no plain {header.architecture} model "
            "has: this variant is not supported"
        )
    return f"{module}.{kind}" if index is None else f"{spec.block(int(index))}.{module}.{kind}"


def _outside(spec: ModelSpec) -> dict[str, str]:
    """Name in the file -> Hugging Face's name, of the parts outside the blocks."""
    embed = dict(zip(("token_embd", "token_embd_norm"), spec.embed, strict=False))
    return {**embed, "output_norm": spec.norm, "output": spec.head}


def unpermute_rotary(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * head_dim, ...], for the rotary form of
    Hugging Face, which turns row i with row i + head_dim / 2; llama.cpp turns 2i with 2i + 1.
    """
    pairs = tensor.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def interleave_qkv(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries, keys and values, [3 * heads * head_dim, ...], to BLOOM's q, k, v by head."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(tensor.shape)


# Of each order: what restores the rows, and how many equal parts a head has.
_RESTORING: dict[RowOrder, tuple[Callable[..., Tensor], int]] = {
    RowOrder.ROTARY: (unpermute_rotary, 2),
    RowOrder.ROTARY_KV: (unpermute_rotary, 2),
    RowOrder.FUSED_QKV: (interleave_qkv, 3),
}


def _in_order(read: Read, rows: Tensor) -> Tensor:
    return read()[rows]


def _without(read: Read, offset: float) -> Tensor:
    return read().float() - offset


def _from_arrays(header: GgufHeader, spec: ModelSpec, names: GgufNames) -> Entries:
    """The tensors of one number that the header has an array of."""
    blocks, entries = header.count("block_count"), {}
    for inner, (key, dims) in names.arrays.items():
        values = header.metadata.get(key)
        # One number is that of all blocks.
        values = (values,) * blocks if isinstance(values, float) else values
        if not isinstance(values, tuple) or len(values) < blocks:
            raise UserError(f"{header.path} has no '{key}' of each block: convert it again")
        for index in range(blocks):
            value = torch.full((1,) * dims, float(values[index]))
            full = f"{spec.block(index)}.{inner}"
            entries[full] = Entry(value.clone, tuple(value.shape), value.dtype)
    return entries


def is_norm(name: str) -> bool:
    """Whether a tensor, by its name in the file, is the weight of a norm."""
    return name.endswith("norm.weight")


# From Hugging Face's conventions to llama.cpp's ---------------------------------------------


def gguf_name(spec: ModelSpec, names: GgufNames, full: str) -> str:
    """A tensor's name in the file. full: Hugging Face's, with `weight` or `bias` at its end."""
    module, _, kind = full.rpartition(".")
    parts = {name: part for part, name in _outside(spec).items()}
    if module in parts:
        return f"{parts[module]}.{kind}"
    index, _, inner = module.removeprefix(f"{spec.blocks}.").partition(".")
    parts = {name: part for part, name in names.block.items()}
    return f"blk.{index}.{parts[inner]}.{kind}"


def gguf_rows(config: PretrainedConfig, names: GgufNames, name: str, rows: int) -> Tensor | None:
    """Which row of Hugging Face's tensor each row of the file's tensor `name` is, int64 (rows,);
    None if the order is the same."""
    order = names.row_order.get(name.split(".")[-2])
    if order is None:
        return None
    key = "num_key_value_heads" if order == RowOrder.ROTARY_KV else "num_attention_heads"
    restore, _ = _RESTORING[order]
    return restore(torch.arange(rows), getattr(config, key)).argsort()
