"""Measures the structure of the source and prints it.

python tests/helpers/structure.py            imports by package, lines, the longest functions
python tests/helpers/structure.py --run      also the frames and modules of one quantization
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("gptq", "quant_cuda", "belle", "benchmarks")
# Calls across the C boundary pass what a C signature asks for.
C_BOUNDARY = ("quant_cuda_", "launch", "gpu_product", "cpu_product")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

SPY = """
import json, runpy, sys
frames, modules = [], set()
def importing(frame):
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False
def watch(frame, event, _argument):
    name = frame.f_globals.get("__name__", "")
    if event != "call" or name.partition(".")[0] not in ("gptq", "quant_cuda"):
        return
    if name not in modules and not importing(frame):
        modules.add(name)
    if frame.f_code.co_name == SOLVE and name.startswith("gptq.") and not frames:
        while frame is not None and frame.f_globals.get("__name__") != "runpy":
            frames.append(f"{frame.f_globals['__name__']}.{frame.f_code.co_name}")
            frame = frame.f_back
sys.argv = sys.argv[1:]
sys.setprofile(watch)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.setprofile(None)
    print("SPY" + json.dumps({"frames": frames[::-1], "modules": sorted(modules)}))
""".replace("SOLVE", repr("solve_layer"))


def sources() -> list[Path]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted([*files, *(ROOT / name for name in ("llama.py", "bloom.py", "setup.py"))])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package(name: str) -> str:
    """`gptq.solver` for gptq.solver.grid, `gptq` for a module of gptq itself."""
    parts = name.split(".")
    if parts[0] != "gptq":
        return parts[0]
    inside = len(parts) > 1 and (ROOT / "gptq" / parts[1]).is_dir()
    return ".".join(parts[:2]) if inside else "gptq"


def imports(path: Path) -> set[str]:
    """Packages of ours that a file imports at run time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {package(name) for name in names if name.partition(".")[0] in FOLDERS}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function, its decorators left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, FunctionNode):
            yield f"{module_name(path)}.{node.name}", node.end_lineno - node.lineno + 1


def long_calls(path: Path, most: int = 6) -> Iterator[tuple[int, str, int]]:
    """(line, called name, arguments) of calls with more than `most` positional arguments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or len(node.args) <= most:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        if not name.startswith(C_BOUNDARY):
            yield node.lineno, name, len(node.args)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def import_table() -> list[str]:
    """A line for each package and an x for each package that it imports."""
    table: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        if path.name != "setup.py":
            here = package(module_name(path))
            table[here] |= imports(path) - {here}
    names = sorted(table, key=lambda name: (len(table[name]), name))
    width = max(map(len, names))
    header = [f"{'':{width}}  {' '.join(f'{n:>2}' for n in range(1, len(names) + 1))}"]
    return header + [
        f"{name:{width}}  {' '.join(' x' if other in table[name] else ' .' for other in names)}"
        f"  {number}"
        for number, name in enumerate(names, 1)
    ]


def quantization() -> dict[str, list[str]]:
    """Frames from llama.py to the first call of the solver, and modules whose functions ran."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import llama_config, make_model, words_file

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "tiny", llama_config())
        text = words_file(Path(folder) / "words.txt")
        argv = [str(ROOT / "llama.py"), str(model), str(text), "--wbits", "4", "--nsamples", "4"]
        argv += ["--seqlen", "32", "--device", "cpu", "--save", f"{folder}/m.pt"]
        done = subprocess.run(
            [sys.executable, "-c", SPY, *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    result = [line for line in done.stdout.splitlines() if line.startswith("SPY")]
    assert result, done.stderr
    return json.loads(result[-1].removeprefix("SPY"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="quantize a tiny model and watch")
    given = parser.parse_args()
    print("\n".join(import_table()))
    by_package: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for path in sources():
        by_package[package(module_name(path))] += lines(path)
        modules[package(module_name(path))] += 1
    print("\nlines  modules  package")
    for name, count in sorted(by_package.items()):
        print(f"{count:5}  {modules[name]:7}  {name}")
    every = [it for path in sources() for it in functions(path)]
    print("\nlongest functions")
    for name, count in sorted(every, key=lambda it: -it[1])[:5]:
        print(f"{count:5}  {name}")
    if given.run:
        found = quantization()
        print(f"\n{len(found['frames'])} frames from llama.py to the solver")
        print("\n".join(f"  {name}" for name in found["frames"]))
        print(f"{len(found['modules'])} modules entered by one quantization")


if __name__ == "__main__":
    main()
