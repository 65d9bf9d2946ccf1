"""Limits that keep modules and functions small enough to read, and the way to the solver short."""

import pytest
from helpers import structure

MODULE_LINES = 400
FUNCTION_LINES = 60
POSITIONAL = 6
FRAMES = 9


@pytest.mark.parametrize("path", structure.sources(), ids=structure.module_name)
def test_modules_functions_and_calls_are_short(path):
    assert structure.lines(path) <= MODULE_LINES
    assert [it for it in structure.functions(path) if it[1] > FUNCTION_LINES] == []
    assert list(structure.long_calls(path, POSITIONAL)) == []


def test_few_frames_lead_to_the_solver():
    found = structure.quantization()
    assert found["frames"][0].startswith("__main__"), found["frames"]
    assert found["frames"][-1].startswith("gptq.solver."), found["frames"]
    assert len(found["frames"]) <= FRAMES, found["frames"]
