"""What tests/conftest.py does after a test that has broken the GPU for its process."""

import os
from types import SimpleNamespace

import conftest
import pytest

from benchmarks.common import gpu_facts


@pytest.fixture
def exits(monkeypatch):
    """The codes that a process ends with, one of several whose GPU does not answer any more."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(gpu_facts, "is_usable", lambda: False)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    return codes


def report(failed=True, marks=("gpu",)):
    return SimpleNamespace(failed=failed, keywords=dict.fromkeys(marks, 1))


def test_a_process_that_lost_its_gpu_ends(exits):
    conftest.pytest_runtest_logreport(report())
    assert exits == [3]


def test_others_go_on(exits, monkeypatch):
    conftest.pytest_runtest_logreport(report(failed=False))
    conftest.pytest_runtest_logreport(report(marks=("slow",)))
    monkeypatch.setattr(gpu_facts, "is_usable", lambda: True)
    conftest.pytest_runtest_logreport(report())
    monkeypatch.setattr(gpu_facts, "is_usable", lambda: False)
    # The only process, or that which the others report to.
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    conftest.pytest_runtest_logreport(report())
    assert exits == []
