"""Whether written files hold the weights that were read."""

from pathlib import Path

import torch
from torch import Tensor

from gptq.checkpoints.canonical import Canonical, dequantize
from gptq.checkpoints.formats import FORMATS
from gptq.checkpoints.layouts import PackedLayer


def verify(original: Canonical, written: Canonical, target: Path, name: str) -> None:
    """Read files back and compare the weight of every layer that was packed.

    original: as it was read. written: as it was given to `formats.write`, which may have fewer
    packed layers. name: of the format.
    Raises RuntimeError for a weight that differs by more than the format's tolerance.
    """
    row = FORMATS[name]
    if row.read is None:
        return
    weights = row.read(target, original.source)
    for layer in original.layers:
        after = weights[f"{layer.name}.weight"]
        before = dequantize(original, layer, after.dtype)
        tolerance = row.tolerance(original, layer) if layer in written.layers else 0.0
        _compare(layer, before, after, tolerance)


def _compare(layer: PackedLayer, before: Tensor, after: Tensor, tolerance: float | Tensor) -> None:
    """tolerance: as `Format.tolerance`."""
    allowed = tolerance if isinstance(tolerance, Tensor) else tolerance * before.abs()
    if before.shape != after.shape or not torch.all((before - after).abs() <= allowed):
        raise RuntimeError(f"{layer.name} was not written as it was read")
