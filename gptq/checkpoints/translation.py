"""Parts of other formats' reading as GPTQ's: names, shapes and settings."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gptq.checkpoints.layouts import PackedLayer
from gptq.errors import UserError
from gptq.files.lazy import Entry, LazyTensors, Read
from quant_cuda.packing import pack_zeros, words_for

MAKE_AGAIN = "write the checkpoint again with the tool that made it, or with gptq.convert"


def fitting_group(inputs: int, least: int = -1) -> int:
    """The largest usual group size that divides a layer's inputs; `least` if none does."""
    return next((size for size in (128, 64, 32) if inputs % size == 0), least)


def names_with(tensors: Iterable[str], ending: str) -> list[str]:
    """The modules that have a tensor `ending`, such as "weight_packed"."""
    return [name.removesuffix(f".{ending}") for name in tensors if name.endswith(f".{ending}")]


def require(path: Path, tensors: LazyTensors, layer: str, *keys: str) -> None:
    """Raise UserError unless the module has these tensors."""
    for key in keys:
        if f"{layer}.{key}" not in tensors:
            raise UserError(f"{path}: {layer}.{key} is absent; copy or download the file again")


def check_shape(path: Path, tensors: LazyTensors, name: str, shape: tuple[int, ...]) -> None:
    """Raise UserError unless a tensor has this shape."""
    if tensors.shape(name) != shape:
        raise UserError(
            f"{path}: {name} has shape {tensors.shape(name)} where {shape} goes with the rest; "
            "the file is damaged"
        )


def qweight(layer: PackedLayer, read: Read) -> Entry:
    """A layer's integers. read: makes int32 (ceil(in * bits / 32), out)."""
    return Entry(read, (words_for(layer.inputs, layer.bits), layer.outputs), torch.int32)


def qzeros(layer: PackedLayer, read: Read) -> Entry:
    """A layer's zero points. read: makes int32 (groups, ceil(out * bits / 32)), without offset."""
    return Entry(read, (layer.groups, words_for(layer.outputs, layer.bits)), torch.int32)


def symmetric_zeros(layer: PackedLayer) -> Entry:
    """Zero points of 2**(bits - 1) throughout, which formats leave out."""
    return qzeros(layer, partial(_middle, layer))


def scales(layer: PackedLayer, read: Read, dtype: torch.dtype) -> Entry:
    """A layer's scales. read: makes `dtype` (groups, out)."""
    return Entry(read, (layer.groups, layer.outputs), dtype)


def transposed(tensors: LazyTensors, name: str) -> Tensor:
    return tensors[name].T.contiguous()


def gptq_settings(layers: Iterable[PackedLayer], sym: bool, desc_act: bool) -> dict[str, object]:
    """What quantize_config.json would say of these layers, with unlike layers as exceptions.

    Raises ValueError if there are no layers.
    """
    layers = list(layers)
    kinds = Counter((layer.bits, layer.group_size) for layer in layers)
    (bits, group_size), _ = max(kinds.items(), key=lambda kind: cast(int, kind[1]))
    unlike = {
        f"+:^{layer.name}$": {"bits": layer.bits, "group_size": layer.group_size}
        for layer in layers
        if (layer.bits, layer.group_size) != (bits, group_size)
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        **({"dynamic": unlike} if unlike else {}),
    }


def _middle(layer: PackedLayer) -> Tensor:
    zeros = torch.full((layer.groups, layer.outputs), 2 ** (layer.bits - 1))
    return pack_zeros(zeros, layer.bits, zero_offset=0)
