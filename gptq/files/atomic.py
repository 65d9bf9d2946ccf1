"""Files and folders that are written completely or not at all.

A folder can hold what is not ours. Only files for which `ours(name)` is true are ever replaced or
removed in it.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gptq.errors import UserError

# Ending of unfinished files and folders; a process that is killed leaves them behind.
PARTIAL = ".partial"
# No reader takes a folder without it for a model, so it is removed first and written last.
LAST = "config.json"

Ours = Callable[[str], bool]
"""Whether a name in a folder is one that this package writes."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def every_name(name: str) -> bool:
    """`ours` for a folder that nobody else writes to."""
    return True


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` if the body raises nothing.

    The data is durable before the name is. Raises UserError if the system cannot write it.
    """
    path = path.resolve() if path.is_symlink() else path
    temporary = _temporary(path)
    try:
        with _user_errors(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def whole_folder(path: Path, ours: Ours = every_name) -> Iterator[Path]:
    """Yield a temporary folder to write files to; it replaces `path` as in `whole_file`.

    Files in the older folder that are not ours are kept.
    """
    real = path.resolve()
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(real / real.name if _stays_in_place(real) else real)
        temporary.mkdir()
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        with _user_errors(path):
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            sync_folder(temporary)
            if temporary.parent == real:
                _fill(real, temporary, ours)
            elif not real.exists():
                os.replace(temporary, real)
            else:
                _exchange(temporary, real)
                _move_others(temporary, real, ours)
            sync_folder(real.parent)
    finally:
        _remove_ours(temporary, ours)


def check_writable(path: Path, folder: bool = False, ours: Ours = every_name) -> None:
    """Raise UserError if `path` cannot be written, to be called before hours of work.

    A file or folder is created and renamed there, as a trial. An existing folder can be written
    if nothing in it is ours, or if it is a quantized checkpoint.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        # safetensors takes no such name.
        raise UserError(f"{path}: is not UTF-8; give another name") from error
    if "\0" in str(path):
        raise UserError(f"{path}: no name can hold a zero byte; give another one")
    try:
        if folder:
            _check_folder(path, ours)
            return
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file to write")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no ordinary file; give another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        real = path.resolve() if path.is_symlink() else path
        first, second = _temporary(real), _temporary(real)
        first.touch()
        try:
            os.replace(first, second)
        finally:
            for name in (first, second):
                name.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def _check_folder(path: Path, ours: Ours) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give the name of a folder")
    real = path.resolve()
    if not real.name:
        raise UserError(f"{path}: is the root of the file system; give a folder in it")
    if path.is_dir() and not _declares_quantization(path):
        mine = sorted(entry.name for entry in path.iterdir() if ours(entry.name))
        if mine:
            raise UserError(
                f"{path}: exists and is no quantized checkpoint, but has {mine[0]}; give a new "
                "folder"
            )
    real.parent.mkdir(parents=True, exist_ok=True)
    place = real / real.name if _stays_in_place(real) else real
    first, second = _temporary(place), _temporary(place)
    first.mkdir()
    try:
        os.replace(first, second)
        if real.exists() and not os.access(real, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not real.exists():
            os.replace(second, real)
            real.rmdir()
    finally:
        for name in (first, second):
            with contextlib.suppress(OSError):
                name.rmdir()


def _declares_quantization(folder: Path) -> bool:
    """Whether a folder holds a quantized checkpoint: in a file of its own, or in config.json, as
    other formats have it."""
    if (folder / "quantize_config.json").exists():
        return True
    try:
        config = json.loads((folder / LAST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(config, dict) and "quantization_config" in config


def check_apart(outputs: Sequence[Path], inputs: Sequence[Path], folder: Path | None) -> None:
    """Raise UserError if writing the outputs would destroy one of them or an input.

    folder: the output that is replaced as a whole, with whatever of ours is in it.
    """
    real_outputs: dict[Path, Path] = {}
    for path in outputs:
        if path.resolve() in real_outputs:
            raise UserError(f"{path}: is asked for twice; give each output a path of its own")
        real_outputs[path.resolve()] = path
    outer = None if folder is None else folder.resolve()
    for real, path in real_outputs.items():
        if outer is not None and outer in real.parents:
            raise UserError(f"{path}: lies inside {folder}, which is replaced; give paths apart")
    for path in filter(Path.exists, inputs):
        source = path.resolve()
        if source in real_outputs or (outer is not None and outer in source.parents):
            raise UserError(f"{path}: is read and would be replaced; give another output")
        for real, output in real_outputs.items():
            if source in real.parents and real.exists():
                raise UserError(
                    f"{output}: is a file of {path}, which is read; give a path outside of it"
                )


def remove_partial(path: Path, ours: Ours = every_name) -> None:
    """Remove the unfinished files and folders of killed processes that were writing `path`.

    Files that are not ours are moved back to the folder that they were in. The caller must know
    that no other process is writing `path`.
    """
    real = path.resolve()
    pattern = re.compile(rf"\.{re.escape(real.name)}\.[^.]+{re.escape(PARTIAL)}")
    for place in {path.parent, real.parent, real}:
        for entry in list(place.iterdir()) if place.is_dir() else ():
            if not pattern.fullmatch(entry.name):
                continue
            if entry.is_dir():
                if real.is_dir():
                    _move_others(entry, real, ours)
                _remove_ours(entry, ours)
            else:
                entry.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def _stays_in_place(folder: Path) -> bool:
    """Whether a folder must not be renamed: a mount point, or one that the process is in."""
    if not folder.is_dir():
        return False
    here = Path.cwd()
    return os.path.ismount(folder) or folder == here or folder in here.parents


def _fill(folder: Path, temporary: Path, ours: Ours) -> None:
    """Move new files into a folder that stays in place, its own older ones replaced."""
    new = {entry.name for entry in temporary.iterdir()}
    for name in (LAST, *(entry.name for entry in folder.iterdir())):
        if name == LAST or (ours(name) and name not in new and (folder / name).is_file()):
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    for name in sorted(new, key=lambda name: name == LAST):
        os.replace(temporary / name, folder / name)
    sync_folder(folder)


def _exchange(temporary: Path, folder: Path) -> None:
    """Swap two folders' names in one step, or, if the system cannot, in two that can be undone."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        paths = (_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(folder))
        if renameat2(*paths, _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    older = _temporary(folder)
    os.replace(folder, older)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(older, folder)
        raise
    os.replace(older, temporary)


def _move_others(older: Path, folder: Path, ours: Ours) -> None:
    """Move what is not ours from an older folder to the one that replaced it."""
    for entry in list(older.iterdir()):
        mine = ours(entry.name) and not entry.is_dir()
        if not mine and not (folder / entry.name).exists():
            os.replace(entry, folder / entry.name)
    sync_folder(folder)


def _remove_ours(folder: Path, ours: Ours) -> None:
    """Remove a temporary folder, unless something in it is not ours."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if ours(entry.name) and not entry.is_dir():
            entry.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sync(file: Path) -> None:
    with file.open("rb+" if os.access(file, os.W_OK) else "rb") as opened:
        os.fsync(opened.fileno())


@contextlib.contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    """Raise a UserError in place of an exception that says that the system could not write."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise unwritable(path, cause) from error


def _system_error(error: Exception) -> OSError | None:
    """The system's error that an exception is or wraps, None if it does not.

    torch raises a RuntimeError while it handles the system's. Libraries in Rust, such as
    tokenizers, put the number into the text of an exception of any type.
    """
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    return cause if isinstance(cause, OSError) else None


def unwritable(path: Path, error: OSError) -> UserError:
    """The error to raise if the system could not write `path`."""
    reason = error.strerror or str(error)
    return UserError(f"{path}: cannot be written ({reason}); free space or choose another path")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises UserError if the system cannot."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise unwritable(folder, error) from error
