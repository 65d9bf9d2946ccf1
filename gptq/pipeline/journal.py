"""The finished blocks of a run, kept beside its output until that is whole."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from gptq.errors import UserError
from gptq.files.atomic import (
    PARTIAL,
    Ours,
    every_name,
    remove_partial,
    sync_folder,
    unwritable,
    whole_file,
)
from gptq.files.lazy import LazyTensors, as_lazy
from gptq.files.opening import open_tensors
from gptq.files.safetensors_file import write_tensors
from gptq.pipeline.team import Team

_PARTS = "block-*.safetensors"
_WIDTHS = "widths.json"
LOCK = "lock"
TRAINING = "training.safetensors"
# What the names of tensors that are to be written begin with in that file.
BEST = "best"


@dataclass(frozen=True)
class Journal:
    """Each finished block is a file of its own, which appears when it is durable."""

    folder: Path

    @property
    def scratch(self) -> Path:
        """Room for what no later run needs; removed when the run ends, or when the next begins."""
        return self.folder / "scratch"

    def part(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def has(self, block: int) -> bool:
        return self.part(block).exists()

    def write(
        self, block: int, tensors: Mapping[str, Tensor], layers: list[dict], weights: str
    ) -> None:
        """Make a block durable: its packed tensors with a hash of them, what the report says of its
        layers, and a hash of the weights that it was made from."""
        record = json.dumps({"weights": weights, "packed": _hash(tensors), "layers": layers})
        with whole_file(self.part(block)) as temporary:
            write_tensors(temporary, as_lazy(tensors), list(tensors), {"record": record})

    def read(self, block: int, weights: str) -> tuple[dict[str, Tensor], list[dict]]:
        """A block's tensors and its layers' reports. Raises UserError for one of other weights."""
        part = self.part(block)
        opened = open_tensors([part])
        record: dict[str, Any] = json.loads(opened.metadata["record"])
        if record["weights"] != weights:
            raise UserError(
                f"{self.folder}: block {block} was made from another model's weights; delete the "
                "folder to start afresh"
            )
        tensors = dict(opened)
        if record.get("packed") != _hash(tensors):
            raise UserError(f"{part}: is damaged; delete it, and --resume solves its block again")
        return tensors, record["layers"]

    @property
    def training(self) -> Path:
        """The file of a training of the whole model, after all blocks."""
        return self.folder / TRAINING

    def write_training(self, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
        """Make the state of a training durable in place of the one before."""
        metadata = {"record": json.dumps(record), "hash": _hash(tensors)}
        with whole_file(self.training) as temporary:
            write_tensors(temporary, as_lazy(tensors), list(tensors), metadata)

    def read_training(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was written last; None if nothing was, or if it is damaged."""
        if not self.training.exists():
            return None
        with contextlib.suppress(UserError, ValueError, KeyError):
            opened = open_tensors([self.training])
            tensors = dict(opened)
            if opened.metadata["hash"] == _hash(tensors):
                return tensors, json.loads(opened.metadata["record"])
        return None

    def solved(self) -> LazyTensors:
        """The packed tensors of all blocks, read when asked for."""
        return open_tensors(sorted(self.folder.glob(_PARTS)))

    def keep_widths(self, widths: Mapping[str, Sequence[int]]) -> None:
        """Make the widths of layers durable that were chosen for them: bits and group size."""
        with whole_file(self.folder / _WIDTHS) as temporary:
            temporary.write_text(json.dumps(dict(widths)))

    def widths(self) -> dict[str, list[int]] | None:
        """What `keep_widths` kept; None if it kept nothing."""
        file = self.folder / _WIDTHS
        return json.loads(file.read_text()) if file.exists() else None

    def tensors(self) -> LazyTensors:
        """As `solved`; scales and norms that were trained replace or join them."""
        solved = self.solved()
        if not self.training.exists():
            return solved
        trained = open_tensors([self.training])
        first = f"{BEST}."
        best = {name: trained.entry(name) for name in trained if name.startswith(first)}
        return solved.changed({name[len(first) :]: entry for name, entry in best.items()})

    def remove(self) -> None:
        """Remove the blocks, once the output is whole. Killed meanwhile, it leaves fewer.

        The folder and its lock go when the lock is let go: another run must not find it free.
        """
        with contextlib.suppress(OSError):
            for part in sorted(self.folder.glob(_PARTS), reverse=True):
                part.unlink()
            (self.folder / _WIDTHS).unlink(missing_ok=True)


def journal_folder(output: Path) -> Path:
    """Where the journal of the run that writes `output` is."""
    # `.` and `..` have no name to put the ending to.
    output = output.resolve() if output.name in ("", "..") else output
    return output.with_name(output.name + ".journal")


def _holds_work(folder: Path) -> bool:
    """Whether anything is there that a run would have to do again."""
    return (folder / _WIDTHS).exists() or any(folder.glob(_PARTS))


def finished_blocks(output: Path) -> int:
    """How many blocks of a run that writes `output` are kept."""
    return len(list(journal_folder(output).glob(_PARTS)))


@contextlib.contextmanager
def open_journal(
    outputs: Sequence[Path],
    identity: Mapping[str, object],
    resume: bool,
    ours: Ours = every_name,
) -> Iterator[Journal]:
    """The journal of the run that writes `outputs`; all are locked against a second run.

    It lies beside the first output, or beside another one if finished blocks are there.
    identity: whatever decides the blocks; a journal with another identity is refused.
    ours: as for `files.atomic`.
    Raises UserError when a journal is there without `resume`, is of another run, or is in use.
    """
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(_locked(output)) for output in outputs]
        for output in outputs:
            remove_partial(output, ours)
        kept = [folder for folder in folders if _holds_work(folder)]
        same = [folder for folder in kept if _identity(folder) == dict(identity)]
        folder = (*same, *kept, *folders)[0]
        journal = Journal(folder)
        shutil.rmtree(journal.scratch, ignore_errors=True)
        _take_up(folder, json.dumps(identity), resume)
        try:
            yield journal
        finally:
            shutil.rmtree(journal.scratch, ignore_errors=True)


@contextlib.contextmanager
def shared_journal(
    team: Team,
    outputs: Sequence[Path],
    identity: Mapping[str, object],
    resume: bool,
    ours: Ours = every_name,
) -> Iterator[Journal]:
    """`open_journal` by the first of several processes.

    The others may be on machines that have not its files: theirs is a folder of the same name,
    of which they use `scratch` alone.
    """
    own = Journal(journal_folder(outputs[0]))
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            nonlocal own
            own = stack.enter_context(open_journal(outputs, identity, resume, ours))

        team.from_leader(begin)
        if not team.leads:
            stack.enter_context(_own_scratch(own, team.rank))
        yield own


@contextlib.contextmanager
def _own_scratch(journal: Journal, rank: int) -> Iterator[None]:
    """Removes what a process that is not the first leaves in `scratch`, now and at the end."""
    folder = journal.scratch / str(rank)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Not empty if the first process, or the other ones, are on this machine too.
        with contextlib.suppress(OSError):
            journal.scratch.rmdir()
            journal.folder.rmdir()


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """The journal's folder of an output, for this process alone. It goes with the last block."""
    folder = journal_folder(output)
    with _lock(output, folder):
        try:
            yield folder
        finally:
            if not _holds_work(folder):
                _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    """Remove a journal without blocks, its lock last: whoever waits for that finds nothing left."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        for file in folder.iterdir():
            if file.name != LOCK:
                file.unlink()
        (folder / LOCK).unlink()
        folder.rmdir()


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of tensors' names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _lock(output: Path, folder: Path) -> TextIO:
    """Open and lock the folder's lock file, which is free again when it is closed."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(
                f"{output}: another run is writing it; wait for it or choose another output"
            ) from error
        # Another run may have ended, and removed the file, since it was opened.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def _identity(folder: Path) -> dict[str, object] | None:
    """What a journal says decided its blocks; None if that cannot be read."""
    try:
        return dict(json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError):
        return None


def _take_up(folder: Path, identity: str, resume: bool) -> None:
    """Continue what is in the folder, or begin. Raises UserError as `open_journal`."""
    for left in folder.glob(f".*{PARTIAL}"):
        left.unlink()
    file = folder / "run.json"
    if not _holds_work(folder):
        # It may be of a run that was another one.
        (folder / TRAINING).unlink(missing_ok=True)
        with whole_file(file) as temporary:
            temporary.write_text(identity)
        sync_folder(folder.parent)
        return
    if not resume:
        done = len(list(folder.glob(_PARTS)))
        raise UserError(
            f"{folder}: holds {f'{done} finished blocks' if done else 'the chosen widths'} of an "
            "earlier run; add --resume to continue it, or delete the folder to start afresh"
        )
    before, now = _identity(folder), json.loads(identity)
    if before is None:
        raise UserError(f"{file}: cannot be read; delete the folder {folder} to start afresh")
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        raise UserError(
            f"{folder}: is of a run that differs in {', '.join(changed)}; give the same arguments "
            "to continue it, or delete the folder to start afresh"
        )
