"""Settings and stages that benchmarks/quantize.py and gpu.py time."""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from benchmarks.limits import PLAIN
from gptq.config import QUALITIES

SETTINGS: dict[str, dict[str, Any]] = {"plain": PLAIN, "fast": QUALITIES["fast"], "default": {}}

# What is timed, by where it is called from; a call inside another one counts for itself only.
STAGES = {
    "gptq.blockwise.steps.step": "forward",
    "gptq.blockwise.steps._outputs": "forward",
    "gptq.pipeline.blocks.accumulate_hessian": "moments",
    "gptq.solver.layer.choose_damping": "damping",
    "gptq.solver.layer.compensate": "feedback",
    "gptq.solver.sweep.inverse_factor": "factorization",
    "quant_cuda.cpu.solver.sweep": "sweep",
    "gptq.solver.sweep.torch_sweep": "sweep",
    "quant_cuda.cuda.solver.sweep": "sweep",
    "gptq.solver.layer.refine": "refinement",
    "gptq.solver.layer.keep_better_rows": "losses",
    "gptq.pipeline.blocks.solve_layer": "rest of the solve",
    "gptq.blockwise.model.BlockwiseModel.load": "read weights",
    "gptq.pipeline.blocks._check_weights": "read weights",
    "gptq.pipeline.blocks._replace_weight": "pack",
    "gptq.pipeline.journal.Journal.write": "journal",
    "gptq.quantization._windows": "tokenize",
    "gptq.quantization._write": "write",
}


class Stopwatch:
    """Time spent in functions, less that in others of them which they call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._inner = [0.0]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            started = self._clock()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = self._clock() - started
                own = spent - self._inner.pop()
                self.seconds[stage] = self.seconds.get(stage, 0.0) + own
                self._inner[-1] += spent

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the calls of everything in STAGES."""
        with ExitStack() as stack:
            for place, stage in STAGES.items():
                owner, name = _owner(place)
                function = self.timed(stage, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, function))
            yield


def _owner(place: str) -> tuple[Any, str]:
    """The module or class of a dotted name, and the last part of it."""
    path, _, name = place.rpartition(".")
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        outer, inner = _owner(path)
        return getattr(outer, inner), name
