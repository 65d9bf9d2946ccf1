"""The text of an answer while its tokens come."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens of the prompt that are decoded with the first ones of the answer: alone, a SentencePiece
# word would lose its leading space.
_BEFORE = 6
# What decoding has for the bytes of a character that is not complete.
_INCOMPLETE = "\ufffd"


class AnswerText:
    """Takes tokens one by one and gives the text that is certain.

    Characters whose bytes are in several tokens are held back until they are complete, and what may
    become a stop string until it cannot. The text ends before the first stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.stopped = False
        """Whether a stop string came; `end` then gives what is before it."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens = list(prompt[-_BEFORE:])
        # _tokens[_start:_done] are decoded already, and again with those that follow.
        self._start, self._done = 0, len(self._tokens)
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain with one more token."""
        self._tokens.append(token)
        text = self._decoded()
        return "" if text.endswith(_INCOMPLETE) else self._release(text)

    def end(self) -> str:
        """The rest of the text, when no token follows."""
        text = "" if self.stopped else self._release(self._decoded())
        return text + self._held

    def _decoded(self) -> str:
        """The text of the tokens since _done."""
        before, both = (
            self._tokenizer.decode(
                self._tokens[self._start : end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            for end in (self._done, None)
        )
        return str(both)[len(before) :]

    def _release(self, text: str) -> str:
        """Note that all tokens are decoded; what of the text is certain."""
        self._start, self._done = self._done, len(self._tokens)
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, text[: min(found)]
            return ""
        beginnings = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        held = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
