"""Files and folders written whole or not at all."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from gptq.errors import UserError

# What has this ending was left by a process that was killed while it wrote.
PARTIAL = ".partial"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the temporary path this gives; `path` then appears complete, or not at all.

    The data is on disk before the name is. Raises UserError where the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: fill the temporary one this gives. An older `path` is replaced."""
    start, older = f".{path.name}.", None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(PARTIAL, start, path.parent))
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        sync_folder(temporary)
        if path.exists():
            # Not deleted in place: a folder that lacks files must not be seen.
            older = Path(tempfile.mkdtemp(PARTIAL, start, path.parent))
            os.replace(path, older)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _refused(path, error) from error
    finally:
        for folder in filter(None, (temporary, older)):
            shutil.rmtree(folder, ignore_errors=True)


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
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


def remove_partial(path: Path) -> None:
    """Remove what killed processes left while they wrote `path`, a file or folder.

    For a caller who knows that no other process is writing it.
    """
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.name.endswith(PARTIAL):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


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


def sync_folder(folder: Path) -> None:
    """Make names that were given in a folder durable. Raises UserError where the system refuses."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise unwritable(folder, error) from error
