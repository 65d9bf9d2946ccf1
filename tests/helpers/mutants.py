"""Changes the modules that guard data in small ways, and says which changes no test notices.

python tests/helpers/mutants.py [--minutes N] [--only TEXT] [MODULE...]

A mutant is a module with one operator, constant, condition or statement changed. Each is run in a
fork of a process that has imported the package, by tests that run in that process; no file is
changed. The quick tests and those that have noticed most run first, up to the first that fails. A
mutant that the tests pass survives. Survivors are listed with a reason in mutants.txt; the exit
code is 1 if others are found.
"""

import argparse
import ast
import copy
import dataclasses
import importlib
import inspect
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

ROOT = Path(__file__).parents[2]
LISTED = Path(__file__).with_name("mutants.txt")
# What judges each module; all of it runs in the process that imports it.
TESTS = {
    "gptq.files.atomic": [
        "files/test_atomic.py",
        "files/test_replaced_folders.py",
        "pipeline/test_outputs.py",
    ],
    "gptq.pipeline.journal": ["pipeline/test_journal.py", "pipeline/test_outputs.py"],
    "gptq.pipeline.identity": ["pipeline/test_identity.py"],
    "gptq.checkpoints.verify": ["checkpoints/test_verify.py"],
    "gptq.checkpoints.reading": [
        "checkpoints/test_reading.py",
        "checkpoints/test_layouts.py",
        "checkpoints/test_embeddings.py",
    ],
    "gptq.inference.perplexity": ["blockwise/test_model.py"],
    "gptq.device": ["project/test_memory_limits.py", "project/test_device.py"],
}
# Imported once, before the forks.
LIBRARIES = (
    "gptq.convert",
    "gguf",
    "pytest",
    "safetensors.torch",
    "tokenizers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bloom.modeling_bloom",
    "transformers.models.llama.modeling_llama",
)
# Seconds for one mutant: one that never ends is noticed. Processor time is limited, because a busy
# machine must not make a mutant look endless; the limit by the clock is for one that waits.
CPU_LIMIT, WALL_LIMIT = 60, 300
# Exit code of a process that has not come to the tests; pytest's own are less.
NOT_RUN = 70
COMPARED = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    tree: ast.Module
    line: int
    name: str
    """Function, and the code before and after: what mutants.txt lists, whatever the line."""


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module's functions, in the order of its lines."""
    original = ast.parse(source)
    functions = [it for it in ast.walk(original) if isinstance(it, ast.FunctionDef)]
    inner = {id(child) for it in functions for child in ast.walk(it) if child is not it}
    for function in (it for it in functions if id(it) not in inner):
        for place, node in enumerate(ast.walk(function)):
            for change in changes(node):
                tree = copy.deepcopy(original)
                twin = next(it for it in ast.walk(tree) if _same_place(it, function))
                changed = next(it for n, it in enumerate(ast.walk(twin)) if n == place)
                before = ast.unparse(changed).splitlines()
                change(changed)
                ast.fix_missing_locations(tree)
                after = ast.unparse(changed).splitlines()
                first = next(n for n, line in enumerate(before) if after[n : n + 1] != [line])
                old, new = (lines[first].strip() for lines in (before, after))
                line = getattr(node, "lineno", function.lineno) + first
                yield Mutant(tree, line, f"{function.name}: {old}  ->  {new}")


def changes(node: ast.AST) -> Iterator[Callable[[ast.AST], None]]:
    """What can be changed at a node. Each changes the node that it is given."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            if type(operator) in COMPARED:
                new = COMPARED[type(operator)]
                yield lambda it, index=index, new=new: it.ops.__setitem__(index, new())
    elif isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield lambda it: setattr(it, "op", other())
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        new = COMPUTED[type(node.op)]
        yield lambda it: setattr(it, "op", new())
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield lambda it: setattr(it, "test", ast.UnaryOp(ast.Not(), it.test))
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
        value = not node.value if type(node.value) is bool else node.value + 1
        yield lambda it: setattr(it, "value", value)
    for field in ("body", "orelse", "finalbody"):
        statements = getattr(node, field, None)
        for index, statement in enumerate(statements if isinstance(statements, list) else ()):
            if _can_go(statement):
                yield lambda it, field=field, index=index: _remove(getattr(it, field), index)


def _can_go(statement: ast.stmt) -> bool:
    """Whether a statement does something that a module would run without."""
    call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    return call or isinstance(statement, ast.Raise | ast.Continue | ast.AugAssign)


def _remove(statements: list[ast.stmt], index: int) -> None:
    statements[index] = ast.Pass()


def _same_place(node: ast.AST, function: ast.FunctionDef) -> bool:
    return isinstance(node, ast.FunctionDef) and node.lineno == function.lineno


@dataclass(frozen=True)
class Judges:
    """What judges a module's mutants, and what is known of each test by its pytest name."""

    files: list[str]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    noticed: Counter[str] = dataclasses.field(default_factory=Counter)

    def pass_with(self, module: str, tree: ast.Module | None) -> bool:
        """Whether they pass with that code; in a fork, so that nothing of it stays."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                self._run(module, tree, write)
            finally:
                os._exit(NOT_RUN)
        os.close(write)
        with os.fdopen(read) as lines:
            for line in lines:
                phase, seconds, outcome, name = line.rstrip("\n").split(" ", 3)
                if phase == "call":
                    self.seconds.setdefault(name, float(seconds))
                self.noticed[name] += outcome == "failed"
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == NOT_RUN:
            raise RuntimeError(f"{module}: a mutant could not be run")
        return code == 0

    def _run(self, module: str, tree: ast.Module | None, report_to: int) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
        signal.alarm(WALL_LIMIT)
        if tree is not None:
            replace_functions(module, tree)
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        import pytest

        # In a folder of its own: pytest keeps those of the last three runs, and removes others.
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
            code = int(pytest.main([*options, *self.files], [_Plugin(self, report_to)]))
        os._exit(code)


@dataclass(frozen=True)
class _Plugin:
    """Orders pytest's tests, and reports what each takes and finds."""

    judges: Judges
    report_to: int

    def pytest_collection_modifyitems(self, items: list) -> None:
        seconds, noticed = self.judges.seconds, self.judges.noticed
        items.sort(key=lambda it: seconds.get(it.nodeid, 0) / (1 + noticed[it.nodeid]))

    def pytest_runtest_logreport(self, report) -> None:
        line = f"{report.when} {report.duration} {report.outcome} {report.nodeid}\n"
        os.write(self.report_to, line.encode())


def replace_functions(module: str, tree: ast.Module) -> None:
    """Give the functions of an imported module the code and the defaults of another version.

    Other modules may have imported them by name; a function stays the object that it is.
    """
    path = sys.modules[module].__file__ if module in sys.modules else None
    functions = dict(_functions(module, vars(importlib.import_module(module))))
    namespace = {"__name__": module, "__file__": path}
    exec(compile(tree, path or module, "exec"), namespace)
    for name, new in _functions(module, namespace):
        old = functions[name]
        old.__code__, old.__defaults__ = new.__code__, new.__defaults__
        old.__kwdefaults__ = new.__kwdefaults__


def _functions(module: str, namespace: Mapping[str, object]) -> Iterator[tuple[str, FunctionType]]:
    """The functions and methods that a module defines, by their qualified names."""
    for value in list(namespace.values()):
        if isinstance(value, type) and value.__module__ == module:
            yield from _functions(module, vars(value))
        value = value.fget if isinstance(value, property) else value
        value = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, FunctionType) and value.__module__ == module:
            yield value.__qualname__, value


def survivors(module: str, tests: list[str], seconds: float, only: str = "") -> Iterator[Mutant]:
    """The mutants that the tests pass, of as many as the time allows, in a random order.

    tests: files. only: a part of the names of those to try.
    """
    path = ROOT / (module.replace(".", "/") + ".py")
    judges = Judges([str(ROOT / "tests" / test) for test in tests])
    if not judges.pass_with(module, None):
        sys.exit(f"error: {module}: its tests fail without a change")
    chosen = [it for it in mutants(path.read_text(encoding="utf-8")) if only in it.name]
    random.Random(0).shuffle(chosen)
    end, tried = time.monotonic() + seconds, 0
    for mutant in chosen:
        if time.monotonic() > end:
            break
        tried += 1
        if judges.pass_with(module, mutant.tree):
            yield mutant
    print(f"{module}: tried {tried} of {len(chosen)} mutants", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mutants of modules that no test notices.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="for each module")
    parser.add_argument("--only", default="", metavar="TEXT", help="a part of the mutants' names")
    arguments = parser.parse_args(argv)
    listed = LISTED.read_text(encoding="utf-8").splitlines()
    # Forks of a process with threads can hang.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    for name in LIBRARIES:
        importlib.import_module(name)
    torch.set_num_threads(1)
    new = 0
    for module in arguments.modules or TESTS:
        for mutant in survivors(module, TESTS[module], 60 * arguments.minutes, arguments.only):
            known = f"{module}.{mutant.name}" in listed
            new += not known
            print(f"{'listed' if known else 'SURVIVES'} {module}:{mutant.line} {mutant.name}")
            sys.stdout.flush()
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
