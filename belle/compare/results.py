"""Scores by kind of task, their means and intervals, and the table of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

MEASURES = ("log-likelihood", "exact match", "ROUGE-L", "chrF", "judge")
OVERALL = "Overall"
RESAMPLES = 2000


@dataclass
class Scored:
    """One question as one model met it."""

    model: str
    kind: str
    written: str
    values: dict[str, float] = field(default_factory=dict)
    """By measure. Those against a reference are missing if there is none, the judge's if it gave
    no usable reply."""


@dataclass(frozen=True)
class Mean:
    value: float
    low: float
    high: float
    """Ends of the 95% interval."""
    count: int
    """Questions."""


# By measure, model and kind of task, or OVERALL.
Means = dict[str, dict[str, dict[str, Mean]]]


def means(scored: Iterable[Scored], seed: int = 0) -> Means:
    """Means over questions, and as OVERALL the mean over kinds, as BELLE counts it.

    Intervals are bootstrapped (Efron, percentile): the questions of each kind are drawn anew
    RESAMPLES times. Models have met the same questions, so that two intervals may overlap although
    the difference of the models is certain.
    """
    collected: dict[str, dict[str, dict[str, list[float]]]] = {}
    for one in scored:
        for measure, value in one.values.items():
            by_model = collected.setdefault(measure, {}).setdefault(one.model, {})
            by_model.setdefault(one.kind, []).append(value)
    return {
        measure: {model: _by_kind(kinds, seed) for model, kinds in by_model.items()}
        for measure, by_model in collected.items()
    }


def _by_kind(kinds: Mapping[str, list[float]], seed: int) -> dict[str, Mean]:
    generator = np.random.default_rng(seed)
    resampled, result = [], {}
    for kind, scores in kinds.items():
        values = np.array(scores)
        drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
        resampled.append(values[drawn].mean(1))
        result[kind] = _mean(float(values.mean()), resampled[-1], len(values))
    overall = float(np.mean([mean.value for mean in result.values()]))
    count = sum(mean.count for mean in result.values())
    result[OVERALL] = _mean(overall, np.mean(resampled, axis=0), count)
    return result


def _mean(value: float, resampled: np.ndarray, count: int) -> Mean:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Mean(value, float(low), float(high), count)


def markdown(averages: Means) -> str:
    """A table for each measure: a row for each kind of task, a column for each model."""
    parts = []
    for measure in (name for name in MEASURES if name in averages):
        models = averages[measure]
        kinds = list(dict.fromkeys(kind for by_kind in models.values() for kind in by_kind))
        kinds.append(kinds.pop(kinds.index(OVERALL)))
        lines = [(measure, "questions", *models), ("---",) * (2 + len(models))]
        for kind in kinds:
            row = [by_kind.get(kind) for by_kind in models.values()]
            count = max(mean.count for mean in row if mean is not None)
            lines.append((kind, str(count), *map(_cell, row)))
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _cell(mean: Mean | None) -> str:
    return "" if mean is None else f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})"
