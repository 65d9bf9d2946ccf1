"""The journal: what is in it, whose it is, and who may use it."""

import fcntl
import json
import os

import pytest
import torch

from gptq.errors import UserError
from gptq.pipeline.journal import (
    LOCK,
    Journal,
    finished_blocks,
    journal_folder,
    open_journal,
    shared_journal,
)

TENSORS = {"a.qweight": torch.arange(6, dtype=torch.int32).view(2, 3)}
LAYERS = [{"name": "a", "loss": 0.1}]


def test_a_journal_gives_back_what_was_written(tmp_path):
    journal = Journal(tmp_path)
    journal.write(3, TENSORS, LAYERS, "abc")
    assert journal.has(3)
    assert not journal.has(2)
    read, layers = journal.read(3, "abc")
    assert layers == LAYERS
    assert torch.equal(read["a.qweight"], TENSORS["a.qweight"])
    with pytest.raises(UserError, match="block 3 was made from another model's weights"):
        journal.read(3, "abd")


def test_a_damaged_block_is_refused(tmp_path):
    journal = Journal(tmp_path)
    journal.write(0, TENSORS, LAYERS, "abc")
    whole = journal.part(0).read_bytes()
    journal.part(0).write_bytes(whole[:-4])
    with pytest.raises(UserError, match="cut short"):
        journal.read(0, "abc")


def test_a_block_with_a_damaged_name_is_refused(tmp_path):
    journal = Journal(tmp_path)
    journal.write(0, TENSORS, LAYERS, "abc")
    data = journal.part(0).read_bytes()
    journal.part(0).write_bytes(data.replace(b"a.qweight", b"c.qweight"))
    with pytest.raises(UserError, match=r"block-0000.safetensors: is damaged; delete it"):
        journal.read(0, "abc")


def begin(output, **identity):
    with open_journal([output], identity, resume=False) as journal:
        journal.write(0, TENSORS, LAYERS, "abc")
    return journal


def test_a_run_without_a_finished_block_leaves_nothing(tmp_path):
    output = tmp_path / "m.pt"
    with pytest.raises(RuntimeError), open_journal([output], {"bits": 4}, resume=False):
        raise RuntimeError("stopped")
    assert os.listdir(tmp_path) == []


def test_a_journal_is_taken_up_only_when_asked_and_by_the_same_run(tmp_path):
    output = tmp_path / "m.pt"
    begin(output, bits=8)
    assert finished_blocks(output) == 1
    with (
        pytest.raises(UserError, match=r"m.pt.journal: holds 1 finished blocks.*add --resume"),
        open_journal([output], {"bits": 8}, resume=False),
    ):
        pass
    with (
        pytest.raises(UserError, match="differs in bits, sym; give the same arguments"),
        open_journal([output], {"bits": 4, "sym": True}, resume=True),
    ):
        pass
    with open_journal([output], {"bits": 8}, resume=True) as journal:
        assert journal.has(0)
        journal.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("removed", range(3))
def test_killed_while_it_is_removed_it_is_a_shorter_journal(tmp_path, monkeypatch, removed):
    output = tmp_path / "m.pt"
    journal = begin(output, bits=8)
    for block in (1, 2):
        journal.write(block, TENSORS, LAYERS, "abc")
    left, unlink = iter(range(removed)), os.unlink

    def killed(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.remove()
    with open_journal([output], {"bits": 8}, resume=True) as journal:
        assert [journal.has(block) for block in range(3)] == [n < 3 - removed for n in range(3)]


def test_blocks_of_an_unknown_run_are_refused(tmp_path):
    output = tmp_path / "m.pt"
    journal = begin(output, bits=8)
    for text in (None, "{", "[]"):
        file = journal.folder / "run.json"
        file.unlink() if text is None else file.write_text(text)
        with (
            pytest.raises(UserError, match=r"(cannot be read|differs in bits).*start afresh"),
            open_journal([output], {"bits": 8}, resume=True),
        ):
            pass


def test_resume_without_a_journal_starts_afresh(tmp_path):
    with open_journal([tmp_path / "m.pt"], {"bits": 8}, resume=True) as journal:
        assert not journal.has(0)
        assert json.loads((journal.folder / "run.json").read_text()) == {"bits": 8}


def test_every_output_is_locked(tmp_path):
    one, two, three = (tmp_path / name for name in ("a.pt", "b.safetensors", "c"))
    with open_journal([one, two], {}, resume=False):
        for outputs in ([two], [three, two], [one, three]):
            with (
                pytest.raises(UserError, match=r"(a.pt|b.safetensors): another run is writing it"),
                open_journal(outputs, {}, resume=True),
            ):
                pass
        with open_journal([three], {}, resume=False):
            pass
    assert os.listdir(tmp_path) == []


def test_a_lock_that_was_removed_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    """Another run can end, and remove its lock file, between the opening and the locking."""
    output, lock, removed = tmp_path / "m.pt", fcntl.flock, []

    def flock(file, operation):
        if not removed:
            removed.append(journal_folder(output) / LOCK)
            removed[0].unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_journal([output], {}, resume=False) as journal:
        assert removed == [journal.folder / LOCK]
        with (
            pytest.raises(UserError, match=r"m.pt: another run is writing it"),
            open_journal([output], {}, resume=False),
        ):
            pass


def test_a_lock_of_another_run_in_the_same_place_is_not_ours(tmp_path, monkeypatch):
    """As above, and a third run has made a file of the same name and locked that."""
    output, lock, theirs = tmp_path / "m.pt", fcntl.flock, []

    def flock(file, operation):
        if not theirs:
            path = journal_folder(output) / LOCK
            path.unlink()
            theirs.append(path.open("w"))
            lock(theirs[0], operation)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=r"m.pt: another run is writing it"),
        open_journal([output], {}, resume=False),
    ):
        pass
    theirs[0].close()


def test_what_a_killed_run_left_is_removed(tmp_path):
    output = tmp_path / "m.pt"
    journal = begin(output, bits=8)
    journal.scratch.mkdir()
    (journal.scratch / "0").touch()
    (journal.folder / ".block-0001.safetensors.77.partial").touch()
    (tmp_path / ".m.pt.77.partial").touch()
    with open_journal([output], {"bits": 8}, resume=True):
        assert sorted(os.listdir(journal.folder)) == ["block-0000.safetensors", "lock", "run.json"]
        journal.scratch.mkdir()
    assert os.listdir(tmp_path) == ["m.pt.journal"] == [journal_folder(output).name]
    assert not journal.scratch.exists()


def test_what_a_killed_run_left_beside_another_output_is_removed(tmp_path):
    one, two = tmp_path / "a.pt", tmp_path / "b.pt"
    scratch = Journal(journal_folder(two)).scratch
    scratch.mkdir(parents=True)
    (scratch / "0").touch()
    with open_journal([one, two], {}, resume=False) as journal:
        assert journal.folder == journal_folder(one)
    assert os.listdir(tmp_path) == []


def test_the_folder_of_an_output_is_made(tmp_path):
    with open_journal([tmp_path / "new" / "m.pt"], {}, resume=False) as journal:
        assert journal.folder.parent == tmp_path / "new"


def test_a_journal_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"m.pt.journal: cannot be written \(Not a directory\)"),
        open_journal([tmp_path / "file" / "m.pt"], {}, resume=False),
    ):
        pass


def test_of_two_journals_the_one_of_this_run_is_taken_up(tmp_path):
    one, two = tmp_path / "a.pt", tmp_path / "b.pt"
    begin(one, bits=8)
    begin(two, bits=4)
    for bits, output in ((8, one), (4, two)):
        with open_journal([one, two], {"bits": bits}, resume=True) as journal:
            assert journal.folder == journal_folder(output)


def test_the_name_of_a_journal_is_durable(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with open_journal([tmp_path / "m.pt"], {}, resume=False):
        assert synced[-1] == str(tmp_path)


class Follower:
    """The second of two processes, whose first one is on another machine."""

    leads, rank = False, 1

    def from_leader(self, begin):
        return None


@pytest.mark.parametrize("others", [[], ["0"]])
def test_a_process_that_follows_leaves_only_what_is_of_others(tmp_path, others):
    folder = journal_folder(tmp_path / "m.pt")
    scratch = Journal(folder).scratch
    for name in ("1", *others):
        (scratch / name).mkdir(parents=True)
    with shared_journal(Follower(), [tmp_path / "m.pt"], {}, resume=False) as journal:
        assert journal == Journal(folder)
        assert os.listdir(scratch) == others
        (scratch / "1" / "inner").mkdir(parents=True)
    assert [it.name for it in tmp_path.rglob("*")] == (
        ["m.pt.journal", "scratch", *others] if others else []
    )


def test_a_process_that_follows_needs_no_scratch(tmp_path):
    with shared_journal(Follower(), [tmp_path / "m.pt"], {}, resume=False):
        pass
    assert os.listdir(tmp_path) == []
