"""The format "awq" (version "gemm"), 4 bit alone, which AutoAWQ defined and most servers read.

Of each layer: qweight int32 (in, out / 8), qzeros int32 (groups, out / 8) without an offset, scales
float16 (groups, out). Field k of a word, from its low bits, is column 8j + ORDER[k].
Layout: https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py)
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoints import translation
from gptq.checkpoints.canonical import Canonical, LayerFacts, half, with_modules, zero_points
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.translation import MAKE_AGAIN, names_with, require
from gptq.errors import UserError
from gptq.files.lazy import Entries, Entry, LazyTensors
from quant_cuda.packing import pack, pack_zeros, unpack
from quant_cuda.weight import group_count

METHOD = "awq"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = len(ORDER)


def pack_columns(values: Tensor) -> Tensor:
    """Integers of 0..15, (n, out), to int32 (n, out / 8)."""
    n, outputs = values.shape
    ordered = values.reshape(n, outputs // _PER_WORD, _PER_WORD)[..., list(ORDER)]
    return pack(ordered.reshape(n, outputs).T, BITS).T.contiguous()


def unpack_columns(words: Tensor) -> Tensor:
    """Undo `pack_columns`: int32 (n, out / 8) to uint8 (n, out)."""
    n, outputs = words.shape[0], words.shape[1] * _PER_WORD
    ordered = unpack(words.T.contiguous(), BITS, outputs).T.reshape(n, -1, _PER_WORD)
    values = torch.empty_like(ordered)
    values[..., list(ORDER)] = ordered
    return values.reshape(n, outputs)


# Writing -------------------------------------------------------------------------------------


def refuses(facts: LayerFacts) -> str | None:
    """Why the format cannot hold a layer, with the flag that helps; None if it can."""
    layer = facts.layer
    if facts.is_end:
        return "is packed, which format awq cannot hold; leave out --quantize-embeddings"
    if facts.mixed:
        return (
            "is of a model whose layers have unlike bits or groups, but format awq has one width "
            "for all; use --format compressed-tensors"
        )
    if layer.bits != BITS:
        return f"has {layer.bits} bits, but format awq has {BITS} only; use --wbits {BITS}"
    if facts.has_g_idx:
        return "has groups in act-order, which format awq cannot hold; use --order gar"
    if facts.short_group:
        return (
            f"has {layer.inputs} inputs, which groups of {layer.group_size} do not divide; "
            f"use --groupsize {translation.fitting_group(layer.inputs)}"
        )
    if layer.outputs % _PER_WORD:
        return f"has {layer.outputs} outputs, which do not fill whole words; use another --format"
    return None


def tensors(canonical: Canonical) -> LazyTensors:
    """Every tensor, none of which is read yet. Scales and biases become float16."""
    modules = {layer.name: _entries(canonical, layer) for layer in canonical.layers}
    return with_modules(canonical.tensors, modules)


def _entries(canonical: Canonical, layer: PackedLayer) -> Entries:
    columns = layer.outputs // _PER_WORD
    q = partial(_packed_weight, canonical, layer)
    entries = {
        "qweight": Entry(q, (layer.inputs, columns), torch.int32),
        "qzeros": Entry(partial(_zeros, canonical, layer), (layer.groups, columns), torch.int32),
        "scales": half(canonical, f"{layer.name}.scales"),
    }
    if f"{layer.name}.bias" in canonical.tensors:
        entries["bias"] = half(canonical, f"{layer.name}.bias")
    return entries


def _packed_weight(canonical: Canonical, layer: PackedLayer) -> Tensor:
    words = canonical.tensors[f"{layer.name}.qweight"]
    return pack_columns(unpack(words, layer.bits, layer.inputs))


def _zeros(canonical: Canonical, layer: PackedLayer) -> Tensor:
    return pack_columns(zero_points(canonical, layer))


def settings(canonical: Canonical) -> dict[str, object]:
    """config.json's quantization_config."""
    return {
        "quant_method": METHOD,
        "bits": canonical.settings.bits,
        "group_size": canonical.settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [canonical.source.spec.head],
    }


# Reading -------------------------------------------------------------------------------------


def recognizes(tensors: LazyTensors, settings: Mapping[str, object]) -> bool:
    """Whether a checkpoint is of this format, by its settings: its names are GPTQ's."""
    return settings.get("quant_method") == METHOD or "w_bit" in settings


def as_gptq(
    path: Path, tensors: LazyTensors, settings: Mapping[str, Any]
) -> tuple[LazyTensors, dict[str, object]]:
    """The same checkpoint with the tensors and settings of "gptq_v2".

    Raises UserError for versions other than "gemm" and tensors that do not go together.
    """
    version = str(settings.get("version", "gemm")).lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if version != "gemm" or bits != BITS:
        raise UserError(
            f"{path}: is AWQ of version {version!r} and {bits} bits; gemm of {BITS} bits can be "
            "read"
        )
    size = settings.get("group_size", settings.get("q_group_size", 128))
    names = names_with(tensors, "qweight")
    if not names or type(size) is not int or (size < 1 and size != -1):
        raise UserError(f"{path}: holds no packed layers in groups of {size!r}; {MAKE_AGAIN}")
    changes: dict[str, Entry | None] = {}
    layers = []
    for name in names:
        layer = _layer(path, tensors, name, size)
        layers.append(layer)
        changes[f"{name}.qweight"] = translation.qweight(layer, partial(_gptq, tensors, layer))
        changes[f"{name}.qzeros"] = translation.qzeros(layer, partial(_gptq_zeros, tensors, layer))
    return tensors.changed(changes), translation.gptq_settings(layers, sym=False, desc_act=False)


def _layer(path: Path, tensors: LazyTensors, name: str, size: int) -> PackedLayer:
    require(path, tensors, name, "qzeros", "scales")
    shape = tensors.shape(f"{name}.qweight")
    if len(shape) != 2 or tensors.dtype(f"{name}.qweight") != torch.int32:
        raise UserError(f"{path}: {name}.qweight is no matrix of int32; {MAKE_AGAIN}")
    inputs, columns = shape
    groups = group_count(inputs, size)
    translation.check_shape(path, tensors, f"{name}.scales", (groups, columns * _PER_WORD))
    translation.check_shape(path, tensors, f"{name}.qzeros", (groups, columns))
    return PackedLayer(name, inputs, columns * _PER_WORD, BITS, groups, size)


def _gptq(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    return pack(unpack_columns(tensors[f"{layer.name}.qweight"]), BITS)


def _gptq_zeros(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    zeros = unpack_columns(tensors[f"{layer.name}.qzeros"])
    return pack_zeros(zeros, BITS, zero_offset=0)
