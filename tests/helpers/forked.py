"""Functions run in processes of their own, which have no libraries to import again."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


class Child:
    """A fork of this process that runs `call` and ends with the number it returns.

    What it prints goes to `log`. environment: added to its own.
    """

    def __init__(self, call: Callable[[], int], log: Path, environment: dict[str, str]):
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = sys.stderr = log.open("w", buffering=1)
            # A fork has none of the threads that its parent's libraries may have started.
            torch.set_num_threads(1)
            os.environ.update(environment)
            code = call()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, or minus the signal's number; one that takes longer is killed."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running after {seconds} s: {self.said}")
            time.sleep(0.005)


def team(calls: list[Callable[[], int]], folder: Path, one_a_machine: bool = False) -> list[Child]:
    """One process for each call, which know of each other as torchrun's do.

    one_a_machine: whether each is told that it is alone on its machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(len(calls)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Child(
            call,
            folder / f"rank-{rank}.log",
            {**common, "RANK": str(rank), **_place(rank, len(calls), one_a_machine)},
        )
        for rank, call in enumerate(calls)
    ]


def _place(rank: int, size: int, one_a_machine: bool) -> dict[str, str]:
    local, count = (0, 1) if one_a_machine else (rank, size)
    return {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(count)}
