"""The text of a local file: plain text, JSON lines, a JSON list or Parquet."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from gptq.data.bounded import bounded
from gptq.data.chat import TEMPLATE
from gptq.data.records import record_text
from gptq.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_KINDS = "text, .jsonl, .json or .parquet"
MISSING_PACKAGES = "reading it needs more packages: pip install 'belle-gptq[data]'"

# A file is read up to the larger of the two: MIN_CHARACTERS, or CHARACTERS_PER_TOKEN for each
# token asked for, about twice what English needs. More takes time and changes nothing.
MIN_CHARACTERS = 4_000_000
CHARACTERS_PER_TOKEN = 8
# A process takes milliseconds to start, a conversation tenths of one.
TEMPLATE_RECORDS = 64

# Takes a number of parts (lines, list entries, row groups) and returns the order to read them in,
# a permutation. A reader goes to the parts in that order, so that what is not needed of a large
# file is never parsed, and yields each record with its place in the file.
Order: TypeAlias = Callable[[int], Sequence[int]]
Reader: TypeAlias = Callable[[Path, Order], Iterator[tuple[str, Any]]]


def local_path(dataset: str | Path) -> Path:
    """The path of a file, `~` expanded."""
    return Path(os.path.expanduser(dataset))


def character_budget(tokens: int) -> int:
    """Characters of text that are enough for so many tokens."""
    return max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * tokens)


def read_text(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    budget: int | None,
    sampler: Random | None = None,
) -> str:
    """About `budget` characters of a file's text, or all of it for None.

    A text file is read from its start. Records are read in their order or, if the file has more
    bytes than `budget` and there is a sampler, in a random one; the tokenizer's end-of-text token
    separates them, or an empty line if it has none.

    Raises UserError for a file that cannot be read, is not UTF-8 or not intact, has no text in it,
    or holds a record that `record_text` refuses.
    """
    path = local_path(dataset)
    reader = READERS.get(path.suffix.lower())
    try:
        if reader is None:
            with path.open(encoding="utf-8-sig") as file:
                text = file.read(budget)
        else:
            large = budget is not None and path.stat().st_size > budget
            records = reader(path, _random_order(sampler) if sampler and large else range)
            text = _joined_records(path, records, tokenizer, budget)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8; convert it to {FILE_KINDS}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise UserError(f"{path}: has no text in it; pass a file with some")
    return text


def _random_order(sampler: Random) -> Order:
    return lambda count: sampler.sample(range(count), count)


def _joined_records(
    path: Path,
    records: Iterator[tuple[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    budget: int | None,
) -> str:
    end = tokenizer.eos_token or "\n\n"
    pieces: list[str] = []
    total = 0
    for piece in _texts(path, records, tokenizer):
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


def _texts(
    path: Path, records: Iterator[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """The texts of records. A chat template runs in a process of its own for some at a time."""
    while some := list(islice(records, TEMPLATE_RECORDS)):

        def convert(some: Sequence[tuple[str, Any]] = some) -> list[str]:
            return [record_text(record, f"{path}, {where}", tokenizer) for where, record in some]

        yield from bounded(convert, f"{path}: {TEMPLATE}") if tokenizer.chat_template else convert()


def read_json(path: Path, order: Order) -> Iterator[tuple[str, Any]]:
    """Records of JSON lines or of one JSON list, by the content: BELLE's .json files are lines."""
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
            "correct it, a file is one object on each line or one list of objects"
        ) from error
    # Of lists in lists without end, and of whole numbers of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise UserError(
            f"{path}, line {first_line}: cannot be read as JSON ({error}); correct it"
        ) from error


def read_parquet(path: Path, order: Order) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file, one row group after another. Raises UserError without pyarrow."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: {MISSING_PACKAGES}") from error
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


READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}
