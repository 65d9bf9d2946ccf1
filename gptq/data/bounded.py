"""Work on what others wrote, in a process with bounds on its time, memory and result.

A chat template is a program in a downloaded file. jinja2's sandbox keeps it from the system, but
not from loops in loops, `2 ** 10 ** 10` or `'x' * 10 ** 10`, and nothing can end those but the end
of the process that they are in.
"""

import contextlib
import json
import os
import select
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from gptq.errors import UserError

SECONDS = 20.0
"""A template needs a thousandth of one for a conversation."""
MEMORY = 1 << 29
"""Bytes beyond what this process has."""
CHARACTERS = 1 << 26
"""Of the result as JSON."""


def bounded(work: Callable[[], list[str]], what: str) -> list[str]:
    """What `work` returns, computed in a copy of this process; nothing else that it does is kept.

    what: the thing to blame, for the message. Raises UserError if `work` does, and if it takes
    more than SECONDS, MEMORY or CHARACTERS. On systems that cannot fork it runs here.
    """
    if not hasattr(os, "fork"):
        return work()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Of locks that other threads hold: the copy uses none of theirs, and would be ended.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        _run_and_exit(work, writing)
    os.close(writing)
    try:
        answer = _read(reading, what)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    if "texts" in answer:
        return answer["texts"]
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    raise RuntimeError(answer.get("trace", f"{what}: the process that ran it has ended"))


def _run_and_exit(work: Callable[[], list[str]], writing: int) -> None:
    """Of the copy: it must end here, whatever happens."""
    try:
        _bound_memory()
        try:
            answer: dict[str, Any] = {"texts": work()}
        except UserError as error:
            answer = {"mistake": str(error)}
        except Exception:
            answer = {"trace": traceback.format_exc()}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
    finally:
        os._exit(0)


def _bound_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(
            resource.RLIMIT_AS,
            (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most),
        )


def _read(reading: int, what: str) -> dict[str, Any]:
    """The answer in a pipe. Raises UserError if it is late or long."""
    end = monotonic() + SECONDS
    data = bytearray()
    arrived = select.poll()
    arrived.register(reading, select.POLLIN)
    while True:
        left = end - monotonic()
        if left <= 0 or not arrived.poll(left * 1000):
            raise UserError(f"{what} runs for more than {SECONDS:g} seconds; correct it")
        part = os.read(reading, 1 << 20)
        if not part:
            return json.loads(data) if data else {}
        data += part
        if len(data) > CHARACTERS:
            raise UserError(f"{what} makes more than {CHARACTERS >> 20} MiB of text; correct it")
