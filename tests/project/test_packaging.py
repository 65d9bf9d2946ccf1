"""What is installed: its metadata, its packages, and that it stands on its own."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.floors import floors
from packaging.requirements import Requirement

import gptq

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = {
    *("gptq", "quant_cuda", "quant_cuda.cpu", "quant_cuda.cuda"),
    *(f"gptq.{name}" for name in ("allocation", "blockwise", "checkpoints", "cli", "data")),
    *(
        f"gptq.{name}"
        for name in ("files", "inference", "models", "pipeline", "serving", "solver", "tuning")
    ),
    *("belle", "belle.compare", "belle.finetune", "belle.generation", "belle.release"),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Everything that building reads.
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
OURS = ("belle", "gptq", "quant_cuda")
PARTS = (*OURS, *FILES)


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {normal(parsed.name): parsed for parsed in map(Requirement, lines)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(package: str) -> Iterator[tuple[Path, str]]:
    """(file, top-level name) of every import from outside, wherever in the file it stands."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield path, str(node.module).partition(".")[0]


def install(folder: Path, **environment: str) -> Path:
    """What pip makes of a source distribution that is built here; nothing is fetched."""
    source, target, blocked = (folder / name for name in ("source", "installed", "blocked"))
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / part, source / part, ignore=ignored)
        else:
            shutil.copyfile(ROOT / part, source / part)
    # Building must do without torch.
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('torch was imported')")
    # The CUDA kernels take minutes to compile; test_cuda_compile.py compiles them if asked.
    ours = {"CUDA_HOME": "none", "PYTHONPATH": str(blocked)}
    environment = {**os.environ, **ours, **environment}
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("belle_gptq-*.tar.gz")
    shutil.unpack_archive(archive, folder)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), "."],
        cwd=folder / archive.name.removesuffix(".tar.gz"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, code: str, elsewhere: Path) -> str:
    """What `code` prints, run with the installed packages and far from the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("package"))


def test_every_module_is_installed(installed):
    modules = {path.relative_to(installed) for path in installed.rglob("*.py")}
    expected = {
        path.relative_to(ROOT) for package in OURS for path in (ROOT / package).rglob("*.py")
    }
    assert modules == expected
    assert {".".join(path.parent.parts) for path in modules} == PACKAGES
    folders = {path.parent.name for path in installed.rglob("*") if path.is_file()}
    assert not folders & {"csrc", "tests"}
    assert not {path.suffix for path in installed.rglob("*")} & {".h", ".cpp", ".cu", ".cuh"}


def test_the_template_of_the_page_is_installed(installed, tmp_path):
    code = "from gptq.cli.html_report import _template as t; print(t().filename)"
    file = installed / "gptq" / "cli" / "report.html.jinja"
    assert run(installed, code, tmp_path) == f"{file}\n"
    assert file.read_bytes() == (ROOT / file.relative_to(installed)).read_bytes()


def test_the_command_is_installed(installed, tmp_path):
    """`gptq` runs, and so does `python -m gptq`; neither needs torch to say its version."""
    no_torch = tmp_path / "none"
    no_torch.mkdir()
    (no_torch / "torch.py").write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join(map(str, (no_torch, installed)))
    for command in ([str(installed / "bin" / "gptq")], [sys.executable, "-m", "gptq"]):
        done = subprocess.run(
            [*command, "--version"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, f"gptq {gptq.__version__}\n"), done.stderr


def test_the_seeds_of_data_generation_are_installed(installed, tmp_path):
    code = (
        "from belle.generation.seeds import LANGUAGES, built_in, read_seeds; "
        "print([len(read_seeds(built_in(language))) for language in LANGUAGES])"
    )
    assert run(installed, code, tmp_path) == "[48, 48]\n"


def test_annotations_are_installed(installed):
    """Type checkers read the annotations of a package that has this file (PEP 561)."""
    for package in ("gptq", "quant_cuda"):
        assert (installed / package / "py.typed").read_bytes() == b""


def test_the_wheel_fits_every_python_of_its_platform(installed):
    """The compiled libraries are loaded through ctypes; they use no Python ABI."""
    (info,) = installed.glob("*.dist-info")
    lines = (info / "WHEEL").read_text(encoding="utf-8").splitlines()
    fields = [line.split(": ", 1) for line in lines if line]
    (tag,) = [value for name, value in fields if name == "Tag"]
    assert re.fullmatch(rf"py3-none-(linux|manylinux\w*)_{platform.machine()}", tag), tag
    assert ["Root-Is-Purelib", "false"] in fields


def test_metadata(installed):
    (info,) = installed.glob("*.dist-info")
    assert info.name == f"belle_gptq-{gptq.__version__}.dist-info"
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert "\nName: belle-gptq\n" in metadata
    assert f"\nVersion: {gptq.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nClassifier: Typing :: Typed\n" in metadata
    for name, url in PROJECT["urls"].items():
        assert f"\nProject-URL: {name}, {url}\n" in metadata
    assert {path.name for path in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}


def test_it_runs_from_anywhere(installed, tmp_path):
    code = "import gptq.cli.run, quant_cuda; print(gptq.quantize.__name__, gptq.__file__)"
    assert run(installed, code, tmp_path) == f"quantize {installed / 'gptq' / '__init__.py'}\n"


def test_compiled_code_is_there_where_there_is_a_compiler(installed, tmp_path):
    code = "from quant_cuda.cpu import library; print(bool(library.instruction_sets()))"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert run(installed, code, tmp_path) == f"{compiler is not None}\n"
    bare = install(tmp_path, CXX="no-such-compiler")
    assert run(bare, code, tmp_path) == "False\n"


# What is imported only where it is used, and the extra that brings it.
EXTRAS = {
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("pydantic", "starlette", "uvicorn"), "serve"),
    "peft": "train",
}


def test_what_is_imported_is_required():
    # Triton comes with torch where there is a GPU; only the module of that name's kernels needs it.
    core = {"triton", *requirements(PROJECT["dependencies"])}
    optional = PROJECT["optional-dependencies"]
    of_belle = {normal(name) for name in requirements(optional["belle"])}
    of_belle |= {
        normal(name)
        for extra in ("data", "train", "report")
        for name in requirements(optional[extra])
    }
    homes = packages_distributions()
    for package in OURS:
        known = core | of_belle if package == "belle" else core
        for path, name in imported(package):
            if name in sys.stdlib_module_names or name in OURS or name in EXTRAS:
                continue
            found = {normal(home) for home in homes.get(name, [name])}
            assert found & known, f"{path.name} imports {name}, which is not required"


def test_what_extras_bring_is_not_imported_with_the_package():
    found = {name for package in ("gptq", "quant_cuda") for _, name in imported(package)}
    assert set(EXTRAS) <= found
    optional = PROJECT["optional-dependencies"]
    for name, extra in EXTRAS.items():
        assert name in requirements(optional[extra]), name
    code = "import sys, gptq.api, gptq.hf, gptq.convert, gptq.serve; "
    code += "import gptq.cli.run, gptq.cli.console; "
    code += f"print([name for name in {sorted(EXTRAS)} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        (
            "datasets",
            "from gptq.data.named_sets import load_split, NAMED_SETS; "
            "load_split(NAMED_SETS['c4'].calibration, 'c4')",
            "data",
        ),
        (
            "pyarrow",
            "from gptq.data.local_files import read_parquet as r; next(r('x.parquet', range))",
            "data",
        ),
    ],
)
def test_a_missing_extra_is_named(module, call, extra):
    code = f"""
import sys
sys.modules[{module!r}] = None
from gptq.errors import UserError
try:
    {call}
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"pip install 'belle-gptq[{extra}]'" in done.stdout, done.stderr


def test_what_is_required_is_here():
    for name, requirement in requirements(PROJECT["dependencies"]).items():
        assert requirement.specifier.contains(version(name), prereleases=True), requirement


def test_everything_has_an_oldest_version():
    """`make test-oldest` installs just these."""
    oldest = floors(PROJECT)
    assert {"torch==2.6", "transformers==5.17", "peft==0.18"} <= set(oldest)
    wanted = requirements(PROJECT["dependencies"])
    assert {normal(line.partition("==")[0]) for line in oldest} > set(wanted)


def test_what_runs_beside_an_installed_package_needs_nothing_of_the_checkout():
    """Test files of `make test-installed` and `make test-oldest`; benchmarks are not installed."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lists = [
        line.split() for line in re.findall(r"^test-.*: FILES := (.*)$", makefile, re.MULTILINE)
    ]
    places = {ROOT / "tests" / name.removesuffix(".py") for names in lists for name in names}
    files = {
        path
        for place in places
        for path in (place.rglob("test_*.py") if place.is_dir() else [place.with_suffix(".py")])
    }
    assert len(lists) == 2
    assert ROOT / "tests/inference/test_second_device.py" in files
    found = r"^\s*(?:from|import) benchmarks\b|\"PYTHONPATH\": str\(ROOT\)"
    assert [path for path in files if re.search(found, path.read_text(), re.MULTILINE)] == []


@pytest.mark.parametrize("found", ["2.11.0", "2.11.0+cu128", "2.13.0", "2.13.0+cpu"])
def test_torch_is_taken_as_it_is_found(found):
    torch = requirements(PROJECT["dependencies"])["torch"]
    assert torch.specifier.contains(found)
    # Reading weights only could still run code before this one (CVE-2025-32434).
    assert not torch.specifier.contains("2.5.1")


def test_links_and_keywords():
    assert set(PROJECT["urls"]) == {"BELLE release", "GPTQ paper"}
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())
    assert "gptq" in PROJECT["keywords"]


def test_the_oldest_python_is_a_classifier():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]


def test_the_changelog_starts_with_this_version():
    """Entries of a release are sorted by kind, below its number and date."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    released = [line for line in versions if line != "Unreleased"]
    assert re.fullmatch(rf"{re.escape(gptq.__version__)} \(\d{{4}}-\d\d-\d\d\)", released[0])
    newest = text.partition(f"## {released[0]}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.*)$", newest, re.MULTILINE) == ["Added", "Changed", "Fixed"]


def test_the_targets_that_contributing_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"`make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    tests = {"test", "test-rest", "test-all", "test-installed", "test-oldest"}
    tests |= {"test-extras", "test-slow", "mutants"}
    assert set(named) == {"venv", "lint", "demo", "belle", "docs", "wheel", *tests}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
