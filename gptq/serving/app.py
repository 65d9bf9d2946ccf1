"""The HTTP side: OpenAI's chat completions and completions, for the one model that is served."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gptq.cli.command import input_error
from gptq.inference.answers import Piece, Served
from gptq.serving.jobs import Limits, jobs, prompts
from gptq.serving.queue import Answers, RequestQueue
from gptq.serving.replies import Json, ReplyFormat, usage
from gptq.serving.requests import ChatRequest, CompletionRequest, ModelName, Refusal, check

_LOG = logging.getLogger("gptq.serve")
# Beyond so many times the limit, a body is not even read to its end.
_READ = 64


@dataclass(frozen=True, eq=False)
class Service:
    """The endpoints."""

    served: Served
    names: Sequence[str]
    """What clients may call the model; the first is its name in responses."""
    limits: Limits
    queue: RequestQueue

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, http: Request) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._model)

    @property
    def _model(self) -> Json:
        return {"id": self.names[0], "object": "model", "created": 0, "owned_by": "belle-gptq"}

    async def load_model(self, http: Request) -> Response:
        """`transformers chat` asks for its model once. Nothing is loaded."""
        self._check_model(check(ModelName, await _read_body(http, self.limits.body)).model)
        ready = _event({"status": "ready", "cached": True})
        return Response(ready, media_type="text/event-stream")

    async def chat(self, http: Request) -> Response:
        return await self._answer(http, ChatRequest)

    async def complete(self, http: Request) -> Response:
        return await self._answer(http, CompletionRequest)

    async def _answer(
        self, http: Request, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        request = check(kind, await _read_body(http, self.limits.body))
        self._check_model(request.model)
        # Templates and tokenizers take a while for long texts.
        tokens = await run_in_threadpool(prompts, self.served, request)
        answers = self.queue.add(jobs(self.served, request, tokens, self.limits))
        form = ReplyFormat(kind is ChatRequest, bool(request.stream), self.names[0])
        count = sum(map(len, tokens))
        if form.stream:
            return _Stream(answers, _events(answers, form, count if request.wants_usage else None))
        return await _whole(http, answers, form, count)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name.rstrip("/") not in self.names:
            raise Refusal(
                f"the model {name!r} is not served here; it is {self.names[0]!r}",
                status=404,
                param="model",
                code="model_not_found",
            )


def make_app(served: Served, names: Sequence[str], limits: Limits) -> Starlette:
    """The server as an ASGI application; `Service` documents the arguments."""
    queue = RequestQueue(served, limits.requests)
    service = Service(served, names, limits, queue)
    app = Starlette(
        routes=[
            Route("/health", service.health),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/load_model", service.load_model, methods=["POST"]),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _refused, Exception: _refused},
    )
    app.state.queue = queue
    return app


class Server(uvicorn.Server):
    """Runs an app of `make_app`; told to stop, it ends the answers that uvicorn would wait for."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        self._queue: RequestQueue = app.state.queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._queue.close()
        super().handle_exit(sig, frame)


async def _read_body(http: Request, limit: int) -> bytes:
    """Raises Refusal for more bytes than the limit, or for fewer than were announced."""
    body, size = bytearray(), 0
    try:
        # Read to its end, since many clients see no response before; but not kept.
        async for part in http.stream():
            size += len(part)
            if size <= limit:
                body += part
            elif size > _READ * limit:
                break
    except ClientDisconnect as gone:
        raise Refusal("the request ends before its body does") from gone
    if size > limit:
        raise Refusal(f"the request has more than {limit} bytes", status=413)
    return bytes(body)


# Responses -----------------------------------------------------------------------------------


async def _whole(http: Request, answers: Answers, form: ReplyFormat, prompt: int) -> Response:
    """All answers in one response. prompt: number of tokens."""

    async def leave_with_client() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        answers.leave()

    watch = asyncio.create_task(leave_with_client())
    found: dict[int, list[Piece]] = {}
    try:
        async for index, piece in answers:
            found.setdefault(index, []).append(piece)
    except Exception as error:
        raise _as_refusal(error) from error
    finally:
        watch.cancel()
        answers.leave()
    choices = [form.choice(index, pieces) for index, pieces in sorted(found.items())]
    counted = usage(prompt, answers.tokens)
    return JSONResponse({**form.head(), "choices": choices, "usage": counted})


async def _events(answers: Answers, form: ReplyFormat, prompt: int | None) -> AsyncIterator[str]:
    """The answers as server-sent events. prompt: number of tokens, if usage is wanted."""
    head = form.head()
    begun: set[int] = set()
    try:
        async for index, piece in answers:
            yield _event({**head, "choices": [form.choice(index, [piece], index not in begun)]})
            begun.add(index)
        if prompt is not None:
            yield _event({**head, "choices": [], "usage": usage(prompt, answers.tokens)})
    except Exception as error:
        yield _event(_as_refusal(error).body)
    yield "data: [DONE]\n\n"


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """Leaves its answers when it ends, however it does: a client may go at any time."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.leave()


# Errors --------------------------------------------------------------------------------------


def _as_refusal(error: Exception) -> Refusal:
    """What a client is told of an error; one that is not the client's is logged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.detail, error.status_code)
    _LOG.error("a request failed", exc_info=error)
    if (known := input_error(error)) is not None:
        return Refusal(known, status=503)
    return Refusal("the server failed; its log says why", status=500)


async def _refused(_: Request, error: Exception) -> Response:
    refusal = _as_refusal(error)
    return JSONResponse(refusal.body, refusal.status)
