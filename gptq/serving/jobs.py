"""From a checked request to the answers that are to be written, within the server's limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptq.data.chat import chat_prompt
from gptq.errors import UserError
from gptq.inference.answers import Job, Served
from gptq.serving.requests import MOST_ANSWERS, ChatRequest, CompletionRequest, Refusal


@dataclass(frozen=True)
class Limits:
    """What clients may ask for."""

    tokens: int
    """Of a prompt and its answer together."""
    new_tokens: int
    """Of an answer."""
    requests: int
    """At a time, waiting or being answered."""

    @property
    def body(self) -> int:
        """Bytes of a request: a token is a few characters, and JSON may need 6 bytes for one."""
        return max(2**16, 32 * self.tokens)


def prompts(served: Served, request: ChatRequest | CompletionRequest) -> list[list[int]]:
    """The token ids of each prompt. Raises Refusal for what has none."""
    if isinstance(request, ChatRequest):
        found = [_chat_tokens(served, request)]
    else:
        found = [_text_tokens(served, prompt) for prompt in request.prompt]
    if not found or not all(found):
        raise Refusal("the prompt is empty", param="prompt")
    if len(found) * (request.n or 1) > MOST_ANSWERS:
        raise Refusal(f"more than {MOST_ANSWERS} answers to one request", param="n")
    return found


def jobs(
    served: Served,
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
) -> list[Job]:
    """The answers, `n` to each prompt in turn. Raises Refusal for those beyond the limits."""
    temperature, top_p = request.temperature, request.top_p
    if temperature is None:
        temperature = _default_temperature(served)
    if top_p is None:
        top_p = served.defaults.top_p or 1.0
    return [
        Job(
            prompt=prompt,
            max_new_tokens=_new_tokens(len(prompt), request.most_tokens, limits),
            temperature=temperature,
            top_p=top_p,
            # Of the same seed, all answers to a prompt would be the same.
            seed=None if request.seed is None else (request.seed + number) % 2**63,
            stop=request.stop or (),
        )
        for prompt in prompts
        for number in range(request.n or 1)
    ]


def _chat_tokens(served: Served, request: ChatRequest) -> list[int]:
    try:
        text = chat_prompt(served.tokenizer, [message.turn for message in request.messages])
    except UserError as error:
        raise Refusal(str(error), param="messages") from error
    # A chat template writes its own beginning of text.
    return _tokens(served, text, add_special_tokens=served.tokenizer.chat_template is None)


def _text_tokens(served: Served, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return _tokens(served, prompt)
    size = served.model.config.get_text_config().vocab_size
    if any(token >= size for token in prompt):
        raise Refusal(f"token ids must be less than {size}", param="prompt")
    return prompt


def _tokens(served: Served, text: str, **options: bool) -> list[int]:
    return list(served.tokenizer(text, **options)["input_ids"])


def _default_temperature(served: Served) -> float:
    """Of generation_config.json, or else OpenAI's 1."""
    if served.defaults.do_sample is False:
        return 0.0
    declared = served.defaults.temperature
    return 1.0 if declared is None else declared


def _new_tokens(prompt: int, wanted: int | None, limits: Limits) -> int:
    """The most tokens of an answer to a prompt of that many."""
    if wanted is not None and wanted > limits.new_tokens:
        raise Refusal(
            f"max_tokens {wanted}: an answer has at most {limits.new_tokens}", param="max_tokens"
        )
    room = limits.tokens - prompt
    if room < (wanted or 1):
        raise Refusal(
            f"the prompt has {prompt} tokens and max_tokens is {wanted or 1}; both together may be "
            f"at most {limits.tokens}",
            code="context_length_exceeded",
        )
    return min(room, limits.new_tokens) if wanted is None else wanted
