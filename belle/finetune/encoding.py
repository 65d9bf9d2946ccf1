"""Conversations as tokens with labels: only answers, and the end of each, count for the loss.

A conversation is cut into pieces of text, each of which is tokenized by itself, so that no token
is part prompt and part answer. A model that answers is in the same position: its prompt is
tokenized alone, up to "Assistant:", and the answer's first token begins with the space.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from belle.records import Conversation
from gptq.data.chat import TEMPLATE, belle_prompt, belle_text
from gptq.errors import UserError, first_line

IGNORED = -100
"""The label of positions that the loss leaves out."""
PROMPTS = ("auto", "belle", "template")
TOO_LONG = ("cut", "drop")
# What a tokenizer may do to the beginning of a text (SentencePiece puts a space in front) must not
# happen within a conversation. No tokenizer joins a letter with the white space that follows it.
_ANCHOR = "a"
_MARKS = "generation %}"

Write = Callable[[Conversation, bool], str]
"""Some turns as text; if the flag is set, up to where the assistant continues."""


class Example(NamedTuple):
    """Token ids and, for each, its label: the token that the position before is to predict."""

    tokens: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoded:
    """The examples of a file."""

    examples: list[Example]
    """In the order of the file, without the dropped ones."""
    cut: int
    """Examples that were cut because they were too long."""
    dropped: int
    """Records without an answer in the tokens that are allowed."""

    @property
    def answer_tokens(self) -> int:
        return sum(len(it.labels) - it.labels.count(IGNORED) for it in self.examples)


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    prompt: str = "auto",
    too_long: str = "cut",
) -> Encoded:
    """The examples of conversations.

    length: tokens of an example at most. too_long: a longer one is cut, and its last answer then
        has no end; or it is dropped. It is dropped in any case if no token of an answer is left.
    prompt: as for `encode`.
    Raises UserError if the tokenizer has no end token, or if no answer is left at all.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, which ends answers; add it to its files")
    examples, cut = [], 0
    for conversation in conversations:
        example = encode(conversation, tokenizer, prompt)
        too_many = len(example.tokens) > length
        if too_many and too_long == "drop":
            continue
        example = Example(example.tokens[:length], example.labels[:length])
        # No position predicts the first token.
        if any(label != IGNORED for label in example.labels[1:]):
            examples.append(example)
            cut += too_many
    if not examples:
        raise UserError(
            f"none of the {len(conversations)} records has an answer within {length} tokens, so "
            "that nothing would be learned; give a larger --length"
        )
    return Encoded(examples, cut, len(conversations) - len(examples))


def uses_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether the tokenizer's chat template writes conversations, or BELLE's form.

    prompt: one of PROMPTS; "auto" takes a template that marks answers by {% generation %}.
    """
    template = tokenizer.chat_template
    if prompt == "template" and not template:
        raise UserError(f"--prompt template: {TEMPLATE} is missing; leave the flag out")
    return prompt == "template" or (prompt == "auto" and _MARKS in str(template))


def encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, prompt: str = "auto"
) -> Example:
    """A conversation as tokens and labels; the labels are its answers, each with an end token.

    prompt: as for `uses_template`.
    """
    if not uses_template(tokenizer, prompt):
        return _encode_pieces(_pieces(conversation, _belle), tokenizer, split_special_tokens=True)
    if _MARKS in str(tokenizer.chat_template):
        return _encode_marked(conversation, tokenizer)

    def write(turns: Conversation, is_prompt: bool) -> str:
        return _template(tokenizer, turns, tokenize=False, add_generation_prompt=is_prompt)

    pieces = _before_end(_pieces(conversation, write), str(tokenizer.eos_token))
    return _encode_pieces(pieces, tokenizer, add_special_tokens=False)


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch, int64 (examples, tokens), padded on the right.

    Which token pads makes no difference: padding is told by position, so that an end token that
    also pads (BELLE issue 319) stays in labels and attention.
    """
    width = max(len(it.tokens) for it in examples)

    def rows(lists: Sequence[list[int]], padding: int) -> Tensor:
        return torch.tensor([row + [padding] * (width - len(row)) for row in lists])

    return {
        "input_ids": rows([it.tokens for it in examples], 0),
        "attention_mask": rows([[1] * len(it.tokens) for it in examples], 0),
        "labels": rows([it.labels for it in examples], IGNORED),
    }


# Pieces --------------------------------------------------------------------------------------


def _belle(turns: Conversation, is_prompt: bool) -> str:
    return belle_prompt(turns) if is_prompt else belle_text(turns)


def _pieces(conversation: Conversation, write: Write) -> Iterator[tuple[str, bool]]:
    """The text between answers and the answers in turn, each with whether it is an answer."""
    done = ""
    for index, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        asked = write(conversation[:index], True)
        answered = write(conversation[: index + 1], False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise UserError(
                f"{TEMPLATE} writes earlier turns anew, so that answers cannot be told from it; "
                "add {% generation %} marks to it, or pass --prompt belle"
            )
        yield asked[len(done) :], False
        yield answered[len(asked) :], True
        done = answered


def _before_end(pieces: Iterator[tuple[str, bool]], end: str) -> Iterator[tuple[str, bool]]:
    """The same text; an answer is only what is before the end token that a template writes."""
    rest = ""
    for text, is_answer in pieces:
        if not is_answer:
            yield rest + text, False
            continue
        answer, found, after = text.partition(end)
        yield answer, True
        rest = found + after
    if rest:
        yield rest, False


def _encode_pieces(
    pieces: Iterator[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, **options: bool
) -> Example:
    """Tokens of the pieces. options: of the tokenizer.

    After an answer the end token is predicted, also if the text goes on with another question: a
    conversation is prompted without end tokens between its turns, so that it is trained so too.
    """
    tokens: list[int] = []
    labels: list[int] = []
    end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    is_after_answer = False
    for text, is_answer in pieces:
        piece = _continued(tokenizer, text, options) if tokens else _first(tokenizer, text, options)
        ignored = [end if is_after_answer else IGNORED] + [IGNORED] * (len(piece) - 1)
        tokens += piece
        labels += piece if is_answer else ignored[: len(piece)]
        is_after_answer = is_answer
    if is_after_answer:
        tokens.append(end)
        labels.append(end)
    return Example(tokens, labels)


def _first(tokenizer: PreTrainedTokenizerBase, text: str, options: dict[str, bool]) -> list[int]:
    """The beginning of an example, with a first token if the tokenizer gives one."""
    tokens = list(tokenizer(text, **options)["input_ids"])  # type: ignore[arg-type]
    # Some tokenizers end each text, which here goes on.
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def _continued(
    tokenizer: PreTrainedTokenizerBase, text: str, options: dict[str, bool]
) -> list[int]:
    """Tokens of a text that follows another one, which do not depend on that one."""
    options = {**options, "add_special_tokens": False}
    anchor, whole = (
        list(tokenizer(it, **options)["input_ids"])  # type: ignore[arg-type]
        for it in (_ANCHOR, _ANCHOR + text)
    )
    if whole[: len(anchor)] == anchor:
        return whole[len(anchor) :]
    return list(tokenizer(text, **options)["input_ids"])  # type: ignore[arg-type]


def _encode_marked(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Example:
    """By a template that marks what is to be learned."""
    encoded = _template(
        tokenizer, conversation, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens, marks = encoded["input_ids"], encoded["assistant_masks"]
    labels = [token if mark else IGNORED for token, mark in zip(tokens, marks, strict=True)]
    return Example(list(tokens), labels)


def _template(tokenizer: PreTrainedTokenizerBase, turns: Conversation, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(turns, **options)
    # A template is a program: it raises jinja2's errors and Python's.
    except Exception as error:
        raise UserError(
            f"{TEMPLATE} refuses a conversation ({first_line(error)}); pass --prompt belle"
        ) from error
