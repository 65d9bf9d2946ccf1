"""Questions to an OpenAI-compatible endpoint. Nothing else here speaks to one."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from gptq.cli.printing import without_surrogates
from gptq.errors import UserError, first_line

OPENAI = "https://api.openai.com/v1"
APIS = ("completion", "chat")
TIME_LIMIT = 120.0
RETRIES = 5
# Status codes under 500 that pass: a time-out, a conflict, too many requests.
_PASSING = (408, 409, 429)
_ADVICE = {
    401: "set OPENAI_API_KEY to a key that it takes",
    403: "set OPENAI_API_KEY to a key that may use the model",
    404: "give the address up to /v1, and a model that is there",
}


class Unanswered(Exception):
    """A question that got no usable answer, but might get one later. The text says why."""


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str
    tokens: int
    """Of question and answer, as the endpoint counts them; 0 if it does not."""

    @property
    def cut(self) -> bool:
        """Whether the text ends before its end, after max_tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Endpoint:
    """Where to ask whom, and how patiently."""

    base_url: str
    model: str
    api: str = "chat"
    """One of APIS: the path that is asked, chat/completions or completions."""
    time_limit: float = TIME_LIMIT
    """Seconds for an attempt. All attempts and the delays between them together may take this
    times their number."""
    retries: int = RETRIES
    """Further attempts after a lost connection, a time-out, 429 or a status from 500 on; their
    delays grow, or are those of Retry-After."""

    def __post_init__(self) -> None:
        """Raises UserError for an address or api that cannot be asked."""
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UserError(
                f"{self.base_url}: is no address of an endpoint; give one as http://host:port/v1"
            )
        if self.api not in APIS:
            raise UserError(f"api {self.api}: is unknown; give one of {', '.join(APIS)}")


class Connection:
    """An endpoint that is being asked, any number of questions at a time."""

    def __init__(self, endpoint: Endpoint, client: openai.AsyncOpenAI) -> None:
        self._endpoint = endpoint
        self._client = client

    async def ask(self, messages: Sequence[Mapping[str, str]], **sampling: Any) -> Reply:
        """The answer to a conversation; the completion api is sent its contents as one text.

        sampling: max_tokens, temperature, top_p, stop, seed.
        Raises Unanswered if there is none now, UserError if there will never be one.
        """
        where = self._endpoint
        options: Any = {name: value for name, value in sampling.items() if value is not None}
        create: Any
        if where.api == "chat":
            create, options["messages"] = self._client.chat.completions.create, list(messages)
        else:
            create = self._client.completions.create
            options["prompt"] = "\n\n".join(message["content"] for message in messages)
        limit = where.time_limit * (where.retries + 1)
        try:
            answer = await asyncio.wait_for(create(model=where.model, **options), limit)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise Unanswered("request timed out") from error
        except openai.APIStatusError as error:
            raise self._refusal(error) from error
        except openai.APIError as error:
            raise Unanswered(first_line(error)) from error
        # What claims to be JSON, such as the page of a proxy.
        except ValueError as error:
            raise Unanswered("an answer that is not JSON") from error
        return _read(answer)

    def _refusal(self, error: openai.APIStatusError) -> UserError | Unanswered:
        code, reason = error.status_code, first_line(error)
        # A filter refuses this question, not all of them.
        if code >= 500 or code in _PASSING or error.code == "content_filter":
            return Unanswered(f"{code}: {reason}")
        where = self._endpoint
        advice = _ADVICE.get(code, "change what it does not take")
        return UserError(f"{where.base_url}: refuses to ask {where.model} ({reason}); {advice}")


@contextlib.asynccontextmanager
async def connect(endpoint: Endpoint) -> AsyncIterator[Connection]:
    """Ask an endpoint, with the key in OPENAI_API_KEY.

    Raises UserError if nothing is there, or if there is no key for OpenAI itself; others may need
    none.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and endpoint.base_url.startswith(OPENAI):
        raise UserError(
            f"{endpoint.base_url}: needs a key; set OPENAI_API_KEY, or give another endpoint"
        )
    async with openai.AsyncOpenAI(
        base_url=endpoint.base_url,
        api_key=key or "none",
        timeout=endpoint.time_limit,
        max_retries=endpoint.retries,
    ) as client:
        try:
            await client.with_options(max_retries=0).models.list()
        except openai.APITimeoutError:
            pass
        except openai.APIConnectionError as error:
            raise UserError(
                f"{endpoint.base_url}: cannot be reached ({first_line(error.__cause__ or error)}); "
                "start the endpoint, or give another address"
            ) from error
        # Whatever it has to say to this, it is there.
        except (openai.OpenAIError, ValueError):
            pass
        yield Connection(endpoint, client)


def _read(answer: Any) -> Reply:
    """The first choice of an answer, whose types nobody has checked."""
    choices = getattr(answer, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    if choice is None:
        raise Unanswered("an answer without choices")
    text = getattr(getattr(choice, "message", choice), "content", getattr(choice, "text", None))
    reason = getattr(choice, "finish_reason", None)
    if not isinstance(text, str):
        raise Unanswered(f"an answer without text (finish_reason {reason})")
    tokens = getattr(getattr(answer, "usage", None), "total_tokens", None)
    return Reply(without_surrogates(text), str(reason), tokens if isinstance(tokens, int) else 0)
