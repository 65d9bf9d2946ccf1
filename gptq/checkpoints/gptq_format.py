"""The formats "gptq" and "gptq_v2", which differ in how zero points are stored; docs/format.md."""

from functools import partial

from torch import Tensor

from gptq.checkpoints.canonical import Canonical, half, layer_entries, with_modules, zero_points
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.settings import quantize_config
from gptq.files.lazy import LazyTensors
from quant_cuda.packing import pack_zeros


def has_zero(canonical: Canonical, layer: PackedLayer) -> str | None:
    """Why format "gptq" cannot hold a layer's values: it stores a zero point less 1."""
    # A symmetric zero point is never 0.
    if canonical.settings.sym or not bool((zero_points(canonical, layer) < 1).any()):
        return None
    return (
        "has a zero point of 0, which format gptq cannot hold; use --format compressed-tensors or "
        "gptq_v2 and a folder"
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
                entries[key] = half(canonical, f"{layer.name}.{key}")
        modules[layer.name] = entries
    return with_modules(canonical.tensors, modules)


def settings(canonical: Canonical, layout: str) -> dict[str, object]:
    """quantize_config.json. layout: "gptq" or "gptq_v2"."""
    return quantize_config(canonical.settings, layout, canonical.embedding_bits)


def _zeros(canonical: Canonical, layer: PackedLayer, zero_offset: int) -> Tensor:
    return pack_zeros(zero_points(canonical, layer), layer.bits, zero_offset)
