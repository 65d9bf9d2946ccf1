"""The progress of a job: a bar on a terminal, flushed lines in a log."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from time import perf_counter

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gptq.pipeline.report import LayerReport

# Lines of an evaluation in a log.
LINES = 10


@contextlib.contextmanager
def progress_bar(title: str, unit: str = "step", first: int = 0) -> Iterator[Callable[..., None]]:
    """A bar with the time left, on standard error; where that is no terminal, LINES lines.

    Gives a function of (steps done, steps in all, a word about the last). The bar is gone at the
    end, so that an error stands alone.
    unit: what a step is, in the lines.
    first: steps that were done before.
    """
    console = Console(stderr=True)
    if console.is_interactive:
        with _bar(title, console, first) as show:
            yield show
        return
    started, last = perf_counter(), first

    def log(done: int, total: int, what: str = "") -> None:
        nonlocal last
        if done * LINES // total > last * LINES // total:
            seconds = perf_counter() - started
            left = seconds / (done - first) * (total - done)
            detail = f" ({what})" if what else ""
            _print_line(f"{title}: {unit} {done} of {total}{detail}, {_times(seconds, left)}")
        last = done

    yield log


@contextlib.contextmanager
def run_progress(
    layers: int, measures: bool
) -> Iterator[tuple[Callable[..., None] | None, Callable[[LayerReport, int], None]]]:
    """The progress of a run: `progress_bar` while layers are measured, if they are, and then
    `quantization_progress`, whose function is the second. A terminal shows one bar at a time.

    layers: in a block.
    """
    with contextlib.ExitStack() as bars:
        measured = show = None
        if measures:
            measured = bars.enter_context(progress_bar("measuring layers"))
        else:
            show = bars.enter_context(quantization_progress(layers))

        def step(layer: LayerReport, total: int) -> None:
            nonlocal show
            if show is None:
                bars.close()
                show = bars.enter_context(quantization_progress(layers))
            show(layer, total)

        yield measured, step


@contextlib.contextmanager
def quantization_progress(layers: int) -> Iterator[Callable[[LayerReport, int], None]]:
    """The same for a quantization, with a line for each block.

    layers: in a block. Gives a function of (a layer's report, layers in all).
    """
    console, title, done = Console(stderr=True), "quantizing", 0
    if console.is_interactive:
        with _bar(title, console) as show:

            def step(layer: LayerReport, total: int) -> None:
                nonlocal done
                done += 1
                show(done, total, f"block {layer.block} {layer.name}")

            yield step
        return
    started = ended = perf_counter()
    needed = 0.0
    block: list[LayerReport] = []

    def log(layer: LayerReport, total: int) -> None:
        nonlocal done, ended, needed
        block.append(layer)
        if len(block) < layers:
            return
        done, blocks, before, ended = done + 1, total // layers, ended, perf_counter()
        # A block of an earlier run is read in no time, but says what it took to solve.
        needed += max(ended - before, sum(it.seconds for it in block))
        times = _times(ended - started, needed / done * (blocks - done))
        loss = sum(it.loss for it in block) / layers
        _print_line(f"{title}: block {done} of {blocks}, mean loss {loss:.3e}, {times}")
        block.clear()

    yield log


def show_training(step: int, steps: int, loss: float) -> None:
    """Write a line about a training after the blocks. loss: of held-out windows, nats a token."""
    _print_line(f"training: step {step} of {steps}, held-out divergence {loss:.4f}")


@contextlib.contextmanager
def _bar(title: str, console: Console, first: int = 0) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, completed=first)

        def show(done: int, total: int, what: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {what}".strip())

        yield show


def _print_line(line: str) -> None:
    # Hours of work must not end because nobody reads the log any more.
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


def _times(seconds: float, left: float) -> str:
    return f"{_clock(seconds)} so far, about {_clock(left)} left"


def _clock(seconds: float) -> str:
    """As hours, minutes and seconds: 0:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
