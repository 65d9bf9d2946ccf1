"""The format "mlx" (mode "affine"), which mlx-lm runs on Apple's processors.

Of each layer: weight uint32 (out, in * bits / 32), the stream of GPTQ's qweight by rows; scales and
biases (out, groups); a weight is scale * q + bias. The embedding and the head are packed alike.
Layout: https://ml-explore.github.io/mlx (mlx.core.quantize)
"""

import warnings
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
from quant_cuda.packing import BITS, pack_zeros, unpack, words_for

GROUP_SIZES = (32, 64, 128)
# Architectures that mlx-lm has no model for.
_WITHOUT_READER = ("bloom",)

# Writing -------------------------------------------------------------------------------------


def refuses(facts: LayerFacts) -> str | None:
    """Why the format cannot hold a layer, with the flag that helps; None if it can."""
    layer = facts.layer
    if facts.model_type in _WITHOUT_READER:
        return f"is of a {facts.model_type} model, which mlx-lm does not run; use another --format"
    if facts.has_g_idx:
        return "has groups in act-order, which format mlx cannot hold; use --order gar"
    if facts.is_end and facts.short_group:
        return (
            f"has {layer.inputs} inputs, which groups of {layer.group_size} do not divide; use "
            "--embedding-bits 16"
        )
    if layer.group_size not in GROUP_SIZES or facts.short_group:
        return (
            f"has groups of {layer.group_size} for {layer.inputs} inputs, but format mlx has whole "
            f"groups of 32, 64 or 128; use --groupsize {translation.fitting_group(layer.inputs)}"
        )
    return None


def tensors(canonical: Canonical) -> LazyTensors:
    """Every tensor, none of which is read yet.

    16-bit tensors are float16 as the scales are: mlx computes in float32 where types differ.
    """
    modules = {layer.name: _entries(canonical, layer) for layer in canonical.layers}
    own = with_modules(canonical.tensors, modules)
    unpacked = [name for name in own if own.dtype(name) == torch.bfloat16]
    return own.changed({name: half(canonical, name) for name in unpacked})


def _entries(canonical: Canonical, layer: PackedLayer) -> Entries:
    name, words = layer.name, words_for(layer.inputs, layer.bits)
    shape = (layer.outputs, layer.groups)
    scale = half(canonical, f"{name}.scales")
    entries = {
        "weight": Entry(partial(_rows, canonical, layer), (layer.outputs, words), torch.uint32),
        "scales": Entry(partial(_transposed, scale), shape, torch.float16),
        "biases": Entry(partial(_biases, canonical, layer, scale), shape, torch.float16),
    }
    if f"{name}.bias" in canonical.tensors:
        entries["bias"] = half(canonical, f"{name}.bias")
    return entries


def _rows(canonical: Canonical, layer: PackedLayer) -> Tensor:
    return translation.transposed(canonical.tensors, f"{layer.name}.qweight").view(torch.uint32)


def _transposed(entry: Entry) -> Tensor:
    return entry.read().T.contiguous()


def _biases(canonical: Canonical, layer: PackedLayer, scale: Entry) -> Tensor:
    products = -(scale.read().float() * zero_points(canonical, layer))
    biases = products.to(torch.float16)
    if not bool(torch.isfinite(biases).all()):
        raise UserError(f"{canonical.origin}: {layer.name} exceeds what 16 bits can hold")
    return biases.T.contiguous()


def settings(canonical: Canonical) -> dict[str, object]:
    """config.json's quantization, with exceptions by the names of layers."""
    base = {
        "group_size": canonical.settings.group_size,
        "bits": canonical.settings.bits,
        "mode": "affine",
    }
    unlike = {
        layer.name: {**base, "group_size": layer.group_size, "bits": layer.bits}
        for layer in canonical.layers
        if (layer.group_size, layer.bits) != (base["group_size"], base["bits"])
    }
    return {**base, **unlike}


# Reading -------------------------------------------------------------------------------------


def recognizes(tensors: LazyTensors, settings: Mapping[str, object]) -> bool:
    """Whether a checkpoint is of this format."""
    return "quant_method" not in settings and any(_is_packed(tensors, n) for n in tensors)


def _is_packed(tensors: LazyTensors, name: str) -> bool:
    return name.endswith(".weight") and tensors.dtype(name) == torch.uint32


def as_gptq(
    path: Path, tensors: LazyTensors, settings: Mapping[str, Any]
) -> tuple[LazyTensors, dict[str, object]]:
    """The same checkpoint with the tensors and settings of "gptq_v2".

    A layer whose biases are no whole numbers of its scales is dequantized, with a warning. Raises
    UserError for modes other than "affine" and for tensors that do not go together.
    """
    mode = settings.get("mode", "affine")
    if mode != "affine":
        raise UserError(f"{path}: is quantized in mode {mode!r}; affine can be read")
    changes: dict[str, Entry | None] = {}
    layers, dequantized = [], []
    for name in [n for n in names_with(tensors, "weight") if _is_packed(tensors, f"{n}.weight")]:
        require(path, tensors, name, "scales", "biases")
        layer = _layer(path, tensors, name, settings)
        changes[f"{name}.biases"] = None
        if _whole_zeros(tensors, layer) is None:
            dequantized.append(name)
            changes[f"{name}.scales"] = None
            shape, dtype = (layer.outputs, layer.inputs), tensors.dtype(f"{name}.scales")
            changes[f"{name}.weight"] = Entry(partial(_dequantized, tensors, layer), shape, dtype)
            continue
        layers.append(layer)
        changes |= _gptq_entries(tensors, layer)
    if not layers:
        raise UserError(f"{path}: holds no packed layers that can be kept so; {MAKE_AGAIN}")
    if dequantized:
        warnings.warn(
            f"{path}: {len(dequantized)} layers ({dequantized[0]}) have biases that are no whole "
            "numbers of their scales; they are dequantized",
            stacklevel=2,
        )
    return tensors.changed(changes), translation.gptq_settings(layers, sym=False, desc_act=False)


def _layer(path: Path, tensors: LazyTensors, name: str, settings: Mapping[str, Any]) -> PackedLayer:
    own = settings.get(name)
    declared = {**settings, **(own if isinstance(own, dict) else {})}
    bits, size = declared.get("bits"), declared.get("group_size")
    if bits not in BITS or type(size) is not int or size < 1:
        raise UserError(
            f"{path}: {name} has {bits!r} bits in groups of {size!r}; 2, 3, 4 and 8 bits can be "
            "read"
        )
    outputs, words = tensors.shape(f"{name}.weight")
    inputs = words * 32 // bits
    groups = -(-inputs // size)
    for key in ("scales", "biases"):
        translation.check_shape(path, tensors, f"{name}.{key}", (outputs, groups))
    return PackedLayer(name, inputs, outputs, bits, groups, size)


def _gptq_entries(tensors: LazyTensors, layer: PackedLayer) -> dict[str, Entry | None]:
    name = layer.name
    turned = partial(translation.transposed, tensors, f"{name}.scales")
    return {
        f"{name}.weight": None,
        f"{name}.qweight": translation.qweight(layer, partial(_columns, tensors, layer)),
        f"{name}.qzeros": translation.qzeros(layer, partial(_zeros, tensors, layer)),
        f"{name}.scales": translation.scales(layer, turned, tensors.dtype(f"{name}.scales")),
    }


def _columns(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    return tensors[f"{layer.name}.weight"].view(torch.int32).T.contiguous()


def _whole_zeros(tensors: LazyTensors, layer: PackedLayer) -> Tensor | None:
    """Zero points, int32 (groups, out); None if some are no whole numbers of 0..2**bits - 1.

    -bias / scale is whole but for the rounding of both to their type.
    """
    stored = tensors[f"{layer.name}.scales"]
    scale, bias = stored.double(), tensors[f"{layer.name}.biases"].double()
    # Where all weights of a group are 0 the scale can be 0, and any zero point will do.
    zeros = torch.where(scale == 0, torch.zeros_like(bias), -bias / scale)
    whole = zeros.round()
    off = (zeros - whole).abs() > zeros.abs() * torch.finfo(stored.dtype).eps
    outside = (whole < 0) | (whole >= 2**layer.bits) | ((scale == 0) & (bias != 0))
    if bool((off | outside).any()):
        return None
    return whole.T.to(torch.int32)


def _zeros(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    zeros = _whole_zeros(tensors, layer)
    assert zeros is not None
    return pack_zeros(zeros, layer.bits, zero_offset=0)


def _dequantized(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    """The weight (out, in) of a layer that stays unpacked."""
    name = layer.name
    q = unpack(_columns(tensors, layer), layer.bits, layer.inputs).T.float()
    scale, bias = (
        tensors[f"{name}.{key}"].float().repeat_interleave(layer.group_size, 1)[:, : layer.inputs]
        for key in ("scales", "biases")
    )
    return (q * scale + bias).to(tensors.dtype(f"{name}.scales"))
