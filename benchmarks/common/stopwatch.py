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

# What is timed, by the place it is called from; time inside another of these is that one's.
STAGES = {
    "gptq.blockwise.steps.step": "forward",
    "gptq.blockwise.steps._outputs": "forward",
    "gptq.pipeline.blocks.moments": "moments",
    "gptq.pipeline.blocks.choose_damp": "damping",
    "gptq.pipeline.blocks.feed_back": "feedback",
    "gptq.solver.solve.inverse_factor": "factorization",
    "quant_cuda.cpu.library.sweep": "sweep",
    "gptq.solver.sweep.torch_sweep": "sweep",
    "quant_cuda.cuda.sweep.sweep": "sweep",
    "gptq.solver.solve._refined": "refinement",
    "gptq.solver.solve._finish": "losses",
    "gptq.pipeline.blocks.solve": "rest of the solve",
    "gptq.blockwise.model.BlockwiseModel.load": "read weights",
    "gptq.pipeline.blocks._check_weights": "read weights",
    "gptq.pipeline.blocks._put": "pack",
    "gptq.pipeline.journal.Journal.write": "journal",
    "gptq.api._windows": "tokenize",
    "gptq.api.export.assemble": "write",
    "gptq.api.export.write_pt": "write",
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
