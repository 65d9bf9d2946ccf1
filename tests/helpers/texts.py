"""Texts, a tokenizer that loses nothing of them, and the text that is read of a file."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gptq.data.windows import evaluation_windows
from gptq.errors import UserError

EOS = "</s>"


def byte_tokenizer(eos: str | None = EOS, bos: bool = False, **options) -> PreTrainedTokenizerFast:
    """One token per byte, so that decoding gives the very text that was tokenised."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.add_special_tokens(["<s>"])
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **options)


def text_of(path: str | Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """All the text that is made of a file."""
    return tokenizer.decode(evaluation_windows(path, tokenizer, seqlen=1).flatten())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def random_text(length: int, seed: int = 7) -> str:
    return "".join(random.Random(seed).choices("abcdefgh \n", k=length))


def assert_one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)


def draw_joined(ids: list[int], nsamples: int, seqlen: int, seed: int) -> list[list[int]]:
    """Windows of one text at the starts that GPTQ-for-LLaMa draws."""
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return windows
