"""Token windows to calibrate and to evaluate on, from a named data set or a local file.

Named sets are sampled as GPTQ-for-LLaMa samples them, so that perplexities can be compared with
published ones. Local files are text, JSON lines, a JSON list or Parquet.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gptq.data.records import record_text
from gptq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Draws in a row without one document longer than a window, after which none is expected.
MAX_DRAWS = 20_000

# Local text is tokenised up to the larger of the two: MIN_TEXT characters, or TEXT_PER_TOKEN for
# each token asked for, about twice what English needs. More costs time and changes nothing.
MIN_TEXT = 4_000_000
TEXT_PER_TOKEN = 8

FILE_KINDS = "text, .jsonl, .json or .parquet"


@dataclass(frozen=True)
class HubText:
    """Where a data set is on the Hugging Face hub, and its column of text."""

    repo: str
    field: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None  # one file per split, in place of all of them


@dataclass(frozen=True)
class Part:
    """A split and how it becomes windows.

    Its first `records` texts (all by default) joined with `separator` are one stream of tokens;
    without a separator each window comes from a document of its own. An evaluation stops after
    `windows` windows.
    """

    hub: HubText
    split: str
    separator: str | None = None
    records: int | None = None
    windows: int | None = None


_WIKITEXT2 = HubText("Salesforce/wikitext", "text", config="wikitext-2-raw-v1")
_C4 = HubText(
    "allenai/c4",
    "text",
    files={
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    },
)
# The set itself is a script, which `datasets` runs no more; the hub keeps a Parquet copy of it.
_PTB = HubText(
    "ptb-text-only/ptb_text_only",
    "sentence",
    revision="refs/convert/parquet",
    files={
        split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")
    },
)

# Name -> what to calibrate on, what to evaluate on.
NAMED_SETS: dict[str, tuple[Part, Part]] = {
    "c4": (Part(_C4, "train"), Part(_C4, "validation", windows=256)),
    "wikitext2": (Part(_WIKITEXT2, "train", "\n\n"), Part(_WIKITEXT2, "test", "\n\n")),
    "ptb": (Part(_PTB, "train", "\n\n"), Part(_PTB, "validation", "\n\n")),
    "c4-new": (Part(_C4, "train"), Part(_C4, "validation", " ", records=1100, windows=256)),
    "ptb-new": (Part(_PTB, "train", " "), Part(_PTB, "test", " ")),
}


def calibration_windows(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Random windows of text: int64 (nsamples, seqlen), the same for the same seed.

    `dataset` is a name in NAMED_SETS or a path. The windows start at random tokens of one long
    text, or, for c4, each in a random document longer than a window (GPTQ-for-LLaMa,
    `utils/datautils.py`). A local text file is read from its start, up to MIN_TEXT characters or
    TEXT_PER_TOKEN for each token asked for; from a larger file of records a random sample of
    about that size is taken, which depends on the seed too.

    Raises UserError for an unknown name, a file that cannot be read or understood, a hub that
    cannot be reached, and a text shorter than one window.
    """
    _check_at_least_one(nsamples=nsamples, seqlen=seqlen)
    part, _ = _named_parts(dataset)
    if part is not None and part.separator is None:
        return _document_windows(part, dataset, tokenizer, nsamples, seqlen, Random(seed))
    budget = _text_budget(nsamples * seqlen)
    tokens = _stream(part, dataset, tokenizer, seqlen, budget, Random(seed))
    rng = Random(seed)
    return torch.stack([_random_window(tokens, seqlen, rng) for _ in range(nsamples)])


def evaluation_windows(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int | None = None,
) -> Tensor:
    """Windows to measure perplexity on: int64 (n, seqlen), the first `limit` of them if given.

    They follow one another without overlap and the tail shorter than a window is dropped; only
    c4 is 256 random windows of random documents, always the same ones. Named sets use the split
    that GPTQ-for-LLaMa evaluates on, a local file is used whole, in its order (with a `limit`,
    only as much of it is read as the limit needs: TEXT_PER_TOKEN characters for each token).

    Raises UserError as `calibration_windows` does.
    """
    _check_at_least_one(seqlen=seqlen, limit=1 if limit is None else limit)
    _, part = _named_parts(dataset)
    most = part.windows if part is not None else None
    bounds = [bound for bound in (limit, most) if bound is not None]
    if part is not None and part.separator is None:
        return _document_windows(part, dataset, tokenizer, min(bounds), seqlen, Random(0))
    budget = None if limit is None else _text_budget(limit * seqlen)
    tokens = _stream(part, dataset, tokenizer, seqlen, budget)
    count = min([len(tokens) // seqlen, *bounds])
    return tokens[: count * seqlen].view(count, seqlen)


def text_fingerprint(windows: Tensor) -> str:
    """16 hex digits that tell token windows of any integer dtype apart (SHA-256)."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.detach().cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} must be at least 1, not {number}")


def _stream(
    part: Part | None,
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    budget: int | None,
    sampler: Random | None = None,
) -> Tensor:
    """int64 (tokens,) of a joined part or of a file, at least one window of them."""
    if part is None:
        text = _local_text(dataset, tokenizer, budget, sampler)
    else:
        rows = _load(part, dataset)[: part.records]
        text = str(part.separator).join(rows[part.hub.field])
    tokens = _tokenize(tokenizer, text)
    if len(tokens) < seqlen:
        raise UserError(
            f"{dataset}: the text is {len(tokens)} tokens, one window is {seqlen}; "
            "pass a smaller --seqlen or more text"
        )
    return tokens


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 (tokens,), with the tokenizer's default special tokens."""
    # verbose=False: a text is longer than the model's context on purpose, no need to warn of it.
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)


def _random_window(tokens: Tensor, seqlen: int, rng: Random) -> Tensor:
    # GPTQ-for-LLaMa never draws the last start; its windows are kept, the crash of a text of
    # exactly one window is not.
    start = rng.randint(0, max(len(tokens) - seqlen - 1, 0))
    return tokens[start : start + seqlen]


# Named sets


def _named_parts(dataset: str | Path) -> tuple[Part, Part] | tuple[None, None]:
    """What a name stands for, or no parts for a file; a name wins over a file of that name."""
    if isinstance(dataset, str) and dataset in NAMED_SETS:
        return NAMED_SETS[dataset]
    # os.path, because these answer False where pathlib raises, as for a name that is too long.
    if os.path.isdir(_path(dataset)):
        raise UserError(f"{dataset}: is a folder; pass one {FILE_KINDS} file of it")
    if not os.path.exists(_path(dataset)):
        raise UserError(
            f"{dataset}: neither a file nor a known data set; pass one of "
            f"{', '.join(NAMED_SETS)}, or the path of a {FILE_KINDS} file"
        )
    return None, None


_MISSING = "reading it needs more packages: pip install 'belle-gptq[data]'"


def _load(part: Part, name: str | Path) -> Any:
    """A `datasets.Dataset` of one split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: {_MISSING}, or pass the path of a local text file") from error
    hub = part.hub
    try:
        return datasets.load_dataset(
            hub.repo,
            name=hub.config,
            data_files=hub.files and {part.split: hub.files[part.split]},
            split=part.split,
            revision=hub.revision,
        )
    # Each layer below (httpx, huggingface_hub, datasets, the file system) has its own errors for
    # a hub that is offline, refuses or has changed; the user mends them all in the same way.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{name}: cannot get {hub.repo} from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); "
            f"pass the path of a local {FILE_KINDS} file instead"
        ) from error


def _document_windows(
    part: Part,
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    rng: Random,
) -> Tensor:
    """One random window of each of `count` random documents longer than a window."""
    documents = _load(part, name)

    def long_document() -> Tensor:
        for _ in range(MAX_DRAWS):
            text = documents[rng.randint(0, len(documents) - 1)][part.hub.field]
            tokens = _tokenize(tokenizer, text)
            if len(tokens) > seqlen:
                return tokens
        raise UserError(
            f"{name}: none of {MAX_DRAWS} documents drawn is longer than {seqlen} tokens; "
            "pass a smaller --seqlen or another data set"
        )

    return torch.stack([_random_window(long_document(), seqlen, rng) for _ in range(count)])


# Local files


def _path(dataset: str | Path) -> Path:
    return Path(os.path.expanduser(dataset))


def _text_budget(tokens: int) -> int:
    """Characters of text that are enough for so many tokens."""
    return max(MIN_TEXT, TEXT_PER_TOKEN * tokens)


def _local_text(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    budget: int | None,
    sampler: Random | None = None,
) -> str:
    """About `budget` characters of a file (None: all): the first, or records from all over it."""
    path = _path(dataset)
    reader = _READERS.get(path.suffix.lower())
    try:
        if reader is None:
            with path.open(encoding="utf-8-sig") as file:
                text = file.read(budget)
        else:
            text = _records_text(path, reader, tokenizer, budget, sampler)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8; convert it to {FILE_KINDS}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise UserError(f"{path}: has no text in it; pass a file with some")
    return text


def _records_text(
    path: Path,
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    budget: int | None,
    sampler: Random | None,
) -> str:
    """The records' texts with the end-of-text token (an empty line without one) between them."""
    large = budget is not None and path.stat().st_size > budget

    def order(count: int) -> Sequence[int]:
        return sampler.sample(range(count), count) if sampler and large else range(count)

    end = tokenizer.eos_token or "\n\n"
    pieces: list[str] = []
    total = 0
    for where, record in reader(path, order):
        piece = record_text(record, f"{path}, {where}", tokenizer)
        if not piece.strip():
            continue
        # Some chat templates close the last turn with the end-of-text token themselves.
        if pieces and not pieces[-1].rstrip().endswith(end):
            pieces.append(end)
        pieces.append(piece)
        total += len(piece)
        if budget is not None and total >= budget:
            break
    return "".join(pieces)


# A reader goes to the parts of its file in the order it is given, a permutation of so many, so
# that what is not needed of a large file is not parsed. It yields each record with where it was.
Order: TypeAlias = Callable[[int], Sequence[int]]
Reader: TypeAlias = Callable[[Path, Order], Iterator[tuple[str, Any]]]


def _json_records(path: Path, order: Callable[[int], Sequence[int]]) -> Iterator[tuple[str, Any]]:
    """JSON lines or one JSON list, whichever the name says: BELLE's .json files are lines."""
    with path.open("rb") as file:
        is_list = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        file.seek(0)
        if is_list:
            records = _parse_json(file.read().decode("utf-8-sig"), path, 1)
            for index in order(len(records)):
                yield f"record {index + 1}", records[index]
            return
        starts = [0, *accumulate(len(line) for line in file)]
        for index in order(len(starts) - 1):
            file.seek(starts[index])
            line = file.readline().decode("utf-8-sig").strip()
            if line:
                yield f"line {index + 1}", _parse_json(line, path, index + 1)


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{path}, line {line}: is not JSON ({error.msg}, column {error.colno}); "
            "mend it, a file is one object on each line or one list of objects"
        ) from error


def _parquet_records(path: Path, order: Order) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: {_MISSING}") from error
    try:
        with ParquetFile(path) as file:
            for group in order(file.num_row_groups):
                batches = file.iter_batches(row_groups=[group], batch_size=1024)
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield f"row {number} of row group {group + 1}", row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: is not an intact Parquet file ({reason}); get it anew") from error


_READERS: dict[str, Reader] = {
    ".jsonl": _json_records,
    ".json": _json_records,
    ".parquet": _parquet_records,
}
