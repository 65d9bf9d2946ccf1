"""benchmarks/gpu.sh with an interpreter that notes its arguments instead of running them."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
# Answers to what the script asks of Python; all else is noted with PYTHONPATH and succeeds, if it
# does not hold a word of FAILING.
PYTHON = """#!/bin/sh
case "$*" in
  *is_available*) exit 0 ;;
  *capability*) echo sm_90; exit 0 ;;
  "-c import xdist") exit "$XDIST" ;;
  "-c import pytest_timeout") exit "$XDIST" ;;
  "-m pytest "*) eval "${PYTEST:-}" ;;
esac
echo "${PYTORCH_NO_CUDA_MEMORY_CACHING:+no caching }$PYTHONPATH|$*" >> "$NOTES"
case "$*" in *"${FAILING:-nothing fails}"*) exit 1 ;; esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs parts in a copy of what the script needs; its output and the calls that it made."""
    tree = tmp_path / "tree"
    for folder in ("benchmarks", "tests/some", "quant_cuda/cuda", "quant_cuda/csrc/cuda"):
        (tree / folder).mkdir(parents=True)
    (tree / "benchmarks" / "gpu.sh").write_text(SCRIPT.read_text(encoding="utf-8"))
    (tree / "quant_cuda/cuda/_cuda.so").touch()
    for name in ("gemv.cu", "bulk.cu", "tensor_map.cuh"):
        (tree / "quant_cuda/csrc/cuda" / name).touch()
    (tree / "tests/some/test_marked.py").write_text("@pytest.mark.gpu\n")
    (tree / "tests/some/test_fixture.py").write_text("def test_it(bits, kernels):\n")
    (tree / "tests/some/test_other.py").write_text("def test_it(kernels_of):\n")
    fake, notes = tmp_path / "python", tmp_path / "notes"
    executable(fake, PYTHON)

    def run(*parts, path=os.environ["PATH"], **environment):
        notes.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(tree / "benchmarks" / "gpu.sh"), *parts],
            env={"PATH": path, "PYTHON": str(fake), "NOTES": str(notes), "XDIST": "0"}
            | {"CUDA_HOME": str(tmp_path / "cuda"), "TMPDIR": str(tmp_path)}
            | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        calls = notes.read_text().splitlines() if notes.exists() else []
        return done.returncode, done.stdout, calls

    run.cuda = tmp_path / "cuda"
    return run


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_packages_of_the_caller_are_found(script):
    _, _, calls = script("kernels", PYTHONPATH="/some/wheels")
    assert calls == [".:/some/wheels|-m benchmarks.gpu measure kernels"]
    _, _, calls = script("kernels")
    assert calls == [".|-m benchmarks.gpu measure kernels"]


def test_tests_that_need_a_gpu_are_selected(script):
    code, _, (call,) = script("tests")
    assert code == 0
    files = "tests/some/test_fixture.py tests/some/test_marked.py"
    marks = "gpu and not slow and not peers and not extras"
    spread = "-n 8 --timeout=60 --timeout-method=thread"
    # Once more -q, beside that of addopts, and pytest would not say how many passed.
    assert call == f".|-m pytest -rfEs -m {marks} {spread} {files}"
    _, _, (call,) = script("tests", XDIST="1")
    assert call == f".|-m pytest -rfEs -m {marks} {files}"


def test_tests_are_interrupted_at_their_limit(script, tmp_path):
    """Not ended: pytest then says what has failed so far."""
    signals = tmp_path / "signals"
    waiting = f"trap 'echo INT > {signals}; exit 2' INT; touch {signals}; sleep 60 & wait"
    code, said, _ = script("tests", TOTAL="2", PYTEST=waiting)
    assert code == 1
    assert signals.read_text() == "INT\n"
    assert "FAILED: tests" in said


def test_each_tool_is_a_part_that_sees_our_kernels_alone(script):
    sanitizer = script.cuda / "bin" / "compute-sanitizer"
    executable(sanitizer, "#!/bin/sh\n")
    code, said, calls = script("sanitize")
    assert code == 0
    assert re.findall(r"^== (\w+)$", said, re.M) == ["memcheck", "racecheck", "synccheck"]
    filters = "--kernel-name kns=_bulk_cu_ --kernel-name kns=_gemv_cu_"
    every = "cuda variants solver decode"
    runs = (
        ("memcheck", "--report-api-errors no ", "cuda variants solver", "1"),
        ("memcheck", "--report-api-errors no ", "decode", ""),
        ("racecheck", "", every, ""),
        ("synccheck", "", every, ""),
    )
    folders = set()
    for (tool, options, families, uncached), call in zip(runs, calls, strict=True):
        caching, _, call = call.rpartition("caching ")
        logs = re.search(r"--logs (\S+)", call)[1]
        own = "--error-exitcode 1 --target-processes application-only"
        under = f"{sanitizer} --tool {tool} {own} {options} --log-file '{logs}/%p' {filters}"
        expected = f".|-m benchmarks.gpu check {families} --logs {logs} --under {under}"
        assert (caching, call.split()) == (uncached and "no ", expected.split())
        folders.add(logs)
    assert len(folders) == 4


def test_a_sanitizer_beside_nvcc_is_found(script, tmp_path):
    """PATH has a link to nvcc, and nothing else of CUDA."""
    for name in ("nvcc", "compute-sanitizer"):
        executable(tmp_path / "toolkit" / name, "#!/bin/sh\n")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(tmp_path / "toolkit" / "nvcc")
    path = f"{tmp_path / 'links'}:{os.environ['PATH']}"
    code, _, (call, _) = script("memcheck", path=path, CUDA_HOME="")
    assert code == 0
    assert f"--under {tmp_path / 'toolkit' / 'compute-sanitizer'} --tool memcheck" in call


def test_a_sanitizer_that_is_not_there_fails(script):
    code, said, calls = script("racecheck")
    assert (code, calls) == (1, [])
    assert (
        "compute-sanitizer is in none of PATH, CUDA_HOME/bin, nvcc's folder: no racecheck" in said
    )
    assert "FAILED: racecheck" in said


def test_a_part_that_fails_does_not_end_the_others(script, tmp_path):
    code, said, calls = script("tune", "kernels", FAILING="tune", OUT=str(tmp_path / "out"))
    assert code == 1
    assert "FAILED: tune" in said
    assert len(calls) == 2
    assert (tmp_path / "out" / "tuned").is_dir()


def test_kernels_that_run_are_not_built_again(script):
    """They may have been built elsewhere, and their objects are not here."""
    code, said, calls = script("build")
    assert (code, calls) == (0, [".|-m benchmarks.gpu_built"])
    assert "_cuda.so is of these sources and runs here" in said
    code, said, calls = script("build", FAILING="gpu_built")
    assert (code, calls[1:]) == (0, [".|setup.py --quiet build_ext --inplace"])


@pytest.mark.parametrize("absolute", [False, True])
def test_a_log_has_what_was_printed(absolute, script, tmp_path):
    out = str(tmp_path / "some where") if absolute else "some where"
    _, first, _ = script("nothing", OUT=out)
    _, second, _ = script("kernels", "decode", OUT=out)
    assert first.startswith("error: no part nothing")
    assert re.findall(r"^\w+ took", second, re.M) == ["kernels took", "decode took"]
    folder = tmp_path / "some where" if absolute else tmp_path / "tree" / "some where"
    assert (folder / "log").read_text() == first + second


def test_no_time_is_left(script):
    code, said, calls = script("kernels", "decode", TOTAL="0")
    assert (code, calls) == (1, [])
    assert said.count("out of time") == 2


def test_an_unknown_part(script):
    code, said, calls = script("kernels", "nothing")
    assert (code, calls) == (2, [])
    assert "error: no part nothing; name some of: build tests" in said


def test_every_part_has_a_limit_and_is_in_the_header():
    text = SCRIPT.read_text(encoding="utf-8")
    parts = re.search(r'^PARTS="(.*)"$', text, re.M)[1].split()
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", text))
    described = re.findall(r"^#   (\w+)  +\w", text, re.M)
    assert list(limits) == parts == described
    assert all(0 < int(seconds) <= 540 for seconds in limits.values())
    assert all(f"{part}() {{" in text for part in parts)


def test_a_commit_is_taken_from_the_environment(monkeypatch):
    from benchmarks.common import gpu_facts

    monkeypatch.setenv("COMMIT", "abc1234")
    assert gpu_facts.commit() == "abc1234"
    monkeypatch.delenv("COMMIT")
    monkeypatch.setattr(gpu_facts, "ROOT", Path(sys.executable).anchor)
    assert gpu_facts.commit() is None
    assert gpu_facts.version("torch")
    assert gpu_facts.version("no-such-package") is None
