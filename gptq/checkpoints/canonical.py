"""A quantized model between reading and writing: the one form that every format is made from.

Each function returns a new record; tensors are read, converted and freed one at a time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.settings import Settings
from gptq.checkpoints.widths import are_mixed
from gptq.device import half_dtype
from gptq.errors import UserError
from gptq.files.lazy import Entries, Entry, LazyTensors
from quant_cuda import PackedWeight
from quant_cuda.packing import unpack_zeros
from quant_cuda.reference import rows

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

    @cached_property
    def mixed(self) -> bool:
        """Whether the layers of blocks have unlike bits or group sizes."""
        ends = self.embeddings
        return are_mixed(layer for layer in self.layers if layer not in ends)

    @property
    def embedding_bits(self) -> int:
        """Bits of the embedding and the head; 16 if they are not packed."""
        return self.embeddings[0].bits if self.embeddings else 16

    @property
    def tied(self) -> dict[str, str]:
        """Names that are not in `tensors`, each with the tensor that it shares."""
        return empty_model.tied(self.source.config, self.source.spec, self.tensors)

    def facts(self, layer: PackedLayer) -> "LayerFacts":
        """What decides whether a format can hold a layer."""
        return LayerFacts(
            layer,
            self.settings.sym,
            self.settings.desc_act,
            self.source.spec.model_type,
            is_end=layer in self.embeddings,
            mixed=self.mixed,
        )


@dataclass(frozen=True)
class LayerFacts:
    """What decides whether a format can hold a packed layer; known before a run."""

    layer: PackedLayer
    sym: bool
    desc_act: bool
    """Whether groups of the model's layers are not runs of neighbouring inputs."""
    model_type: str
    is_end: bool = False
    """Whether it is the embedding or the output head, which keep their inputs' order."""
    mixed: bool = False
    """Whether the model's layers have unlike bits or group sizes."""

    @property
    def short_group(self) -> bool:
        """Whether the last group has fewer inputs than the others."""
        return self.layer.group_size > 0 and self.layer.inputs % self.layer.group_size != 0

    @property
    def has_g_idx(self) -> bool:
        return self.desc_act and not self.is_end and self.layer.groups > 1


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


def half(canonical: Canonical, name: str) -> Entry:
    """A tensor as float16. Reading it raises UserError if float16 cannot hold a value."""
    entry = canonical.tensors.entry(name)
    return entry._replace(read=partial(_read_half, canonical, name), dtype=torch.float16)


def _read_half(canonical: Canonical, name: str) -> Tensor:
    tensor = canonical.tensors[name].to(torch.float16)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{canonical.origin}: {name} exceeds what 16 bits can hold")
    return tensor


def scale_rounding(canonical: Canonical, layer: PackedLayer) -> float:
    """How much float16 scales change a layer's weights, relative; 0 if they are float16 already."""
    stored = canonical.tensors.dtype(f"{layer.name}.scales")
    return 0.0 if stored == torch.float16 else 2.0**-10


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
