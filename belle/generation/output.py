"""The file of generated tasks, which a person may edit between runs."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from belle.journal import Journal, Line, Record
from gptq.errors import UserError, first_line
from gptq.files.atomic import check_writable, whole_file


class Output:
    """A JSON list of records. Those of earlier runs are kept as they are now found in it: edited
    ones stay edited, deleted ones deleted."""

    def __init__(self, path: Path, journal: Journal) -> None:
        """Raises UserError for a file that cannot be written, or is not of this journal."""
        self.path = path
        self._journal = journal
        check_writable(path)
        self.written = _written(journal.lines, _digest(path))
        """How many records have ever been written to the file."""
        if path.exists() and not self.written:
            raise UserError(
                f"{path}: was not written by this run; move it away, or give another --output_dir"
            )
        self._read()

    def extend(self, records: Sequence[Record]) -> None:
        """Write those of a run's records, all from its first on, that no run has written yet.

        The journal notes it before, with what the file was then: if the process is killed in
        between, the next run sees that the file is still the same.
        """
        if len(records) <= self.written:
            return
        kept = self._read()
        self._journal.append({"written": len(records), "over": _digest(self.path)})
        with whole_file(self.path) as temporary:
            text = json.dumps([*kept, *records[self.written :]], ensure_ascii=False, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
        self.written = len(records)

    def _read(self) -> list[Any]:
        if not self.path.exists():
            return []
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}: is no JSON ({first_line(error)}); correct it, and run again"
            ) from error
        if not isinstance(kept, list):
            raise UserError(f"{self.path}: is no list of records; correct it, and run again")
        return kept


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _written(lines: Sequence[Line], digest: str | None) -> int:
    """digest: of the file; None if it is not there, and is to be written anew."""
    notes = [line for line in lines if "written" in line]
    digests = [*(note["over"] for note in notes), digest]
    count = 0
    for note, after in zip(notes, digests[1:], strict=True):
        # Else the process was killed between note and file.
        if after != note["over"]:
            count = note["written"]
    return 0 if digest is None else count
