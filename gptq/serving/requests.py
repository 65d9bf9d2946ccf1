"""What clients may ask for: OpenAI's requests, checked field by field.

A field that would change the answer but is not supported is refused, never ignored.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

# Answers to one request, over all its prompts.
MOST_ANSWERS = 16

# Fields that do not change an answer.
_IGNORED = {
    "metadata",
    "name",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that are not supported, and the values with which they ask for nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """OpenAI takes one prompt or several; a prompt may be a list itself, of token ids."""
    is_tokens = isinstance(value, list) and bool(value) and isinstance(value[0], int)
    return [value] if isinstance(value, str) or is_tokens else value


TokenIds = list[Annotated[int, Field(ge=0)]]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=16), BeforeValidator(_as_list)]
Body = TypeVar("Body", bound=BaseModel)


class Refusal(Exception):
    """A request that is not answered: HTTP status and what OpenAI's error object says."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _asks_for_nothing(name: str, value: object) -> bool:
    # Completions ask for log probabilities with a number, 0 too, which Python takes for False.
    neutral = [
        it for it in _NEUTRAL.get(name, ()) if isinstance(it, bool) == isinstance(value, bool)
    ]
    return value is None or value in neutral


class _Checked(BaseModel):
    """Refuses fields that it does not know, unless they ask for nothing."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "_Checked":
        for name, value in (self.model_extra or {}).items():
            if name not in _IGNORED and not _asks_for_nothing(name, value):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return self


class ModelName(_Checked):
    model: str


class StreamOptions(_Checked):
    include_usage: bool | None = None


class Request(_Checked):
    """What chat completions and completions have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(_Checked):
    type: Literal["text"]
    text: str


class Message(_Checked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates take it."""
        text = "".join(part.text for part in self.content)
        # OpenAI's newer name of the same role, which templates do not know.
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _read_generation_config(cls, fields: Any) -> Any:
        """Take the settings of `transformers chat`, a GenerationConfig as JSON, as fields."""
        if not isinstance(fields, dict) or fields.get("generation_config") is None:
            return fields
        fields = dict(fields)
        try:
            settings = dict(json.loads(fields.pop("generation_config")))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError("generation_config is no JSON object") from error
        settings.pop("transformers_version", None)
        if settings.pop("do_sample", None) is False:
            settings["temperature"] = 0.0
        if "max_new_tokens" in settings:
            settings["max_tokens"] = settings.pop("max_new_tokens")
        return {**settings, **fields}

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None if the client leaves it open."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    prompt: Annotated[list[str | TokenIds], BeforeValidator(_as_prompts)]

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; 16 if the client leaves it open, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens


def check(kind: type[Body], body: bytes) -> Body:
    """The request in a JSON body. Raises Refusal that names the field and what is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        message = first["msg"].removeprefix("Value error, ")
        raise Refusal(f"{field}: {message}" if field else message, param=field) from error
