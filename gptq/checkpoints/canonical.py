"""A quantized model between reading and writing: the one form that every format is made from.

Each function returns a new record; tensors are read, converted and freed one at a time.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.reading import Checkpoint
from gptq.checkpoints.settings import Settings, from_declared
from gptq.device import half_dtype
from gptq.errors import UserError
from gptq.files.lazy import Entries, Entry, LazyTensors, Shape
from gptq.nn import PackedModule, QuantEmbedding
from quant_cuda import PackedWeight
from quant_cuda.packing import pack_zeros, unpack_zeros, words_for
from quant_cuda.reference import rows
from quant_cuda.weight import natural_groups

# Outputs whose weights are dequantized at a time.
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class Canonical:
    """A quantized model, none of whose tensors is in memory."""

    source: ModelSource
    """The configuration and the tokenizer."""
    origin: Path
    """The checkpoint or model that it was made from, for error messages."""
    tensors: LazyTensors
    """Every tensor by Hugging Face's names, in the model's order, without a tied head's.

    A packed layer has qweight, qzeros and scales, and g_idx and bias if it needs them, as
    docs/format.md defines them. `qzeros` hold the zero points as they are, without the offset of
    format "gptq", which cannot store 0. What is not packed is of `dtype`, or float32 if `dtype`
    cannot hold its values.
    """
    layers: tuple[PackedLayer, ...]
    settings: Settings

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit type of tensors that are not packed."""
        return half_dtype(self.source.config.dtype)

    @property
    def embeddings(self) -> tuple[PackedLayer, ...]:
        """The embedding and the output head, if they are packed."""
        ends = (self.source.spec.embed[0], self.source.spec.head)
        return tuple(layer for layer in self.layers if layer.name in ends)

    @property
    def embedding_bits(self) -> int:
        """Bits of the embedding and the head; 16 if they are not packed."""
        return self.embeddings[0].bits if self.embeddings else 16

    @property
    def tied(self) -> dict[str, str]:
        """Names that are not in `tensors`, each with the tensor that it shares."""
        return empty_model.tied(self.source.config, self.source.spec, self.tensors)


# Tensors in order ----------------------------------------------------------------------------


def layer_entries(tensors: LazyTensors, layer: str) -> Entries:
    """A packed layer's tensors, by the last part of their names."""
    keys = ("qweight", "qzeros", "scales", "g_idx", "bias")
    return {key: tensors.entry(f"{layer}.{key}") for key in keys if f"{layer}.{key}" in tensors}


def with_modules(tensors: LazyTensors, modules: Mapping[str, Entries]) -> LazyTensors:
    """The same tensors in the same order, all those of some modules replaced.

    modules: the new tensors of a module, by the last part of their names.
    """
    entries: Entries = {}
    for name in tensors:
        module = name.rpartition(".")[0]
        if module in modules:
            entries |= {f"{module}.{key}": it for key, it in modules[module].items()}
        else:
            entries[name] = tensors.entry(name)
    return LazyTensors(entries)


# From a run, from a checkpoint ---------------------------------------------------------------


def from_blocks(
    source: ModelSource, module: PreTrainedModel, packed: LazyTensors, settings: Settings
) -> Canonical:
    """From the finished blocks of a run.

    module: the model without weights. packed: tensors of its packed layers, with zero points of
    format "gptq".
    """
    layers, modules = [], {}
    for name, linear in module.named_modules():
        if f"{name}.qweight" not in packed:
            continue
        groups = packed.shape(f"{name}.scales")[0]
        sizes = (linear.in_features, linear.out_features)
        layer = PackedLayer(name, *sizes, settings.bits, groups, settings.group_size)
        own = layer_entries(packed, name)
        own["qzeros"] = own["qzeros"]._replace(read=partial(_zeros, packed, layer, 1))
        layers.append(layer)
        modules[name] = own
    unpacked = _unpacked(source, module, source.folder, source.tensors, modules)
    tensors = with_modules(unpacked, modules)
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
    settings = from_declared(checkpoint.settings, checkpoint.bits, checkpoint.group_size)
    tensors = with_modules(stored, modules)
    return Canonical(source, checkpoint.path, tensors, checkpoint.layers, settings)


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


# What the tensors say ------------------------------------------------------------------------


def zero_points(canonical: Canonical, layer: PackedLayer) -> Tensor:
    """A layer's zero points, int32 (groups, out)."""
    packed = canonical.tensors[f"{layer.name}.qzeros"]
    return unpack_zeros(packed, layer.bits, layer.outputs, zero_offset=0)


def measure(canonical: Canonical) -> Canonical:
    """The same model; `sym` and `desc_act` of its settings are as its packed layers have them."""
    sym = all(
        bool((zero_points(canonical, layer) == 2 ** (layer.bits - 1)).all())
        for layer in canonical.layers
    )
    desc_act = any(_is_out_of_order(canonical, layer) for layer in canonical.layers)
    return replace(canonical, settings=replace(canonical.settings, sym=sym, desc_act=desc_act))


def _is_out_of_order(canonical: Canonical, layer: PackedLayer) -> bool:
    g_idx = canonical.tensors.get(f"{layer.name}.g_idx")
    return g_idx is not None and bool((g_idx[1:] < g_idx[:-1]).any())


def dequantize(canonical: Canonical, layer: PackedLayer, dtype: torch.dtype) -> Tensor:
    """A packed layer's weight, `dtype` (out, in)."""
    tensors = canonical.tensors
    packed = PackedWeight(
        tensors[f"{layer.name}.qweight"],
        tensors[f"{layer.name}.qzeros"],
        tensors[f"{layer.name}.scales"],
        tensors.get(f"{layer.name}.g_idx"),
        layer.bits,
        layer.group_size,
        in_features=layer.inputs,
        zero_offset=0,
    )
    weight = torch.empty((layer.outputs, layer.inputs), dtype=dtype)
    for outputs in torch.arange(layer.outputs).split(_CHUNK):
        weight[outputs] = rows(packed, outputs).to(dtype)
    return weight


def unpack(
    canonical: Canonical, layers: Collection[PackedLayer], dtype: torch.dtype | None = None
) -> Canonical:
    """The same model, some of its packed layers dequantized to `weight` (out, in).

    dtype: of their weights and biases; by default the model's 16-bit type.
    """
    dtype = dtype or canonical.dtype
    modules = {}
    for layer in layers:
        weight = partial(dequantize, canonical, layer, dtype)
        own = {"weight": Entry(weight, (layer.outputs, layer.inputs), dtype)}
        bias = f"{layer.name}.bias"
        if bias in canonical.tensors:
            own["bias"] = Entry(partial(_cast, canonical, bias, dtype), (layer.outputs,), dtype)
        modules[layer.name] = own
    kept = tuple(layer for layer in canonical.layers if layer.name not in modules)
    return replace(canonical, tensors=with_modules(canonical.tensors, modules), layers=kept)


def _cast(canonical: Canonical, name: str, dtype: torch.dtype) -> Tensor:
    return canonical.tensors[name].to(dtype)
