"""Every format that a quantized model is written in, as one table.

A new format is a module of this package and a row of FORMATS; if a folder can have it, also its
name in `names`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints import dense, gptq_format
from gptq.checkpoints.canonical import Canonical
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.writing import CONTAINERS, FOLDER, SHARD_BYTES, Container, Contents
from gptq.errors import UserError
from gptq.files.lazy import LazyTensors


def holds_all(canonical: Canonical, layer: PackedLayer) -> str | None:
    """`refuses` of a format that can hold every layer."""
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
    """What the files say of themselves: quantize_config.json; None if nothing."""
    refuses: Callable[[Canonical, PackedLayer], str | None] = holds_all
    """Why the format cannot hold a layer, to follow the layer's name; None if it can."""
    containers: Mapping[str, Container] = field(default_factory=lambda: CONTAINERS)
    """Who writes it to a file, by the file's ending, or to a folder, under FOLDER."""
    read: Callable[[Path, ModelSource], LazyTensors] | None = None
    """The full model that written files hold: tensors by Hugging Face's names, a packed layer's
    `weight` (out, in) dequantized. None if it cannot be read back; then nothing is compared."""
    tolerance: Callable[[Canonical, PackedLayer], float] = exact
    """How much the format may change a layer's weights, relative to each."""
    packs: bool = True
    """Whether weights stay packed."""


FORMATS: dict[str, Format] = {
    "gptq": Format(
        "gptq",
        partial(gptq_format.tensors, zero_offset=1),
        partial(gptq_format.settings, layout="gptq"),
        refuses=gptq_format.refuses_v1,
        read=gptq_format.read,
        tolerance=gptq_format.tolerance,
    ),
    "gptq_v2": Format(
        "gptq_v2",
        partial(gptq_format.tensors, zero_offset=0),
        partial(gptq_format.settings, layout="gptq_v2"),
        read=gptq_format.read,
        tolerance=gptq_format.tolerance,
    ),
    "dense": Format("dense", dense.tensors, dense.settings, read=dense.read, packs=False),
}


def folder_formats() -> tuple[str, ...]:
    """Names of the formats that a folder can have whose weights stay packed."""
    return tuple(name for name, it in FORMATS.items() if it.packs and FOLDER in it.containers)


def container_of(target: Path) -> str:
    """The ending of a file that some format is written to, else FOLDER."""
    endings = {ending for it in FORMATS.values() for ending in it.containers}
    return target.suffix if target.suffix in endings else FOLDER


def default_format(canonical: Canonical, container: str) -> str:
    """ "gptq", which every program reads, for `.pt` and symmetric models; else "gptq_v2".

    For a container that neither has, the first format that has it.
    """
    name = "gptq" if canonical.settings.sym or container == ".pt" else "gptq_v2"
    if container in FORMATS[name].containers:
        return name
    return next(name for name, it in FORMATS.items() if container in it.containers)


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
    for layer in canonical.layers:
        reason = row.refuses(canonical, layer)
        if reason is not None:
            raise UserError(f"{canonical.origin}: {layer.name} {reason}")
    source, tensors = canonical.source, row.tensors(canonical)
    tied = empty_model.tied(source.config, source.spec, tensors)
    contents = Contents(
        source, tensors, row.settings(canonical), tied, shard_bytes=shard_bytes, check=check
    )
    row.containers[container](target, contents)
