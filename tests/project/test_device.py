"""Where to compute and in which type."""

import types
from pathlib import Path

import pytest
import torch

from gptq import device as machine
from gptq.device import (
    available_memory,
    calibration_dtype,
    half_dtype,
    peak_memory,
    pick_device,
    pick_dtype,
    reset_peak_memory,
)
from gptq.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_device_by_name_or_a_gpu_if_there_is_one(monkeypatch):
    assert pick_device("cpu") == CPU
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        # What tries the device out; there may be none here.
        monkeypatch.setattr(torch, "empty", lambda *_args, **_kwargs: None)
        assert pick_device(None).type == kind


@pytest.mark.parametrize(("size", "name"), [("1", "cuda"), ("4", "cuda:2")])
def test_processes_of_torchrun_take_a_gpu_each(monkeypatch, size, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_args, **_kwargs: None)
    run = {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": size, "MASTER_ADDR": "x"}
    for key, value in run.items():
        monkeypatch.setenv(key, value)
    assert pick_device(None) == torch.device(name)


def test_memory_of_a_gpu_is_its_allocators(monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    assert (available_memory(GPU), peak_memory(GPU)) == (5, 7)
    reset_peak_memory(CPU)
    assert forgotten == []
    reset_peak_memory(GPU)
    assert forgotten == [GPU]


def test_a_device_that_holds_no_data():
    with pytest.raises(UserError, match=r"--device meta cannot be used \(it holds no data\)"):
        pick_device("meta")


@pytest.mark.parametrize("name", ["warp", "cpu:x", "cuda:99", ""])
def test_devices_that_cannot_be_used(name):
    with pytest.raises(
        UserError, match=f"--device {name} cannot be used .*; try --device cpu"
    ) as e:
        pick_device(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "device", "stored", "expected"),
    [
        (None, CPU, torch.float16, torch.float32),
        (None, CPU, torch.bfloat16, torch.float32),
        (None, GPU, torch.float16, torch.float16),
        (None, GPU, torch.bfloat16, torch.bfloat16),
        (None, GPU, torch.float32, torch.float16),
        (None, GPU, None, torch.float16),
        ("float32", GPU, torch.float16, torch.float32),
        ("bfloat16", CPU, torch.float16, torch.bfloat16),
        ("float16", CPU, None, torch.float16),
    ],
)
def test_types(name, device, stored, expected):
    assert pick_dtype(name, device, stored) is expected


def test_a_type_that_is_not_known():
    with pytest.raises(UserError, match="--dtype int8 is not known; choose one of float32, "):
        pick_dtype("int8", CPU, None)


def test_types_to_store():
    assert half_dtype(torch.bfloat16) is torch.bfloat16
    assert half_dtype(torch.float16) is torch.float16
    assert half_dtype(torch.float32) is half_dtype(None) is torch.float16


def test_peak_memory_of_the_process_is_in_bytes():
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak_memory(CPU) == pytest.approx(peak * 1024, rel=0.05)
    # A process cannot forget its peak; asking for that must not fail either.
    reset_peak_memory(CPU)
    assert peak_memory(CPU) >= peak * 1024 * 0.95


def test_peak_memory_is_that_of_getrusage_only_if_the_system_has_no_other(monkeypatch):
    """getrusage counts the process that started this one, too."""
    usage = types.SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr(machine.resource, "getrusage", lambda _who: usage)
    assert peak_memory(CPU) > 7 * 1024
    monkeypatch.setattr(machine, "_read", lambda _path: "")
    assert peak_memory(CPU) == 7 * 1024


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, None])
def test_matrix_units_take_a_model_of_their_type(has_units, stored, monkeypatch):
    monkeypatch.setattr(machine, "has_matrix_units", lambda: has_units)
    taken = has_units and stored == torch.bfloat16
    expected = torch.bfloat16 if taken else torch.float32
    assert calibration_dtype(None, CPU, stored) is expected
    assert calibration_dtype("float32", CPU, stored) is torch.float32
    gpu = torch.device("cuda")
    assert calibration_dtype(None, gpu, stored) is pick_dtype(None, gpu, stored)


def test_matrix_units_are_those_the_system_knows_of():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert not machine.has_matrix_units() or "amx_tile" in flags
