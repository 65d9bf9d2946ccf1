"""`make test` and `make test-rest` together run every case, and none twice."""

import subprocess
import sys
from itertools import combinations, product
from types import SimpleNamespace

import pytest
from conftest import ROOT
from helpers.selection import CHOICES, corners, select

SHAPES = [(64, -1), (96, 32), (96, 64)]


def cases():
    """A product of three parameters, and of two that come together."""
    return [
        {"bits": bits, "dtype": dtype, "kernel": kernel, "n_in": n_in, "group_size": group_size}
        for bits, dtype, kernel, (n_in, group_size) in product((2, 3, 4, 8), "ab", "xyz", SHAPES)
    ]


def pairs(rows):
    return {pair for row in rows for pair in combinations(sorted(row.items()), 2)}


def test_corners_have_every_pair_of_values():
    every = cases()
    kept = corners(every)
    assert kept[0] == 0
    assert kept[-1] == len(every) - 1
    assert pairs(every[i] for i in kept) == pairs(every)
    assert len(kept) < len(every) / 3


def test_one_parameter_or_two_keep_everything():
    assert corners([{"bits": bits} for bits in (2, 3, 4)]) == [0, 1, 2]
    two = [{"bits": bits, "sym": sym} for bits in (2, 3, 4) for sym in (False, True)]
    assert corners(two) == list(range(6))
    assert corners([{}]) == [0]
    # True is no 1, and what cannot be hashed is itself.
    assert corners([{"x": True}, {"x": 1}, {"x": []}]) == [0, 1, 2]


class Item:
    """As much of a pytest.Item as the selection looks at."""

    def __init__(self, name, params, *marks):
        self.nodeid = f"{name}[{'-'.join(map(str, params.values()))}]"
        self.callspec = SimpleNamespace(params=params)
        self.get_closest_marker = lambda mark: mark in marks


def test_marks_keep_all_cases_or_none():
    product = cases()
    for marks, kept in [(("every_case",), len(product)), (("thorough",), 0)]:
        items = [Item("test", case, *marks) for case in product]
        assert len(select(items, "corners")) == kept
        assert len(select(items, "rest")) == len(product) - kept


def test_what_runs_on_a_gpu_stands_in_for_nothing():
    """It is skipped without one."""
    items = [
        Item("test", {"device": device, **case}) for device in ("cpu", "gpu") for case in cases()
    ]
    kept = [item.callspec.params for item in select(items, "corners")]
    on_cpu = [params for params in kept if params["device"] == "cpu"]
    assert {pair for pair in pairs(on_cpu) if "device" not in dict(pair)} == pairs(cases())


COLLECT = """
import sys, pytest
for cases in sys.argv[1:]:
    print("cases", cases)
    pytest.main(["--collect-only", "-q", "-o", "addopts=", "--cases", cases, "tests"])
"""


@pytest.mark.thorough
def test_no_case_is_lost():
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *CHOICES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    runs: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("cases "):
            names = runs.setdefault(line.split()[1], [])
        elif "::" in line:
            names.append(line)
    every, kept, rest = (runs[cases] for cases in CHOICES)
    assert len(set(every)) == len(every) == len(kept) + len(rest)
    assert set(kept) | set(rest) == set(every)
    assert len(kept) > len(every) / 2
