"""An answer's text while its tokens come, against the text of all tokens at once."""

import pytest
import torch
from helpers.texts import byte_tokenizer
from transformers import LlamaTokenizer

from gptq.inference.answer_text import AnswerText


def written(tokenizer, prompt, tokens, stop=()):
    """The pieces of an answer, up to a stop string."""
    text = AnswerText(tokenizer, prompt, stop)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return [*pieces, text.end()], text.stopped


@pytest.fixture
def words():
    """A tokenizer with SentencePiece's spaces and byte tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "▁the", "▁cat", "s", "▁s"]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


TEXTS = ["plain words", "你好，世界", "a 😀 b", "é\n\nè"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters(text):
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    pieces, stopped = written(tokenizer, tokens[:3], tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert not stopped
    # A character comes with its last byte, not later.
    assert [len(piece) for piece in pieces if piece] == [1] * len(text)


def test_bytes_that_are_no_character_come_in_the_end():
    tokenizer = byte_tokenizer()
    tokens = tokenizer("ab😀")["input_ids"][:-1]
    pieces, _ = written(tokenizer, [], tokens)
    assert pieces[:2] == ["a", "b"]
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_the_space_before_a_word_stays(words):
    numbers = words.convert_tokens_to_ids(["▁the", "▁cat", "s", "▁cat", "▁s"])
    pieces, _ = written(words, numbers[:1], numbers[1:])
    assert pieces == [" cat", "s", " cat", " s", ""]


def test_random_tokens_give_the_text_of_all_of_them():
    tokenizer = byte_tokenizer()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(2, len(tokenizer), (40,), generator=generator).tolist()
        pieces, _ = written(tokenizer, [], tokens)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("one two three", ["two"]),
        ("one two three", ["three", "e t"]),
        ("aaab", ["aab"]),
        ("ab ab abc", ["abc", "abd"]),
        ("你好，世界", ["，世"]),
        ("one two", ["x", "owl", "two!"]),
        ("one", ["one"]),
        ("one\n\ntwo", ["\n\n"]),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text, stop):
    tokenizer = byte_tokenizer()
    pieces, stopped = written(tokenizer, [], tokenizer(text)["input_ids"], stop)
    found = [text.find(part) for part in stop if part in text]
    assert "".join(pieces) == (text[: min(found)] if found else text)
    assert stopped == bool(found)


def test_only_what_may_become_a_stop_string_is_held_back():
    tokenizer = byte_tokenizer()
    pieces, _ = written(tokenizer, [], tokenizer("a#b##c")["input_ids"], ["##!"])
    assert pieces == ["a", "", "#b", "", "", "##c", ""]
