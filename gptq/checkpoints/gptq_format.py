"""The formats "gptq" and "gptq_v2", which differ in how zero points are stored; docs/format.md."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.canonical import (
    Canonical,
    from_checkpoint,
    layer_entries,
    unpack,
    with_modules,
    zero_points,
)
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.reading import attach
from gptq.checkpoints.settings import quantize_config
from gptq.errors import UserError
from gptq.files.lazy import LazyTensors
from quant_cuda.packing import pack_zeros


def refuses_v1(canonical: Canonical, layer: PackedLayer) -> str | None:
    """Why format "gptq" cannot hold a layer: it stores a zero point less 1."""
    # A symmetric zero point is never 0.
    if canonical.settings.sym or not bool((zero_points(canonical, layer) < 1).any()):
        return None
    return (
        "has a zero point of 0, which format gptq cannot hold; use --format gptq_v2 and a folder "
        "or .safetensors"
    )


def tensors(canonical: Canonical, zero_offset: int) -> LazyTensors:
    """Every tensor, those of packed layers as docs/format.md has them.

    zero_offset: 1 for "gptq", 0 for "gptq_v2". Scales and biases become float16. Raises UserError
    for one that float16 cannot hold, when it is read.
    """
    modules = {}
    for layer in canonical.layers:
        entries = layer_entries(canonical.tensors, layer.name)
        zeros = partial(_zeros, canonical, layer, zero_offset)
        entries["qzeros"] = entries["qzeros"]._replace(read=zeros)
        for key in ("scales", "bias"):
            if key in entries:
                half = partial(_half, canonical, f"{layer.name}.{key}")
                entries[key] = entries[key]._replace(read=half, dtype=torch.float16)
        modules[layer.name] = entries
    return with_modules(canonical.tensors, modules)


def settings(canonical: Canonical, layout: str) -> dict[str, object]:
    """quantize_config.json. layout: "gptq" or "gptq_v2"."""
    return quantize_config(canonical.settings, layout, canonical.embedding_bits)


def read(target: Path, source: ModelSource) -> LazyTensors:
    """The full model that a file or folder holds; weights of packed layers are float32."""
    module = empty_model.build(source.config, source.spec, torch.device("cpu"))
    canonical = from_checkpoint(source, module, attach(module, source.spec, target))
    return unpack(canonical, canonical.layers, torch.float32).tensors


def tolerance(canonical: Canonical, layer: PackedLayer) -> float:
    """How much weights may change, relative: scales wider than float16 are rounded."""
    stored = canonical.tensors.dtype(f"{layer.name}.scales")
    return 0.0 if stored == torch.float16 else 2.0**-10


def _zeros(canonical: Canonical, layer: PackedLayer, zero_offset: int) -> Tensor:
    return pack_zeros(zero_points(canonical, layer), layer.bits, zero_offset)


def _half(canonical: Canonical, name: str) -> Tensor:
    tensor = canonical.tensors[name].to(torch.float16)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{canonical.origin}: {name} exceeds what 16 bits can hold")
    return tensor
