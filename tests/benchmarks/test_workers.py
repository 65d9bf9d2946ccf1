"""Workers that crash or hang, and what is done for the rest of their work."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT

from benchmarks.common.workers import WORKER, Events, Limits, given_up, read, supervise

# Items that a worker goes through; a, b and so on are what may fail, in two places each.
WORK = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.common.workers import Events

def crash(events, name): os.kill(os.getpid(), signal.SIGSEGV)
def hang(events, name): time.sleep(600)
def leave(events, name): sys.exit(7)
def vanish(events, name): os._exit(0)
def say(events, name):
    events.fail(name, "the device is gone")
    sys.exit(3)
def gone(events, name):
    events.fail(name, "the device is gone", crashed=True)
    sys.exit(3)
def good(events, name): pass

events = Events(Path(sys.argv[1]))
for place in ("here", "there"):
    if place in events.finished:
        continue
    made = []
    for name, does in {items}.items():
        if events.leaves_out(name):
            continue
        events.begin(name, place)
        globals()[does](events, name)
        made.append(name)
    events.finish(place, made=made)
events.end()
sys.exit({code})
"""


@pytest.fixture
def work(tmp_path):
    """Supervises a worker that goes through these items; what failed, and the events."""

    def run(items, code=0, seconds=60):
        script, path = tmp_path / "worker.py", tmp_path / "events.jsonl"
        script.write_text(WORK.format(root=str(ROOT), items=items, code=code))
        watched = []
        command = [sys.executable, "-S", str(script), str(path)]
        failed = supervise(command, path, Limits(60, seconds), watched.append)
        return failed, {e["finished"]: e["made"] for e in watched if "finished" in e}

    return run


def test_nothing_fails(work):
    items = {"a": "good", "b": "good"}
    assert work(items) == ({}, {"here": ["a", "b"], "there": ["a", "b"]})


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("crash", "here: ended by SIGSEGV"),
        ("hang", "here: nothing for 1 s"),
        ("leave", "here: ended with code 7"),
        ("vanish", "here: ended with code 0"),
        ("say", "the device is gone"),
    ],
)
def test_what_ends_a_worker_is_named_and_the_rest_is_done(does, reason, work, capsys):
    seconds = 1 if does == "hang" else 60
    failed, done = work({"a": "good", "bad": does, "b": "good"}, seconds=seconds)
    assert failed == {"bad": reason}
    assert done == {"here": ["a", "b"], "there": ["a", "b"]}
    if does != "say":  # by the worker, which prints it itself
        assert f"FAILED: bad: {reason}\n" in capsys.readouterr().out


def test_relatives_of_what_crashes_are_left_out(work):
    tile = "bulk-8x128-stages4"
    names = [f"{tile}-splits{n}" for n in (1, 2, 3)]
    others = {"bulk": "good", "bulk-16x128-stages4-splits1": "good"}
    items = {names[0]: "crash", names[1]: "gone", names[2]: "good", **others}
    failed, done = work(items)
    assert list(failed) == names
    assert failed[names[2]] == f"left out, as 2 of {tile} crashed or hung"
    assert done == {"here": list(others), "there": list(others)}


def test_what_is_given_up():
    crashed = ["bulk-8x128-stages4-splits1", "bulk-8x128-stages8-splits1", "bulk"]
    tile = "bulk-16x128-stages4-splits2"
    assert given_up("bulk-8x128-stages4-splits2", crashed) is None
    assert given_up(tile, crashed) is None
    crashed.append("bulk-24x128-stages4-splits1")
    assert given_up(tile, crashed) == "left out, as 4 of bulk crashed or hung"
    for other in ("bulk", "bulk_pairs-32x256-stages4-splits1", "gemm-16x128-stages3-splits1"):
        assert given_up(other, crashed) is None
    # What has no splits has no tile.
    assert given_up("refine_group", ["sweep_block"] * 4) is None


def test_several_fail(work):
    failed, done = work({"a": "crash", "b": "leave", "c": "good", "d": "crash"})
    assert list(failed) == ["a", "b", "d"]
    assert done == {"here": ["c"], "there": ["c"]}


def test_a_bad_end_that_is_nothings_fault(work):
    """As of a sanitizer that has found something: it is not run for ever."""
    failed, done = work({"a": "good"}, code=1)
    assert failed == {WORKER: "ended with code 1, after its end"}
    assert done == {"here": ["a"], "there": ["a"]}


def test_a_worker_that_does_not_start(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(5)"]
    failed = supervise(command, tmp_path / "events", Limits(60, 60))
    assert failed == {WORKER: "ended with code 5, between two steps"}


def test_what_is_half_written_is_read_later(tmp_path):
    path = tmp_path / "events"
    Events(path).begin("a", "here")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"beg')
    events, position = read(path)
    assert events == [{"begun": "a", "where": "here"}]
    path.write_bytes(whole * 2)
    assert read(path, position) == (events, 2 * position)


def test_a_worker_ends_with_what_watches_it(tmp_path):
    """A part's time is over: `timeout` sends SIGTERM to this process, and the worker has to end."""
    path = tmp_path / "events"
    worker = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    watcher = f"""
        import sys
        from pathlib import Path
        from benchmarks.common.workers import Limits, supervise
        command = [sys.executable, "-c", {worker!r}, {str(tmp_path / "pid")!r}]
        supervise(command, Path({str(path)!r}), Limits(600, 600))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(watcher)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    pid = wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: not is_running(int(pid)))


def is_running(pid):
    """Whether there is such a process that is more than an entry waiting for its parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value
