"""The tables of a finished job."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from gptq.cli.printing import printable
from gptq.pipeline.report import Report

MIB = 2**20


def layer_table(report: Report) -> Table:
    """A line for every layer, in the order they were solved; fits a terminal of 80 columns.

    Layers have a column for their widths if these are not all alike.
    """
    mixed = len(report.widths) > 1
    table = Table(
        title="layers",
        title_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    table.add_column("block", justify="right")
    table.add_column("layer", overflow="fold")
    if mixed:
        table.add_column("bits", justify="right", vertical="bottom")
        table.add_column("group", justify="right", vertical="bottom")
    for heading in ("loss", "rounding", "rows\nrounded", "damp", "seconds"):
        table.add_column(heading, justify="right", overflow="fold", vertical="bottom")
    for layer in report.layers:
        cells = (
            str(layer.block),
            layer.name,
            *((str(layer.bits), str(layer.group_size)) if mixed else ()),
            f"{layer.loss:.3e}",
            f"{layer.rtn_loss:.3e}",
            f"{layer.kept_rtn}/{layer.rows}",
            f"{layer.damp:g}",
            f"{layer.seconds:.2f}",
        )
        table.add_row(*cells)
    return table


def _counted(layers: Iterable[tuple[object, int]]) -> str:
    """What layers have, and how many have it."""
    parts = (f"{it} ({count} layer{'s' * (count != 1)})" for it, count in layers)
    return ", ".join(parts)


def totals_table(report: Report) -> Table:
    """What the run came to."""
    count = len(report.layers)
    damps = Counter(layer.damp for layer in report.layers)
    table = Table(title="totals", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("layers", str(count))
    if len(report.widths) > 1:
        table.add_row("widths", _counted(report.widths.items()))
    if report.embedding is not None:
        table.add_row("embedding and head", str(report.embedding))
    table.add_row("mean loss", f"{sum(x.loss for x in report.layers) / count:.3e} of the output")
    table.add_row("mean loss of rounding", f"{sum(x.rtn_loss for x in report.layers) / count:.3e}")
    kept, rows = sum(x.kept_rtn for x in report.layers), sum(x.rows for x in report.layers)
    table.add_row("rows that keep rounding", f"{kept} of {rows}")
    table.add_row("damp", _counted((f"{it:g}", damps[it]) for it in sorted(damps)))
    if dead := sum(layer.dead for layer in report.layers):
        table.add_row("dead inputs", f"{dead}, zero on all calibration tokens; rounded to nearest")
    table.add_row("time", f"{report.seconds:.1f} s")
    table.add_row("peak memory", f"{report.peak_memory / MIB:.0f} MiB")
    for text in report.warnings:
        table.add_row("warning", escape(printable(text)))
    for path in report.written:
        table.add_row("written", f"{escape(printable(str(path)))} ({size_of(path) / MIB:.1f} MiB)")
    return table


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)
