"""One run on two machines, each with folders of its own; the journal is on the first alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, llama_config, make_model
from helpers.forked import team
from helpers.shared_runs import stopped, words
from safetensors.torch import load_file, save_file

from gptq.cli import run as cli
from gptq.models import LLAMA


class Machines:
    """Two machines: each has the model and the text in a folder of its own, and works there."""

    def __init__(self, base, model, text):
        self.base, self.folders = base, [base / "machine-0", base / "machine-1"]
        for folder in self.folders:
            folder.mkdir()
            shutil.copytree(model, folder / "model")
            shutil.copy(text, folder / "text.txt")

    def call(self, number, work):
        """A function that does some work in a machine's folder."""

        def call():
            os.chdir(self.folders[number])
            return work()

        return call

    def run(self, *more, signal_of_second=None):
        """The same command on both; the second may get a signal in its second block.

        Returns the exit code and what was printed, of each.
        """
        argv = words("model", "text.txt", "out/m.pt", *more)
        works = [lambda: cli.main(LLAMA, argv)] * 2
        if signal_of_second is not None:
            works[1] = lambda: stopped(argv, signal_of_second)
        calls = [self.call(number, work) for number, work in enumerate(works)]
        children = team(calls, self.base, one_a_machine=True)
        return [(child.wait(), child.said) for child in children]

    def files(self, number):
        """Names of what is there besides the inputs."""
        folder = self.folders[number]
        inputs = (folder / "model", folder / "text.txt")
        files = (file for file in folder.rglob("*") if file.is_file())
        return {str(it.relative_to(folder)) for it in files if not it.is_relative_to(inputs[0])} - {
            "text.txt"
        }


@pytest.fixture
def machines(tmp_path, llama_dir, text_file):
    return Machines(tmp_path, llama_dir, text_file)


@pytest.mark.parametrize("more", [(), ("--max-memory", "1MiB")], ids=["memory", "disk"])
def test_machines_with_folders_of_their_own(more, machines):
    """The journal is on the first alone. Stopped and resumed, it is the same bit for bit."""
    (machines.folders[0] / "out").mkdir()
    assert [code for code, _ in machines.run(*more)] == [0, 0]
    whole = (machines.folders[0] / "out/m.pt").read_bytes()
    assert machines.files(1) == set()
    (machines.folders[0] / "out/m.pt").unlink()
    (first, said), (second, _) = machines.run(*more, signal_of_second=signal.SIGKILL)
    assert (first, second) == (2, -signal.SIGKILL)
    assert "1 finished blocks are kept; add --resume" in said
    (again, said), (other, said_there) = machines.run(*more, "--resume")
    assert (again, other) == (0, 0), said + said_there
    assert (machines.folders[0] / "out/m.pt").read_bytes() == whole
    assert machines.files(0) == {"out/m.pt"}
    assert machines.files(1) == set()


def test_machines_with_different_models_end_at_once(machines):
    file = machines.folders[1] / "model/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    for code, said in machines.run():
        assert code == 2
        assert "error: process 1 differs from the first in model; give all the same MODEL" in said


def test_a_block_that_differs_is_noticed(tmp_path, text_file):
    """The identity of a run has the first and the last block; this is one between."""
    model = make_model(tmp_path / "three", llama_config(num_hidden_layers=3))
    machines = Machines(tmp_path, model, text_file)
    file = machines.folders[1] / "model/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    for code, said in machines.run():
        assert code == 2
        assert "error: model.layers.1: its weights differ between the processes" in said


def test_a_machine_without_the_model_says_so(machines):
    shutil.rmtree(machines.folders[1] / "model")
    argv = words("model", "text.txt", "out/m.pt")
    # Where torchrun would end the first one.
    calls = [lambda: 0, machines.call(1, lambda: cli.main(LLAMA, argv))]
    _, second = team(calls, machines.base, one_a_machine=True)
    assert second.wait() == 2
    assert "error: 'model' is no folder here" in second.said


# Two network namespaces, joined by a cable of which each has an end.
NETWORK = """
ip netns add {0} && ip netns add {1}
ip link add end-0 netns {0} type veth peer name end-1 netns {1}
ip -n {0} addr add 10.77.0.1/24 dev end-0 && ip -n {1} addr add 10.77.0.2/24 dev end-1
ip -n {0} link set lo up && ip -n {1} link set lo up
ip -n {0} link set end-0 up && ip -n {1} link set end-1 up
"""


@pytest.fixture
def network():
    """Names of two network namespaces that reach each other."""
    names = [f"gptq-{os.getpid()}-{number}" for number in range(2)]
    try:
        made = subprocess.run(
            ["sh", "-ec", NETWORK.format(*names)], capture_output=True, check=False
        )
        if made.returncode:
            pytest.skip(f"no network namespaces here: {made.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_torchrun_in_two_network_namespaces(network, tmp_path, text_file):
    """The commands of docs/quantizing.md."""
    model = make_model(tmp_path / "deep", llama_config(num_hidden_layers=8))
    machines = Machines(tmp_path, model, text_file)
    (machines.folders[0] / "out").mkdir()

    def run(*more, killed=False):
        started = []
        for number, (name, folder) in enumerate(zip(network, machines.folders, strict=True)):
            command = [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"),
                *("--master-addr=10.77.0.1", "--master-port=29500", str(ROOT / "llama.py")),
            ]
            started.append(
                subprocess.Popen(
                    [*command, *words("model", "text.txt", "out/m.pt", *more)],
                    cwd=folder,
                    env={**os.environ, "GLOO_SOCKET_IFNAME": f"end-{number}"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        if killed:
            journal = machines.folders[0] / "out/m.pt.journal"
            while started[0].poll() is None and not any(journal.glob("block-*.safetensors")):
                time.sleep(0.01)
            # torchrun and the process that it started.
            listed = ["ip", "netns", "pids", network[1]]
            for pid in subprocess.run(listed, capture_output=True, check=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        said = [process.communicate()[0].decode() for process in started]
        return [process.returncode for process in started], said

    codes, said = run()
    assert codes == [0, 0], said
    whole = (machines.folders[0] / "out/m.pt").read_bytes()
    (machines.folders[0] / "out/m.pt").unlink()
    codes, said = run(killed=True)
    assert 0 not in codes
    assert "error: another process of this run was lost" in said[0]
    codes, said = run("--resume")
    assert codes == [0, 0], said
    assert (machines.folders[0] / "out/m.pt").read_bytes() == whole
    assert machines.files(0) == {"out/m.pt"}
    assert machines.files(1) == set()
