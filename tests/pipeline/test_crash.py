"""A run that is killed, or that the disk refuses, at any moment loses the block in hand at most."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, llama_config, make_model

KILLS = 50
# Of the changes to files that a run makes, one in so many is tried, and all with -m slow.
STRIDE = 23
SHORT, NO_SPACE, IO_ERROR, KILL = 1, 2, 3, 4
COMPILER = shutil.which("cc")


class Server:
    """helpers/crash_server.py, with helpers/io_faults.c in it where there is a compiler."""

    def __init__(self, room: Path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        if COMPILER:
            library = room / "io_faults.so"
            source = ROOT / "tests" / "helpers" / "io_faults.c"
            subprocess.run(
                [COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True
            )
            environment["LD_PRELOAD"] = str(library)
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "helpers" / "crash_server.py"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: list[str], folder: Path, **task) -> tuple[int, str]:
        task = {"argv": argv, "folder": str(folder), **task}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    assert server.process.wait() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "m", llama_config(num_hidden_layers=3))


class Run:
    """One command line whose files can be held against those of a run that nothing stopped."""

    def __init__(self, server: Server, model: Path, text: Path, room: Path, folder: bool):
        self.server, self.room = server, room
        self.argv = [
            *(str(model), str(text), "--wbits", "4", "--groupsize", "32", "--percdamp", "0.01"),
            *("--scale-search", "minmax", "--refine", "0", "--device", "cpu"),
            *("--nsamples", "2", "--seqlen", "16"),
            *("--save", str(room / "m.pt"), "--save_safetensors", str(room / "m.safetensors")),
            *(("--save-dir", str(room / "d")) if folder else ()),
        ]
        for first in (True, False):
            self.clear()
            begun = time.monotonic()
            code, said = self("--resume", first=first)
            self.seconds = time.monotonic() - begun
            assert code == 0, said
        self.changes = int(re.search(r"changes (\d+)", said)[1]) if COMPILER else 0
        self.whole = self.files()
        self.clear()

    def __call__(self, *more: str, **task) -> tuple[int, str]:
        return self.server.run([*self.argv, *more], self.room, **task)

    def files(self) -> dict[str, bytes]:
        """What is there under the names that were asked for."""
        names = ("m.pt", "m.safetensors", "d/model.safetensors", "d/config.json")
        return {n: (self.room / n).read_bytes() for n in names if (self.room / n).exists()}

    def blocks(self) -> int:
        return len(list(self.room.glob("m.pt.journal/block-*")))

    def clear(self) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
        self.room.mkdir()

    def check_none_incomplete(self) -> None:
        for name, data in self.files().items():
            assert data == self.whole[name], f"{name} is not whole"
        if (self.room / "d").exists():
            assert {"d/model.safetensors", "d/config.json"} <= self.files().keys()

    def check_whole(self) -> None:
        """The end of a run: the same files, and nothing else."""
        assert self.files() == self.whole
        expected = {"m.pt", "m.safetensors", *({"d"} if "d/config.json" in self.whole else ())}
        assert set(os.listdir(self.room)) == expected


@pytest.fixture
def run(server, model, text_file, tmp_path):
    return Run(server, model, text_file, tmp_path / "room", folder=False)


@pytest.fixture
def run_with_folder(server, model, text_file, tmp_path):
    return Run(server, model, text_file, tmp_path / "room", folder=True)


def test_killed_at_fifty_random_moments(run):
    moments = random.Random(0)
    kills = ends = 0
    while kills < KILLS:
        before = run.blocks()
        code, said = run("--resume", seconds=moments.uniform(0, run.seconds), signal=signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), said
        run.check_none_incomplete()
        if code == 0:
            run.check_whole()
            run.clear()
            ends += 1
        else:
            kills += 1
            # Either the journal has what it had, or the run had ended and was about to remove it.
            assert run.blocks() >= before or run.files() == run.whole
    assert run("--resume")[0] == 0
    run.check_whole()


def tried(changes: int, stride: int) -> range:
    """Where a run is to fail: numbers of changes, which differ with what is left over."""
    assert changes > 100
    return range(1, changes + 1, stride)


EVERY = pytest.mark.parametrize(
    "stride", [STRIDE, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"]
)


@EVERY
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_a_write_that_fails_is_said_and_survived(run_with_folder, stride):
    run = run_with_folder
    reasons = {NO_SPACE: "No space left on device", IO_ERROR: "Input/output error"}
    for n in tried(run.changes, stride):
        how = (NO_SPACE, IO_ERROR)[n % 2]
        code, said = run("--resume", n=n, how=how)
        run.check_none_incomplete()
        assert code == 2, f"change {n}: {said}"
        words = " ".join(said.split())
        assert re.search(rf"error: .* cannot be written \({reasons[how]}\)", words), said
        assert ("finished blocks are kept; add --resume" in words) == (run.blocks() > 0)
        assert run("--resume")[0] == 0
        run.check_whole()
        run.clear()


@EVERY
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_killed_at_a_change_to_a_file(run_with_folder, stride):
    run = run_with_folder
    for n in tried(run.changes, stride):
        code, said = run("--resume", n=n, how=KILL)
        assert code == -signal.SIGKILL, f"change {n}: {said}"
        run.check_none_incomplete()
        assert run("--resume")[0] == 0
        run.check_whole()
        run.clear()


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_short_writes_are_continued(run_with_folder):
    code, said = run_with_folder(n=0, how=SHORT)
    assert code == 0, said
    assert int(re.search(r"changes (\d+)", said)[1]) > run_with_folder.changes
    run_with_folder.check_whole()


def test_ctrl_c_says_how_to_resume(run):
    code, said = run(signal_at=1, signal=signal.SIGINT)
    assert code == 130
    assert "interrupted: 1 finished blocks are kept; add --resume to the same command" in said
    code, said = run()
    assert code == 2
    assert "holds 1 finished blocks of an earlier run; add --resume" in said
    assert run("--resume")[0] == 0
    run.check_whole()
    code, said = run(signal_at=0, signal=signal.SIGINT)
    assert code == 130
    assert "resume" not in said
    run.check_whole()
