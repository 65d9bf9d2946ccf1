"""Work in a process of its own, of which a part may crash it or hang: what did is named and left
out, and the process is started again for the rest. Where relatives of a thing did so too often it
is left out untried (`given_up`).

The worker appends `Events` to a file before and after everything it tries. `supervise`, in the
process that started it, reads them: the last thing that was begun is what the worker ended in.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Event = dict[str, Any]
WORKER = "the worker"
"""Named as failed if a worker ends badly between the things it tries."""
POLL_SECONDS = 0.05
# Crashes and hangs after which what shares their code is left out: it would fail as they did, and
# each costs the start of a process or a step's limit. Of a tile, and of a kernel.
MOST_OF_TILE = 2
MOST_OF_KERNEL = 4


class Limits(NamedTuple):
    """Seconds that a worker may take."""

    start: float
    """From its start to its first event."""
    step: float
    """From one event to the next."""


class Events:
    """What was tried so far, by this worker and by those before it.

    A name is what fails: it is not tried again, wherever else it occurs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        events, _ = read(path)
        self.failed: dict[str, str] = {e["failed"]: e["reason"] for e in events if "failed" in e}
        self.crashed: list[str] = [e["failed"] for e in events if e.get("crashed")]
        self.finished: set[str] = {e["finished"] for e in events if "finished" in e}

    def begin(self, name: str, where: str, quietly: bool = False) -> None:
        """name will be tried now; where: what else tells one trial of it from another.

        quietly: nothing is printed.
        """
        if not quietly:
            print(f"{where}: {name}", flush=True)
        self._append({"begun": name, "where": where})

    def fail(self, name: str, reason: str, crashed: bool = False) -> None:
        """crashed: it ended its process, or made it of no use, or hung."""
        self.failed[name] = reason
        if crashed:
            self.crashed.append(name)
        self._append({"failed": name, "reason": reason, "crashed": crashed})
        print(f"FAILED: {name}: {reason}", flush=True)

    def leaves_out(self, name: str) -> bool:
        """Whether name is not tried: it failed, or its relatives did, of which it is then named."""
        if name not in self.failed and (reason := given_up(name, self.crashed)):
            self.fail(name, reason)
        return name in self.failed

    def finish(self, item: str, **result: Any) -> None:
        """item is done and need not be done again after a restart."""
        self.finished.add(item)
        self._append({"finished": item, **result})

    def end(self) -> None:
        """All is done: a bad exit code from here on is nothing's fault that was tried."""
        self._append({"ended": True})

    def _append(self, event: Event) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def given_up(name: str, crashed: Sequence[str]) -> str | None:
    """Why a variant, as bulk-64x256-stages4-splits2, is left out after these crashed or hung.

    None if it is not, and for all that is no variant.
    """
    tile, _, splits = name.rpartition("-splits")
    if not splits.isdecimal():
        return None
    kernel = tile.split("-")[0]
    of_tile = [it for it in crashed if it.rpartition("-splits")[0] == tile]
    of_kernel = [it for it in crashed if it.split("-")[0] == kernel]
    for family, found, most in (
        (tile, of_tile, MOST_OF_TILE),
        (kernel, of_kernel, MOST_OF_KERNEL),
    ):
        if len(found) >= most:
            return f"left out, as {len(found)} of {family} crashed or hung"
    return None


def read(path: Path, start: int = 0) -> tuple[list[Event], int]:
    """The events from the byte `start` on, and the byte after them; one that is not written to its
    end yet is left out."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return [json.loads(line) for line in whole], start + sum(map(len, whole))


def supervise(
    command: Sequence[str],
    path: Path,
    limits: Limits,
    watch: Callable[[Event], None] = lambda _: None,
) -> dict[str, str]:
    """Run a worker to its end, again after each thing that crashes it or takes too long.

    command: it appends Events to path, and leaves out what failed or is finished there.
    watch: called with each event.
    Returns what failed and why; WORKER if it ended badly in nothing that it had named.
    """
    with _ended_by_sigterm():
        while True:
            before = len(Events(path).failed)
            reason, last = _run(command, path, limits, watch)
            if reason is None:
                return Events(path).failed
            if "begun" in last:
                Events(path).fail(last["begun"], f"{last['where']}: {reason}", crashed=True)
                continue
            # It named the culprit itself, and ended because the device was of no use any more.
            if "failed" in last and len(Events(path).failed) > before:
                continue
            where = "after its end" if "ended" in last else "between two steps"
            return Events(path).failed | {WORKER: f"{reason}, {where}"}


def _run(
    command: Sequence[str], path: Path, limits: Limits, watch: Callable[[Event], None]
) -> tuple[str | None, Event]:
    """One worker: why it ended badly, None if it did not, and its last event."""
    _, position = read(path)
    last: Event = {}
    limit, since = limits.start, time.monotonic()
    # A session of its own: a program between us and the worker, as compute-sanitizer, has to end
    # with it.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            while True:
                code = process.poll()
                events, position = read(path, position)
                for event in events:
                    last = event
                    watch(event)
                if code is not None:
                    # What ends a process in good order, as a library may, is no end of the work.
                    done = code == 0 and "ended" in last
                    return (None if done else _ending(code)), last
                if events:
                    limit, since = limits.step, time.monotonic()
                elif time.monotonic() - since > limit:
                    return f"nothing for {limit:g} s", last
                time.sleep(POLL_SECONDS)
        except SystemExit:
            print(f"stopped; the last event was {json.dumps(last)}", flush=True)
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that the worker is ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
