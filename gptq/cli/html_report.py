"""A finished quantization as one HTML page that needs nothing beside it."""

import math
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path

from jinja2 import Environment
from rich.filesize import decimal

from gptq.checkpoints.reading import open_checkpoint
from gptq.files.atomic import whole_file
from gptq.files.opening import LazyTensors
from gptq.files.safetensors_file import nbytes
from gptq.models import ModelSpec
from gptq.pipeline.report import LayerReport, Report

PAGE = "index.html"


def write_page(
    folder: Path, name: str, spec: ModelSpec, report: Report, perplexities: Mapping[str, float]
) -> Path:
    """Write `index.html` into a folder, which is made; returns its path.

    name: of the model. perplexities: by data set, maybe none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, _ = open_checkpoint(report.written[0])
    page = folder / PAGE
    with whole_file(page) as unfinished:
        text = _template().render(
            name=name,
            report=report,
            settings=report.config.to_dict(),
            perplexities=perplexities,
            columns=[_short(linear) for linear in spec.linears],
            heat=heat_map(report.layers, spec),
            least=min(layer.loss for layer in report.layers),
            most=max(layer.loss for layer in report.layers),
            parts=parts(tensors, spec),
            stages=stages(report, spec),
        )
        unfinished.write_text(text, encoding="utf-8")
    return page


def heat_map(
    layers: tuple[LayerReport, ...], spec: ModelSpec
) -> list[tuple[int, list[tuple[LayerReport | None, float]]]]:
    """For each block its layers in the order they run, with a shade from 0 to 1.

    The shade is the place of the loss's logarithm between the least and the greatest.
    """
    known = {(layer.block, layer.name): layer for layer in layers}
    logs = {key: math.log(max(layer.loss, 1e-30)) for key, layer in known.items()}
    low, high = min(logs.values()), max(logs.values())
    width = (high - low) or 1.0
    return [
        (
            block,
            [
                (known.get((block, name)), (logs.get((block, name), low) - low) / width)
                for name in spec.linears
            ],
        )
        for block in sorted({layer.block for layer in layers})
    ]


def parts(tensors: LazyTensors, spec: ModelSpec) -> list[tuple[str, int, float, int]]:
    """(part, weights, bits a weight, bytes) of what a file holds, and of all of it at the end.

    Scales, zero points and group indices count as bits of their layer's weights.
    """
    weights: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for name in tensors:
        part = _part(name, spec)
        sizes[part] += nbytes(tensors, name)
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
    """Weights that a tensor stands for: of packed ones only the words do, by their shape."""
    layer, _, kind = name.rpartition(".")
    if kind in ("qzeros", "scales", "g_idx"):
        return 0
    if kind != "qweight":
        return prod(tensors.shape(name))
    words, outputs = tensors.shape(name)
    _, zero_words = tensors.shape(f"{layer}.qzeros")
    # Zero points are as many for each group as there are outputs, in words of the same bits.
    bits = max(b for b in (2, 3, 4, 8) if -(-outputs * b // 32) <= zero_words)
    return words * 32 // bits * outputs


def stages(report: Report, spec: ModelSpec) -> list[tuple[str, float, float]]:
    """(stage, seconds, share of the run): what was timed, layers by kind, and the rest."""
    rows = list(report.stages)
    for name in spec.linears:
        spent = sum(layer.seconds for layer in report.layers if layer.name == name)
        rows.append((f"solving {_short(name)}", spent))
    rows.append(("the rest", max(0.0, report.seconds - sum(seconds for _, seconds in rows))))
    return [(stage, seconds, seconds / (report.seconds or 1)) for stage, seconds in rows]


def _short(name: str) -> str:
    """`q_proj` for `self_attn.q_proj`."""
    return name.rpartition(".")[2]


def _template():
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = decimal
    return environment.from_string(_PAGE)


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}, {{ report.config.bits }} bit</title>
<style>
:root { --ink: #1a202c; --soft: #5a6472; --line: #e2e8f0; --paper: #fff; --bar: #2b6cb0;
  --cold: 210 45% 94%; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #2d3642; --paper: #12161c; --bar: #63a4e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1rem 0 1.5rem; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.75rem; align-items: start; }
section { min-width: 0; margin-bottom: 1.75rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .4rem; border-bottom: 1px solid var(--line); text-align: right;
  font-weight: normal; }
td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-size: .85rem; vertical-align: bottom; }
.all td { font-weight: 600; }
.bar { display: block; height: 4px; border-radius: 2px; background: var(--bar); }
.heat { table-layout: fixed; }
.heat td, .heat th { border: 0; padding: 1px; text-align: center; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; }
td:not(:first-child) { white-space: nowrap; }
.heat th:first-child { width: 2.8rem; overflow-wrap: normal;
  color: var(--soft); font-size: .8rem; text-align: right;
  padding-right: .4rem; }
.heat td i { display: block; height: 1.15rem; border-radius: 3px; }
.scale { display: flex; align-items: center; gap: .5rem; color: var(--soft); font-size: .85rem; }
.scale i { flex: 1; height: .7rem; border-radius: 3px; background: linear-gradient(
  to right in oklch, oklch(.93 .04 90), oklch(.42 .16 20)); }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{{ report.config.bits }} bit in groups of {{ report.config.group_size }}, written to
{% for path in report.written %}{{ path.name }}{{ ", " if not loop.last }}{% endfor %}.</p>
<div class="facts">
<div><b>{{ parts[-1][3] | size }}</b><span>tensors in the file</span></div>
<div><b>{{ "%.2f" | format(parts[-1][2]) }}</b><span>bits a weight, over all</span></div>
<div><b>{{ "%.0f" | format(report.seconds) }} s</b><span>to quantize</span></div>
<div><b>{{ report.peak_memory | size }}</b><span>peak memory</span></div>
{% for set, value in perplexities.items() %}
<div><b>{{ "%.3f" | format(value) }}</b><span>perplexity, {{ set }}</span></div>
{% endfor %}
</div>
<div class="columns">
<section>
<h2>Loss of each layer</h2>
<p>Error of the output as a share of the output, on the calibration text.</p>
<table class="heat">
<thead><tr><th>block</th>{% for column in columns %}<th scope="col"><span>{{ column }}</span></th>
{% endfor %}</tr></thead>
<tbody>
{% for block, row in heat %}
<tr><th scope="row">{{ block }}</th>
{% for layer, shade in row %}
<td>{% if layer %}<i style="background:oklch({{ "%.3f" | format(0.93 - 0.51 * shade) }} \
{{ "%.3f" | format(0.04 + 0.12 * shade) }} {{ "%.0f" | format(90 - 70 * shade) }})" \
title="block {{ block }} {{ layer.name }}: {{ "%.2e" | format(layer.loss) }}, \
rounded {{ "%.2e" | format(layer.rtn_loss) }}"></i>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
<div class="scale">{{ "%.1e" | format(least) }}<i></i>{{ "%.1e" | format(most) }}</div>
</section>
<div>
<section>
<h2>Where the bytes are</h2>
<table>
<thead><tr><th>part</th><th>weights</th><th>bits each</th><th>bytes</th></tr></thead>
<tbody>
{% for part, weights, bits, bytes in parts %}
<tr{{ ' class="all"' | safe if loop.last }}><td>{{ part }}{% if not loop.last %}<span class="bar" \
style="width:{{ "%.1f" | format(100 * bytes / parts[-1][3]) }}%"></span>{% endif %}</td>
<td>{{ "{:,}".format(weights) }}</td><td>{{ "%.2f" | format(bits) }}</td><td>{{ bytes | size }}</td>
</tr>
{% endfor %}
</tbody>
</table>
</section>
<section>
<h2>Where the time went</h2>
<table>
<thead><tr><th>stage</th><th>seconds</th><th>share</th></tr></thead>
<tbody>
{% for stage, seconds, share in stages %}
<tr><td>{{ stage }}<span class="bar" style="width:{{ "%.1f" | format(100 * share) }}%"></span></td>
<td>{{ "%.1f" | format(seconds) }}</td><td>{{ "%.0f" | format(100 * share) }} %</td></tr>
{% endfor %}
</tbody>
</table>
</section>
<section>
<h2>Settings</h2>
<table>
<tbody>
{% for setting, value in settings.items() %}
<tr><td>{{ setting }}</td><td>{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>
</section>
</div>
</div>
</body>
</html>
"""
