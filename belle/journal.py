"""What a run has received, one durable line each, so that a killed run goes on where it was."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gptq.errors import UserError
from gptq.files.atomic import sync_folder, unwritable

Line = dict[str, Any]
Record = dict[str, Any]
"""A task with its fields in the output file, or a refused one with its reason."""


class Journal:
    """A file of JSON lines, of which the first says what the run is."""

    def __init__(self, path: Path, file: BinaryIO, lines: list[Line]) -> None:
        self._path = path
        self._file = file
        self.lines = lines
        """Those of an earlier run, without the first."""

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line; it is durable when this returns. Raises UserError if it cannot be."""
        try:
            self._file.write(_row(line))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._path, error) from error


@contextlib.contextmanager
def open_journal(path: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal at a path, for this process alone: continued, or begun if there is none.

    identity: whatever decides what the run receives.
    A last line that a kill or a full disk has torn is cut off. Raises UserError, and changes
    nothing, if the journal is of another run, damaged or in use.
    """
    try:
        file = path.open("ab+")
    except OSError as error:
        raise unwritable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{path}: another run is writing it; wait for it or give another output"
            ) from error
        file.seek(0)
        data = file.read()
        lines, length = _read(data, path)
        if not lines and not _row(identity).startswith(data):
            raise UserError(f"{path}: is not of this command; move it away, or give another output")
        if lines:
            _check(lines[0], identity, path)
        file.truncate(length)
        journal = Journal(path, file, lines[1:])
        if not lines:
            journal.append(identity)
            sync_folder(path.parent)
        yield journal


def _row(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _read(data: bytes, path: Path) -> tuple[list[Line], int]:
    """The whole lines, and how many bytes they are."""
    lines, length = [], 0
    rows = data.splitlines(keepends=True)
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            whole = isinstance(line, dict) and row.endswith(b"\n")
        except ValueError:
            whole = False
        if not whole:
            if number < len(rows):
                raise UserError(
                    f"{path}:{number}: is damaged; correct the line, or move the file away to "
                    "begin anew"
                )
            break
        lines.append(line)
        length += len(row)
    return lines, length


def _check(before: Line, now: Mapping[str, Any], path: Path) -> None:
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        raise UserError(
            f"{path}: is of a run that differs in {', '.join(changed)}; give the same to continue "
            "it, or another output"
        )
