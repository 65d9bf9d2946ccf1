"""Every format that a quantized model is written in, as one table.

A new format is a module of this package and a row of FORMATS; if a folder can have it, also its
name in `names`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints import awq, compressed_tensors, dense, gptq_format, mlx
from gptq.checkpoints.assembly import read_full
from gptq.checkpoints.canonical import Canonical, LayerFacts, scale_rounding
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.writing import (
    CONTAINERS,
    FOLDER,
    SHARD_BYTES,
    Container,
    Contents,
    write_folder,
)
from gptq.errors import UserError
from gptq.files.lazy import LazyTensors


def holds_all(facts: LayerFacts) -> str | None:
    """`refuses` of a format that can hold every layer."""
    return None


def holds_all_values(canonical: Canonical, layer: PackedLayer) -> str | None:
    """`refuses_values` of a format that can hold all values."""
    return None


def exact(canonical: Canonical, layer: PackedLayer) -> float:
    """`tolerance` of a format that changes no weight."""
    return 0.0


@dataclass(frozen=True)
class Format:
    """How a quantized model is laid out in files."""

    name: str
    """As `--format` takes it."""
    tensors: Callable[[Canonical], LazyTensors]
    """Every tensor of the files, none of which is read yet."""
    settings: Callable[[Canonical], dict[str, object] | None]
    """What the files say of themselves: config.json's quantization_config; None if nothing."""
    refuses: Callable[[LayerFacts], str | None] = holds_all
    """Why the format cannot hold a layer, to follow the layer's name; None if it can. Asked before
    a run."""
    refuses_planned: Callable[[LayerFacts], str | None] | None = None
    """The same of a layer that a run will write, if more is known of that."""
    refuses_values: Callable[[Canonical, PackedLayer], str | None] = holds_all_values
    """The same of what only a layer's values tell."""
    containers: Mapping[str, Container] = field(default_factory=lambda: CONTAINERS)
    """Who writes it to a file, by the file's ending, or to a folder, under FOLDER."""
    settings_keys: tuple[str, ...] = ("quantization_config",)
    """The keys of config.json that hold the settings."""
    own_settings_file: bool = False
    """Whether quantize_config.json holds the settings too."""
    read: Callable[[Path, ModelSource], LazyTensors] | None = read_full
    """The full model that written files hold: tensors by Hugging Face's names, a packed layer's
    `weight` (out, in) dequantized. None if it cannot be read back; then nothing is compared."""
    tolerance: Callable[[Canonical, PackedLayer], float | Tensor] = scale_rounding
    """How much the format may change a layer's weights: a share of each, or the most of each as a
    tensor (out, in)."""
    packs: bool = True
    """Whether weights stay packed."""
    packs_embeddings: bool = False
    """Whether its readers take a packed embedding and head, so that a folder has them."""


def _of_gguf(name: str) -> Callable[..., Any]:
    """A function of `gguf_format`. The gguf package is imported when it is called, so that other
    formats do not wait for it, and work where it is not installed."""

    def call(*args: Any) -> Any:
        from gptq.checkpoints import gguf_format

        return getattr(gguf_format, name)(*args)

    return call


# Formats whose settings only a folder's config.json holds.
_FOLDER_ONLY = {FOLDER: write_folder}

FORMATS: dict[str, Format] = {
    "gptq": Format(
        "gptq",
        partial(gptq_format.tensors, zero_offset=1),
        partial(gptq_format.settings, layout="gptq"),
        refuses_values=gptq_format.has_zero,
        own_settings_file=True,
    ),
    "gptq_v2": Format(
        "gptq_v2",
        partial(gptq_format.tensors, zero_offset=0),
        partial(gptq_format.settings, layout="gptq_v2"),
        own_settings_file=True,
    ),
    "compressed-tensors": Format(
        "compressed-tensors",
        compressed_tensors.tensors,
        compressed_tensors.settings,
        refuses=compressed_tensors.refuses,
        containers=_FOLDER_ONLY,
    ),
    "awq": Format("awq", awq.tensors, awq.settings, refuses=awq.refuses, containers=_FOLDER_ONLY),
    "mlx": Format(
        "mlx",
        mlx.tensors,
        mlx.settings,
        refuses=mlx.refuses,
        containers=_FOLDER_ONLY,
        settings_keys=("quantization", "quantization_config"),
        packs_embeddings=True,
    ),
    "gguf": Format(
        "gguf",
        _of_gguf("tensors"),
        _of_gguf("settings"),
        refuses=_of_gguf("refuses"),
        refuses_planned=_of_gguf("refuses_planned"),
        refuses_values=_of_gguf("refuses_values"),
        containers={".gguf": _of_gguf("write")},
        read=_of_gguf("read"),
        tolerance=_of_gguf("tolerance"),
    ),
    "dense": Format(
        "dense", dense.tensors, dense.settings, read=dense.read, tolerance=exact, packs=False
    ),
}


def folder_formats() -> tuple[str, ...]:
    """Names of the formats that a folder can have whose weights stay packed."""
    return tuple(name for name, it in FORMATS.items() if it.packs and FOLDER in it.containers)


def container_of(target: Path) -> str:
    """The ending of a file that some format is written to, else FOLDER."""
    endings = {ending for it in FORMATS.values() for ending in it.containers}
    return target.suffix if target.suffix in endings else FOLDER


def default_format(layers: Iterable[LayerFacts], container: str) -> str:
    """What most programs read: "gptq" for `.pt`, `.safetensors` and symmetric models; for others
    "compressed-tensors", or "gptq_v2" if that cannot hold every layer.

    For a container that none of them has, the first format that has it.
    """
    layers = list(layers)
    if container != FOLDER and container in FORMATS["gptq"].containers:
        sym = container == ".pt" or all(facts.sym for facts in layers)
        return "gptq" if sym else "gptq_v2"
    if container != FOLDER:
        return next(name for name, it in FORMATS.items() if container in it.containers)
    if all(facts.sym for facts in layers):
        return "gptq"
    name = "compressed-tensors"
    return "gptq_v2" if any(map(FORMATS[name].refuses, layers)) else name


def check_layers(name: str, layers: Iterable[LayerFacts], origin: Path) -> None:
    """Raise UserError for the first layer that a format cannot hold. origin: of the model."""
    for facts in layers:
        reason = FORMATS[name].refuses(facts)
        if reason is not None:
            raise UserError(f"{origin}: --format {name}: {facts.layer.name} {reason}")


def write(
    canonical: Canonical,
    target: Path,
    name: str,
    *,
    container: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model in the format `name`; `target` appears complete or not at all.

    container: a key of the format's `containers`; by default as the target's ending says.
    shard_bytes: more than this goes into several files of a folder.
    check: called with what was written before it replaces an older `target`.
    Raises UserError if the format cannot hold the model or is not written to such a target.
    """
    row = FORMATS[name]
    container = container_of(target) if container is None else container
    if container not in row.containers:
        raise UserError(
            f"{target}: format {name} is written to a {' or '.join(row.containers)}, not to a "
            f"{container}; give another name or --format"
        )
    check_layers(name, map(canonical.facts, canonical.layers), canonical.origin)
    for layer in canonical.layers:
        reason = row.refuses_values(canonical, layer)
        if reason is not None:
            raise UserError(f"{canonical.origin}: {layer.name} {reason}")
    source, tensors = canonical.source, row.tensors(canonical)
    contents = Contents(
        source,
        tensors,
        row.settings(canonical),
        empty_model.tied(source.config, source.spec, tensors),
        settings_keys=row.settings_keys,
        own_settings_file=row.own_settings_file,
        meta=canonical.settings.meta if row.packs and not row.own_settings_file else None,
        shard_bytes=shard_bytes,
        check=check,
    )
    row.containers[container](target, contents)
