"""Passages whose last word is to be found, made from an encyclopedia.

In the manner of LAMBADA (Paperno et al. 2016, arXiv 1606.06031): several sentences, of which the
last word is left out. Theirs are from novels, and were chosen by people who could guess the word
from the passage but not from its last sentence. These are chosen by a rule: the word stands in an
earlier sentence of the passage, as more than four in five of LAMBADA's do.
"""

import html
import re
from dataclasses import dataclass

SENTENCES = 4
"""Of a passage."""
CHARACTERS = 1200
"""Of a passage, at most."""
_DOCUMENT = re.compile(r"<doc\b[^>]*>(.*?)</doc>", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
_LAST_WORD = re.compile(r" ([A-Za-z]{4,})\.$")


@dataclass(frozen=True)
class Passage:
    """A passage without its last word and full stop, and that word."""

    context: str
    word: str


def passages(text: str, count: int) -> list[Passage]:
    """At most `count` passages, one of a paragraph, spread evenly over the text; always the same.

    text: documents as `<doc ...>`, paragraphs of a line each, `</doc>`.
    """
    paragraphs = [line for document in _DOCUMENT.findall(text) for line in document.splitlines()]
    found = [passage for passage in map(_first_passage, paragraphs) if passage is not None]
    count = min(count, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def _first_passage(paragraph: str) -> Passage | None:
    """The first run of sentences that ends with a word of an earlier one of them."""
    sentences = _SENTENCE_END.split(html.unescape(paragraph).strip())
    for start in range(len(sentences) - SENTENCES + 1):
        *earlier, last = sentences[start : start + SENTENCES]
        word = _LAST_WORD.search(last)
        whole = " ".join([*earlier, last])
        if word is None or len(whole) > CHARACTERS or "<" in whole:
            continue
        if re.search(rf"\b{word[1]}\b", " ".join(earlier)):
            return Passage(whole.removesuffix(word[0]), word[1])
    return None
