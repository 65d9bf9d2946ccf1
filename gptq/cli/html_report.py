"""A finished quantization as one self-contained HTML page; report.html.jinja is its template."""

import math
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path

from jinja2 import Environment, PackageLoader, Template
from rich.filesize import decimal

from gptq.checkpoints.layouts import stored_bits
from gptq.checkpoints.reading import open_checkpoint
from gptq.files.atomic import whole_file
from gptq.files.lazy import LazyTensors
from gptq.models import ModelSpec
from gptq.pipeline.report import LayerReport, Report

PAGE = "index.html"
TEMPLATE = "report.html.jinja"
# Below any loss of a layer that was not reproduced exactly; the logarithm of 0 is none.
_LEAST_LOSS = 1e-30


def write_page(
    folder: Path, name: str, spec: ModelSpec, report: Report, perplexities: Mapping[str, float]
) -> Path:
    """Write `index.html` into a folder, which is made; returns its path.

    name: of the model. perplexities: by data set, maybe none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    with whole_file(page) as unfinished:
        text = _template().render(name=name, **_facts(spec, report), perplexities=perplexities)
        # A name of bytes that are not UTF-8 is shown with escapes.
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("gptq.cli", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = decimal
    return environment.get_template(TEMPLATE)


def _facts(spec: ModelSpec, report: Report) -> dict[str, object]:
    """What the template shows of a run and of the first file that it wrote."""
    tensors, _ = open_checkpoint(report.written[0])
    losses = [layer.loss for layer in report.layers]
    return {
        "report": report,
        "widths": report.widths,
        "settings": report.config.to_dict(),
        "columns": [_short(linear) for linear in spec.linears],
        "heat": heat_map(report.layers, spec),
        "least": min(losses),
        "most": max(losses),
        "parts": parts(tensors, spec),
        "stages": stages(report, spec),
    }


# The losses ----------------------------------------------------------------------------------


def heat_map(
    layers: tuple[LayerReport, ...], spec: ModelSpec
) -> list[tuple[int, list[tuple[LayerReport | None, float]]]]:
    """For each block its layers in the order they run, with a shade from 0 to 1.

    The shade is where the loss's logarithm lies between the least and the greatest.
    """
    by_place = {(layer.block, layer.name): layer for layer in layers}
    logs = {place: math.log(max(layer.loss, _LEAST_LOSS)) for place, layer in by_place.items()}
    low, high = min(logs.values()), max(logs.values())
    width = (high - low) or 1.0
    return [
        (
            block,
            [
                (by_place.get((block, name)), (logs.get((block, name), low) - low) / width)
                for name in spec.linears
            ],
        )
        for block in sorted({layer.block for layer in layers})
    ]


# The bytes -----------------------------------------------------------------------------------


def parts(tensors: LazyTensors, spec: ModelSpec) -> list[tuple[str, int, float, int]]:
    """(part, weights, bits a weight, bytes) of each part of a file, and of the file at the end.

    Scales, zero points and group indices count as bits of their layer's weights.
    """
    weights: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for name in tensors:
        part = _part(name, spec)
        sizes[part] += tensors.nbytes(name)
        weights[part] += _weights(tensors, name)
    order = ["embedding", *(_short(linear) for linear in spec.linears), "head", "norms and biases"]
    rows = [
        (part, weights[part], 8 * sizes[part] / max(weights[part], 1), sizes[part])
        for part in order
        if sizes[part]
    ]
    total, size = sum(weights.values()), sum(sizes.values())
    return [*rows, ("all", total, 8 * size / total, size)]


def _part(name: str, spec: ModelSpec) -> str:
    """The part of the model that a tensor belongs to."""
    module, _, kind = name.rpartition(".")
    if module == spec.embed[0]:
        return "embedding"
    if module == spec.head:
        return "head"
    inner = module.removeprefix(f"{spec.blocks}.").partition(".")[2]
    if inner in spec.linears and kind != "bias":
        return _short(inner)
    return "norms and biases"


def _weights(tensors: LazyTensors, name: str) -> int:
    """How many weights a tensor holds; a packed layer's are all in its qweight."""
    layer, _, kind = name.rpartition(".")
    if kind in ("qzeros", "scales", "g_idx"):
        return 0
    if kind != "qweight":
        return prod(tensors.shape(name))
    packed_rows, outputs = tensors.shape(name)
    return packed_rows * 32 // stored_bits(tensors, layer) * outputs


# The time ------------------------------------------------------------------------------------


def stages(report: Report, spec: ModelSpec) -> list[tuple[str, float, float]]:
    """(stage, seconds, share of the run): what was timed, layers by kind, and the rest."""
    rows = list(report.stages)
    for name in spec.linears:
        seconds = sum(layer.seconds for layer in report.layers if layer.name == name)
        rows.append((f"solving {_short(name)}", seconds))
    rows.append(("the rest", max(0.0, report.seconds - sum(seconds for _, seconds in rows))))
    return [(stage, seconds, seconds / (report.seconds or 1)) for stage, seconds in rows]


def _short(name: str) -> str:
    """`q_proj` for `self_attn.q_proj`."""
    return name.rpartition(".")[2]
