"""The format "dense": a full model in 16 bits, as transformers writes it."""

from pathlib import Path

from gptq.blockwise.source import ModelSource
from gptq.checkpoints.canonical import Canonical, unpack
from gptq.files.lazy import LazyTensors
from gptq.files.opening import open_tensors


def tensors(canonical: Canonical) -> LazyTensors:
    """Every tensor in the model's 16-bit type, packed layers dequantized."""
    return unpack(canonical, canonical.layers).tensors


def settings(canonical: Canonical) -> None:
    """A full model has no settings."""


def read(target: Path, source: ModelSource) -> LazyTensors:
    """The tensors of a file or folder as they are stored."""
    return open_tensors(sorted(target.glob("*.safetensors")) if target.is_dir() else [target])
