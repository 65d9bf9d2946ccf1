"""Blocks of a datatrove pipeline for conversations: reader, filter, files in between, duplicates.

A document's text is the conversation by which duplicates are told; `metadata` has the conversation
itself and its place in the input. Task i of n has the i-th part of all records in their order, so
that the result does not depend on n.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from belle.records import parse, values
from belle.release.filters import Filter, compared, control_characters
from gptq.data.local_files import local_path
from gptq.errors import UserError

# Priorities of exact duplicates are 16-bit numbers.
MOST_TASKS = 65_000
GRAM = 5
# xxhash 4 takes no strings any more, and datatrove 0.10 gives it some.
_HASH = HashConfig(hash_fc="sha1")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Source(NamedTuple):
    """A file of records.

    name: its path as it was given, for places in it. parts: its lines, list entries or row groups.
    """

    path: str
    name: str
    parts: int

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Raises UserError for a file that cannot be read or has no records."""
        counts: list[int] = []

        def count(parts: int) -> Sequence[int]:
            counts.append(parts)
            return ()

        for _ in values(path, count):
            pass
        if not counts[0]:
            raise UserError(f"{path}: has no records; pass a file with some")
        return cls(str(local_path(path).resolve()), str(path), counts[0])


class ReadRecords(BaseReader):
    """Records of several files. One that is no conversation has a `problem`, and its JSON as text.

    Raises UserError for a file that is not JSON.
    """

    name = "records"

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__()
        self.sources = sources

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        total = sum(source.parts for source in self.sources)
        start, stop = rank * total // world_size, (rank + 1) * total // world_size
        before = 0
        for source in self.sources:
            part = range(max(start - before, 0), min(stop - before, source.parts))
            before += source.parts
            for place, record in values(source.path, partial(_only, part)) if part else ():
                yield _document(record, f"{source.name}, {place}", rank)


def _only(part: range, _: int) -> range:
    """`part` as an order in which a file's parts are read."""
    return part


def _document(record: Any, place: str, shard: int) -> Document:
    metadata = {"shard": shard, "messages": [], "problem": None}
    try:
        metadata["messages"] = conversation = parse(record)
        metadata["problem"] = control_characters(conversation)
        text = compared(conversation)
    except ValueError as error:
        metadata["problem"] = str(error)
    if metadata["problem"]:
        text, metadata["messages"] = json.dumps(record), []
    return Document(text=text, id=place, metadata=metadata)


def json_line(value: Any) -> bytes:
    """A line of JSON. Half a surrogate pair, which has no UTF-8, is written as its escape."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


class ConversationFilters(BaseFilter):
    """Removes a conversation for which one of several functions gives a reason, the first counts.

    What ReadRecords found no conversation in is removed first, by the name "schema". One block for
    all of them: datatrove's own counting of what passes a block takes longer than most do.
    """

    name = "conversations"

    def __init__(self, filters: dict[str, Filter], folder: str) -> None:
        """folder: for what is removed, with a folder in it for each filter."""
        super().__init__(WriteShards(folder, "${filter}/${rank}.jsonl"))
        self.filters = filters

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if problem := doc.metadata["problem"]:
            doc.metadata["filter"] = "schema"
            return False, problem
        for name, reason_of in self.filters.items():
            if reason := reason_of(doc.metadata["messages"]):
                doc.metadata["filter"] = name
                return False, reason
        return True


class WriteShards(DiskWriter):
    """JSON lines in a file of each task; a task without documents has no file."""

    name = "shards"

    def __init__(self, folder: str, file: str = "${rank}.jsonl") -> None:
        super().__init__(folder, file, compression=None, adapter=_fields, mode="wb")

    def _write(self, document: dict, file_handler: Any, filename: str) -> None:
        file_handler.write(json_line(document))


def _fields(_: DiskWriter, document: Document) -> dict[str, Any]:
    return {"text": document.text, "id": document.id, "metadata": document.metadata}


class ReadShards(BaseReader):
    """What the task of the same number wrote with WriteShards.

    datatrove's own readers deal out the files that there are, and one task's documents would be
    another's after a task without any.
    """

    name = "shards"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        yield from documents(Path(self.folder) / f"{rank:05d}.jsonl")


def documents(path: Path) -> Iterator[Document]:
    """Documents in a file of WriteShards, none if there is no file."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield Document(**json.loads(line))


# Duplicates ----------------------------------------------------------------------------------


def _text_of(document: Document) -> str:
    return document.text


def _earlier_first(document: Document) -> int:
    return MOST_TASKS + 1 - document.metadata["shard"]


# Of equal texts the first in the input stays.
EXACT = ExactDedupConfig(
    content_getter=_text_of, document_priority=_earlier_first, hash_config=_HASH
)
# The chance that two texts share a bucket is 1 - (1 - J^6)^10 at a Jaccard similarity J:
# 0.15 at 0.5, 0.71 at 0.7, 0.95 at 0.8 and 0.9995 at 0.9. Similar pairs are compared exactly
# afterwards, so that the buckets may be wide.
NEAR = MinhashConfig(n_grams=GRAM, num_buckets=10, hashes_per_bucket=6, hash_config=_HASH)


def grams(text: str) -> np.ndarray:
    """Hashes of all runs of GRAM characters, uint64, (max(1, characters - GRAM + 1),)."""
    text = text.ljust(GRAM, "\0")
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - GRAM + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(GRAM):
        hashes = hashes * _MULTIPLIER + codes[i : i + count]
    hashes ^= hashes >> np.uint64(32)
    return hashes * _MULTIPLIER


def jaccard(a: str, b: str) -> float:
    """Share of the runs of GRAM characters of either text that both have."""
    first, second = np.unique(grams(a)), np.unique(grams(b))
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


class _NoWords(WordTokenizer):
    """The one for a language would need its package, and 5-grams are of characters."""

    word_tokenize = sent_tokenize = span_tokenize = None  # type: ignore[assignment]


class Signatures(MinhashDedupSignature):
    """MinHash signatures of 5-grams of characters, which suit Chinese too.

    In numpy: datatrove hashes one 5-gram after another, which takes 15 times as long, and permutes
    the hashes by a remainder, which takes three times as long as an odd factor.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, NEAR, language=_NoWords())
        factors, offsets = self.parameters
        self.factors, self.offsets = factors.T | np.uint64(1), offsets.T

    def get_shingles(self, text: str) -> np.ndarray:
        return grams(text)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        hashes = np.min(self.factors * shingles + self.offsets, axis=1)
        # The next stage takes hashes below 2**61.
        return (hashes >> np.uint64(3)).reshape(NEAR.num_buckets, -1).tolist()


class ComparePairs(PipelineStep):
    """Keeps of the pairs that share a bucket those of a similarity from `threshold` on.

    For each record in such a pair it notes the most similar one, in the file `partners`.
    """

    name = "compare"
    type = "🫂 - DEDUP"

    def __init__(self, pairs: str, shards: str, folder: str, threshold: float) -> None:
        super().__init__()
        self.pairs = Path(pairs)
        self.shards = Path(shards)
        self.folder = Path(folder)
        self.partners = self.folder / "partners.json"
        self.threshold = threshold

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        # Task and number of one document, and of another.
        record = struct.Struct("<4I")
        files = {path.name: path.read_bytes() for path in sorted(self.pairs.glob("*.dups"))}
        pairs = {pair for content in files.values() for pair in record.iter_unpack(content)}
        compared = self._documents({end for pair in pairs for end in (pair[:2], pair[2:])})
        similar, partners = bytearray(), dict[str, tuple[float, str]]()
        for pair in sorted(pairs):
            first, second = compared[pair[:2]], compared[pair[2:]]
            similarity = jaccard(first.text, second.text)
            if similarity < self.threshold:
                continue
            similar += record.pack(*pair)
            for here, there in ((first.id, second.id), (second.id, first.id)):
                found = (round(similarity, 3), there)
                partners[here] = max(partners.get(here, found), found)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partners.write_bytes(json_line(partners))
        # The next step wants as many files as there are buckets.
        for name in files:
            (self.folder / name).write_bytes(similar)
            similar = bytearray()

    def _documents(self, ends: set[tuple[int, ...]]) -> dict[tuple[int, ...], Document]:
        return {
            (shard, number): Document(document.text, document.id)
            for shard in {shard for shard, _ in ends}
            for number, document in enumerate(documents(self.shards / f"{shard:05d}.jsonl"))
            if (shard, number) in ends
        }
