"""A replaced folder keeps what is not ours, and is the older or the newer one, whole."""

import contextlib
import ctypes
import errno
import os
import types
from pathlib import Path

import pytest

from gptq.errors import UserError
from gptq.files import atomic
from gptq.files.atomic import check_writable, whole_folder

OURS = ("config.json", "a.safetensors", "b.safetensors")


def ours(name):
    return name in OURS


def when_synced(monkeypatch, folder, call):
    """Call whenever the names in a folder are made durable."""
    sync = os.fsync

    def fsync(handle):
        if os.path.samestat(os.fstat(handle), folder.stat()):
            call()
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


# Folders that stay in place ----------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "deeper"])
def test_a_folder_that_the_process_is_in_is_filled(tmp_path, monkeypatch, inner):
    """What is not ours stays. config.json goes first, durably, and comes last."""
    folder = tmp_path / "out"
    for name in ("config.json", "a.safetensors", "notes.txt"):
        (folder / "deeper").mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    (folder / "b.safetensors").mkdir()
    monkeypatch.chdir(folder / inner)
    before, replace, steps = folder.stat().st_ino, os.replace, []

    def step(name):
        steps.append((name, (folder / "config.json").exists()))

    def renamed(source, target):
        step(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    when_synced(monkeypatch, folder, lambda: step("durable"))
    check_writable(folder, folder=True, ours=lambda _name: False)
    steps.clear()
    with whole_folder(folder, ours) as temporary:
        for name in ("config.json", "new.safetensors"):
            (temporary / name).write_text("new")
    moved = [("new.safetensors", False), ("config.json", False)]
    assert steps == [("durable", False), *moved, ("durable", True)]
    assert {it.name: it.is_dir() or it.read_text() for it in folder.iterdir()} == {
        "config.json": "new",
        "new.safetensors": "new",
        "notes.txt": "old",
        "b.safetensors": True,
        "deeper": True,
    }
    assert folder.stat().st_ino == before


# Exchanging two folders ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_system_that_cannot_exchange(tmp_path, monkeypatch, number):
    """Two renames do it, unless the reason is one that will end them too."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").touch()

    def renameat2(*_args):
        ctypes.set_errno(number)
        return -1

    library = types.SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_kwargs: library)
    failed = number == errno.EIO
    refused = pytest.raises(UserError, match=os.strerror(number))
    with (
        refused if failed else contextlib.nullcontext(),
        whole_folder(folder) as temporary,
    ):
        (temporary / "new").touch()
    assert os.listdir(folder) == ["old" if failed else "new"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_exchange_is_one_step(tmp_path, monkeypatch):
    folder, calls = tmp_path / "out", []
    folder.mkdir()

    def renameat2(_at, one, _other_at, other, exchange):
        calls.append(exchange)
        os.rename(other, other + b"-")
        os.rename(one, other)
        os.rename(other + b"-", one)
        return 0

    library = types.SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_kwargs: library)
    monkeypatch.setattr(os, "replace", None)
    with whole_folder(folder) as temporary:
        (temporary / "new").touch()
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["out"]
    assert calls == [2]


def test_the_systems_own_reason_comes_out(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        atomic._exchange(tmp_path / "none", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("name", "older"), [("notes.txt", ["old"]), ("config.json", [])])
def test_what_the_new_folder_has_is_not_replaced_by_an_older_one(tmp_path, name, older):
    """The older one, if it is not ours, stays where it is, under the unfinished folder's name."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text("old")
    with whole_folder(folder, ours) as temporary:
        (temporary / name).write_text("new")
    assert (folder / name).read_text() == "new"
    assert [it.read_text() for it in tmp_path.glob(f".out.*.partial/{name}")] == older


def test_what_is_kept_of_an_older_folder_is_durable(tmp_path, monkeypatch):
    """A folder with a name of ours is kept, too."""
    folder, durable = tmp_path / "out", []
    (folder / "a.safetensors").mkdir(parents=True)
    (folder / "notes.txt").touch()
    when_synced(monkeypatch, folder, lambda: durable.append(sorted(os.listdir(folder))))
    with whole_folder(folder, ours) as temporary:
        (temporary / "config.json").touch()
    assert durable == [["a.safetensors", "config.json", "notes.txt"]]
    assert os.listdir(tmp_path) == ["out"]
