"""Blocks of a datatrove pipeline for conversations: reader, filters, files in between.

A document's text is the conversation by which duplicates are told; `metadata` has the conversation
itself and its place in the input. Task i of n has the i-th part of all records in their order, so
that the result does not depend on n.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.disk_base import DiskWriter

from belle.records import parse, values
from belle.release.filters import Filter, compared, control_characters
from gptq.data.local_files import local_path
from gptq.errors import UserError


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
