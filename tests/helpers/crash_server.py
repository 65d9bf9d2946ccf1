"""A process that imports everything once and then runs command lines in forks of itself.

Reads a line of JSON a run from standard input and answers with one: the exit code, or minus the
signal's number, and what was printed. The first is run in this process itself, so that the rest
find all that is imported on the way.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import gptq.cli.console
import gptq.quantization
from gptq.cli import run
from gptq.models import LLAMA

torch.set_num_threads(1)
LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None


def child(task: dict, log: str) -> int:
    number = task.get("signal_at")
    # A parent that runs in the background lets its children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        if LIBRARY is not None:
            LIBRARY.io_faults_arm(task["folder"].encode(), task.get("n", 0), task.get("how", 0))
        if number is not None:
            wrap(number, task["signal"])
        code = run.main(LLAMA, task["argv"])
        changes = 0 if LIBRARY is None else LIBRARY.io_faults_arm(b"", 0, 0)
        print(f"changes {changes}", file=file)
    return code


def wrap(block: int, number: int) -> None:
    """Send this process a signal when the first layer of a block is solved."""
    whole = gptq.quantization.quantize_blocks

    def blocks(*args, **others):
        for layer in whole(*args, **others):
            if layer.block == block:
                os.kill(os.getpid(), number)
            yield layer

    gptq.quantization.quantize_blocks = blocks


def serve() -> None:
    with tempfile.TemporaryDirectory() as room:
        log = os.path.join(room, "log")
        for line in sys.stdin:
            task = json.loads(line)
            if task.get("first"):
                code = child(task, log)
                print(json.dumps([code, Path(log).read_text()]), flush=True)
                continue
            pid = os.fork()
            if pid == 0:
                try:
                    os._exit(child(task, log))
                except BaseException:
                    with open(log, "a") as file:
                        traceback.print_exc(file=file)
                    os._exit(1)  # what is to be cleaned up is the parent's
            if "seconds" in task:
                time.sleep(task["seconds"])
                os.kill(pid, task["signal"])
            _, status = os.waitpid(pid, 0)
            said = Path(log).read_text() if os.path.exists(log) else ""
            print(json.dumps([os.waitstatus_to_exitcode(status), said]), flush=True)


if __name__ == "__main__":
    assert threading.active_count() == 1
    serve()
