"""A .gguf file as Hugging Face tensors and configuration.

Names, orders of rows and settings are data of the architecture: `ModelSpec.gguf`.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

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
    header, spec, names = _open(path)
    entries: Entries = {}
    for name in header.tensors:
        if name.endswith(".attn_rot_embd.weight"):
            continue  # what the model computes for itself, in files of 2023
        # First, because it refuses the names that nothing else can take apart.
        full = _hf_name(header, spec, names, name)
        entry, restore = lazy_tensor(header, name), _restoring(header, names, name)
        if restore is not None:
            entry = entry._replace(read=partial(_then, entry.read, restore))
        entries[full] = entry
    return LazyTensors(entries, header.metadata)


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
    return AutoConfig.for_model(spec.model_type, **values)


def _rotary(header: GgufHeader, hidden_size: int) -> dict[str, Any]:
    """Settings of attention with rotary positions."""
    head_dim = header.count("attention.key_length", hidden_size // _heads(header))
    if header.count("rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"{header.path} rotates a part of each head only, which {header.architecture} models "
            "do not do"
        )
    theta = header.number("rope.freq_base", 10000.0)
    return {
        "num_key_value_heads": _kv_heads(header),
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _heads(header: GgufHeader) -> int:
    return header.count("attention.head_count")


def _kv_heads(header: GgufHeader) -> int:
    return header.count("attention.head_count_kv", _heads(header))


# Which files are supported -------------------------------------------------------------------


def _open(path: Path) -> tuple[GgufHeader, ModelSpec, GgufNames]:
    """The header, and how its architecture is described. Raises UserError if it is not in SPECS."""
    header = read_header(path)
    known = {spec.gguf.architecture: (spec, spec.gguf) for spec in SPECS.values() if spec.gguf}
    if header.architecture not in known:
        raise UserError(
            f"{path} is a '{header.architecture}' model; {' and '.join(known)} are supported"
        )
    _check_variant(header)
    check_types(header)
    return header, *known[header.architecture]


def _check_variant(header: GgufHeader) -> None:
    path, arch = header.path, header.architecture
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


def _restoring(
    header: GgufHeader, names: GgufNames, name: str
) -> Callable[[Tensor], Tensor] | None:
    """What brings a tensor's rows into Hugging Face's order; None if they are in it."""
    order = names.row_order.get(name.split(".")[-2])
    if order is None:
        return None
    restore, parts, count_heads = _RESTORING[order]
    heads, rows = count_heads(header), header.tensors[name].shape[0]
    if rows % (parts * heads):
        raise UserError(
            f"{header.path}: '{name}' has {rows} rows, which do not divide into its heads"
        )
    return partial(restore, heads=heads)


def unpermute_rotary(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * head_dim, ...], for the rotary form of
    Hugging Face, which turns row i with row i + head_dim / 2; llama.cpp turns 2i with 2i + 1.
    """
    pairs = tensor.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def interleave_qkv(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries, keys and values, [3 * heads * head_dim, ...], to BLOOM's q, k, v by head."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(tensor.shape)


# Of each order: what restores the rows, how many equal parts a head has, how many heads there are.
_RESTORING: dict[RowOrder, tuple[Callable[..., Tensor], int, Callable[[GgufHeader], int]]] = {
    RowOrder.ROTARY: (unpermute_rotary, 2, _heads),
    RowOrder.ROTARY_KV: (unpermute_rotary, 2, _kv_heads),
    RowOrder.FUSED_QKV: (interleave_qkv, 3, _heads),
}


def _then(read: Read, restore: Callable[[Tensor], Tensor]) -> Tensor:
    return restore(read())
