"""Requests that wait for the model: one is answered at a time, in the order in which they came."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from gptq.inference.answers import Job, Piece, Served
from gptq.serving.requests import Refusal


def _stopped() -> Refusal:
    return Refusal("the server was stopped", status=503)


class Answers:
    """The answers to one request, as they are written. Belongs to the event loop that made it."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.tokens = 0
        """Of all answers; complete when the iteration has ended."""
        self.future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()
        self._left = threading.Event()

    def write(self, served: Served) -> None:
        """Write all answers, one after another; on the thread of the model."""
        try:
            for index, job in enumerate(self.jobs):
                if not self._left.is_set():
                    send = partial(self._send_piece, index)
                    self.tokens += served.answer(job, send, self._left.is_set)
            self._send(None)
        except Exception as error:
            self._send(error)

    def leave(self, reason: Refusal | None = None) -> None:
        """Compute no more of the answers: nobody waits for them, or for this reason."""
        self._left.set()
        self.jobs = ()
        if self.future is not None:
            self.future.cancel()
        self._send(reason)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces, each with the number of its answer. Raises what `Served.answer` raises."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def _send_piece(self, index: int, piece: Piece) -> None:
        self._send((index, piece))

    def _send(self, item: tuple[int, Piece] | Exception | None) -> None:
        # The loop is closed if the server ended meanwhile.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class RequestQueue:
    """The requests that are answered or wait: one thread answers them in their order."""

    def __init__(self, served: Served, most: int) -> None:
        """most: requests at a time, the one that is answered among them."""
        self._served, self._most = served, most
        self._open: set[Answers] = set()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "model")

    def add(self, jobs: Sequence[Job]) -> Answers:
        """Answer a request when its turn comes. Raises Refusal if too many wait already."""
        if self._closed:
            raise _stopped()
        if len(self._open) >= self._most:
            raise Refusal("too many requests wait already; try again later", status=503)
        answers = Answers(jobs)
        self._open.add(answers)
        answers.future = self._thread.submit(answers.write, self._served)
        # Called when it was answered, failed, or left before its turn.
        answers.future.add_done_callback(lambda _: self._open.discard(answers))
        return answers

    def close(self) -> None:
        """Answer nothing more, and end what is being answered."""
        self._closed = True
        for answers in tuple(self._open):
            answers.leave(_stopped())
        self._thread.shutdown(wait=False)
