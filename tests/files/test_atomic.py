"""Files appear whole or not at all."""

import contextlib
import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from gptq.checkpoints.writing import write_pt, write_safetensors
from gptq.errors import UserError
from gptq.files.atomic import (
    check_writable,
    remove_partial,
    sync_folder,
    whole_file,
    whole_folder,
)
from gptq.files.lazy import as_lazy


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

    def write():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
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

    def write():
        with whole_folder(folder) as temporary:
            (temporary / "fresh").touch()
            full_disk()

    with pytest.raises(UserError, match="No space left"):
        write()
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


@contextlib.contextmanager
def largest_file(size):
    """The system refuses, in the middle of a write, to let a file grow any further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_a_write_that_the_system_ends(tmp_path, write):
    tensors = {"a": torch.zeros(100_000), "b": torch.ones(100_000)}
    with (
        largest_file(100_000),
        pytest.raises(UserError, match=r"cannot be written \(File too large\); free space"),
    ):
        write(tmp_path / "out", as_lazy(tensors), {})
    assert os.listdir(tmp_path) == []


def test_other_errors_inside_a_write_keep_their_kind(tmp_path):
    with pytest.raises(RuntimeError, match="mistake"), whole_file(tmp_path / "out"):
        raise RuntimeError("mistake")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    folder = tmp_path / "belle-7b-v1.5"
    folder.mkdir()
    check_writable(folder, folder=True)
    (folder / "precious").touch()
    with pytest.raises(UserError, match="is no quantized checkpoint, but has precious; give a"):
        check_writable(folder, folder=True)
    (folder / "quantize_config.json").touch()
    check_writable(folder, folder=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give the name of a folder"):
        check_writable(tmp_path / "file", folder=True)
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        check_writable(folder)


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".m.pt.77.partial", "m.pt.partial", ".m.pt.rc", ".other.77.partial", "m.pt"):
        (tmp_path / name).touch()
    (tmp_path / ".m.pt.abc.partial").mkdir()
    (tmp_path / ".m.pt.abc.partial" / "model.safetensors").touch()
    remove_partial(tmp_path / "m.pt")
    left = {"m.pt.partial", ".m.pt.rc", ".other.77.partial", "m.pt"}
    assert set(os.listdir(tmp_path)) == left


def test_data_is_durable_before_its_name_is(tmp_path, monkeypatch):
    """Of a folder every file, then the folder itself, then the name; of a file the same."""
    calls, sync, replace = [], os.fsync, os.replace

    def fsync(handle):
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.partition(".partial")[0])
        sync(handle)

    def renamed(*paths):
        calls.append("renamed")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    with whole_folder(tmp_path / "new") as unfinished:
        for name in ("a", "b"):
            (unfinished / name).write_text(name)
    *files, folder, last, parent = calls
    assert sorted(files) == ["a", "b"]
    assert folder.startswith(".new.")
    assert (last, parent) == ("renamed", tmp_path.name)
    calls.clear()
    with whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("x")
    assert calls[0].startswith(".file.")
    assert calls[1:] == ["renamed", tmp_path.name]


@pytest.mark.parametrize("folder", [True, False])
def test_folders_around_an_output_are_made_before_the_work(tmp_path, folder):
    path = tmp_path / "a" / "b" / "out"
    for _ in range(2):
        check_writable(path, folder=folder)
        assert [it.name for it in path.parent.parent.rglob("*")] == ["b"]


@pytest.mark.parametrize(
    ("config", "quantized"),
    [('{"quantization_config": {}}', True), ('{"bits": 4}', False), ("[]", False), ("{", False)],
)
def test_a_quantized_folder_of_any_format_can_be_replaced(tmp_path, config, quantized):
    (tmp_path / "config.json").write_text(config)
    refused = pytest.raises(UserError, match="exists and is no quantized checkpoint")
    with contextlib.nullcontext() if quantized else refused:
        check_writable(tmp_path, folder=True, ours=lambda name: name == "config.json")
    assert os.listdir(tmp_path) == ["config.json"]


# Places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_the_folders_around_a_folder_are_made(tmp_path, there):
    if there:
        (tmp_path / "a" / "b").mkdir(parents=True)
    with whole_folder(tmp_path / "a" / "b" / "out") as temporary:
        (temporary / "x").touch()
    assert [str(it.relative_to(tmp_path)) for it in tmp_path.rglob("*") if it.is_file()] == [
        "a/b/out/x"
    ]


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\udcff", "is not UTF-8; give another name"),
        ("a\0b", "no name can hold a zero byte; give another one"),
    ],
)
def test_names_that_cannot_be(tmp_path, folder, name, message):
    with pytest.raises(UserError, match=message):
        check_writable(tmp_path / name, folder=folder)
    assert os.listdir(tmp_path) == []


def test_the_root_is_no_output():
    with pytest.raises(UserError, match=r"^/: is the root of the file system; give a folder in it"):
        check_writable(Path("/"), folder=True, ours=lambda _name: False)


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "access", lambda *_args: False)
    with pytest.raises(UserError, match=r"there: cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "there", folder=True)
    check_writable(tmp_path / "new", folder=True)
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_in_which_nothing_can_be_renamed(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match="No space left"):
        check_writable(tmp_path / "out", folder=folder)
    assert os.listdir(tmp_path) == []


def test_a_link_is_tried_where_it_leads(tmp_path):
    """The file is renamed there; beside the link there may be no room, or another file system."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "m.pt")
    with pytest.raises(UserError, match=r"link: cannot be written \(No such file or directory\)"):
        check_writable(tmp_path / "link")
    (tmp_path / "nowhere").mkdir()
    check_writable(tmp_path / "link")
    with whole_file(tmp_path / "link") as temporary:
        assert temporary.parent == tmp_path / "nowhere"
        temporary.write_text("x")
    assert (tmp_path / "nowhere" / "m.pt").read_text() == "x"
    assert os.listdir(tmp_path / "nowhere") == ["m.pt"]


# Messages ----------------------------------------------------------------------------------------


def test_an_error_without_a_number_keeps_its_text(tmp_path):
    with (
        pytest.raises(UserError, match=r"out: cannot be written \(the cable came off\)"),
        whole_file(tmp_path / "out"),
    ):
        raise OSError("the cable came off")


def test_a_folder_that_cannot_be_made_durable(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    sync_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(UserError, match=r"none: cannot be written \(No such file or directory\)"):
        sync_folder(tmp_path / "none")


def wrapped(error):
    """As if it were raised while the system's error was handled."""
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        wrapped(RuntimeError("the writer stopped")),
        Exception("No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: no room (os error 28)"),
    ],
)
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_libraries_make_of_the_systems_errors(tmp_path, error, whole):
    with (
        pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"),
        whole(tmp_path / "out"),
    ):
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        wrapped(ValueError("mistake")),
        UserError("in.pt: cannot be read (os error 5)"),
        KeyError("x"),
    ],
)
def test_what_is_not_about_writing_stays_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, whole_file(tmp_path / "out"):
        raise error
    assert caught.value is error
    assert error.__cause__ is None


def test_a_tokenizer_that_does_not_fit(tmp_path):
    words = {f"word{number}": number for number in range(9999)}
    tokenizer = Tokenizer(WordLevel(words, "word0"))
    with (
        largest_file(1000),
        pytest.raises(UserError, match=r"out: cannot be written \(File too large\)"),
        whole_folder(tmp_path / "out") as temporary,
    ):
        tokenizer.save(str(temporary / "tokenizer.json"))
    assert os.listdir(tmp_path) == []


def test_a_folder_in_a_file(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="out: cannot be written"),
        whole_folder(tmp_path / "file" / "out"),
    ):
        pass
