"""The folder of a release: records in a random order, its beginnings, removed records, a report."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

from belle.records import FORMS
from belle.release import ALL, NEAR_DUPLICATES, REMOVED, REPORT
from belle.release.blocks import documents, json_line
from gptq import __version__
from gptq.files.atomic import whole_folder


class WriteKept(DiskWriter):
    """Lines of the key that a record is sorted by, a tab and the record in its form.

    The key is a hash of the seed and the text: a record that joins or leaves moves no other.
    """

    name = "kept"
    default_output_filename = "${rank}.lines"

    def __init__(self, folder: str, form: str, seed: int) -> None:
        super().__init__(folder, compression=None, adapter=lambda _, document: document, mode="wb")
        self.form = form
        self.seed = seed

    def _write(self, document: Any, file_handler: Any, filename: str) -> None:
        text = f"{self.seed} {document.text}".encode()
        key = hashlib.blake2b(text, digest_size=16).hexdigest().encode()
        file_handler.write(key + b"\t" + json_line(FORMS[self.form](document.metadata["messages"])))


class Publish(PipelineStep):
    """Writes the folder, whole or not at all, from what was kept and what each filter removed.

    The first N records are also written as N.jsonl, for each scale N that there are enough for.
    """

    name = "publish"
    type = "💽 - WRITER"

    def __init__(
        self,
        out: Path,
        kept: str,
        removed: dict[str, str],
        partners: Path,
        options: dict[str, Any],
    ) -> None:
        """removed: the folder of each filter, in their order. partners: a file of ComparePairs.

        options: form, seed and scales, and what else the report should have.
        """
        super().__init__()
        self.out = out
        self.kept = Path(kept)
        self.removed = removed
        self.partners = partners
        self.options = options

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        scales = self.options["scales"]
        with whole_folder(self.out) as folder:
            with (folder / REMOVED).open("wb") as file:
                counted = {name: _write_removed(self._removed(name), file) for name in self.removed}
            kept = self._write_kept(folder)
            report = {
                "version": __version__,
                "datatrove": version("datatrove"),
                **self.options,
                "scales": [scale for scale in scales if scale <= kept],
                "scales not written": [scale for scale in scales if scale > kept],
                "read": kept + sum(entry["removed"] for entry in counted.values()),
                "filters": counted,
                "kept": kept,
            }
            text = json.dumps(report, ensure_ascii=False, indent=2).encode(
                errors="backslashreplace"
            )
            (folder / REPORT).write_bytes(text + b"\n")

    def _removed(self, name: str) -> Iterator[dict[str, Any]]:
        form = FORMS[self.options["form"]]
        partners = json.loads(self.partners.read_bytes()) if name == NEAR_DUPLICATES else {}
        for path in sorted(Path(self.removed[name]).glob("*.jsonl")):
            for document in documents(path):
                messages = document.metadata["messages"]
                entry = {
                    "place": document.id,
                    "filter": name,
                    "reason": document.metadata.get("filter_reason", name),
                }
                if document.id in partners:
                    similarity, place = partners[document.id]
                    entry |= {"reason": "similar to another", "to": place, "similarity": similarity}
                yield {**entry, "record": form(messages) if messages else json.loads(document.text)}

    def _write_kept(self, folder: Path) -> int:
        with contextlib.ExitStack() as stack:
            shards = [
                stack.enter_context(path.open("rb")) for path in sorted(self.kept.glob("*.lines"))
            ]
            order = sorted(place for shard in enumerate(shards) for place in _keys(*shard))
            targets = {ALL: len(order)}
            targets |= {f"{n}.jsonl": n for n in self.options["scales"] if n <= len(order)}
            files = [
                (stack.enter_context((folder / name).open("wb")), count)
                for name, count in targets.items()
            ]
            for i, (_, shard, position) in enumerate(order):
                shards[shard].seek(position)
                record = shards[shard].readline().partition(b"\t")[2]
                for file, count in files:
                    if i < count:
                        file.write(record)
        return len(order)


def _keys(shard: int, file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Key, shard and position of each record."""
    position = 0
    for line in file:
        yield line.partition(b"\t")[0], shard, position
        position += len(line)


def _write_removed(entries: Iterator[dict[str, Any]], file: BinaryIO) -> dict[str, Any]:
    """Write what a filter removed; returns its count, its reasons and the first record."""
    reasons: Counter[str] = Counter()
    first = None
    for entry in entries:
        reasons[entry["reason"]] += 1
        first = first or entry
        file.write(json_line(entry))
    return {"removed": reasons.total(), "reasons": dict(sorted(reasons.items())), "first": first}
