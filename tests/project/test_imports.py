"""Who may import what, as one table, and that importing the package costs and changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = ("gptq", "gptq.errors", "gptq.torchrun", "gptq.models")
# Of each package or module: what of ours it may import, and what of others besides the standard
# library. A package may import itself; `from gptq import x` is an import of gptq.x.
OURS: dict[str, tuple[str, ...]] = {
    "quant_cuda": (),
    "gptq": (),
    "gptq.errors": (),
    "gptq.torchrun": (),
    "gptq.models": (),
    "gptq.config": ("gptq.errors",),
    "gptq.device": ("gptq.errors", "gptq.torchrun"),
    "gptq.files": ("gptq.errors",),
    "gptq.data": ("gptq.errors",),
    "gptq.nn": ("quant_cuda",),
    "gptq.solver": ("gptq.config", "quant_cuda"),
}
OURS["gptq.blockwise"] = (*BASE, "gptq.files", "gptq.nn", "gptq.solver")
OURS["gptq.tuning"] = (*OURS["gptq.blockwise"], "gptq.blockwise", "quant_cuda")
OURS["gptq.pipeline"] = (
    *OURS["gptq.blockwise"],
    *("gptq.blockwise", "gptq.config", "gptq.tuning", "quant_cuda"),
)
OURS["gptq.checkpoints"] = (*OURS["gptq.pipeline"], "gptq.device", "gptq.data")
OURS["gptq.inference"] = (*OURS["gptq.checkpoints"], "gptq.checkpoints")
OURS["gptq.allocation"] = (*OURS["gptq.pipeline"], "gptq.pipeline")
OURS["gptq.fitting"] = (*OURS["gptq.inference"], "gptq.pipeline", "gptq.allocation")
OURS["gptq.job"] = OURS["gptq.fitting"]
OURS["gptq.tuned_text"] = (*OURS["gptq.job"], "gptq.job")
OURS["gptq.quantization"] = (*OURS["gptq.tuned_text"], "gptq.fitting", "gptq.tuned_text")
OURS["gptq.api"] = (*OURS["gptq.quantization"], "gptq.quantization", "gptq.inference")
OURS["gptq.hf"] = OURS["gptq.api"]
OURS["gptq.cli"] = (*OURS["gptq.api"], "gptq.api", "gptq.hf")
OURS["gptq.convert"] = (*OURS["gptq.cli"], "gptq.cli")
OURS["gptq.serving"] = ("gptq.errors", "gptq.data", "gptq.inference", "gptq.cli")
OURS["gptq.serve"] = (*OURS["gptq.convert"], "gptq.serving")
OURS["gptq.__main__"] = ("gptq.cli",)
SCRIPTS = (*OURS["gptq.serve"], "gptq.convert", "gptq.serve")
OURS["llama"] = OURS["bloom"] = OURS["belle"] = SCRIPTS
OURS["benchmarks"] = OURS["generate_instruction"] = (*SCRIPTS, "belle")

THEIRS: dict[str, tuple[str, ...]] = {
    "quant_cuda": ("torch", "triton"),
    "gptq": (),
    "gptq.errors": (),
    "gptq.torchrun": (),
    "gptq.models": (),
    "gptq.config": (),
    "gptq.device": ("torch",),
    "gptq.files": ("torch", "safetensors", "gguf", "numpy"),
    "gptq.data": ("torch", "datasets", "pyarrow", "jinja2"),
    "gptq.nn": ("torch",),
    "gptq.solver": ("torch",),
    "gptq.blockwise": ("torch", "transformers", "tokenizers", "huggingface_hub", "gguf", "numpy"),
    "gptq.tuning": ("torch",),
    "gptq.pipeline": ("torch", "transformers"),
    "gptq.checkpoints": ("torch", "transformers", "gguf"),
    "gptq.inference": ("torch", "transformers"),
    "gptq.allocation": ("torch",),
    "gptq.fitting": ("torch",),
    "gptq.job": (),
    "gptq.tuned_text": ("torch",),
    "gptq.quantization": ("torch",),
    "gptq.api": ("torch", "transformers"),
    "gptq.hf": ("torch", "transformers", "peft"),
    "gptq.cli": ("torch", "transformers", "rich", "jinja2"),
    "gptq.convert": ("torch", "transformers"),
    "gptq.serving": ("torch", "transformers", "pydantic", "starlette", "uvicorn"),
    "gptq.serve": ("transformers",),
    "gptq.__main__": (),
    "llama": (),
    "bloom": (),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def home(name: str) -> str | None:
    """The longest beginning of a module's name that the table has."""
    while name and name not in OURS:
        name = name.rpartition(".")[0]
    return name or None


def imported(path: Path) -> set[str]:
    """Modules that a file imports, for use at run time."""
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
    return found


SOURCES = sorted(
    path
    for folder in ("belle", "gptq", "quant_cuda", "benchmarks", ".")
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    if path.name != "setup.py"
)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_what_the_table_allows(path):
    here = home(module_name(path))
    assert here is not None, f"{path.name} is not in the table"
    for name in imported(path):
        top = name.partition(".")[0]
        if top in ("belle", "gptq", "quant_cuda", "benchmarks", "llama", "bloom"):
            there = home(name)
            assert there in (here, "gptq", *OURS[here]), f"{here} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert here not in THEIRS or top in THEIRS[here], f"{here} imports {name}"


def test_the_table_names_what_there_is():
    assert set(OURS) == {home(module_name(path)) for path in SOURCES}


def test_the_table_has_no_circle():
    """Each name is allowed only to what comes after it in the table."""
    order = list(OURS)
    for here, allowed in OURS.items():
        for there in allowed:
            assert order.index(there) < order.index(here), f"{here} may import {there}"


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
    assert run(code) == "['QuantConfig', 'QuantLinear', 'Width', 'load', 'quantize']\n"


def test_importing_changes_no_torch_settings():
    code = """
import torch
def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
before = state()
import gptq.cli.run, gptq.api, gptq.cli.console, quant_cuda
print(before == state())
"""
    assert run(code) == "True\n"
