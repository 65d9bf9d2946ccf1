"""Sizes by name, and what memory is left, from made-up trees of /proc and /sys/fs/cgroup."""

import os
from pathlib import Path

import pytest
import torch

import gptq
from gptq.device import available_memory, parse_size
from gptq.errors import UserError

GIB = 2**30
CPU = torch.device("cpu")
FREE = 16
V2_MOUNT = "35 24 0:30 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = (
    "33 31 0:31 {top} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
)
NO_LIMIT_V1 = 9223372036854771712


def machine(root: Path, group: str, mounts: str, top: str = "/") -> Path:
    """A tree with 16 GiB free, of a process in that control group. top: the mounts' root."""
    (root / "proc" / "self").mkdir(parents=True)
    meminfo = f"MemTotal: 33554432 kB\nMemFree: 1024 kB\nMemAvailable: {FREE * 2**20} kB\n"
    (root / "proc" / "meminfo").write_text(meminfo)
    (root / "proc" / "self" / "cgroup").write_text(group)
    other = "23 1 8:1 / / rw - ext4 /dev/sda1 rw"
    mountinfo = f"{other}\n{mounts.format(top=top)}\n"
    (root / "proc" / "self" / "mountinfo").write_text(mountinfo)
    return root


def v2(root: Path, group: str, limit: object, used: float, cached: float = 0, high: object = "max"):
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    size = {"memory.max": limit, "memory.high": high, "memory.current": used}
    for name, amount in size.items():
        text = amount if isinstance(amount, str) else int(amount * GIB)
        (folder / name).write_text(f"{text}\n")
    stat = f"anon 1\nactive_file {GIB}\ninactive_file {int(cached * GIB)}\nslab 9\n"
    (folder / "memory.stat").write_text(stat)


def v1(root: Path, group: str, limit: int, used: float, cached: float = 0) -> None:
    folder = root / "sys/fs/cgroup/memory" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{int(used * GIB)}\n")
    # The first line is of the group alone, the total with the groups inside.
    stat = f"cache 5\ninactive_file 77\ntotal_inactive_file {int(cached * GIB)}\n"
    (folder / "memory.stat").write_text(stat)


def left(root: Path) -> float:
    return available_memory(CPU, root) / GIB


def test_without_control_groups_the_machine_decides(tmp_path):
    assert left(machine(tmp_path, "", "")) == FREE


def test_a_container_of_version_2_is_limited(tmp_path):
    """Its own group is the root of the tree that it sees."""
    machine(tmp_path, "0::/\n", V2_MOUNT)
    v2(tmp_path, ".", 8, 3)
    assert left(tmp_path) == 5


def test_a_groups_name_can_hold_colons(tmp_path):
    """As containerd names them."""
    machine(tmp_path, "0::/system.slice:cri-containerd:ab\n", V2_MOUNT)
    v2(tmp_path, "system.slice:cri-containerd:ab", 8, 3)
    assert left(tmp_path) == 5


def test_files_pages_are_not_used_memory(tmp_path):
    machine(tmp_path, "0::/\n", V2_MOUNT)
    v2(tmp_path, ".", 8, 8, cached=6.5)
    assert left(tmp_path) == 6.5


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [(("max", 1), (6, 4), 2), ((5, 1), ("max", 9), 4), ((9, 1), (6, 5), 1), ((3, 2), (20, 2), 1)],
)
def test_the_tightest_of_nested_groups_decides(tmp_path, inner, outer, expected):
    machine(tmp_path, "0::/slurm.slice/job_1/step_0\n", V2_MOUNT)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)  # the root group has no limit files
    v2(tmp_path, "slurm.slice/job_1/step_0", *inner)
    v2(tmp_path, "slurm.slice/job_1", *outer)
    v2(tmp_path, "slurm.slice", "max", 12)
    v2(tmp_path, "slurm.slice/job_2", 1, 1)  # another job's
    assert left(tmp_path) == expected


def test_memory_is_reclaimed_above_high(tmp_path):
    machine(tmp_path, "0::/user.slice\n", V2_MOUNT)
    v2(tmp_path, "user.slice", 8, 1, high=4)
    assert left(tmp_path) == 3


def test_a_group_without_a_limit_leaves_it_to_the_machine(tmp_path):
    machine(tmp_path, "0::/user.slice\n", V2_MOUNT)
    v2(tmp_path, "user.slice", "max", 30)
    assert left(tmp_path) == FREE


def test_a_full_group_has_nothing_left(tmp_path):
    machine(tmp_path, "0::/a\n", V2_MOUNT)
    v2(tmp_path, "a", 2, 3)
    assert left(tmp_path) == 0


V1_GROUP = "9:name=systemd:/\n4:cpu,cpuacct:/elsewhere\n3:memory:{path}\n0::/\n"


@pytest.mark.parametrize(
    ("path", "top", "place"),
    [
        ("/docker/ab", "/", "docker/ab"),
        # Docker shows a container its own group as the top, and the path of the host.
        ("/docker/ab", "/docker/ab", "."),
        ("/docker/ab/inside", "/docker/ab", "inside"),
        # In a namespace of its own.
        ("/", "/", "."),
    ],
)
def test_version_1_beside_version_2(tmp_path, path, top, place):
    machine(tmp_path, V1_GROUP.format(path=path), V1_MOUNTS, top)
    v1(tmp_path, place, 6 * GIB, 5, cached=3)
    v1(tmp_path, ".", NO_LIMIT_V1 if place != "." else 6 * GIB, 5, cached=3)
    assert left(tmp_path) == 4


def test_limits_of_version_1_nest(tmp_path):
    machine(tmp_path, V1_GROUP.format(path="/slurm/job"), V1_MOUNTS)
    v1(tmp_path, "slurm/job", NO_LIMIT_V1, 1)
    v1(tmp_path, "slurm", 3 * GIB, 2)
    v1(tmp_path, ".", NO_LIMIT_V1, 9)
    assert left(tmp_path) == 1


def test_a_group_outside_of_what_is_seen_counts_for_nothing(tmp_path):
    machine(tmp_path, "0::/../other\n", V2_MOUNT)
    v2(tmp_path, ".", "max", 1)
    v2(tmp_path, "../other", 1, 1)
    assert left(tmp_path) == FREE


@pytest.mark.parametrize(("local", "share"), [("4", 4), ("2", 2), (None, 8)])
def test_processes_of_one_machine_share_its_memory(tmp_path, monkeypatch, local, share):
    """torchrun says how many are here; without its word all of them are."""
    machine(tmp_path, "0::/\n", V2_MOUNT)
    v2(tmp_path, ".", 8, 0)
    run = {"RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (run | {"LOCAL_WORLD_SIZE": local}).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert left(tmp_path) == 8 / share


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * GIB),
        ("6gib", 6 * GIB),
        ("6Gi", 6 * GIB),
        ("2.5G", 2_500_000_000),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("1TiB", 2**40),
        ("123456", 123456),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1GiB", "6GiBs", "6 6", "1e9", "0.0G", "i", "6i", "1" + 310 * "0"]
)
def test_what_is_no_size_is_one_line(text, llama_dir, tmp_path, text_file):
    with pytest.raises(UserError, match=r"--max-memory .* is not a size: give one such as 6GiB"):
        gptq.quantize(llama_dir, text_file, save=tmp_path / "m.pt", max_memory=text)
    assert os.listdir(tmp_path) == []
