"""Every test that needs a GPU is marked, so that it is skipped without one, and run where there is
one: benchmarks/gpu.sh looks for marked tests in the files that this rule finds."""

import ast
import re

from conftest import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))
SCRIPT = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
RULE = re.compile(re.search(r"^NEEDS_GPU='(.*)'$", SCRIPT, re.MULTILINE)[1], re.MULTILINE)
# It says what happens without a GPU, and with one has nothing to say.
ASKS = {"test_gpu_benchmark.py"}


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_what_takes_the_fixture_is_found():
    """The one fixture of which a case runs on a GPU."""
    takers = {
        path
        for path in FILES
        for function in functions(path)
        if function.name.startswith("test_") or function.decorator_list
        if "kernels" in {argument.arg for argument in function.args.args}
    }
    assert len(takers) > 5
    assert [path for path in takers if not RULE.search(path.read_text(encoding="utf-8"))] == []
    marked = [it.name for it in functions(TESTS / "conftest.py") if "mark.gpu" in source(it)]
    assert marked == ["kernels"]


def source(function):
    return "\n".join(map(ast.unparse, function.decorator_list))


def test_no_test_asks_for_a_gpu_itself():
    """A skip of its own would hide it from the mark."""
    asking = {
        path.name
        for path in FILES
        if re.search(r"\bis_available\(\)", path.read_text(encoding="utf-8"))
    }
    assert asking == ASKS


def test_cases_on_a_gpu_are_marked():
    """A parameter that names the device, as selection.py knows it, has the mark."""
    for path in FILES:
        for function in functions(path):
            for decorator in function.decorator_list:
                text = ast.unparse(decorator)
                if re.search(r"parametrize\(.device.,", text) and re.search("['\"]cuda['\"]", text):
                    assert "mark.gpu" in text, f"{path}: {function.name}"
