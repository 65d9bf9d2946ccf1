"""Token windows to calibrate and to evaluate on, from a named data set or a local file.

Named sets are sampled as GPTQ-for-LLaMa samples them (`utils/datautils.py`), so that perplexities
can be compared with published ones.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

from gptq.data.local_files import FILE_KINDS, character_budget, local_path, read_text
from gptq.data.named_sets import NAMED_SETS, NamedSet, Split, joined_text, load_split
from gptq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# After so many draws in a row without a document longer than a window, none is expected.
MAX_DRAWS = 20_000
RUN = 8
"""Tokens that tell a place in a text from others."""
_FACTOR = 0x2545F4914F6CDD1D
_SURROGATES = re.compile("[\ud800-\udfff]")


def calibration_windows(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Random windows of text: int64 (nsamples, seqlen), the same for the same seed.

    dataset: a name in NAMED_SETS or the path of a file. The windows start at random tokens of one
        long text or, for c4, each in a random document longer than a window. A text file is read
        from its start, up to `character_budget` characters; from a larger file of records a random
        sample of about that size is taken, which depends on the seed too.

    Raises UserError for an unknown name, a file that cannot be read or understood, a hub that
    cannot be reached, and a text shorter than one window.
    """
    _check_at_least_one(nsamples=nsamples, seqlen=seqlen)
    named = _named_set(dataset)
    split = None if named is None else named.calibration
    if split is not None and split.separator is None:
        return _document_windows(split, dataset, tokenizer, nsamples, seqlen, Random(seed))
    budget = character_budget(nsamples * seqlen)
    tokens = _tokens(split, dataset, tokenizer, seqlen, budget, Random(seed))
    rng = Random(seed)
    return torch.stack([_random_window(tokens, seqlen, rng) for _ in range(nsamples)])


def evaluation_windows(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int | None = None,
) -> Tensor:
    """Windows to measure perplexity on: int64 (n, seqlen), at most `limit` of them.

    They follow one another without overlap, and a tail shorter than a window is dropped; only c4
    is 256 random windows of random documents, always the same ones. Named sets use the split that
    GPTQ-for-LLaMa evaluates on. A local file is used whole, in its order; with a `limit`, only
    `character_budget` characters of it are read.

    Raises UserError as `calibration_windows` does.
    """
    _check_at_least_one(seqlen=seqlen, limit=1 if limit is None else limit)
    named = _named_set(dataset)
    split = None if named is None else named.evaluation
    most = None if split is None else split.windows
    bounds = [bound for bound in (limit, most) if bound is not None]
    if split is not None and split.separator is None:
        return _document_windows(split, dataset, tokenizer, min(bounds), seqlen, Random(0))
    budget = None if limit is None else character_budget(limit * seqlen)
    tokens = _tokens(split, dataset, tokenizer, seqlen, budget)
    count = min([len(tokens) // seqlen, *bounds])
    return tokens[: count * seqlen].view(count, seqlen)


def distinct_tokens(windows: Tensor) -> int:
    """How many different tokens windows, int64 (n, seqlen), hold, each with what is before it.

    Counted as different runs of RUN tokens: text that is repeated counts once, whether the windows
    overlap, begin at the same token, or the text itself repeats.
    """
    return len(torch.unique(run_numbers(windows)))


def run_numbers(windows: Tensor) -> Tensor:
    """A number for each run of RUN tokens, int64 (n, runs), of windows (n, seqlen).

    Two runs can have the same one, but of a million hardly any do: the factors are odd, and the sum
    wraps around at 64 bits. Sorting rows of tokens would take seconds.
    """
    runs = windows.unfold(1, min(RUN, windows.shape[1]), 1)
    factors = torch.tensor([pow(_FACTOR, power, 1 << 62) for power in range(runs.shape[-1])])
    return (runs * factors).sum(-1)


def text_fingerprint(windows: Tensor) -> str:
    """16 hex digits of the SHA-256 of token windows (n, seqlen) of any integer dtype."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.detach().cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} must be at least 1, not {number}")


def _named_set(dataset: str | Path) -> NamedSet | None:
    """The named set, or None for a file. A name wins over a file of that name."""
    if isinstance(dataset, str) and dataset in NAMED_SETS:
        return NAMED_SETS[dataset]
    # os.path, since it returns False for a name that is too long; pathlib raises.
    if os.path.isdir(local_path(dataset)):
        raise UserError(f"{dataset}: is a folder; pass one {FILE_KINDS} file of it")
    if not os.path.exists(local_path(dataset)):
        raise UserError(
            f"{dataset}: neither a file nor a known data set; pass one of "
            f"{', '.join(NAMED_SETS)}, or the path of a {FILE_KINDS} file"
        )
    return None


def _tokens(
    split: Split | None,
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    budget: int | None,
    sampler: Random | None = None,
) -> Tensor:
    """The tokens of a joined split or of a file: int64 (n,), n at least seqlen."""
    if split is None:
        text = read_text(dataset, tokenizer, budget, sampler)
    else:
        text = joined_text(split, dataset)
    tokens = _tokenize(tokenizer, text)
    if len(tokens) < seqlen:
        raise UserError(
            f"{dataset}: the text is {len(tokens)} tokens, one window is {seqlen}; "
            "pass a smaller --seqlen or more text"
        )
    return tokens


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 (n,), with the tokenizer's default special tokens."""
    # JSON can hold halves of a surrogate pair, which no tokenizer takes.
    text = _SURROGATES.sub("\ufffd", text)
    # verbose=False: a text is longer than the model's context on purpose, no need to warn of it.
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)


def _random_window(tokens: Tensor, seqlen: int, rng: Random) -> Tensor:
    # GPTQ-for-LLaMa never draws the last start, and fails for a text of exactly one window. The
    # draws are the same here; the failure is not.
    start = rng.randint(0, max(len(tokens) - seqlen - 1, 0))
    return tokens[start : start + seqlen]


def _document_windows(
    split: Split,
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    rng: Random,
) -> Tensor:
    """One random window of each of `count` random documents longer than a window."""
    documents = load_split(split, name)

    def long_document() -> Tensor:
        for _ in range(MAX_DRAWS):
            text = documents[rng.randint(0, len(documents) - 1)][split.dataset.column]
            tokens = _tokenize(tokenizer, text)
            if len(tokens) > seqlen:
                return tokens
        raise UserError(
            f"{name}: none of {MAX_DRAWS} documents drawn is longer than {seqlen} tokens; "
            "pass a smaller --seqlen or another data set"
        )

    return torch.stack([_random_window(long_document(), seqlen, rng) for _ in range(count)])
