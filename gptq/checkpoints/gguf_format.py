"""The format "gguf": one file for llama.cpp, with the integers of packed layers as they are.

A symmetric 4-bit layer becomes Q4_0, an asymmetric one Q4_1, a symmetric 8-bit one Q8_0. Their
blocks of 32 inputs have a scale each, whatever the group size was. So has a packed embedding or
head; one that does not fit one of these is rounded to nearest in Q8_0. Norms and biases are
float32.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor

from gptq.blockwise.gguf_config import gguf_keys
from gptq.blockwise.gguf_model import gguf_name, gguf_rows, is_norm, open_gguf
from gptq.blockwise.gguf_rope import rope_tensors
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.canonical import Canonical, LayerFacts, dequantize, zero_points
from gptq.checkpoints.gguf_tokenizer import Value, tokenizer_keys
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.names import GGUF_GROUP
from gptq.checkpoints.settings import QUANTIZER, SETTINGS_KEY, quantize_config
from gptq.checkpoints.writing import Contents
from gptq.errors import UserError
from gptq.files.atomic import whole_file
from gptq.files.gguf_blocks import BITS, BLOCK, Blocks, join, row_bytes
from gptq.files.lazy import Entries, Entry, LazyTensors
from gptq.models import GgufNames
from quant_cuda.packing import unpack as unpack_words
from quant_cuda.weight import natural_groups

# The part of a step by which a Q4_1 minimum, 15 steps at most, can be off in float16.
_MINIMUM_ERROR = 15 * 2.0**-11
# The part of a step by which rounding to Q8_0 changes a weight: a half, and the float16 scale.
_ROUNDING_ERROR = 0.5 + 127 * 2.0**-11
_PLAIN = {torch.float16: GgmlType.F16, torch.float32: GgmlType.F32}
# Outputs that are converted at a time.
_CHUNK = 8192
_FILE_TYPES = {
    GgmlType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    GgmlType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    GgmlType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    GgmlType.F32: gguf.LlamaFileType.ALL_F32,
    GgmlType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GgmlType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
}


# What it can hold ----------------------------------------------------------------------------


def refusal(bits: int, group_size: int, sym: bool, desc_act: bool, inputs: int) -> str | None:
    """Why a layer of these settings does not fit, to follow its name; None if it does.

    desc_act: whether groups are not runs of neighbouring inputs.
    """
    if bits not in BITS.values():
        return f"has {bits} bits, which format gguf does not hold exactly; use --wbits 4"
    if bits == 8 and not sym:
        return "is asymmetric of 8 bits, which format gguf does not hold exactly; use --sym"
    if desc_act:
        return "has groups of scattered inputs, which format gguf cannot hold; use --order gar"
    if inputs % BLOCK:
        return (
            f"has {inputs} inputs, not a multiple of {BLOCK} as format gguf needs; use another "
            "--format"
        )
    if group_size != -1 and group_size % BLOCK:
        return (
            f"has groups of {group_size} inputs, not a multiple of {BLOCK} as format gguf needs; "
            f"use --groupsize {GGUF_GROUP}"
        )
    return None


def refuses(facts: LayerFacts) -> str | None:
    """`refusal` of a layer, by what is known without its values; an embedding and a head fit."""
    layer = facts.layer
    if facts.is_end:
        return None
    # Whether this layer is symmetric, if not all are, its zero points tell.
    return refusal(layer.bits, layer.group_size, True, facts.has_g_idx, layer.inputs)


def refuses_planned(facts: LayerFacts) -> str | None:
    """`refusal` of a layer that a run will write: it is symmetric only if that is asked for."""
    layer = facts.layer
    return refusal(layer.bits, layer.group_size, facts.sym, facts.has_g_idx, layer.inputs)


def refuses_values(canonical: Canonical, layer: PackedLayer) -> str | None:
    """`refusal` of a layer as its tensors have it."""
    if layer in canonical.embeddings:
        return None
    g_idx = canonical.tensors.get(f"{layer.name}.g_idx")
    natural = natural_groups(layer.inputs, layer.group_size)
    scattered = g_idx is not None and not torch.equal(g_idx.to(natural.dtype), natural)
    sym = _is_symmetric(canonical, layer)
    return refusal(layer.bits, layer.group_size, sym, scattered, layer.inputs)


def check_source(source: ModelSource, rows: int) -> None:
    """Raise UserError for a model that the format cannot describe. rows: of the embedding."""
    names = _names(source)
    shapes = {"blk.0.ffn_up.weight": (1,), "token_embd.weight": (rows,)}
    gguf_keys(source.config, names, shapes)
    tokenizer_keys(source, rows)


def _names(source: ModelSource) -> GgufNames:
    if source.spec.gguf is None:
        raise UserError(
            f"format gguf is not known for {source.spec.model_type} models; use another --format"
        )
    return source.spec.gguf


def _type(canonical: Canonical, layer: PackedLayer) -> GgmlType | None:
    """The type that holds a layer's integers, by what is known without reading any.

    None for an embedding or head that fits none. One of 8 bits fits Q8_0 if it is symmetric.
    """
    sym, scattered = canonical.settings.sym, canonical.settings.desc_act
    is_end = layer in canonical.embeddings
    if is_end and refusal(layer.bits, layer.group_size, True, scattered, layer.inputs) is not None:
        return None
    if layer.bits == 8:
        return GgmlType.Q8_0
    return GgmlType.Q4_0 if sym else GgmlType.Q4_1


def _is_symmetric(canonical: Canonical, layer: PackedLayer) -> bool:
    return bool((zero_points(canonical, layer) == 2 ** (layer.bits - 1)).all())


# Tensors as the file has them ----------------------------------------------------------------


def tensors(canonical: Canonical) -> LazyTensors:
    """Every tensor by its name in the file; blocks are uint8.

    `metadata` has their types as "types", and as "arrays" what the header has in place of tensors.

    Raises UserError for an architecture that files cannot describe, and when it is read for a
    scale that float16 cannot hold.
    """
    names = _names(canonical.source)
    layers = {layer.name: layer for layer in canonical.layers}
    entries: Entries = {}
    types: dict[str, GgmlType] = {}
    arrays = _arrays(canonical, names)
    for full in canonical.tensors:
        module, _, key = full.rpartition(".")
        layer = layers.get(module)
        if layer is not None and key not in ("qweight", "bias"):
            continue
        if full.endswith(tuple(names.arrays)):
            continue
        name = gguf_name(
            canonical.source.spec, names, full if key == "bias" else f"{module}.weight"
        )
        if layer is not None and key == "qweight":
            types[name], entry = _packed(canonical, layer)
        else:
            types[name], entry = _unpacked(canonical, full)
        entries[name] = _as_in_file(canonical, names, name, entry)
    factors = rope_tensors(canonical.source.config) if names.rotary else {}
    for name, tensor in factors.items():
        types[name] = GgmlType.F32
        entries[name] = Entry(tensor.clone, tuple(tensor.shape), tensor.dtype)
    return LazyTensors(entries, {"types": types, "arrays": arrays})


def _arrays(canonical: Canonical, names: GgufNames) -> dict[str, list[float]]:
    """The numbers of all blocks by their whole keys."""
    spec, blocks = canonical.source.spec, range(canonical.source.config.num_hidden_layers)
    return {
        key: [float(canonical.tensors[f"{spec.block(index)}.{inner}"]) for index in blocks]
        for inner, (key, _) in names.arrays.items()
    }


def _as_in_file(canonical: Canonical, names: GgufNames, name: str, entry: Entry) -> Entry:
    """A tensor with its rows in the file's order; a norm's weight as the file counts it."""
    if names.norm_offset and is_norm(name):
        return entry._replace(read=lambda: entry.read() + names.norm_offset)
    rows = gguf_rows(canonical.source.config, names, name, entry.shape[0])
    return entry if rows is None else entry._replace(read=lambda: entry.read()[rows])


def _packed(canonical: Canonical, layer: PackedLayer) -> tuple[GgmlType, Entry]:
    kind, dtype = _type(canonical, layer), canonical.dtype
    if kind is None:
        weight = partial(dequantize, canonical, layer, dtype)
        return _rounded(Entry(weight, (layer.outputs, layer.inputs), dtype))
    shape = (layer.outputs, row_bytes(kind, layer.inputs))
    return kind, Entry(partial(_blocks, canonical, layer, kind), shape, torch.uint8)


def _blocks(canonical: Canonical, layer: PackedLayer, kind: GgmlType) -> Tensor:
    """A packed layer's blocks, uint8 (out, bytes of a row)."""
    if kind == GgmlType.Q8_0 and not _is_symmetric(canonical, layer):
        # An embedding or a head: of other layers such are refused.
        return _round(dequantize(canonical, layer, canonical.dtype))
    packed = canonical.tensors[f"{layer.name}.qweight"]
    scales = canonical.tensors[f"{layer.name}.scales"].to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise UserError(f"{canonical.origin}: {layer.name}.scales exceed what 16 bits can hold")
    group = natural_groups(layer.inputs, layer.group_size)[::BLOCK].long()
    scales = scales[group].T
    minima = None
    if kind == GgmlType.Q4_1:
        zeros = zero_points(canonical, layer)[group].T
        minima = -(scales.float() * zeros).to(torch.float16)
        if not bool(torch.isfinite(minima).all()):
            raise UserError(f"{canonical.origin}: {layer.name} has minima beyond float16")
    parts = []
    for outputs in torch.arange(layer.outputs).split(_CHUNK):
        span = slice(int(outputs[0]), int(outputs[-1]) + 1)
        q = unpack_words(packed[:, span], layer.bits, layer.inputs).T.contiguous()
        part = Blocks(q, scales[span], None if minima is None else minima[span])
        parts.append(join(kind, part))
    return torch.cat(parts)


def _unpacked(canonical: Canonical, full: str) -> tuple[GgmlType, Entry]:
    entry, spec = canonical.tensors.entry(full), canonical.source.spec
    if len(entry.shape) == 1:
        return GgmlType.F32, entry._replace(read=lambda: entry.read().float(), dtype=torch.float32)
    is_end = full in (f"{spec.embed[0]}.weight", f"{spec.head}.weight")
    return _rounded(entry) if is_end else _as_it_is(entry)


def _rounded(entry: Entry) -> tuple[GgmlType, Entry]:
    """A weight rounded to nearest in Q8_0. It has as many inputs as a block's layers, which fit."""
    outputs, inputs = entry.shape
    stored = (outputs, row_bytes(GgmlType.Q8_0, inputs))
    return GgmlType.Q8_0, Entry(lambda: _round(entry.read()), stored, torch.uint8)


def _round(weight: Tensor) -> Tensor:
    rounded = [
        torch.from_numpy(gguf.quantize(rows.float().numpy(), GgmlType.Q8_0))
        for rows in weight.split(_CHUNK)
    ]
    return torch.cat(rounded)


def _as_it_is(entry: Entry) -> tuple[GgmlType, Entry]:
    if entry.dtype != torch.bfloat16:
        return _PLAIN[entry.dtype], entry
    # numpy has no such type.
    shape = (*entry.shape[:-1], 2 * entry.shape[-1])
    return GgmlType.BF16, Entry(lambda: entry.read().view(torch.uint8), shape, torch.uint8)


# Settings, and reading back ------------------------------------------------------------------


def settings(canonical: Canonical) -> dict[str, object]:
    """What the file says of the quantization, as quantize_config.json does."""
    return quantize_config(canonical.settings, "gptq_v2", canonical.embedding_bits)


def read(target: Path, source: ModelSource) -> LazyTensors:
    """The full model that a file holds, as the gguf package dequantizes it."""
    return open_gguf(target, source.spec)


def tolerance(canonical: Canonical, layer: PackedLayer) -> Tensor:
    """The most that weights may change, float32 (out, in)."""
    weight, kind = dequantize(canonical, layer, torch.float32), _type(canonical, layer)
    if kind is None or (kind == GgmlType.Q8_0 and not _is_symmetric(canonical, layer)):
        most = weight.unflatten(1, (-1, BLOCK)).abs().amax(-1)
        rounding = (_ROUNDING_ERROR / 127 * most).repeat_interleave(BLOCK, 1)
        return rounding + weight.abs() * torch.finfo(canonical.dtype).eps
    scales = canonical.tensors[f"{layer.name}.scales"]
    # Wider scales are rounded to float16.
    bound = weight.abs() * (0.0 if scales.dtype == torch.float16 else 2.0**-10)
    if kind == GgmlType.Q4_1:
        group = natural_groups(layer.inputs, layer.group_size).long()
        bound += _MINIMUM_ERROR * scales.float().abs()[group].T
    return bound


# The file ------------------------------------------------------------------------------------


def write(path: Path, contents: Contents) -> None:
    """Write a file, one tensor after another; it appears complete or not at all.

    Raises UserError for a model that files cannot describe.
    """
    stored, source = contents.tensors, contents.source
    names = _names(source)
    shapes = {name: stored.shape(name) for name in stored}
    types = stored.metadata["types"]
    keys = _general_keys(contents, types)
    for key, value in gguf_keys(source.config, names, shapes).items():
        keys[f"{names.architecture}.{key}"] = value
    keys |= stored.metadata["arrays"]
    keys |= tokenizer_keys(source, shapes["token_embd.weight"][0])
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, names.architecture)
        try:
            _add_keys(writer, keys)
            for name in stored:
                kind = torch.empty(0, dtype=stored.dtype(name)).numpy().dtype
                writer.add_tensor_info(
                    name,
                    stored.shape(name),
                    kind,
                    stored.nbytes(name),
                    raw_dtype=types[name],
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in stored:
                writer.write_tensor_data(stored[name].contiguous().numpy())
        finally:
            writer.close()
        if contents.check is not None:
            contents.check(temporary)


def _general_keys(contents: Contents, types: Mapping[str, GgmlType]) -> dict[str, Value]:
    tensors = contents.tensors
    matrices = [
        name for name in tensors if name.startswith("blk.") and len(tensors.shape(name)) > 1
    ]
    kinds = [types[name] for name in matrices]
    most = max(kinds, key=kinds.count)
    settings = {} if contents.settings is None else {SETTINGS_KEY: json.dumps(contents.settings)}
    return {
        "general.type": "model",
        "general.name": contents.source.name,
        "general.quantized_by": QUANTIZER,
        "general.file_type": int(_FILE_TYPES[most]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **settings,
    }


def _add_keys(writer: gguf.GGUFWriter, keys: Mapping[str, Value]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            # What llama.cpp expects of every whole number here.
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
