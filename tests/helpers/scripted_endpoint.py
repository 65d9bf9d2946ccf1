"""An OpenAI-compatible endpoint that answers by a function, with every fault of a real one."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What goes over the wire."""

    body: bytes
    status: int = 200
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    """Bytes of the body that are announced but never sent."""
    delay: float = 0.0
    """Seconds before it."""
    drip: float = 0.0
    """Seconds before each byte of the body."""


def reply(text: str | None, finish_reason: str = "stop", **options: Any) -> Answer:
    """A completion, or chat completion: the fields of both are there."""
    choice = {
        "index": 0,
        "text": text,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
    }
    return document({"choices": [choice], "usage": {"total_tokens": 10}}, **options)


def document(fields: dict[str, Any], **options: Any) -> Answer:
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted"}
    return Answer(json.dumps({**whole, **fields}).encode(), **options)


def error(status: int, message: str = "no", headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
    return Answer(body, status, headers=headers or {})


FAULTS = {
    "429": error(429, "slow down", {"Retry-After": "0.01"}),
    "500": error(500, "broken", {"Retry-After": "0.01"}),
    "HTML": Answer(b"<html><body>Welcome</body></html>", kind="text/html"),
    "HTML that claims to be JSON": Answer(b"<html></html>"),
    "null content": reply(None, "content_filter"),
    "no choices": document({"choices": []}),
    "null choices": document({"choices": None}),
    "an error with 200": document({"error": {"message": "overloaded"}}),
    "a list": Answer(b"[]"),
    "a cut body": Answer(reply("the beginning of").body[:60], cut=100),
}
"""Answers that are of no use, but might be followed by one that is."""


def prompt_of(request: Request) -> str:
    """The text of the last message, or the prompt."""
    return request["prompt"] if "prompt" in request else request["messages"][-1]["content"]


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients that are killed, or no longer wait, are part of the tests."""


class ScriptedEndpoint:
    """Runs while its context lasts. `requests` has the bodies received, in order of arrival."""

    def __init__(self, script: Callable[[Request], Answer] | Sequence[Answer]) -> None:
        """script: answers a request; or the answers in turn, of which the last is repeated."""
        self.requests: list[Request] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._script = script
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ScriptedEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, key: str | None, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            self.paths.append(path)
            self.keys.append(key)
            number = len(self.requests) - 1
        if callable(self._script):
            return self._script(request)
        return self._script[min(number, len(self._script) - 1)]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # An answer is one packet, which nothing delays.

            def do_GET(self) -> None:
                self.send_error(404)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with endpoint._lock:
                    endpoint._now += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._now)
                try:
                    key = self.headers["Authorization"]
                    answer = endpoint._answer(self.path, key, json.loads(body))
                    time.sleep(answer.delay)
                finally:
                    with endpoint._lock:
                        endpoint._now -= 1
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.kind)
                self.send_header("Content-Length", str(len(answer.body) + answer.cut))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in answer.body if answer.drip else ():
                    time.sleep(answer.drip)
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                self.wfile.write(b"" if answer.drip else answer.body)
                self.close_connection = answer.cut > 0

            def log_message(self, *_: object) -> None:
                pass

        return Handler
