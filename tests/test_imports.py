"""The house: imports go down only, and importing the package costs and changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("quant_cuda",),
    ("gptq", "gptq.errors", "gptq.launch", "gptq.models"),
    ("gptq.config", "gptq.decode", "gptq.files", "gptq.machine", "gptq.records", "gptq.tensors"),
    ("gptq.arguments", "gptq.calibration", "gptq.factor", "gptq.grid"),
    ("gptq.tensor_files", "gptq.gguf_reader"),
    ("gptq.journal", "gptq.shelf", "gptq.torch_file", "gptq.refine", "gptq.sweep"),
    ("gptq.source", "gptq.solver", "gptq.eras"),
    ("gptq.adapt",),
    ("gptq.qlinear", "gptq.embeddings"),
    ("gptq.skeleton",),
    ("gptq.stages",),
    ("gptq.moments",),
    ("gptq.distributed",),
    ("gptq.pipeline", "gptq.checkpoint", "gptq.evaluate", "gptq.generate", "gptq.memory"),
    ("gptq.export", "gptq.html_report", "gptq.readers", "gptq.report"),
    ("gptq.api",),
    ("gptq.cli", "gptq.convert", "gptq.hf"),
    ("gptq.serve",),
    ("llama", "bloom", "benchmarks"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def home(name: str) -> str | None:
    """The longest known beginning of a module's name; a package's inner modules share its floor."""
    while name:
        if name in FLOOR:
            return name
        name = name.rpartition(".")[0]
    return None


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, for use at run time."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in {n.split(".")[0] for n in FLOOR}}


SOURCES = sorted(
    path
    for folder in ("gptq", "quant_cuda", "benchmarks", ".")
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    if path.name != "setup.py"
)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down_only(path):
    here = home(module_name(path))
    assert here is not None, f"{path.name} has no floor"
    if here == "gptq":
        return  # Hands names on lazily; nothing is imported until one is used.
    for name in imported(path):
        there = home(name)
        inside = there == here and here in ("quant_cuda", "gptq.models", "benchmarks")
        # `from gptq import x` names a module; the package itself lies at the bottom.
        assert inside or FLOOR[there] < FLOOR[here] or there == "gptq", f"{here} imports {name}"


def test_every_floor_is_inhabited():
    modules = {home(module_name(path)) for path in SOURCES}
    assert set(FLOOR) == modules


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


def test_importing_gptq_loads_nothing_heavy():
    assert run(
        "import sys, gptq; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ) == ("False False\n")


def test_public_names():
    code = "import gptq; print([getattr(gptq, n).__name__ for n in gptq.__all__])"
    assert run(code) == "['QuantConfig', 'QuantLinear', 'load', 'quantize']\n"


def test_importing_changes_no_torch_settings():
    code = """
import torch
def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
before = state()
import gptq.cli, gptq.api, gptq.report, quant_cuda
print(before == state())
"""
    assert run(code) == "True\n"
