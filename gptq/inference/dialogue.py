"""A dialogue, one line after another: what was said before is remembered as far as it fits."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from gptq.blockwise.activations import check_tokens
from gptq.data.chat import Message, chat_prompt
from gptq.errors import UserError
from gptq.inference.answers import Job, Piece, Served

# What begins the next question in BELLE's form: some models go on with one themselves. A chat
# template has tokens of its own that end an answer.
NEXT_QUESTION = ("\nHuman:", "\n\nHuman:")


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen."""

    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    top_k: int | None = None
    """None: the model's own generation_config.json decides, also on the next."""
    repetition_penalty: float | None = None
    seed: int | None = None
    """The same seed gives the same dialogue; None: another one each time."""


def dialogue(
    served: Served,
    lines: Iterable[str],
    sampling: Sampling,
    max_new_tokens: int,
    show: Callable[[str], None],
    notify: Callable[[str], None],
) -> Iterator[str]:
    """Answer each line, given those before it and their answers; a line is read once the answer
    before it is taken. Conversations become text as `data.chat.chat_prompt` has it.

    show: gets an answer piece by piece. notify: gets a sentence if the oldest turns are forgotten
    because the model's context is full, or if a line alone is too long for it.
    Raises UserError for a chat template that fails, a token that the embedding does not have, and
    logits that are not numbers.
    """
    is_belle = served.tokenizer.chat_template is None
    messages: list[Message] = []
    for turn, line in enumerate(lines):
        messages.append({"role": "user", "content": line})
        prompt, forgotten = _prompt(served, messages, max_new_tokens)
        if forgotten == len(messages):
            messages.pop()
            notify(
                f"this line is {len(prompt)} tokens, and the model takes {_positions(served)} with "
                f"the answer's {max_new_tokens}; say less, or lower --max-new-tokens"
            )
            continue
        if forgotten:
            del messages[:forgotten]
            notify(
                f"the context of {_positions(served)} tokens is full: the oldest "
                f"{forgotten // 2} questions and answers are forgotten"
            )
        pieces: list[str] = []

        def send(piece: Piece, pieces: list[str] = pieces) -> None:
            pieces.append(piece.text)
            show(piece.text)

        job = Job(
            prompt,
            max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            None if sampling.seed is None else sampling.seed + turn,
            NEXT_QUESTION if is_belle else (),
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
        )
        try:
            served.answer(job, send, lambda: False)
        except FloatingPointError as error:
            raise UserError(str(error)) from error
        messages.append({"role": "assistant", "content": "".join(pieces).strip()})
        yield messages[-1]["content"]


def _prompt(served: Served, messages: list[Message], max_new_tokens: int) -> tuple[list[int], int]:
    """The tokens of the last messages that leave room for an answer, and how many before them are
    left out: all, if the last one alone leaves none."""
    positions, forgotten = _positions(served), 0
    while True:
        tokens = _encoded(served.tokenizer, messages[forgotten:])
        check_tokens(torch.tensor(tokens), served.model.get_input_embeddings())
        if positions is None or len(tokens) + max_new_tokens <= positions:
            return tokens, forgotten
        if forgotten + 1 == len(messages):
            return tokens, len(messages)
        # A question and its answer.
        forgotten += 2


def _encoded(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    tokens = tokenizer(
        chat_prompt(tokenizer, messages),
        # A chat template writes its own beginning of text.
        add_special_tokens=tokenizer.chat_template is None,
    )["input_ids"]
    if not tokens:
        raise UserError("the tokenizer's chat template makes no text of a conversation; correct it")
    return tokens


def _positions(served: Served) -> int | None:
    # BLOOM's attention has no limit, but its configuration says what it was trained for.
    return served.positions or getattr(served.model.config, "seq_length", None)
