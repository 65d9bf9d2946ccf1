"""A .gguf file as Hugging Face tensors and configuration, and the same the other way round.

Names, orders of rows and settings are data of the architecture: `ModelSpec.gguf`.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from gptq.blockwise.gguf_rope import FACTORS, rope_keys, rope_parameters
from gptq.blockwise.limits import check_sizes
from gptq.errors import UserError
from gptq.files.gguf_file import GgufHeader, check_types, lazy_tensor, read_header
from gptq.files.lazy import Entries, LazyTensors, Read
from gptq.models import SPECS, GgufNames, ModelSpec, RowOrder


def open_gguf(path: Path) -> LazyTensors:
    """The model's tensors by their Hugging Face names, in Hugging Face's order of rows.

    float32, float16 and bfloat16 stay what they are; quantized types become float32. There is no
    `lm_head.weight` if the file ties it to the embedding. Raises UserError unless this is a
    complete GGUF file of an architecture in SPECS.
    """
    opened = open_names(path)
    entries: Entries = {}
    for full, name in opened.tensors.items():
        entry, rows = lazy_tensor(opened.header, name), opened.rows(name)
        if rows is not None:
            entry = entry._replace(read=partial(_in_order, entry.read, rows))
        entries[full] = entry
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
        heads = _kv_heads(self.header) if order == RowOrder.ROTARY_KV else _heads(self.header)
        rows = self.header.tensors[name].shape[0]
        restore, parts = _RESTORING[order]
        if rows % (parts * heads):
            raise UserError(
                f"{self.header.path}: '{name}' has {rows} rows, which do not divide into its heads"
            )
        return restore(torch.arange(rows), heads)


def open_names(path: Path) -> GgufModel:
    """Open a file, errors as `open_gguf`."""
    header, spec, names = _open(path)
    tensors = {}
    for name in header.tensors:
        # What the model computes for itself: in files of 2023, and of Llama 3.
        if not name.endswith(".attn_rot_embd.weight") and name != FACTORS:
            tensors[_hf_name(header, spec, names, name)] = name
    return GgufModel(header, spec, names, tensors)


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration that Hugging Face's class needs to run the model; errors as `open_gguf`."""
    header, spec, names = _open(path)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} has no 'token_embd.weight': it holds no whole model")
    tokens = {
        f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    values: dict[str, Any] = {
        "architectures": [spec.architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": header.count("embedding_length"),
        "num_hidden_layers": header.count("block_count"),
        "num_attention_heads": _heads(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{name: number for name, number in tokens.items() if isinstance(number, int)},
        **{name: header.count(key) for name, key in names.counts.items()},
        **{name: header.number(key) for name, key in names.numbers.items()},
        **{name: tensor in header.tensors for name, tensor in names.flags.items()},
    }
    if names.rotary:
        values |= _rotary(header, values["hidden_size"])
    check_sizes(path, values.get)
    if names.rotary:
        sizes = AutoConfig.for_model(spec.model_type, **values)
        values["rope_parameters"] = rope_parameters(header, sizes)
    return AutoConfig.for_model(spec.model_type, **values)


def _rotary(header: GgufHeader, hidden_size: int) -> dict[str, Any]:
    """Settings of attention with rotary positions."""
    head_dim = header.count("attention.key_length", hidden_size // _heads(header))
    if header.count("rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"{header.path} rotates a part of each head only, which {header.architecture} models "
            "do not do"
        )
    return {"num_key_value_heads": _kv_heads(header), "head_dim": head_dim}


def _heads(header: GgufHeader) -> int:
    return header.count("attention.head_count")


def _kv_heads(header: GgufHeader) -> int:
    return header.count("attention.head_count_kv", _heads(header))


# Which files are supported -------------------------------------------------------------------


def _open(path: Path) -> tuple[GgufHeader, ModelSpec, GgufNames]:
    """The header, and how its architecture is described. Raises UserError if it is not in SPECS."""
    header = read_header(path)
    # Of several that files name alike, the first: LLaMA and Mistral.
    known: dict[str, tuple[ModelSpec, GgufNames]] = {}
    for spec in SPECS.values():
        if spec.gguf is not None:
            known.setdefault(spec.gguf.architecture, (spec, spec.gguf))
    if header.architecture not in known:
        raise UserError(
            f"{path} is a '{header.architecture}' model; {', '.join(known)} are supported"
        )
    _check_variant(header)
    check_types(header)
    return header, *known[header.architecture]


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


def _has_window(config: PretrainedConfig) -> bool:
    """Whether some layer attends to fewer tokens than the model has positions."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return False
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return "sliding_attention" in kinds and window < config.max_position_embeddings


def gguf_keys(
    config: PretrainedConfig, names: GgufNames, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float | int | str]:
    """A configuration as values for the file's header, by keys after the architecture.

    shapes: of tensors, by their names in the file. Raises UserError for what files cannot describe.
    """
    if _has_window(config):
        raise UserError(
            "this model attends to a sliding window, which format gguf cannot describe; use "
            "another --format"
        )
    heads = config.num_attention_heads
    # BLOOM's positions have no end; what it was trained on is a hint in its configuration.
    positions = getattr(config, "max_position_embeddings", getattr(config, "seq_length", 2048))
    keys: dict[str, float | int | str] = {
        "context_length": positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": shapes["blk.0.ffn_up.weight"][0],
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "vocab_size": shapes["token_embd.weight"][0],
    }
    keys |= {key: getattr(config, name) for name, key in names.counts.items()}
    keys |= {key: float(getattr(config, name)) for name, key in names.numbers.items()}
    if names.rotary:
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys |= {"rope.dimension_count": size, **rope_keys(config)}
        if size * heads != config.hidden_size:
            keys |= {"attention.key_length": size, "attention.value_length": size}
    return keys
