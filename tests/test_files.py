"""Files appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch

from gptq.errors import UserError
from gptq.files import Journal, check_writable, whole_file, whole_folder


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "out.pt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_older_file_survives_a_failure(tmp_path, error):
    path = tmp_path / "out.pt"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, full_disk)
    with (
        pytest.raises(UserError, match=r"out.pt: cannot be written \(No space left on device\)"),
        whole_file(tmp_path / "out.pt") as temporary,
    ):
        temporary.write_text("data")
    assert os.listdir(tmp_path) == []


def test_a_folder_replaces_an_older_one(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "stale").touch()
    with whole_folder(folder) as temporary:
        (temporary / "fresh").touch()
    assert os.listdir(folder) == ["fresh"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_folder_leaves_the_older_one(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(UserError, match="No space left"), whole_folder(folder) as temporary:
        (temporary / "fresh").touch()
        full_disk()
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_paths_that_cannot_be_written(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "x.pt")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "file" / "x.pt")
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path / "x.pt")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(Path("/proc/nowhere/x.pt"))


def test_a_journal_gives_back_what_was_written(tmp_path):
    journal = Journal(tmp_path)
    tensors = {"a.qweight": torch.arange(6, dtype=torch.int32).view(2, 3)}
    journal.write(3, tensors, [{"loss": 0.1}])
    assert journal.has(3)
    assert not journal.has(2)
    read, record = journal.read(3)
    assert record == [{"loss": 0.1}]
    assert torch.equal(read["a.qweight"], tensors["a.qweight"])
