"""Bars by kind of task, one for each model, in the form of BELLE's figure."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from belle.compare.results import MEASURES, OVERALL, Mean, Means
from gptq.files.atomic import whole_file

# Names of models and kinds may be Chinese; which fonts a machine has differs.
FONTS = [
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
    "DejaVu Sans",
]
WIDTH, HEIGHT = 13.0, 3.4  # inches, of a panel


def draw(averages: Means, path: Path, published: Mapping[str, Mapping[str, float]]) -> None:
    """A panel for each measure, with 95% intervals; `published`, by model and kind, beside the
    judge's. Writes a PNG."""
    shown = [name for name in MEASURES if name in averages]
    with pyplot.rc_context({"font.sans-serif": FONTS}), warnings.catch_warnings():
        # Without any of the fonts a Chinese name is boxes; the tables have it.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        figure, axes = pyplot.subplots(
            len(shown), 1, figsize=(WIDTH, HEIGHT * len(shown)), squeeze=False
        )
        for axis, measure in zip(axes[:, 0], shown, strict=True):
            _panel(axis, averages[measure], published if measure == "judge" else {})
            axis.set(title=measure)
        figure.tight_layout()
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, dpi=110, format="png")
        pyplot.close(figure)


def _panel(
    axis: Axes,
    models: Mapping[str, Mapping[str, Mean]],
    published: Mapping[str, Mapping[str, float]],
) -> None:
    kinds = list(dict.fromkeys(kind for by_kind in models.values() for kind in by_kind))
    kinds.append(kinds.pop(kinds.index(OVERALL)))
    count = len(models) + len(published)
    width = 0.8 / count
    columns: list[tuple[str, Mapping[str, Mean] | Mapping[str, float]]]
    columns = [*models.items(), *published.items()]
    for place, (name, by_kind) in enumerate(columns):
        at = [i + (place - (count - 1) / 2) * width for i in range(len(kinds))]
        shown = [(x, kind) for x, kind in zip(at, kinds, strict=True) if kind in by_kind]
        means = [_as_mean(by_kind[kind]) for _, kind in shown]
        axis.bar(
            [x for x, _ in shown],
            [mean.value for mean in means],
            0.92 * width,
            label=name,
            alpha=0.4 if name in published else 1.0,
            yerr=[[it.value - it.low for it in means], [it.high - it.value for it in means]],
            error_kw={"elinewidth": 0.7},
        )
    axis.set_xticks(range(len(kinds)), kinds, rotation=20, ha="right")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.28))


def _as_mean(score: Mean | float) -> Mean:
    """A published score has no interval."""
    return score if isinstance(score, Mean) else Mean(score, score, score, 0)
