"""The small changes of `make mutants`: which there are, and that tests are seen to notice them."""

import ast
import importlib
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers.mutants import LISTED, TESTS, mutants, replace_functions

SMALL = '''
LIMIT = 7

def sizes(items, low=0):
    """Not changed."""
    found = []
    for item in items:
        if item is None or item < low:
            continue
        found.append(2 * item)
    if not found:
        raise ValueError("none")
    return found
'''


def test_every_kind_of_change():
    names = [mutant.name for mutant in mutants(SMALL)]
    assert all(name.startswith("sizes: ") for name in names)
    changes = [tuple(name.removeprefix("sizes: ").split("  ->  ")) for name in names]
    assert sorted(changes) == sorted(
        [
            ("0", "1"),
            ("item is None", "item is not None"),
            ("item < low", "item <= low"),
            ("item is None or item < low", "item is None and item < low"),
            ("if item is None or item < low:", "if not (item is None or item < low):"),
            ("continue", "pass"),
            ("2 * item", "2 // item"),
            ("2", "3"),
            ("found.append(2 * item)", "pass"),
            ("if not found:", "if not not found:"),
            ("raise ValueError('none')", "pass"),
        ]
    )


def test_each_is_the_module_with_one_change():
    lines = ast.unparse(ast.parse(SMALL)).splitlines()
    for mutant in mutants(SMALL):
        changed = ast.unparse(mutant.tree).splitlines()
        assert sum(a != b for a, b in zip(lines, changed, strict=True)) == 1, mutant.name
        assert "Not changed." in ast.unparse(mutant.tree)


KINDS = """
import contextlib

def plain():
    return 1

def default(value=1, *, other=1):
    return value * other

@contextlib.contextmanager
def managed():
    yield 1

class Thing:
    def method(self):
        return 1

    @property
    def value(self):
        return 1
"""


def test_functions_are_replaced_where_they_are_known_already(tmp_path, monkeypatch):
    (tmp_path / "kinds_of_functions.py").write_text(KINDS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("kinds_of_functions")
    plain, default, managed, thing = module.plain, module.default, module.managed, module.Thing()

    def results():
        with managed() as value:
            return plain(), default(), value, thing.method(), thing.value

    assert results() == (1, 1, 1, 1, 1)
    replace_functions("kinds_of_functions", ast.parse(KINDS.replace("1", "2")))
    assert results() == (2, 4, 2, 2, 2)


SCRIPT = """
import sys
from helpers.mutants import Judges, mutants
source, judges = open("small.py").read(), Judges(["test_small.py"])
print(judges.pass_with("small", None))
print([mutant.name for mutant in mutants(source) if judges.pass_with("small", mutant.tree)])
"""


def test_what_the_tests_pass_survives(tmp_path):
    (tmp_path / "small.py").write_text("def least(a, b):\n    return a if a < b else b\n")
    (tmp_path / "test_small.py").write_text(
        "from small import least\n\n"
        "def test_least():\n    assert (least(1, 2), least(2, 1)) == (1, 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # Of two equal numbers either is the least.
    assert done.stdout.splitlines() == ["True", "['least: a < b  ->  a <= b']"]


@pytest.mark.parametrize("module", TESTS)
def test_modules_and_their_tests_are_there(module):
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert all((ROOT / "tests" / test).is_file() for test in TESTS[module])


def test_every_listed_survivor_is_a_mutant_of_today():
    lines = LISTED.read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    existing = set()
    for module in TESTS:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        existing |= {f"{module}.{mutant.name}" for mutant in mutants(source)}
    assert listed <= existing, listed - existing
