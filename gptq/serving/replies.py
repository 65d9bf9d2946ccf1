"""OpenAI's response objects, made of the pieces of answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import time
from typing import Any
from uuid import uuid4

from gptq.inference.answers import Piece

Json = dict[str, Any]


@dataclass(frozen=True)
class ReplyFormat:
    """How the response to one request is written."""

    chat: bool
    """Chat completions, else completions."""
    stream: bool
    model: str

    def head(self) -> Json:
        """What the response, and each event of the stream, begins with."""
        kind, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        return {
            "id": f"{prefix}-{uuid4().hex}",
            "object": f"{kind}.chunk" if self.chat and self.stream else kind,
            "created": int(time()),
            "model": self.model,
        }

    def choice(self, index: int, pieces: Sequence[Piece], first: bool = True) -> Json:
        """An answer, or the part of it that these pieces are. first: it is the first part."""
        text = "".join(piece.text for piece in pieces)
        content: Json = {"text": text}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            content = {"delta" if self.stream else "message": {**role, "content": text}}
        reason = {"logprobs": None, "finish_reason": pieces[-1].finish}
        return {"index": index, **content, **reason}


def usage(prompt: int, answers: int) -> Json:
    """Numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}
