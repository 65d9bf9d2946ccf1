"""The form between reading and writing, made of a run's blocks or of a checkpoint."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.canonical import Canonical, layer_entries, unpack, with_modules
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.reading import Checkpoint, attach
from gptq.checkpoints.settings import Settings, from_declared
from gptq.checkpoints.widths import describe
from gptq.config import Width, Widths
from gptq.device import half_dtype
from gptq.errors import UserError
from gptq.files.lazy import Entries, Entry, LazyTensors, Shape
from gptq.nn import PackedModule, QuantEmbedding
from quant_cuda.packing import pack_zeros, unpack_zeros, words_for
from quant_cuda.weight import natural_groups


def from_blocks(
    source: ModelSource,
    module: PreTrainedModel,
    packed: LazyTensors,
    settings: Settings,
    widths: Widths | None = None,
) -> Canonical:
    """From the finished blocks of a run.

    module: the model without weights. packed: tensors of its packed layers, with zero points of
        format "gptq", and those that replace the model's own because they were trained.
    widths: of layers that do not have the bits and group size of `settings`.
    """
    base = Width(settings.bits, settings.group_size)
    layers, modules = [], {}
    for name, linear in module.named_modules():
        if f"{name}.qweight" not in packed:
            continue
        groups = packed.shape(f"{name}.scales")[0]
        sizes = (linear.in_features, linear.out_features)
        width = base if widths is None else widths.get(name, base)
        layer = PackedLayer(name, *sizes, width.bits, groups, width.group_size)
        own = layer_entries(packed, name)
        own["qzeros"] = own["qzeros"]._replace(read=partial(_zeros, packed, layer, 1))
        layers.append(layer)
        modules[name] = own
    trained = {
        name: packed.entry(name) for name in packed if name.rpartition(".")[0] not in modules
    }
    stored = source.tensors.changed(trained)
    unpacked = _unpacked(source, module, source.folder, stored, modules)
    tensors = with_modules(unpacked, modules)
    settings = describe(settings, layers, source.spec)
    return Canonical(source, source.folder, tensors, tuple(layers), settings)


def from_checkpoint(
    source: ModelSource, module: PreTrainedModel, checkpoint: Checkpoint
) -> Canonical:
    """From a checkpoint, attached to `module` by `reading.attach`.

    Settings say what the checkpoint says; `measure` brings them up to date.
    """
    source = _with_ties(source, module.config.tie_word_embeddings)
    modules = {layer.name: _layer(module, checkpoint, layer) for layer in checkpoint.layers}
    stored = _unpacked(source, module, checkpoint.path, checkpoint.tensors, modules)
    declared = from_declared(checkpoint.settings, checkpoint.bits, checkpoint.group_size)
    settings = describe(declared, checkpoint.layers, source.spec)
    tensors = with_modules(stored, modules)
    return Canonical(source, checkpoint.path, tensors, checkpoint.layers, settings)


def read_full(target: Path, source: ModelSource) -> LazyTensors:
    """The full model that a written checkpoint holds; weights of packed layers are float32."""
    module = empty_model.build(source.config, source.spec, torch.device("cpu"))
    canonical = from_checkpoint(source, module, attach(module, source.spec, target))
    return unpack(canonical, canonical.layers, torch.float32).tensors


def _with_ties(source: ModelSource, tied: bool) -> ModelSource:
    """The source, whose configuration says whether the checkpoint's head is the embedding's."""
    if source.config.tie_word_embeddings == tied:
        return source
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = tied
    return replace(source, config=config)


def _layer(module: PreTrainedModel, checkpoint: Checkpoint, layer: PackedLayer) -> Entries:
    """A packed layer's tensors, with `g_idx` also if the checkpoint has none."""
    tensors, name = checkpoint.tensors, layer.name
    part = module.get_submodule(name)
    assert isinstance(part, PackedModule)
    zeros = partial(_zeros, tensors, layer, checkpoint.zero_offset)
    columns = words_for(layer.outputs, layer.bits)
    entries = {
        "qweight": tensors.entry(f"{name}.qweight"),
        "qzeros": Entry(zeros, (layer.groups, columns), torch.int32),
        "scales": tensors.entry(f"{name}.scales"),
    }
    if not isinstance(part, QuantEmbedding):
        g_idx = partial(_g_idx, tensors, layer)
        entries["g_idx"] = Entry(g_idx, (layer.inputs,), torch.int32)
    # Early tools wrote a bias for every layer. `attach` tells which layers have one.
    if part.bias is not None:
        entries["bias"] = tensors.entry(f"{name}.bias")
    return entries


def _unpacked(
    source: ModelSource,
    module: PreTrainedModel,
    origin: Path,
    stored: LazyTensors,
    packed: Collection[str],
) -> LazyTensors:
    """Every tensor of the model in order, read as if none were packed.

    packed: layers whose tensors are replaced afterwards, so that their types do not matter.
    """
    half, state = half_dtype(source.config.dtype), module.state_dict()
    tied = empty_model.tied(source.config, source.spec, state)
    entries: Entries = {}
    for name, expected in state.items():
        if name not in tied:
            shape = tuple(expected.shape)
            is_packed = name.rpartition(".")[0] in packed or name not in stored
            dtype = half if is_packed else _type_to_write(stored, name, half)
            entries[name] = Entry(partial(_dense, stored, name, shape, dtype, origin), shape, dtype)
    return LazyTensors(entries)


def _type_to_write(stored: LazyTensors, name: str, half: torch.dtype) -> torch.dtype:
    """The model's 16-bit type; float32 for a tensor with values that are beyond that type."""
    dtype = stored.dtype(name)
    if dtype not in (torch.float32, torch.float64, torch.bfloat16) or dtype == half:
        return half
    low, high = stored[name].aminmax()
    return half if max(-float(low), float(high)) <= torch.finfo(half).max else torch.float32


def _dense(
    stored: Mapping[str, Tensor], name: str, shape: Shape, dtype: torch.dtype, origin: Path
) -> Tensor:
    if name not in stored:
        raise UserError(f"{origin}: {name} is absent; the file is incomplete")
    tensor = stored[name]
    if tensor.shape != shape:
        raise UserError(
            f"{origin}: {name} has shape {tuple(tensor.shape)} where the model's configuration "
            f"wants {shape}; the weights are another model's"
        )
    return tensor.to(dtype)


def _zeros(tensors: LazyTensors, layer: PackedLayer, offset: int) -> Tensor:
    """`qzeros` without the offset that they are stored with."""
    zeros = unpack_zeros(tensors[f"{layer.name}.qzeros"], layer.bits, layer.outputs, offset)
    return pack_zeros(zeros, layer.bits, zero_offset=0)


def _g_idx(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    g_idx = tensors.get(f"{layer.name}.g_idx")
    if g_idx is not None:
        return g_idx
    return natural_groups(layer.inputs, layer.group_size).to(torch.int32)
