"""`python -m gptq` takes any architecture, told from the model's config.json."""

import os
import re
import subprocess
import sys

import pytest
from conftest import PACKAGES
from helpers.logs import without_progress

import gptq
from gptq.cli.run import _check_architecture, main
from gptq.errors import UserError
from gptq.models import BLOOM, LLAMA, SPECS

QUANTIZE = ["--wbits", "4", "--groupsize", "32", "--nsamples", "4", "--seqlen", "32"]


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PACKAGES), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_it_quantizes_and_runs_both_tiny_models(
    architecture, request, tmp_path, text_file, monkeypatch, capsys
):
    model = request.getfixturevalue(f"{architecture}_dir")
    argv = [model, text_file, *QUANTIZE]
    done = python("-m", "gptq", *argv, "--save", "x.pt", cwd=tmp_path)
    assert (done.returncode, without_progress(done.stderr)) == (0, "")
    assert "mean loss" in done.stdout
    monkeypatch.chdir(tmp_path)
    loading = [model, text_file, "--load", "x.pt", "--eval", "--eval-windows", "2"]
    printed = []
    for spec in (None, SPECS[architecture]):
        assert main(spec, [*map(str, loading), "--seqlen", "32"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert re.fullmatch(r"perplexity words\.txt \S+ \(2 x 32 tokens\)\n", printed[0])


def test_it_writes_what_a_script_writes(tmp_path, llama_dir, text_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(word) for word in (llama_dir, text_file, *QUANTIZE)]
    for spec, name in ((None, "a.pt"), (LLAMA, "b.pt")):
        assert main(spec, [*argv, "--save", name]) == 0
    assert without_progress(capsys.readouterr().err) == ""
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_nothing_heavy_is_imported_to_answer(flag, tmp_path):
    code = f"""
import sys
from gptq.__main__ import main
try:
    main(argv=[{flag!r}])
except SystemExit as stop:
    print(stop.code)
print([name for name in ("torch", "transformers", "rich", "jinja2") if name in sys.modules])
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.endswith("0\n[]\n")


def test_version(tmp_path):
    done = python("-m", "gptq", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"gptq {gptq.__version__}\n")


def test_help_is_of_no_one_architecture(capsys):
    with pytest.raises(SystemExit) as stop:
        main(None, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m gptq ")
    assert "python -m gptq MODEL c4 --wbits 4 --groupsize 128 --save" in shown
    assert all(name in shown for name in SPECS)
    assert ".py" not in shown


def test_a_script_takes_its_own_architecture():
    _check_architecture("m", LLAMA, LLAMA)
    _check_architecture("m", BLOOM, None)
    with pytest.raises(UserError, match=r"^m: is a bloom model; use bloom\.py$"):
        _check_architecture("m", BLOOM, LLAMA)
    # One that has no script of its own.
    _check_architecture("m", SPECS["qwen2"], LLAMA)
    with pytest.raises(UserError, match=r"^m: is a qwen2 model; use llama\.py$"):
        _check_architecture("m", SPECS["qwen2"], BLOOM)
