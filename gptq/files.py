"""Files written whole or not at all, and the journal of a run that can be resumed."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gptq.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the temporary path this gives; `path` then appears complete, or not at all.

    The data is on disk before the name is. Raises UserError where the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: fill the temporary one this gives. An older `path` is replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: Path, folder: bool = False) -> None:
    """Raise UserError now, rather than after hours of work, if `path` could not be written.

    A folder is written to only if it is new, empty, or a quantized checkpoint's.
    """
    if path.is_dir() and not folder:
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    if folder and path.exists() and not _replaceable(path):
        raise UserError(f"{path}: exists and is no quantized checkpoint; give a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / "quantize_config.json").exists() or not any(path.iterdir()))


def _refused(path: Path, error: Exception) -> Exception:
    """The UserError for what the system refused, which torch and safetensors wrap in their own."""
    cause = error if isinstance(error, OSError) else error.__context__
    number = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, SafetensorError) and number:
        cause = OSError(int(number[1]), os.strerror(int(number[1])))
    return unwritable(path, cause) if isinstance(cause, OSError) else error


def unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"{path}: cannot be written ({reason}); free space or choose another path")


@dataclass(frozen=True)
class Journal:
    """The finished blocks of one run, each a file of its own, in a folder beside the output."""

    folder: Path

    def part(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def has(self, block: int) -> bool:
        return self.part(block).exists()

    def write(self, block: int, tensors: Mapping[str, Tensor], record: list[dict]) -> None:
        """Make a block durable: its tensors and what the report says of it."""
        data = save(dict(tensors), metadata={"format": "pt", "record": json.dumps(record)})
        with whole_file(self.part(block)) as temporary:
            temporary.write_bytes(data)

    def read(self, block: int) -> tuple[dict[str, Tensor], list[dict]]:
        with safe_open(self.part(block), framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, record  # noqa: SIM118

    def remove(self) -> None:
        """Drop the journal, once the output is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def open_journal(output: Path, identity: Mapping[str, object], resume: bool) -> Iterator[Journal]:
    """The journal of the run that writes `output`, locked against a second run.

    identity: whatever decides the result; a journal with another identity is refused.
    Raises UserError when a journal is there without `resume`, is of another run, or is in use.
    """
    folder = output.with_name(output.name + ".journal")
    identity_file = folder / "run.json"
    done = len(list(folder.glob("block-*.safetensors")))
    found = identity_file.exists() and done > 0
    if found and not resume:
        raise UserError(
            f"{folder}: holds {done} finished blocks of an earlier run; add --resume to continue "
            "it, or delete the folder to start afresh"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise unwritable(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{output}: another run is writing it; wait for it or choose another output"
            ) from error
        text = json.dumps(identity, indent=1, sort_keys=True)
        if found:
            _check_identity(folder, identity_file.read_text(), text)
        else:
            with whole_file(identity_file) as temporary:
                temporary.write_text(text)
        try:
            yield Journal(folder)
        finally:
            if not any(folder.glob("block-*.safetensors")):
                shutil.rmtree(folder, ignore_errors=True)


def _check_identity(folder: Path, theirs: str, ours: str) -> None:
    if theirs == ours:
        return
    before, now = json.loads(theirs), json.loads(ours)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    raise UserError(
        f"{folder}: is of a run that differs in {', '.join(changed)}; give the same arguments to "
        "continue it, or delete the folder to start afresh"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
